"""From a trained model to a file for microcontrollers, measured by running that file (`python -m timm_netaug deploy`)."""
