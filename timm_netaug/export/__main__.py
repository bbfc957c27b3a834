"""`python -m timm_netaug.export CHECKPOINT OUT_DIR`"""
import argparse

from ..card import facts_of_run
from ..checkpoint import load_run
from ..errors import told_plainly
from . import export_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug.export',
        description="Write a checkpoint of train.py as a folder for timm.create_model('local-dir:OUT_DIR').")
    parser.add_argument('checkpoint', help='checkpoint of train.py')
    parser.add_argument('out_dir', help='folder for model.safetensors and config.json')
    parser.add_argument('--use-ema', action='store_true',
                        help='export the moving average of the weights (default where the run validated it)')
    args = parser.parse_args()
    with told_plainly('timm_netaug.export'):
        model, run, checkpoint = load_run(args.checkpoint, args.use_ema or None)
        export_folder(model, args.out_dir, run, facts_of_run(checkpoint, args.use_ema or None))
    print(f"Exported. Load it with:\n\n    import timm, timm_netaug\n"
          f"    model = timm.create_model('local-dir:{args.out_dir}', pretrained=True)")


if __name__ == '__main__':
    main()
