"""The flags of `validate.py`, one row each, and the rules that concern several of them."""
import argparse
import importlib.util
import os
from dataclasses import replace

from ..errors import UserError
from .common_flags import COMPUTE, DATASET, INPUT, TARGETS, check_shared
from .flags import Flag, Group, build_parser, check_flags, given_flags

__all__ = ['VALIDATE_FLAGS', 'check_validate_args', 'validate_parser']


def _not_with(*names: str) -> dict:
    return dict.fromkeys(names, 'leave one of the two out')


_EXCLUDES = {  # of flags that both scripts have
    '--torchcompile': _not_with('--torchscript', '--aot-autograd'),
    '--torchscript': _not_with('--aot-autograd'),
}

VALIDATE_FLAGS = (
    Group('Dataset', (
        *DATASET,
        Flag('--split', 'split to evaluate on', str, 'validation', 'NAME'),
        Flag('--num-samples', 'number of samples in the split, for iterable data sets', int, metavar='N'),
        *TARGETS,
    )),
    Group('Model', (
        Flag('--model -m', "timm model, wildcard, text file of names or 'all'; a checkpoint of train.py names its own",
             str, 'dpn92', 'NAME'),
        Flag('--pretrained', 'use the pretrained weights'),
        Flag('--checkpoint', 'checkpoint, or a folder whose checkpoints are all evaluated', str, '', 'FILE'),
        Flag('--use-ema', "use the moving average of the checkpoint's weights", needs='--checkpoint'),
        Flag('--reparam', 'fuse the branches of blocks that can be re-parameterised'),
        Flag('--test-pool', 'where the input is larger than in training, pool as in training and average the results'),
        Flag('--num-classes', "number of classes of the model; without the flag, the model's own", int, metavar='N',
             range='[1, inf]'),
        *INPUT,
        Flag('--use-train-size', "use the input size of the model's training instead of that of its evaluation"),
        Flag('--crop-mode', 'how images are cropped', str, metavar='MODE', choices=('squash', 'border', 'center')),
        Flag('--crop-border-pixels', 'number of pixels to crop on each side', int, metavar='N', range='[0, inf]'),
        Flag('--tf-preprocessing', 'prepare images as TensorFlow does; needs tensorflow', excludes=_not_with(
            '--no-prefetcher', '--crop-pct', '--crop-mode', '--crop-border-pixels')),
    )),
    Group('Device and precision', (
        Flag('-j --workers', 'number of loader processes', int, 4, 'N', range='[0, 1024]'),
        Flag('-b --batch-size', 'images in a batch', int, 256, 'N', range='[1, inf]'),
        Flag('--num-gpu', 'number of GPUs that share each batch', int, 1, 'N', range='[1, inf]'),
        Flag('--aot-autograd', 'fuse the model with AOT Autograd'),
        *(replace(flag, excludes=_EXCLUDES.get(flag.name, {}), needs='' if flag.name == '--fuser' else flag.needs)
          for flag in COMPUTE),
    )),
    Group('Results', (
        Flag('--log-freq', 'number of batches between two log lines', int, 10, 'N', range='[1, inf]'),
        Flag('--results-file', 'file for the results, written after every model', str, '', 'FILE'),
        Flag('--results-format', 'format of the file', str, 'csv', 'FORMAT', choices=('csv', 'json'),
             needs='--results-file'),
        Flag('--real-labels', 'JSON file of the ReaL labels of ImageNet', str, '', 'FILE',
             excludes=_not_with('--valid-labels')),  # ReaL's labels are those of all the classes
        Flag('--valid-labels', "text file with the model's class for each class of the data set, one number on a line",
             str, '', 'FILE'),
        Flag('--retry', 'use smaller batches where memory is short'),
        Flag('--seed', 'seed of all random numbers', int, 42, 'N', range='[0, 4294967295]'),
        Flag('--metrics-avg', 'compute precision, recall and F1, averaged in this way; needs scikit-learn', str,
             metavar='NAME', choices=('micro', 'macro', 'weighted')),
        Flag('--naflex-loader', 'keep the aspect ratio of images, for NaFlex models', excludes=_not_with(
            '--tf-preprocessing', '--aot-autograd', '--test-pool', '--channels-last', '--crop-pct', '--crop-mode',
            '--crop-border-pixels')),
        Flag('--naflex-max-seq-len', 'largest number of patches of an image', int, 576, 'N', range='[1, inf]',
             needs='--naflex-loader'),
    )),
)
_PACKAGES = {'--metrics-avg': ('sklearn', 'scikit-learn'), '--tf-preprocessing': ('tensorflow', 'tensorflow')}


def validate_parser() -> argparse.ArgumentParser:
    """Build the command line of `validate.py`."""
    return build_parser(
        "Evaluate a timm model, or a checkpoint of train.py or of the NetAug authors. Flags and defaults are timm's.",
        VALIDATE_FLAGS)


def check_validate_args(args: argparse.Namespace) -> None:
    """Refuse flags that would be ignored or would fail later.

    Raises:
        UserError: One sentence with the flag's name.
    """
    if args.fuser in ('nvfuser', 'nvf'):
        raise UserError(f'--fuser {args.fuser}: PyTorch has no nvFuser for TorchScript any more; there is --fuser te.')
    check_flags(VALIDATE_FLAGS, args)
    if args.aot_autograd and args.num_gpu > 1:
        raise UserError('--aot-autograd and --num-gpu do not go together: leave one of the two out.')
    for flag in given_flags(VALIDATE_FLAGS, args):
        if flag.name in _PACKAGES and importlib.util.find_spec(_PACKAGES[flag.name][0]) is None:
            package = _PACKAGES[flag.name][1]
            raise UserError(f'{flag.name} needs {package}: pip install {package}.')
    check_shared(args)
    folder = os.path.dirname(os.path.abspath(args.results_file))
    if args.results_file and (os.path.isdir(args.results_file) or not os.path.isdir(folder)):
        raise UserError(f'--results-file {args.results_file} is no file name in an existing folder.')
