"""From a trained model to a file for microcontrollers that has been run: `python -m timm_netaug deploy`."""
