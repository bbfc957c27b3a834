"""Command lines of `train.py` and `validate.py`: timm's flags with timm's defaults, a NetAug group, and strict YAML."""
import argparse
import dataclasses
import difflib
import importlib.util
import os
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml
from timm.utils import ParseKwargs

from ..config import NetAugConfig, NetAugTraining, split_fields
from ..errors import UserError
from ..io.data import DataSource

__all__ = [
    'train_parser', 'validate_parser', 'parse_args', 'check_train_args', 'check_validate_args', 'data_source',
    'netaug_config', 'FREE_FLAGS',
]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # `%(default)s` of None, False or '' tells nothing
        tells = action.default not in ('', {}) and action.default is not None and action.default is not False
        return super()._get_help_string(action) if tells else action.help


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of flags; the command line overrides it')
    return parser


def _flag(group, *names: str, help: str, **kwargs: Any) -> None:
    group.add_argument(*names, help=help, **kwargs)


def _switch(group, *names: str, help: str) -> None:
    group.add_argument(*names, action='store_true', default=False, help=help)


def _add_dataset(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group('Dataset')
    _flag(group, 'data', nargs='?', metavar='DIR', help='root of the data set (or --data-dir)')
    _flag(group, '--data-dir', metavar='DIR', help='root of the data set')
    _flag(group, '--dataset', default='', metavar='NAME', help="timm's TYPE/NAME of a data set; empty: image folders")
    _switch(group, '--dataset-download', help='download the data set where its type allows')
    _flag(group, '--class-map', type=str, default='', metavar='FILE', help='text file of class names in label order')
    _flag(group, '--input-img-mode', type=str, metavar='MODE', help='PIL mode that images are converted to')
    _flag(group, '--input-key', type=str, metavar='KEY', help='key of the image in a sample')
    _flag(group, '--target-key', type=str, metavar='KEY', help='key of the label in a sample')
    _switch(group, '--dataset-trust-remote-code', help="let a Hugging Face data set run its repository's code")
    return group


def _add_input(group) -> None:
    _flag(group, '--num-classes', type=int, metavar='N', help='classes of the model; its own number where not given')
    _flag(group, '--gp', type=str, metavar='POOL', help='global pooling: fast, avg, max, avgmax, catavgmax')
    _flag(group, '--img-size', type=int, metavar='N', help='height and width of the input')
    _flag(group, '--in-chans', type=int, metavar='N', help='channels of the input')
    _flag(group, '--input-size', nargs=3, type=int, metavar='N', help='channels, height and width of the input')
    _flag(group, '--crop-pct', type=float, metavar='R', help='input size / resized size in evaluation')
    _flag(group, '--mean', nargs='+', type=float, metavar='MEAN', help='mean of the pixels, from 0 to 1')
    _flag(group, '--std', nargs='+', type=float, metavar='STD', help='standard deviation of the pixels')
    _flag(group, '--interpolation', type=str, default='', metavar='NAME', help='how images are resized')


def _add_compute(group) -> None:
    _switch(group, '--channels-last', help='channels-last memory format; always with --netaug on a CPU')
    _flag(group, '--fuser', type=str, default='', help="TorchScript fuser: '', 'te', 'old'")
    _switch(group, '--fast-norm', help='norm layers in the low precision of the mixed-precision mode')
    _flag(group, '--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
          help="arguments of the model's constructor")
    _flag(group, '--torchcompile-mode', type=str, metavar='MODE', help='mode of torch.compile')
    _switch(group, '--torchscript', help='script the model')
    _flag(group, '--torchcompile', nargs='?', type=str, const='inductor', metavar='BACKEND', help='compile the model')
    _flag(group, '--device', type=str, default='cuda', help='device; the CPU where this is left out and no GPU found')
    _switch(group, '--amp', help='mixed precision')
    _flag(group, '--amp-dtype', type=str, default='float16', metavar='DTYPE', help='float16 or bfloat16')
    _flag(group, '--model-dtype', type=str, metavar='DTYPE', help='type of the weights, without mixed precision')
    _switch(group, '--pin-mem', help='pinned memory in the loader')
    _switch(group, '--no-prefetcher', help='normalise in the loader, not on the device')


def _stage(value: str) -> Any:
    return int(value) if value.lstrip('-').isdigit() else value


def train_parser() -> argparse.ArgumentParser:
    """Build the command line of `train.py`."""
    parser = _parser("Train a timm model, with --netaug inside a wider super-network. Flags and defaults are timm's.")

    group = parser.add_argument_group('NetAug')
    _switch(group, '--netaug', help='train with Network Augmentation; the checkpoints hold the tiny model')
    _flag(group, '--netaug-width-mults', nargs='+', type=float, metavar='M',
          help="width multipliers; the model's defaults where not given")
    _flag(group, '--netaug-expand-mults', nargs='+', type=float, metavar='M', help='expansion multipliers, likewise')
    _flag(group, '--netaug-divisor', type=int, metavar='N',
          help='round augmented widths to multiples of N (default: 1)')
    _flag(group, '--netaug-from-stage', type=_stage, metavar='N',
          help='first stage that is augmented, or a module; what lies before it is computed once (default: 0, all)')
    _flag(group, '--netaug-alpha', type=float, metavar='W', help="weight of the augmented network's loss (default: 1)")
    _flag(group, '--netaug-stop-width-at', type=float, metavar='R',
          help='share of the epochs with augmented widths and sorting; 0 for short runs (default: 0.5)')
    _switch(group, '--netaug-no-sort', help='never sort channels')
    _flag(group, '--netaug-distill', type=float, metavar='W',
          help="weight of the tiny network's loss against the augmented network's logits (default: 0)")
    _flag(group, '--netaug-batch-fraction', type=float, metavar='R',
          help='share of a batch that the augmented network sees (default: 1)')
    _flag(group, '--netaug-every', type=int, metavar='N',
          help='train the augmented network in every N-th update, with N-fold weight (default: 1)')
    _switch(group, '--netaug-init', help='without --netaug: start from the weights that a training with it starts from')

    group = _add_dataset(parser)
    _flag(group, '--train-split', default='train', metavar='NAME', help='split to train on')
    _flag(group, '--val-split', default='validation', metavar='NAME', help='split to validate on')
    _flag(group, '--train-num-samples', type=int, metavar='N', help='samples of the train split, for iterable sets')
    _flag(group, '--val-num-samples', type=int, metavar='N', help='samples of the validation split, likewise')

    group = parser.add_argument_group('Model')
    _flag(group, '--model', type=str, default='resnet50', metavar='NAME', help='timm model')
    _switch(group, '--pretrained', help='start from the pretrained weights')
    _flag(group, '--pretrained-path', type=str, metavar='FILE',
          help='start from these weights (a reference .pth too); the head is replaced where its classes differ')
    _flag(group, '--initial-checkpoint', type=str, default='', metavar='FILE',
          help='start from a checkpoint, head and all')
    _flag(group, '--resume', type=str, default='', metavar='FILE', help='go on with the training of a checkpoint')
    _switch(group, '--no-resume-opt', help="resume without the optimizer's state")
    _flag(group, '-b', '--batch-size', type=int, default=128, metavar='N', help='images of a process in a step')
    _flag(group, '-vb', '--validation-batch-size', type=int, metavar='N', help='the same in validation')
    _flag(group, '--grad-accum-steps', type=int, default=1, metavar='N', help='batches for every optimizer step')
    _switch(group, '--grad-checkpointing', help='recompute activations in the backward pass')
    _flag(group, '--head-init-scale', type=float, metavar='S', help="factor on the classifier's initial weights")
    _flag(group, '--head-init-bias', type=float, metavar='B', help="the classifier's initial bias")
    _add_input(group)

    group = parser.add_argument_group('Device, precision and distribution')
    _add_compute(group)
    _switch(group, '--no-ddp-bb', help='no broadcast of buffers in DistributedDataParallel (NetAug never does)')
    _switch(group, '--synchronize-step', help='wait for the device after every step')
    _flag(group, '--local_rank', type=int, default=0, metavar='N', help='set by old launchers; torchrun needs no flag')
    _flag(group, '--device-modules', nargs='+', type=str, metavar='NAME', help='Python modules of device back ends')

    group = parser.add_argument_group('Optimizer')
    _flag(group, '--opt', type=str, default='sgd', metavar='NAME', help='optimizer (sgd is Nesterov)')
    _flag(group, '--opt-eps', type=float, metavar='EPS', help="optimizer's epsilon")
    _flag(group, '--opt-betas', nargs='+', type=float, metavar='BETA', help="optimizer's betas")
    _flag(group, '--momentum', type=float, default=0.9, metavar='M', help='momentum')
    _flag(group, '--weight-decay', type=float, default=2e-5, metavar='WD',
          help='weight decay, none on biases and norms')
    _flag(group, '--clip-grad', type=float, metavar='NORM', help='clip gradients')
    _flag(group, '--clip-mode', type=str, default='norm', metavar='MODE', help='norm, value or agc')
    _flag(group, '--layer-decay', type=float, metavar='R', help='learning-rate factor from layer to layer')
    _flag(group, '--layer-decay-min-scale', type=float, default=0, metavar='S', help='its lower bound')
    _flag(group, '--layer-decay-no-opt-scale', type=float, metavar='S', help='freeze layers below this factor')
    _flag(group, '--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
          help='further arguments of the optimizer')

    group = parser.add_argument_group('Learning rate')
    _flag(group, '--sched', type=str, default='cosine', metavar='NAME', help='schedule')
    _switch(group, '--sched-on-updates', help='step the schedule at every update, not every epoch')
    _flag(group, '--lr', type=float, metavar='LR', help='learning rate; overrides --lr-base')
    _flag(group, '--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at --lr-base-size')
    _flag(group, '--lr-base-size', type=int, default=256, metavar='N', help='images per update that --lr-base is for')
    _flag(group, '--lr-base-scale', type=str, default='', metavar='NAME',
          help='linear or sqrt in the images per update; empty: by optimizer')
    _flag(group, '--lr-noise', nargs='+', type=float, metavar='R', help='where in the schedule noise is on')
    _flag(group, '--lr-noise-pct', type=float, default=0.67, metavar='R', help="noise's limit")
    _flag(group, '--lr-noise-std', type=float, default=1.0, metavar='STD', help="noise's standard deviation")
    _flag(group, '--lr-cycle-mul', type=float, default=1.0, metavar='M', help='cycle length multiplier')
    _flag(group, '--lr-cycle-decay', type=float, default=0.5, metavar='R', help='decay from cycle to cycle')
    _flag(group, '--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    _flag(group, '--lr-k-decay', type=float, default=1.0, metavar='K', help="k of cosine's and poly's k-decay")
    _flag(group, '--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate that warm-up starts from')
    _flag(group, '--min-lr', type=float, default=0, metavar='LR', help='lower bound of the learning rate')
    _flag(group, '--epochs', type=int, default=300, metavar='N', help='epochs of the schedule')
    _flag(group, '--epoch-repeats', type=float, default=0.0, metavar='N', help='repeats of the data within an epoch')
    _flag(group, '--start-epoch', type=int, metavar='N', help='epoch to start at')
    _flag(group, '--decay-milestones', nargs='+', type=int, default=[90, 180, 270], metavar='N',
          help='epochs at which multistep decays')
    _flag(group, '--decay-epochs', type=float, default=90, metavar='N', help='epochs between decays')
    _flag(group, '--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    _switch(group, '--warmup-prefix', help='warm-up before the schedule, not within')
    _flag(group, '--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr at the end')
    _flag(group, '--patience-epochs', type=int, default=10, metavar='N', help="plateau's patience")
    _flag(group, '--decay-rate', '--dr', type=float, default=0.1, metavar='R', help='factor of a decay')

    group = parser.add_argument_group('Augmentation and regularisation')
    _switch(group, '--no-aug', help='evaluation transforms in training')
    _flag(group, '--train-crop-mode', type=str, metavar='MODE', help='rrc, rkrc or rkrr')
    _flag(group, '--scale', nargs='+', type=float, default=[0.08, 1.0], metavar='R', help='area of the random crop')
    _flag(group, '--ratio', nargs='+', type=float, default=[3 / 4, 4 / 3], metavar='R', help='its aspect ratio')
    _flag(group, '--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    _flag(group, '--vflip', type=float, default=0.0, metavar='P', help='probability of a vertical flip')
    _flag(group, '--color-jitter', type=float, default=0.4, metavar='F', help='colour jitter')
    _flag(group, '--color-jitter-prob', type=float, metavar='P', help='its probability')
    _flag(group, '--grayscale-prob', type=float, metavar='P', help='probability of greyscale')
    _flag(group, '--gaussian-blur-prob', type=float, metavar='P', help='probability of a blur')
    _flag(group, '--aa', type=str, metavar='NAME', help='AutoAugment policy, such as rand-m9-mstd0.5')
    _flag(group, '--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation (distributed)')
    _flag(group, '--aug-splits', type=int, default=0, metavar='N', help='augmentation splits')
    _switch(group, '--jsd-loss', help='Jensen-Shannon divergence over the splits')
    _switch(group, '--bce-loss', help='binary cross-entropy')
    _switch(group, '--bce-sum', help='sum it over the classes')
    _flag(group, '--bce-target-thresh', type=float, metavar='T', help='binarise its soft targets')
    _flag(group, '--bce-pos-weight', type=float, metavar='W', help="its positives' weight")
    _flag(group, '--reprob', type=float, default=0.0, metavar='P', help='probability of random erasing')
    _flag(group, '--remode', type=str, default='pixel', metavar='MODE', help='its fill: pixel, const or rand')
    _flag(group, '--recount', type=int, default=1, metavar='N', help='regions that it erases')
    _switch(group, '--resplit', help='no erasing in the first augmentation split')
    _flag(group, '--mixup', type=float, default=0.0, metavar='A', help='mixup alpha')
    _flag(group, '--cutmix', type=float, default=0.0, metavar='A', help='cutmix alpha')
    _flag(group, '--cutmix-minmax', nargs='+', type=float, metavar='R', help='cutmix by the share of the area instead')
    _flag(group, '--mixup-prob', type=float, default=1.0, metavar='P', help='probability of either')
    _flag(group, '--mixup-switch-prob', type=float, default=0.5, metavar='P', help='probability of cutmix of the two')
    _flag(group, '--mixup-mode', type=str, default='batch', metavar='MODE', help='batch, pair or elem')
    _flag(group, '--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch that they end at')
    _flag(group, '--smoothing', type=float, default=0.1, metavar='R', help='label smoothing')
    _flag(group, '--train-interpolation', type=str, default='random', metavar='NAME', help='how images are resized')
    _flag(group, '--drop', type=float, default=0.0, metavar='P', help='dropout')
    _flag(group, '--drop-connect', type=float, metavar='P', help='old name of --drop-path')
    _flag(group, '--drop-path', type=float, metavar='P', help='stochastic depth')
    _flag(group, '--drop-block', type=float, metavar='P', help='DropBlock, for models that have it')

    group = parser.add_argument_group('BatchNorm')
    _flag(group, '--bn-momentum', type=float, metavar='M', help="BatchNorm's momentum")
    _flag(group, '--bn-eps', type=float, metavar='EPS', help="BatchNorm's epsilon")
    _switch(group, '--sync-bn', help='statistics over all processes')
    _flag(group, '--dist-bn', type=str, default='reduce', metavar='MODE',
          help='running statistics after an epoch: broadcast, reduce, or empty')
    _switch(group, '--split-bn', help='a BatchNorm for each augmentation split')

    group = parser.add_argument_group('Model EMA')
    _switch(group, '--model-ema', help='keep and validate an exponential moving average of the weights')
    _switch(group, '--model-ema-force-cpu', help='keep it on the CPU, unvalidated')
    _flag(group, '--model-ema-decay', type=float, default=0.9998, metavar='D', help='its decay')
    _switch(group, '--model-ema-warmup', help='warm up its decay')

    group = parser.add_argument_group('Miscellaneous')
    _flag(group, '--seed', type=int, default=42, metavar='N', help='seed')
    _flag(group, '--worker-seeding', type=str, default='all', metavar='MODE', help='all or part')
    _flag(group, '--log-interval', type=int, default=50, metavar='N', help='batches between log lines')
    _flag(group, '--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    _flag(group, '--recovery-interval', type=int, default=0, metavar='N', help='batches between recovery checkpoints')
    _flag(group, '--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    _flag(group, '-j', '--workers', type=int, default=4, metavar='N', help='loader processes')
    _switch(group, '--save-images', help='save a batch of images at every log line')
    _flag(group, '--output', type=str, default='', metavar='DIR', help='where runs are written (default: output/train)')
    _flag(group, '--experiment', type=str, default='', metavar='NAME', help="this run's folder in it")
    _flag(group, '--eval-metric', type=str, default='top1', metavar='NAME', help='metric that ranks checkpoints')
    _flag(group, '--tta', type=int, default=0, metavar='N', help='test-time augmentation')
    _switch(group, '--use-multi-epochs-loader', help='keep one iterator over all epochs')
    _switch(group, '--log-wandb', help='log to Weights & Biases')
    _flag(group, '--wandb-project', type=str, metavar='NAME', help='its project')
    _flag(group, '--wandb-tags', nargs='+', type=str, default=[], metavar='TAG', help='its tags')
    _flag(group, '--wandb-resume-id', type=str, default='', metavar='ID', help='its run to go on with')

    sizes = ['none', 'sqrt', 'linear']
    group = parser.add_argument_group('Scheduled resolutions')
    _flag(group, '--train-img-sizes', nargs='+', type=int, metavar='N', help='input sizes')
    _flag(group, '--train-batch-sizes', nargs='+', type=int, metavar='N', help='batch size of each')
    _flag(group, '--train-size-probs', nargs='+', type=float, metavar='P', help='probability of each')
    _flag(group, '--train-size-schedule', type=str, default='constant', choices=['constant', 'progressive'],
          help='how the choice moves')
    _flag(group, '--train-size-schedule-spread', type=float, default=0.65, metavar='STD', help='spread of progressive')
    _flag(group, '--train-size-random-mix', type=float, default=0.1, metavar='R', help='share of uniform choices')
    _flag(group, '--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N',
          help='batches of an epoch')
    _flag(group, '--variable-batch-loss-scale', type=str, default='none', choices=sizes, help='loss by batch size')

    group = parser.add_argument_group('NaFlex (sequences of patches)')
    _switch(group, '--naflex-loader', help='NaFlex loader')
    _flag(group, '--naflex-train-seq-lens', nargs='+', type=int, default=[128, 256, 576, 784, 1024], metavar='N',
          help='sequence lengths')
    _flag(group, '--naflex-max-seq-len', type=int, default=576, metavar='N', help='length in validation')
    _flag(group, '--naflex-patch-sizes', nargs='+', type=int, metavar='N', help='patch sizes')
    _flag(group, '--naflex-patch-size-probs', nargs='+', type=float, metavar='P', help='probability of each')
    _flag(group, '--naflex-loss-scale', type=str, default='linear', choices=sizes, help='loss by batch size')
    _switch(group, '--naflex-patchify-channels-first', help='channels first within a patch')

    group = parser.add_argument_group('Knowledge distillation')
    _flag(group, '--kd-model-name', type=str, metavar='NAME',
          help='learn from this teacher: timm name with weights, local-dir:DIR, hf-hub:OWNER/NAME')
    _flag(group, '--kd-distill-type', type=str, default='logit', choices=['logit', 'feature', 'token'],
          help='learn from its logits, its features, or by a token')
    _flag(group, '--kd-loss-type', type=str, default='kl', metavar='NAME',
          help='loss against its logits; there is kl alone')
    _flag(group, '--distill-loss-weight', type=float, metavar='W', help="weight of the teacher's loss")
    _flag(group, '--task-loss-weight', type=float, metavar='W',
          help="weight of the labels' loss; without the other flag, the teacher's is 1 less it")
    _flag(group, '--kd-temperature', type=float, default=4.0, metavar='T', help='temperature of the softened classes')
    _flag(group, '--kd-student-feature-dim', type=int, metavar='N',
          help="number of the student's features; found out where not given")
    _flag(group, '--kd-teacher-feature-dim', type=int, metavar='N', help="number of the teacher's features, likewise")
    _flag(group, '--kd-token-distill-type', type=str, default='soft', choices=['soft', 'hard'],
          help="targets of the distillation token: the teacher's softened classes, or its choice")
    return parser


def validate_parser() -> argparse.ArgumentParser:
    """Build the command line of `validate.py`."""
    parser = _parser("Evaluate a timm model, one of our checkpoints or a reference checkpoint. Flags are timm's.")

    group = _add_dataset(parser)
    _flag(group, '--split', default='validation', metavar='NAME', help='split to evaluate on')
    _flag(group, '--num-samples', type=int, metavar='N', help='samples of the split, for iterable sets')

    group = parser.add_argument_group('Model')
    _flag(group, '--model', '-m', default='dpn92', metavar='NAME',
          help="timm model, wildcard, text file of names or 'all'; a checkpoint of ours names its own")
    _switch(group, '--pretrained', help='use the pretrained weights')
    _flag(group, '--checkpoint', type=str, default='', metavar='FILE', help='checkpoint, or a folder of them: each one')
    _switch(group, '--use-ema', help="use the checkpoint's EMA")
    _switch(group, '--reparam', help='fuse the branches of re-parameterisable blocks')
    _switch(group, '--test-pool', help='pool as in training where the input is larger, then average')
    _add_input(group)
    _switch(group, '--use-train-size', help="the training's input size, not the test's")
    _flag(group, '--crop-mode', type=str, metavar='MODE', help='squash, border or center')
    _flag(group, '--crop-border-pixels', type=int, metavar='N', help='crop N pixels on each side')
    _switch(group, '--tf-preprocessing', help="TensorFlow's preprocessing; needs tensorflow")

    group = parser.add_argument_group('Device and precision')
    _flag(group, '-j', '--workers', type=int, default=4, metavar='N', help='loader processes')
    _flag(group, '-b', '--batch-size', type=int, default=256, metavar='N', help='images in a batch')
    _flag(group, '--num-gpu', type=int, default=1, metavar='N', help='GPUs that share every batch')
    _switch(group, '--aot-autograd', help='fuse the model with AOT Autograd')
    _add_compute(group)

    group = parser.add_argument_group('Results')
    _flag(group, '--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    _flag(group, '--results-file', type=str, default='', metavar='FILE', help='write them here, after every model')
    _flag(group, '--results-format', type=str, default='csv', metavar='FORMAT', help='csv or json')
    _flag(group, '--real-labels', type=str, default='', metavar='FILE', help='JSON file of the ReaL labels of ImageNet')
    _flag(group, '--valid-labels', type=str, default='', metavar='FILE',
          help="text file: the model's class of each of the data set's, one index on a line")
    _switch(group, '--retry', help='smaller batches where memory is short')
    _flag(group, '--seed', type=int, default=42, metavar='N', help='seed')
    _flag(group, '--metrics-avg', type=str, choices=['micro', 'macro', 'weighted'],
          help='precision, recall and F1 too; needs scikit-learn')
    _switch(group, '--naflex-loader', help='native aspect ratios, for NaFlex models')
    _flag(group, '--naflex-max-seq-len', type=int, default=576, metavar='N', help='patches of an image, at most')
    return parser


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key stands once, however it is spelled."""

    def construct_mapping(self, node, deep=False):
        keys = [str(key.value).replace('-', '_') for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key '{twice[0]}' stands there twice")
        return super().construct_mapping(node, deep)


def _config_to_argv(parser: argparse.ArgumentParser, path: str) -> List[str]:
    """Turn a YAML file into the command line that says the same, so that one parser judges both."""
    try:
        with open(path, encoding='utf-8') as f:
            config = yaml.load(f, _UniqueKeys) or {}
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f'Cannot read the config {path}: {" ".join(str(e).split())}') from e
    if not isinstance(config, dict):
        raise UserError(f'The config {path} must map flags to values, it is a {type(config).__name__}.')
    actions = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config')}
    argv = []
    for key, value in config.items():
        action = actions.get(str(key).replace('-', '_'))
        if action is None:
            near = difflib.get_close_matches(str(key).replace('-', '_'), actions, 1, 0)
            raise UserError(f"Unknown key '{key}' (value {value!r}) in {path}; the nearest flag is"
                            f' --{near[0].replace("_", "-")}.')
        flag = (action.option_strings or ['--data-dir'])[-1]  # what the positional argument stands for
        # timm's own args.yaml has empty lists and mappings for flags of its that were not given.
        if value is None or value in ([], {}) and not action.dest.startswith('netaug'):
            continue
        if isinstance(action, argparse._StoreTrueAction):
            if not isinstance(value, bool):
                raise UserError(f"Key '{key}' in {path} has the value {value!r}; {flag} takes true or false.")
            argv += [flag] if value else []
            continue
        if isinstance(value, dict) != isinstance(action, ParseKwargs) or isinstance(value, bool):
            raise UserError(f"Key '{key}' in {path} has the value {value!r}, which {flag} does not take.")
        if isinstance(value, list) and action.nargs in (None, '?'):
            raise UserError(f"Key '{key}' in {path} has the value {value!r}; {flag} takes one value.")
        if value == [] or isinstance(value, list) and any(str(v).startswith('--') for v in value):
            raise UserError(f"Key '{key}' in {path} has the value {value!r}; {flag} takes a list of values.")
        values = [f'{k}={v!r}' for k, v in value.items()] if isinstance(value, dict) else \
            [str(v) for v in (value if isinstance(value, list) else [value])]
        if action.nargs in (None, '?') and values[0] != '':
            argv.append(f'{flag}={values[0]}')  # a value may begin with a dash
        else:
            argv += [flag, *values]
        _check_value(parser, action, key, values, path)
    return argv


def _check_value(
        parser: argparse.ArgumentParser,
        action: argparse.Action,
        key: str,
        values: List[str],
        path: str,
) -> None:
    if isinstance(action, ParseKwargs):
        return
    try:
        for value in values:
            parser._check_value(action, parser._get_value(action, value))
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise argparse.ArgumentError(action, f'expected {action.nargs} values')
    except argparse.ArgumentError as e:
        raise UserError(f"Key '{key}' in {path} has the value {' '.join(values)!r}: {e}.") from e


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line and the YAML file that it names; the command line has the last word.

    Raises:
        UserError: The YAML file says what the flags do not accept; key, value and nearest flag are named.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument('-c', '--config')
    known, rest = finder.parse_known_args(argv)
    from_config = _config_to_argv(parser, known.config) if known.config else []
    args, unknown = parser.parse_known_args([*from_config, *rest])
    if unknown:
        flags = [s for a in parser._actions for s in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split('=')[0], flags, 1, 0.75)
        hint = f'the nearest is {near[0]}' if near else '--help lists the flags'
        raise UserError(f'Unknown flag {unknown[0]}; {hint}.')
    typed = parser.parse_args(rest)
    if typed.data and typed.data_dir and typed.data != typed.data_dir:
        raise UserError(f'Two data sets given, {typed.data} and --data-dir {typed.data_dir}: leave one out.')
    args.config = known.config
    args.data_dir = typed.data or typed.data_dir or args.data_dir or args.data
    args.device_given = any(a.split('=')[0] == '--device' for a in (*from_config, *rest))
    return args


def netaug_config(args: argparse.Namespace) -> Optional[Tuple[NetAugConfig, NetAugTraining]]:
    """Return the configurations of the super-network and of its training, None without `--netaug` and `--netaug-init`.

    Raises:
        UserError: A value is out of its range, or a NetAug flag stands without `--netaug`.
    """
    names = [f.name for kind in (NetAugConfig, NetAugTraining) for f in dataclasses.fields(kind) if f.name != 'sort']
    fields = {k: getattr(args, f'netaug_{k}') for k in names if getattr(args, f'netaug_{k}') is not None}
    if args.netaug_no_sort:
        fields['sort'] = False
    if args.netaug_init:
        unused = sorted({*fields} - {'width_mults', 'expand_mults', 'divisor'})
        if args.netaug:
            raise UserError('--netaug-init does nothing with --netaug, which starts from these weights: leave it out.')
        if unused:
            raise UserError(f'--netaug-{unused[0].replace("_", "-")} does nothing with --netaug-init: leave it out.')
        if args.pretrained or args.pretrained_path or args.initial_checkpoint:
            raise UserError('--netaug-init is for a training from scratch: leave it out, or the pretrained weights.')
    elif not args.netaug:
        if fields:
            raise UserError('NetAug flags do nothing without --netaug: add it, or leave them out.')
        return None
    try:
        return split_fields(fields)
    except ValueError as e:
        flag = re.sub(r'NetAug(?:Config|Training)\.(\w+)', lambda m: '--netaug-' + m[1].replace('_', '-'), str(e))
        raise UserError(flag) from e


def data_source(args: argparse.Namespace) -> DataSource:
    """Return the data set that the flags name."""
    return DataSource(**{field.name: getattr(args, field.name) for field in dataclasses.fields(DataSource)})


# What may change from a run to the one that goes on with it: where it runs and what it tells.
FREE_FLAGS = (
    'config', 'data', 'data_dir', 'output', 'experiment', 'resume', 'no_resume_opt', 'log_interval',
    'recovery_interval', 'save_images', 'device', 'pin_mem', 'checkpoint_hist', 'local_rank', 'log_wandb',
    'wandb_project', 'wandb_tags', 'wandb_resume_id', 'dataset_download', 'synchronize_step')
# Flags of timm's that are refused when used, never ignored: why.
_NAFLEX = "NaFlex models are transformers over sequences of patches: train them with timm's own script"
_REFUSED = {
    'naflex_loader': _NAFLEX, 'naflex_train_seq_lens': _NAFLEX, 'naflex_max_seq_len': _NAFLEX,
    'naflex_patch_sizes': _NAFLEX, 'naflex_patch_size_probs': _NAFLEX, 'naflex_loss_scale': _NAFLEX,
    'naflex_patchify_channels_first': _NAFLEX,
    'tta': "timm's loaders make no augmented copies of the images in validation",
}
_REFUSED_WITH_NETAUG = {
    'split_bn': 'its BatchNorms are not elastic; --aug-splits goes without it',
    'torchscript': 'sampled widths are not static; there is --torchcompile',
    'fuser': 'it is for TorchScript alone',
    'fast_norm': 'it is for LayerNorm and GroupNorm, which these models do not have',
}
_NOT_TOGETHER = (
    ('torchscript', 'torchcompile', 'they are two compilers'),
    ('torchscript', 'grad_checkpointing', 'a scripted model does not checkpoint'),
    ('torchscript', 'sync_bn', 'a scripted model cannot synchronise'),
    ('torchscript', 'kd_model_name', 'distillation needs the model as it is'),
    ('sync_bn', 'split_bn', 'the split norms would be lost'),
    ('netaug_batch_fraction', 'resplit', 'the first part of the batch is not erased'),
)
# Flag -> the one without which it does nothing.
_NEEDS = {
    'model_ema_force_cpu': 'model_ema', 'model_ema_warmup': 'model_ema', 'model_ema_decay': 'model_ema',
    'bce_sum': 'bce_loss', 'bce_target_thresh': 'bce_loss', 'bce_pos_weight': 'bce_loss',
    'torchcompile_mode': 'torchcompile', 'no_resume_opt': 'resume', 'amp_dtype': 'amp',
    'wandb_tags': 'log_wandb', 'wandb_project': 'log_wandb', 'wandb_resume_id': 'log_wandb',
    'distill_loss_weight': 'kd_model_name', 'task_loss_weight': 'kd_model_name', 'kd_distill_type': 'kd_model_name',
    'kd_loss_type': 'kd_model_name', 'kd_student_feature_dim': 'kd_model_name',
    'kd_teacher_feature_dim': 'kd_model_name', 'kd_token_distill_type': 'kd_model_name',
    'train_batch_sizes': 'train_img_sizes', 'train_size_probs': 'train_img_sizes',
    'train_size_schedule': 'train_img_sizes', 'train_batches_per_epoch': 'train_img_sizes',
    'train_size_schedule_spread': 'train_img_sizes', 'train_size_random_mix': 'train_img_sizes',
    'variable_batch_loss_scale': 'train_batch_sizes', 'fuser': 'torchscript',
}
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_CHOICES = {  # timm's parser takes any string here, and falls over it later
    'amp_dtype': ('float16', 'bfloat16'),
    'model_dtype': (None, 'float32', 'float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'dist_bn': ('', 'broadcast', 'reduce'),
    'worker_seeding': ('all', 'part'),
    'eval_metric': ('top1', 'top5', 'loss'),
    'remode': ('pixel', 'const', 'rand'),
    'kd_loss_type': ('kl',),
    'fuser': ('', 'te', 'old', 'legacy'),
    'train_crop_mode': (None, 'rrc', 'rkrc', 'rkrr'),
    'mixup_mode': ('batch', 'pair', 'elem', 'half'),
    'interpolation': ('', *_INTERPOLATIONS),
    'train_interpolation': ('', 'random', *_INTERPOLATIONS),
    'gp': (None, '', 'fast', 'fastavg', 'fastmax', 'fastavgmax', 'fastcatavgmax', 'avg', 'max', 'avgmax', 'catavgmax'),
}


# Flag -> smallest and largest value, and whether the largest one is allowed itself.
_RANGES = {
    **dict.fromkeys(('smoothing', 'drop', 'drop_path', 'drop_connect', 'drop_block', 'model_ema_decay', 'momentum'),
                    (0, 1, False)),
    **dict.fromkeys(('hflip', 'vflip', 'reprob', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob',
                     'mixup_prob', 'mixup_switch_prob', 'bn_momentum', 'train_size_random_mix',
                     'bce_target_thresh', 'mean', 'std'), (0, 1, True)),
}


def _check_ranges(args: argparse.Namespace) -> None:
    for dest, (low, high, closed) in _RANGES.items():
        value = getattr(args, dest, None)
        for number in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if not low <= number <= high or (number == high and not closed) or (number == 0 and dest == 'std'):
                hint = ' (pixels are from 0 to 1 here, not to 255)' if dest in ('mean', 'std') else ''
                flag = dest.replace('_', '-')
                wanted = f'from {low} to {high}' if closed else f'from {low} up to, but not, {high}'
                wanted = f'above 0, {wanted}' if dest == 'std' else wanted
                raise UserError(f'--{flag} must be {wanted}, got {number:g}{hint}.')


def _given(parser: argparse.ArgumentParser, args: argparse.Namespace, dests: Sequence[str]) -> Dict[str, str]:
    flags = {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings}
    return {d: flags[d] for d in dests if getattr(args, d) != parser.get_default(d)}


def _check_values(
        parser: argparse.ArgumentParser,
        args: argparse.Namespace,
        choices: Dict[str, tuple],
        minima: Dict[str, int],
) -> None:
    flags = {a.dest: (a.option_strings or [a.dest])[-1] for a in parser._actions}
    for dest, values in choices.items():
        if getattr(args, dest) not in values:
            raise UserError(f'{flags[dest]} takes one of {", ".join(repr(c) for c in values if c)},'
                            f' got {getattr(args, dest)!r}.')
    for dest, minimum in minima.items():
        value = getattr(args, dest)
        if value is not None and value < minimum:
            raise UserError(f'{flags[dest]} must be at least {minimum}, got {value}.')


def _check_distillation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    kind = args.kd_distill_type
    if args.netaug and args.kd_model_name and kind != 'logit':
        raise UserError(f'--kd-distill-type {kind} does not go together with --netaug: both of its sub-networks learn'
                        f' from logits, their features have different widths. Use logit.')
    if args.kd_temperature != parser.get_default('kd_temperature') and not (args.kd_model_name or args.netaug_distill):
        raise UserError('--kd-temperature does nothing without --kd-model-name or --netaug-distill.')
    if args.kd_temperature <= 0:
        raise UserError(f'--kd-temperature must be above 0, got {args.kd_temperature:g}.')
    for dest in ('distill_loss_weight', 'task_loss_weight'):
        value = getattr(args, dest)
        if value is not None and value < 0:
            raise UserError(f'--{dest.replace("_", "-")} must be at least 0, got {value:g}.')
    if args.task_loss_weight is not None and args.task_loss_weight > 1 and args.distill_loss_weight is None:
        raise UserError('--task-loss-weight above 1 needs --distill-loss-weight, which is 1 less it otherwise.')
    for dest, wanted in (('kd_student_feature_dim', 'feature'), ('kd_teacher_feature_dim', 'feature'),
                         ('kd_token_distill_type', 'token')):
        if getattr(args, dest) != parser.get_default(dest) and kind != wanted:
            raise UserError(f'--{dest.replace("_", "-")} does nothing without --kd-distill-type {wanted}.')


def _check_train_sizes(args: argparse.Namespace) -> None:
    sizes = args.train_img_sizes or []
    for dest in ('train_batch_sizes', 'train_size_probs'):
        values = getattr(args, dest)
        if values and len(values) != len(sizes):
            raise UserError(f'--{dest.replace("_", "-")} needs a value for each of the {len(sizes)} --train-img-sizes,'
                            f' got {len(values)}.')
    if min([*sizes, *(args.train_batch_sizes or [])], default=1) < 1:
        raise UserError('--train-img-sizes and --train-batch-sizes must be at least 1.')


def check_train_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse, before anything is touched, what `train.py` would otherwise ignore or fall over.

    Raises:
        UserError: One sentence with the flag's name.
    """
    for dest, flag in _given(parser, args, _REFUSED).items():
        raise UserError(f'{flag} is not carried out: {_REFUSED[dest]}.')
    if args.netaug:
        for dest, flag in _given(parser, args, _REFUSED_WITH_NETAUG).items():
            raise UserError(f'{flag} does not go together with --netaug: {_REFUSED_WITH_NETAUG[dest]}.')
    _check_values(parser, args, _CHOICES, dict(
        batch_size=1, validation_batch_size=1, epochs=1, grad_accum_steps=1, log_interval=1, val_interval=1,
        checkpoint_hist=1, num_classes=1, img_size=1, seed=0, start_epoch=0, workers=0, recovery_interval=0,
        warmup_epochs=0, clip_grad=0, train_batches_per_epoch=1))
    for dest, flag in _given(parser, args, _NEEDS).items():
        if not getattr(args, _NEEDS[dest]):
            raise UserError(f'{flag} does nothing without --{_NEEDS[dest].replace("_", "-")}.')
    _check_ranges(args)
    _check_distillation(parser, args)
    _check_train_sizes(args)
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UserError('--amp needs float32 weights: leave --model-dtype out.')
    if args.drop_path is not None and args.drop_connect is not None:
        raise UserError('--drop-connect is the old name of --drop-path: leave it out.')
    for one, other, why in _NOT_TOGETHER:
        if getattr(args, one) and getattr(args, other):
            raise UserError(f'--{one.replace("_", "-")} and --{other.replace("_", "-")} do not go together: {why}.')
    if args.netaug and args.torchcompile and args.grad_checkpointing:
        raise UserError('--torchcompile and --grad-checkpointing do not go together with --netaug: compiled code can'
                        ' not bring back the widths of the forward pass. Leave one of the two out.')
    if args.jsd_loss and args.aug_splits < 2:
        raise UserError('--jsd-loss needs --aug-splits of at least 2.')
    if args.jsd_loss and args.bce_loss:
        raise UserError('--jsd-loss and --bce-loss are two losses: choose one.')
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        if getattr(args, dest) is not None and len(getattr(args, dest)) != 2:
            raise UserError(f'--{dest.replace("_", "-")} takes two numbers.')
    mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    if mixed and any(size % 2 for size in args.train_batch_sizes or [args.batch_size]):
        raise UserError('--mixup and --cutmix need an even --batch-size.')
    if args.aug_splits and args.netaug_batch_fraction not in (None, 1):
        raise UserError('--netaug-batch-fraction does not go together with --aug-splits, whose batches are made of'
                        ' parts: leave one of the two out.')
    if args.aug_splits == 1:
        raise UserError('--aug-splits must be at least 2.')
    if args.aug_splits and not args.no_prefetcher and mixed:
        raise UserError('--aug-splits with --mixup or --cutmix needs --no-prefetcher.')
    if args.split_bn and args.aug_splits < 2 and not args.resplit:
        raise UserError('--split-bn needs --aug-splits or --resplit.')
    if args.local_rank and 'LOCAL_RANK' not in os.environ:
        raise UserError('--local_rank is set by old launchers: start the processes with torchrun.')
    if not args.data_dir and not args.dataset:
        raise UserError('No data set given: name its folder with --data-dir.')
    if sum(map(bool, (args.pretrained_path, args.initial_checkpoint, args.resume))) > 1:
        raise UserError('Give only one of --pretrained-path, --initial-checkpoint and --resume.')


_VALIDATE_CHOICES = {
    **{dest: _CHOICES[dest] for dest in ('amp_dtype', 'model_dtype', 'interpolation', 'gp')},
    'crop_mode': (None, 'squash', 'border', 'center'),
    'fuser': ('', 'te', 'old', 'legacy'),
    'results_format': ('csv', 'json'),
}
_VALIDATE_NEEDS = {
    'amp_dtype': 'amp', 'torchcompile_mode': 'torchcompile', 'use_ema': 'checkpoint', 'results_format': 'results_file',
    'naflex_max_seq_len': 'naflex_loader'}
_VALIDATE_NOT_WITH = {  # each one would have no effect next to the key, or spoil it
    'torchcompile': ('torchscript', 'aot_autograd'),
    'torchscript': ('aot_autograd',),
    'real_labels': ('valid_labels',),  # ReaL's labels are those of all the classes
    'aot_autograd': ('num_gpu',),
    'naflex_loader': ('tf_preprocessing', 'aot_autograd', 'test_pool', 'channels_last', 'crop_pct', 'crop_mode',
                      'crop_border_pixels'),
    'tf_preprocessing': ('no_prefetcher', 'crop_pct', 'crop_mode', 'crop_border_pixels'),
}
_VALIDATE_PACKAGES = {
    'metrics_avg': ('sklearn', 'scikit-learn'), 'tf_preprocessing': ('tensorflow', 'tensorflow')}


def check_validate_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what `validate.py` would otherwise ignore or fall over.

    Raises:
        UserError: One sentence with the flag's name.
    """
    flags = {a.dest: (a.option_strings or [a.dest])[-1] for a in parser._actions}
    given = {dest for dest in flags if hasattr(args, dest) and getattr(args, dest) != parser.get_default(dest)}
    if args.fuser in ('nvfuser', 'nvf'):
        raise UserError(f'--fuser {args.fuser}: PyTorch has no nvFuser for TorchScript any more; there is --fuser te.')
    _check_values(parser, args, _VALIDATE_CHOICES, dict(
        batch_size=1, num_gpu=1, log_freq=1, naflex_max_seq_len=1, num_classes=1, img_size=1, seed=0, workers=0))
    _check_ranges(args)
    for dest, needs in _VALIDATE_NEEDS.items():
        if dest in given and needs not in given:
            raise UserError(f'{flags[dest]} does nothing without {flags[needs]}.')
    for dest, others in _VALIDATE_NOT_WITH.items():
        for other in others:
            if dest in given and other in given:
                raise UserError(f'{flags[dest]} and {flags[other]} do not go together: leave one of the two out.')
    for dest, (module, package) in _VALIDATE_PACKAGES.items():
        if dest in given and importlib.util.find_spec(module) is None:
            raise UserError(f'{flags[dest]} needs {package}: pip install {package}.')
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UserError('--amp needs float32 weights: leave --model-dtype out.')
    if not args.data_dir and not args.dataset:
        raise UserError('No data set given: name its folder with --data-dir.')
    folder = os.path.dirname(os.path.abspath(args.results_file))
    if args.results_file and (os.path.isdir(args.results_file) or not os.path.isdir(folder)):
        raise UserError(f'--results-file {args.results_file}: that is no name of a file in a folder that there is.')
