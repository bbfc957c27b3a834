"""A model as an int8 file: `python -m timm_netaug deploy CHECKPOINT|NAME OUT_DIR --data-dir DATA`."""
import argparse
import logging
import os
import time
from functools import partial
from typing import Optional, Sequence

from ..deploy.detector import deploy_detector
from ..deploy.onnx import deploy_onnx
from ..deploy.pipeline import DeployConfig, deploy
from ..deploy.report import onnx_table, text_table
from ..detection.fcos import STRIDES
from ..detection.folder import load_trained
from ..errors import UserError, exit_on_user_error
from ..fits import check_fits, parse_board
from ..info import describe
from ..io.data import DataSource
from ..load import LoadedModel, load_model
from .flags import check_at_least, refuse_for_detector

__all__ = ['main']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug deploy',
        description='Write an int8 .tflite of a model, the same as C++ source, and a report of what was measured by'
                    ' running that very file in the interpreter of TensorFlow Lite Micro.')
    default = DeployConfig()
    flag = parser.add_argument
    flag('source', metavar='CHECKPOINT|NAME',
         help='checkpoint of train.py or train_detection.py, exported folder, or timm model with weights')
    flag('out_dir', help='folder for model.tflite, model.h, model.cc and report.json')
    flag('--data-dir', metavar='DIR', required=True, help='root of the data set')
    flag('--dataset', default='', metavar='NAME', help="timm's TYPE/NAME of a data set; empty: image folders")
    flag('--class-map', default='', metavar='FILE', help='text file of class names in label order')
    flag('--format', choices=('tflite', 'onnx'), default='tflite',
         help='onnx writes model.onnx and model_int8.onnx for the tools of chip vendors, which are not run as on a chip'
              ' (%(default)s)')
    flag('--calibration-split', default=default.calibration_split, metavar='NAME',
         help='split to calibrate with (%(default)s)')
    flag('--split', metavar='NAME', help=f'split to measure accuracy on ({default.split}; val for a detector)')
    flag('--calibration-images', type=int, default=default.calibration_images, metavar='N',
         help='images to calibrate with, spread over the classes; for a detector, at random (%(default)s)')
    flag('--images', type=int, default=default.images, metavar='N',
         help='images to measure accuracy on, drawn in the same way (all)')
    flag('--seed', type=int, default=default.seed, metavar='N', help='of the choice of images (%(default)s)')
    flag('--no-same-kernels', action='store_true',
         help='leave the kernels of convolutions with stride 2 as they are; their padding takes more memory then')
    flag('--max-drop', type=float, default=default.max_drop, metavar='POINTS',
         help='points of top-1, of AP50 for a detector, that int8 may lose (%(default)s)')
    flag('--max-steps', type=int, default=default.max_steps, metavar='N',
         help='steps by which the outputs may differ from those of the reference kernels (%(default)s)')
    flag('--beside', nargs='+', default=(), metavar='FILE',
         help='other int8 .tflite files to measure in the same run: of `deploy`, or with normalised images as input')
    flag('--fits', nargs=2, metavar=('SRAM', 'FLASH'),
         help='exit with an error if the measured arena or file is larger, as in --fits 320K 1M')
    flag('--model', metavar='NAME', help='architecture of a file that does not say it')
    flag('--img-size', type=int, metavar='N', help="height and width of the input; the model's own")
    flag('--use-ema', action='store_true', default=None,
         help='take the moving average of the weights (default where the run validated it)')
    return parser


def _source(args: argparse.Namespace, loaded: LoadedModel) -> DataSource:
    return DataSource(args.data_dir, dataset=args.dataset, class_map=args.class_map,
                      input_img_mode=loaded.input_img_mode)


def _name(source: str) -> str:
    """Return what reports call a model: a file or a folder without the place where it lies, any other name as it is."""
    path = source.removeprefix('local-dir:')
    return os.path.basename(os.path.abspath(path)) if os.path.exists(path) else source


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = _parser().parse_args(argv)
    logging.getLogger('timm').setLevel(logging.ERROR)
    with exit_on_user_error('timm_netaug deploy'):
        check_at_least(args, calibration_images=1, images=0, max_steps=0, max_drop=0)
        board = parse_board(args.fits) if args.fits else None
        start = time.monotonic()
        detector = load_trained(args.source, args.use_ema)[0]
        split = args.split or ('val' if detector is not None else DeployConfig.split)
        config = DeployConfig(
            **{k: getattr(args, k) for k in ('calibration_split', 'calibration_images', 'images', 'seed', 'max_drop',
                                             'max_steps')},
            split=split,
            same_kernels=not args.no_same_kernels,
            beside=tuple(args.beside),
        )
        say = partial(print, flush=True)

        def written(table: str, files: str) -> None:
            say(f'\n{table}\n\nWritten to {args.out_dir} in {time.monotonic() - start:.0f} s: {files}.')

        if detector is not None:
            refuse_for_detector(args, 'dataset', 'class_map', 'beside', 'model', 'img_size')
            if args.format == 'onnx':
                raise UserError('--format onnx is for classifiers: leave it out.')
            report = deploy_detector(detector, _name(args.source), args.out_dir, args.data_dir, config, say)
            model, input_size, step = detector.dense, detector.config.data_config['input_size'], dict(step=STRIDES[-1])
        else:
            loaded = load_model(args.source, args.model, args.use_ema, flags=dict(img_size=args.img_size))
            if args.format == 'onnx':
                if board or args.beside or args.no_same_kernels:
                    raise UserError('--fits, --beside and --no-same-kernels are for --format tflite: leave them out.')
                report = deploy_onnx(loaded, _name(args.source), args.out_dir, _source(args, loaded), config, say)
                written(onnx_table(report), 'model.onnx, model_int8.onnx, report_onnx.json')
                return
            report = deploy(loaded, _name(args.source), args.out_dir, _source(args, loaded), config, say)
            model, input_size, step = loaded.model, loaded.data_config['input_size'], {}
        written(text_table(report), 'model.tflite, model.h, model.cc, report.json')
        if board:
            info = describe(model, input_size, samples=1, same_kernels=config.same_kernels)
            measured = dict(arena=report['arena']['total'], flash=report['bytes'])
            check_fits(model, info, board, measured, config.same_kernels, **step)
