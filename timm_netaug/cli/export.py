"""Write a checkpoint as a folder that timm takes: `python -m timm_netaug export CHECKPOINT OUT_DIR`."""
import argparse
from typing import Optional, Sequence

from ..detection.folder import export_detector, load_trained
from ..errors import exit_on_user_error
from ..io.checkpoint import read_checkpoint
from ..io.folder import export_folder
from ..load import load_model
from .flags import refuse_for_detector
from .training_record import detection_record, training_record

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug export',
        description="Write a checkpoint as a folder for timm.create_model('local-dir:OUT_DIR').")
    parser.add_argument('checkpoint', help='checkpoint of train.py, or file of weights')
    parser.add_argument('out_dir', help='folder for model.safetensors and config.json')
    parser.add_argument('--model', metavar='NAME', help='architecture, for a file that does not contain it')
    parser.add_argument('--use-ema', action='store_true', default=None,
                        help='export the moving average of the weights (default if the run validated it)')
    args = parser.parse_args(argv)
    with exit_on_user_error('timm_netaug export'):
        detector, run = load_trained(args.checkpoint, args.use_ema)
        if detector is not None:
            refuse_for_detector(args, 'model')
            facts = detection_record(read_checkpoint(args.checkpoint), args.use_ema) if run else None
            export_detector(detector, args.out_dir, facts)
            print(f"Exported. Load it with:\n\n    from timm_netaug.detection import create_detector\n"
                  f"    detector = create_detector('local-dir:{args.out_dir}')")
            return
        loaded = load_model(args.checkpoint, args.model, args.use_ema)
        facts = training_record(read_checkpoint(args.checkpoint), args.use_ema) if loaded.run else None
        export_folder(loaded.model, args.out_dir, loaded.describe(), facts)
    print(f"Exported. Load it with:\n\n    import timm, timm_netaug\n"
          f"    model = timm.create_model('local-dir:{args.out_dir}', pretrained=True)")
