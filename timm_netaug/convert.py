"""The authors' `.pth` files as folders that timm and the Hub take."""
from pathlib import Path
from typing import Union

import torch.nn as nn

from .io.folder import export_folder
from .load import load_model

__all__ = ['convert']


def convert(path: str, out_dir: Union[str, Path], model_name: str) -> nn.Module:
    """Write weights of the reference implementation, or in timm's own names, as `export_folder` does.

    Args:
        path: File of a tiny model, also with `state_dict` around the weights.
        out_dir: Gets `model.safetensors` and `config.json`, with the input of the registered model.
        model_name: Architecture that the weights are of.

    Returns:
        The model.

    Raises:
        UserError: The file is not of that model; the first keys that do not match are named.
    """
    loaded = load_model(path, model_name)
    export_folder(loaded.model, out_dir, loaded.describe())
    return loaded.model


if __name__ == '__main__':
    from .__main__ import run_old_form
    run_old_form('convert')
