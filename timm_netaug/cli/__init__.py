"""The command lines: `train` and `validate`, and the commands of `python -m timm_netaug`."""
