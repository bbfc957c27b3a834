"""The command lines: `train` and `validate`, which `train.py` and `validate.py` of a checkout start too."""
