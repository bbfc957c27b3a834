"""Measure the average precision of a tiny detector.

    python validate_detection.py --data-dir DATA --split test --checkpoint output/train/RUN/model_best.pth.tar
    python validate_detection.py --data-dir DATA --split test --model hf-hub:OWNER/NAME --pictures found.jpg
"""
import argparse
import json
import logging
import os
import sys
from typing import Optional, Tuple

from ..detection.annotations import read_split
from ..detection.create import create_detector
from ..detection.detector import Detector
from ..detection.evaluate import evaluate_detector
from ..detection.folder import find_detector_folder, load_checkpoint
from ..detection.metric import METRICS, check_metric
from ..detection.pictures import check_picture, draw_results
from ..errors import UserError, exit_on_user_error
from .command_line import parse_args
from .detection_flags import detection_flags
from .device import check_device, choose_device, mixed_precision
from .flags import Flag, build_parser, check_flags, flag_name
from .logs import set_up_logging
from .results import write_results
from .validate_flags import VALIDATE_FLAGS

__all__ = ['main', 'validate_detection_parser']

_logger = logging.getLogger('validate')
_PICTURES = 16  # images in the file of --pictures
_FLAGS = ('data', 'data_dir', 'split', 'model', 'checkpoint', 'use_ema', 'img_size', 'input_size', 'workers',
          'batch_size', 'channels_last', 'device', 'amp', 'amp_dtype', 'log_freq', 'results_file', 'results_format')
_DEFAULTS = dict(model='', split='val', batch_size=32)
_HELP = dict(
    data_dir='root of the data set, in the layout of Pascal VOC or COCO',
    split='split to evaluate on; FOLDER/NAME of one in a subfolder, A+B for two together',
    model='trained detector: an exported folder, local-dir:DIR or hf-hub:OWNER/NAME',
    checkpoint='checkpoint of train_detection.py',
    img_size="height and width of the input, a multiple of 32; the training's where not given",
    input_size='channels (3), height and width of the input')


_OWN = (
    Flag('--pictures', f'draw {_PICTURES} images with true and found boxes into this picture', str, '', 'FILE'),
)
DETECTION_FLAGS = detection_flags(VALIDATE_FLAGS, _FLAGS, _OWN, _DEFAULTS, _HELP)


def validate_detection_parser() -> argparse.ArgumentParser:
    """Build the command line of `validate_detection.py`."""
    return build_parser('Measure the average precision of a tiny detector.', DETECTION_FLAGS)


def _load(args: argparse.Namespace) -> Tuple[Detector, str]:
    """Build the detector that the flags name; returns it with its name in results."""
    if bool(args.checkpoint) == bool(args.model):
        raise UserError('Name the detector with either --checkpoint or --model.')
    if args.checkpoint:
        detector, run = load_checkpoint(args.checkpoint, args.use_ema or None)
        return detector, run.architecture
    if find_detector_folder(args.model) is None:
        raise UserError(f'{args.model} is not a trained detector: name an exported folder, local-dir:DIR or'
                        f' hf-hub:OWNER/NAME of one, or a checkpoint with --checkpoint.')
    name = args.model if ':' in args.model else f'local-dir:{args.model}'
    return create_detector(name).eval(), args.model


def _img_size(args: argparse.Namespace) -> Optional[Tuple[int, int]]:
    size = args.input_size[1:] if args.input_size else [args.img_size] * 2 if args.img_size else None
    if size and any(n < 32 or n % 32 for n in size):
        raise UserError(f'--img-size takes multiples of 32, got {" x ".join(map(str, size))}.')
    return tuple(size) if size else None


def validate() -> None:
    """Evaluate as the command line says.

    Raises:
        UserError: It cannot be done as it stands; the message says what to change.
    """
    set_up_logging()
    args = parse_args(validate_detection_parser(), sys.argv[1:])
    check_flags(DETECTION_FLAGS, args)
    for dest in ('results_file', 'pictures'):
        path = getattr(args, dest)
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UserError(f'{flag_name(dest)} {path}: there is no such folder.')
        if path and os.path.isdir(path):
            raise UserError(f'{flag_name(dest)} {path} is a folder: name a file in it.')
    if args.pictures:
        check_picture(args.pictures)
    check_metric()
    size = _img_size(args)
    choose_device(args, _logger)
    device = check_device(args.device)
    split = read_split(args.data_dir, args.split)
    detector, name = _load(args)
    for note in split.notes:
        _logger.warning(note)
    metrics, evaluator, dataset = evaluate_detector(
        detector, split, size, args.batch_size, args.workers, args.device, mixed_precision(args, device),
        args.channels_last, args.log_freq)
    by_class, images, loss = (metrics.pop(k) for k in ('AP_by_class', 'images', 'loss'))
    row = dict(
        model=name,
        **{k: None if metrics[k] is None else round(metrics[k], 4) for k in METRICS},
        param_count=round(sum(p.numel() for p in detector.parameters()) / 1e6, 3),
        img_size=list(size or detector.config.img_size),
        **(dict(checkpoint=args.checkpoint) if args.checkpoint else {}),
        loss=round(loss, 5),
        images=images,
    )
    by_class = {k: None if v is None else round(v, 4) for k, v in by_class.items()}
    print(f'--result\n{json.dumps({**row, "AP_by_class": by_class}, indent=2)}', flush=True)
    if args.results_file:
        write_results(args.results_file, {**row, **{f'AP/{k}': v for k, v in by_class.items()}}, args.results_format)
    if args.pictures:
        draw_results(dataset, evaluator, list(dataset.labels), args.pictures, _PICTURES)


def main() -> None:
    with exit_on_user_error('validate_detection.py'):
        validate()


if __name__ == '__main__':
    main()
