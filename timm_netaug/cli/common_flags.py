"""The flags that `train.py` and `validate.py` share."""
import argparse
import dataclasses

from timm.utils import ParseKwargs

from ..errors import UserError
from ..io.data import DataSource
from .flags import Flag

__all__ = ['COMPUTE', 'DATASET', 'INPUT', 'INTERPOLATIONS', 'TARGETS', 'check_shared', 'data_source', 'target_of']

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_POOLS = ('fast', 'fastavg', 'fastmax', 'fastavgmax', 'fastcatavgmax', 'avg', 'max', 'avgmax', 'catavgmax')

DATASET = (
    Flag('data', 'root folder of the data set (the same as --data-dir)', str, metavar='DIR', nargs='?', free=True),
    Flag('--data-dir', 'root folder of the data set', str, metavar='DIR', free=True),
    Flag('--dataset', 'data set of another kind than image folders, as TYPE/NAME: hfds/NAME, wds/NAME, torch/NAME ...',
         str, '', 'NAME'),
    Flag('--dataset-download', 'download the data set, where its type can be downloaded', free=True),
    Flag('--class-map', 'text file of the class names in label order: NAME, or NUMBER NAME, on each line', str, '',
         'FILE'),
    Flag('--input-img-mode', 'Pillow mode that images are converted to, such as L or RGB', str, metavar='MODE'),
    Flag('--input-key', 'key of the image in a sample', str, metavar='KEY'),
    Flag('--target-key', 'key of the label in a sample', str, metavar='KEY'),
    Flag('--dataset-trust-remote-code', 'let a Hugging Face data set run the code of its repository'),
)

TARGETS = (
    Flag('--task', 'one class for each image, or any number of classes for each image', str, 'classification',
         'NAME', choices=('classification', 'multilabel')),
    Flag('--target-format', 'labels of a multi-label data set: class indices, or one number for each class', str,
         'indices', 'NAME', choices=('indices', 'dense')),
)

INPUT = (
    Flag('--gp', 'global pooling', str, metavar='POOL', choices=('', *_POOLS)),
    Flag('--img-size', 'height and width of the input', int, metavar='N', range='[1, 8192]'),
    Flag('--in-chans', 'channels of the input', int, metavar='N', range='[1, inf]'),
    Flag('--input-size', 'channels, height and width of the input', int, metavar='N', nargs=3, range='[1, 8192]'),
    Flag('--crop-pct', 'size of the input divided by the size that images are resized to, in evaluation', float,
         metavar='R', range='[0.05, 2]'),
    Flag('--mean', 'mean of the pixels, each pixel being from 0 to 1', float, metavar='MEAN', nargs='+',
         range='[0, 1]'),
    Flag('--std', 'standard deviation of the pixels, each pixel being from 0 to 1', float, metavar='STD', nargs='+',
         range='(0, 1]'),
    Flag('--interpolation', 'how images are resized', str, '', 'NAME', choices=INTERPOLATIONS),
)

COMPUTE = (
    Flag('--channels-last', 'use the channels-last memory format (NetAug on a CPU always does)'),
    Flag('--fuser', 'fuser of TorchScript', str, '', 'NAME', choices=('te', 'old', 'legacy'), needs='--torchscript',
         refused_with_netaug='it is for TorchScript alone'),
    Flag('--fast-norm', 'compute norm layers in the low precision of mixed precision',
         refused_with_netaug='it is for LayerNorm and GroupNorm, which these models do not have'),
    Flag('--model-kwargs', "arguments of the model's constructor", ParseKwargs, {}, 'KEY=VALUE', nargs='*'),
    Flag('--torchcompile-mode', 'mode of torch.compile', str, metavar='MODE', needs='--torchcompile'),
    Flag('--torchscript', 'compile the model with TorchScript',
         refused_with_netaug='sampled widths are not static; there is --torchcompile'),
    Flag('--torchcompile', 'compile the model with torch.compile', str, metavar='BACKEND', nargs='?',
         const='inductor'),
    Flag('--device', 'device; without the flag, a GPU if PyTorch finds one, else the CPU', str, 'cuda', free=True),
    Flag('--amp', 'train in mixed precision'),
    Flag('--amp-dtype', 'type of mixed precision', str, 'float16', 'DTYPE', choices=('float16', 'bfloat16'),
         needs='--amp'),
    Flag('--model-dtype', 'type of the weights, without mixed precision', str, metavar='DTYPE',
         choices=('float32', 'float16', 'bfloat16')),
    Flag('--pin-mem', 'use pinned memory in the loader', free=True),
    Flag('--no-prefetcher', 'normalise images in the loader instead of on the device'),
)


def check_shared(args: argparse.Namespace) -> None:
    """Check the rules that concern several of the flags in this module.

    Raises:
        UserError: One sentence with the flags' names.
    """
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UserError('--amp needs float32 weights: leave --model-dtype out.')
    if not args.data_dir and not args.dataset:
        raise UserError('No data set given: name its folder with --data-dir.')


def data_source(args: argparse.Namespace) -> DataSource:
    """Return the data set that the flags name."""
    return DataSource(**{field.name: getattr(args, field.name) for field in dataclasses.fields(DataSource)})


def target_of(args: argparse.Namespace) -> str:
    """Return what the target of an image is, for `open_dataset`."""
    return args.target_format if args.task == 'multilabel' else 'class'
