"""The authors' `.pth` files as folders that timm and the Hub take: `python -m timm_netaug.convert PTH OUT_DIR`."""
import argparse
from pathlib import Path
from typing import Optional, Sequence, Union

import torch.nn as nn
from timm import create_model
from timm.data import resolve_model_data_config

from .checkpoint import classes_in_file, load_weights, read_weights
from .errors import UserError, check_model_name, first_line, told_plainly
from .export import export_folder
from .reference import checkpoint_filter_fn

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
    check_model_name(model_name)
    state_dict = read_weights(path)
    num_classes = classes_in_file(path, model_name)
    try:
        model = create_model(model_name, **({} if num_classes is None else dict(num_classes=num_classes)))
        state_dict = checkpoint_filter_fn(state_dict, model)
    except (RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{path} can not be converted: {first_line(e)}.') from e
    load_weights(model, state_dict, path)
    run = dict(class_names=None, model_args=dict(num_classes=num_classes), data_config=resolve_model_data_config(model))
    export_folder(model.eval(), out_dir, run)
    return model


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug.convert',
        description="Write a .pth file of the NetAug authors as a folder for timm.create_model('local-dir:OUT_DIR').")
    parser.add_argument('pth', help="file of a tiny model, in the authors' names or in timm's")
    parser.add_argument('out_dir', help='folder for model.safetensors and config.json')
    parser.add_argument('--model', required=True, metavar='NAME', help='architecture, netaug_mbv2_tiny for one')
    args = parser.parse_args(argv)
    with told_plainly('timm_netaug.convert'):
        convert(args.pth, args.out_dir, args.model)
    print(f"Converted. Load it with:\n\n    import timm, timm_netaug\n"
          f"    model = timm.create_model('local-dir:{args.out_dir}', pretrained=True)")


if __name__ == '__main__':
    main()
