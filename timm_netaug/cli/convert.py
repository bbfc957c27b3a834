"""Write a `.pth` file of the authors as a folder that timm takes: `python -m timm_netaug convert PTH OUT_DIR`."""
import argparse
from typing import Optional, Sequence

from ..convert import convert
from ..errors import exit_on_user_error

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug convert',
        description="Write a .pth file of the NetAug authors as a folder for timm.create_model('local-dir:OUT_DIR').")
    parser.add_argument('pth', help="file of a tiny model, with the authors' or timm's names of tensors")
    parser.add_argument('out_dir', help='folder for model.safetensors and config.json')
    parser.add_argument('--model', required=True, metavar='NAME', help='architecture, for example netaug_mbv2_tiny')
    args = parser.parse_args(argv)
    with exit_on_user_error('timm_netaug convert'):
        convert(args.pth, args.out_dir, args.model)
    print(f"Converted. Load it with:\n\n    import timm, timm_netaug\n"
          f"    model = timm.create_model('local-dir:{args.out_dir}', pretrained=True)")
