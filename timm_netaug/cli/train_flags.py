"""The flags of `train.py`, one row each, and the rules that concern several of them."""
import argparse
import dataclasses
import os
import re
from dataclasses import replace
from typing import Any, Optional, Tuple

from timm.loss import LOSS_TYPES, MULTI_LABEL_LOSS_TYPES
from timm.utils import ParseKwargs

from ..config import NetAugConfig, NetAugTraining, split_fields
from ..errors import UserError
from .common_flags import COMPUTE, DATASET, INPUT, INTERPOLATIONS, TARGETS, check_shared
from .flags import Flag, Group, all_flags, build_parser, check_flags, flag_name, given_flags

__all__ = ['TRAIN_FLAGS', 'check_train_args', 'flag_of_weights', 'loss_of', 'mixes_images', 'netaug_config',
           'train_parser']


def _stage(value: str) -> Any:
    return int(value) if value.lstrip('-').isdigit() else value


_NAFLEX = "NaFlex models are transformers over sequences of patches: train them with timm's own script"
_NOT_WITH_TORCHSCRIPT = {
    '--torchcompile': 'they are two compilers',
    '--grad-checkpointing': 'a scripted model has no checkpointing',
    '--sync-bn': 'a scripted model cannot synchronise BatchNorm',
    '--kd-model-name': 'distillation needs the model as it is',
}
_LOSS_SCALES = ('none', 'sqrt', 'linear')

TRAIN_FLAGS = (
    Group('NetAug', (
        Flag('--netaug', 'train with Network Augmentation; checkpoints hold the tiny model'),
        Flag('--netaug-width-mults', "multipliers that widths are drawn from; without the flag, the model's own", float,
             metavar='M', nargs='+'),
        Flag('--netaug-expand-mults', "multipliers that expansion ratios are drawn from; without the flag, the model's"
             ' own', float, metavar='M', nargs='+'),
        Flag('--netaug-divisor', 'round augmented widths to multiples of N (default: 1)', int, metavar='N'),
        Flag('--netaug-from-stage', 'first stage that is augmented, or the name of a module; the stages before it are'
             ' computed once for both passes (default: 0, which augments all stages)', _stage, metavar='N'),
        Flag('--netaug-alpha', "weight of the augmented sub-network's loss (default: 1)", float, metavar='W'),
        Flag('--netaug-stop-width-at', 'share of the epochs in which widths are augmented and channels are sorted; 0 is'
             ' good for short runs (default: 0.5)', float, metavar='R'),
        Flag('--netaug-no-sort', 'never sort channels'),
        Flag('--netaug-distill', "weight of a loss of the tiny network against the augmented sub-network's logits"
             ' (default: 0)', float, metavar='W'),
        Flag('--netaug-batch-fraction', 'share of a batch that the augmented sub-network is trained on (default: 1)',
             float, metavar='R', excludes={'--resplit': 'the first part of the batch is not erased'}),
        Flag('--netaug-every', 'train the augmented sub-network in every N-th update, with N times the weight (default:'
             ' 1)', int, metavar='N'),
        Flag('--netaug-init', 'without --netaug: start from the weights that a training with --netaug and the same'
             ' --netaug-from-stage starts from'),
    )),
    Group('Dataset', (
        *DATASET,
        Flag('--train-split', 'split to train on', str, 'train', 'NAME'),
        Flag('--val-split', 'split to validate on', str, 'validation', 'NAME'),
        Flag('--train-num-samples', 'number of samples in the training split, for iterable data sets', int,
             metavar='N'),
        Flag('--val-num-samples', 'number of samples in the validation split, for iterable data sets', int,
             metavar='N'),
        *TARGETS,
    )),
    Group('Model', (
        Flag('--model', 'name of a timm model', str, 'resnet50', 'NAME'),
        Flag('--pretrained', 'start from pretrained weights'),
        Flag('--pretrained-path', 'start from the weights in this file (of the NetAug authors, too); the classifier is'
             ' replaced where the number of classes differs', str, metavar='FILE'),
        Flag('--pretrained-cfg-overlay', 'fields that replace those of the pretrained config', ParseKwargs, {},
             'KEY=VALUE', nargs='*'),
        Flag('--initial-checkpoint', 'start from the weights of this checkpoint, classifier included', str, '', 'FILE'),
        Flag('--resume', "continue the run of this checkpoint; 'auto' continues the run in the folder of --experiment,"
             ' or begins it', str, '', 'FILE', free=True),
        Flag('--no-resume-opt', "leave out the optimizer's state when a run is resumed", needs='--resume', free=True),
        Flag('-b --batch-size', 'images in a step of one process', int, 128, 'N', range='[1, inf]'),
        Flag('-vb --validation-batch-size', 'images in a batch of validation; without the flag, as --batch-size', int,
             metavar='N', range='[1, inf]'),
        Flag('--grad-accum-steps', 'number of batches whose gradients are summed for one optimizer step', int, 1, 'N',
             range='[1, inf]'),
        Flag('--grad-checkpointing', 'compute activations again in the backward pass, to save memory'),
        Flag('--head-init-scale', "factor on the classifier's initial weights", float, metavar='S',
             range='(-inf, inf)'),
        Flag('--head-init-bias', "initial value of the classifier's bias", float, metavar='B', range='[-1000, 1000]'),
        Flag('--num-classes', 'number of classes; without the flag, a new classifier has as many classes as the data'
             ' set', int, metavar='N', range='[1, inf]'),
        *INPUT,
    )),
    Group('Device, precision and distribution', (
        *(replace(flag, excludes=_NOT_WITH_TORCHSCRIPT) if flag.name == '--torchscript' else flag for flag in COMPUTE),
        Flag('--no-ddp-bb', 'do not broadcast buffers in DistributedDataParallel (NetAug never does)'),
        Flag('--synchronize-step', 'wait for the device after every step', free=True),
        Flag('--local_rank', 'set by old launchers; torchrun needs no flag', int, 0, 'N', free=True),
        Flag('--device-modules', 'Python modules of device back ends to import', str, metavar='NAME', nargs='+'),
    )),
    Group('Optimizer', (
        Flag('--opt', 'name of the optimizer (sgd uses Nesterov momentum)', str, 'sgd', 'NAME'),
        Flag('--opt-eps', "the optimizer's epsilon", float, metavar='EPS', range='[0, 1]'),
        Flag('--opt-betas', "the optimizer's betas", float, metavar='BETA', nargs='+', range='[0, 1)'),
        Flag('--momentum', 'momentum', float, 0.9, 'M', range='[0, 1)'),
        Flag('--weight-decay', 'weight decay; biases and norm layers have none', float, 2e-5, 'WD', range='[0, inf)'),
        Flag('--clip-grad', 'limit that gradients are clipped to', float, metavar='NORM', range='[0, inf]'),
        Flag('--clip-mode', 'how gradients are clipped', str, 'norm', 'MODE', choices=('norm', 'value', 'agc')),
        Flag('--layer-decay', 'factor on the learning rate from each layer to the layer before it', float,
             metavar='R', range='(0, 10]'),
        Flag('--layer-decay-min-scale', 'lower limit of the factor of --layer-decay', float, 0, 'S', range='[0, 1]'),
        Flag('--layer-decay-no-opt-scale', 'freeze layers whose factor of --layer-decay is below this one', float,
             metavar='S', range='[0, 1]'),
        Flag('--opt-kwargs', "further arguments of the optimizer's constructor", ParseKwargs, {}, 'KEY=VALUE',
             nargs='*'),
    )),
    Group('Learning rate', (
        Flag('--sched', 'name of the schedule', str, 'cosine', 'NAME'),
        Flag('--sched-on-updates', 'change the learning rate at every update instead of every epoch'),
        Flag('--lr', 'learning rate; it overrides --lr-base', float, metavar='LR', range='[0, inf)'),
        Flag('--lr-base', 'learning rate for updates of --lr-base-size images', float, 0.1, 'LR', range='[0, inf)'),
        Flag('--lr-base-size', 'number of images in an update that --lr-base is for', int, 256, 'N', range='[1, inf]'),
        Flag('--lr-base-scale', 'how the learning rate follows the number of images in an update; without the flag, the'
             ' optimizer decides', str, '', 'NAME', choices=('linear', 'sqrt')),
        Flag('--lr-noise', 'shares of the schedule between which noise is added to the learning rate', float,
             metavar='R', nargs='+', range='[0, inf)'),
        Flag('--lr-noise-pct', 'limit of the noise', float, 0.67, 'R', range='(0, inf)'),
        Flag('--lr-noise-std', 'standard deviation of the noise', float, 1.0, 'STD', range='[0, 1000]'),
        Flag('--lr-cycle-mul', 'factor on the length of a cycle from one cycle to the next', float, 1.0, 'M',
             range='(0, inf)'),
        Flag('--lr-cycle-decay', 'factor on the learning rate from one cycle to the next', float, 0.5, 'R',
             range='[0, inf)'),
        Flag('--lr-cycle-limit', 'number of cycles', int, 1, 'N', range='[1, inf]'),
        Flag('--lr-k-decay', 'exponent k of the k-decay of cosine and poly schedules', float, 1.0, 'K',
             range='(0, 100]'),
        Flag('--warmup-lr', 'learning rate that warm-up starts from', float, 1e-5, 'LR', range='[0, inf)'),
        Flag('--min-lr', 'lower limit of the learning rate', float, 0, 'LR', range='[0, inf)'),
        Flag('--epochs', 'number of epochs of the schedule', int, 300, 'N', range='[1, inf]'),
        Flag('--stop-epoch', 'end the training before this epoch, although the schedule is longer', int, metavar='N',
             range='[1, inf]', free=True),
        Flag('--epoch-repeats', 'number of times that the data are repeated within an epoch', float, 0.0, 'N',
             range='[0, inf)'),
        Flag('--start-epoch', 'epoch to start at', int, metavar='N', range='[0, inf]'),
        Flag('--decay-milestones', 'epochs at which the multistep schedule lowers the learning rate', int,
             [90, 180, 270], 'N', nargs='+'),
        Flag('--decay-epochs', 'number of epochs from one decay to the next', float, 90, 'N', range='(0, inf)'),
        Flag('--warmup-epochs', 'number of epochs of warm-up', int, 5, 'N', range='[0, inf]'),
        Flag('--warmup-prefix', 'put the warm-up before the schedule instead of into it'),
        Flag('--cooldown-epochs', 'number of epochs at --min-lr after the schedule', int, 0, 'N', range='[0, inf]'),
        Flag('--patience-epochs', 'epochs without progress before the plateau schedule lowers the learning rate', int,
             10, 'N', range='[0, inf]'),
        Flag('--decay-rate --dr', 'factor on the learning rate at a decay', float, 0.1, 'R', range='[0, inf)'),
    )),
    Group('Loss', (
        Flag('--loss', 'loss function; without the flag, ce for one class and bce for multi-label images', str,
             metavar='NAME', choices=LOSS_TYPES,
             excludes={'--jsd-loss': 'both choose the loss', '--bce-loss': 'both choose the loss'}),
        Flag('--smoothing', 'label smoothing', float, 0.1, 'R', range='[0, 1)'),
        Flag('--jsd-loss', 'Jensen-Shannon divergence over the augmentation splits (the same as --loss jsd)'),
        Flag('--bce-loss', 'binary cross-entropy (the same as --loss bce)'),
        Flag('--bce-sum', 'sum the binary cross-entropy over the classes instead of averaging it'),
        Flag('--bce-target-thresh', 'probability above which a soft target of binary cross-entropy becomes 1', float,
             metavar='T', range='[0, 1]'),
        Flag('--bce-pos-weight', 'weight of positive targets in binary cross-entropy', float, metavar='W',
             range='(0, inf)'),
        Flag('--poly-epsilon', 'coefficient of the first polynomial term of the poly loss; 0 is cross-entropy', float,
             2.0, 'EPS', range='(-inf, inf)'),
        Flag('--poly-gamma', 'exponent of the focal term of the multi-label poly loss; 0 switches the term off', float,
             0.0, 'G', range='[0, inf]'),
        Flag('--class-stats', 'JSON file with the number of samples (num_samples) and of positive samples of each class'
             ' (pos_counts), for loss db and for weights that are computed', str, '', 'FILE'),
        Flag('--loss-pos-weight', "weight of positive targets in bce and multi-label asl: a number, one number for each"
             " class separated by commas, a file of them, or 'neg_pos' (negatives / positives of --class-stats)", str,
             metavar='W'),
        Flag('--loss-class-weight', "weight of each class in bce and multi-label asl: numbers as for --loss-pos-weight,"
             " or 'inv_freq' or 'effective_num' of --class-stats", str, metavar='W'),
        Flag('--loss-weight-power', "exponent of the weights 'neg_pos' and 'inv_freq'", float, 1.0, 'P',
             needs='--loss-pos-weight --loss-class-weight'),
    )),
    Group('Augmentation and regularisation', (
        Flag('--no-aug', 'transform training images as in evaluation'),
        Flag('--train-crop-mode', 'how training images are cropped', str, metavar='MODE',
             choices=('rrc', 'rkrc', 'rkrr')),
        Flag('--scale', 'smallest and largest area of the random crop, as shares of the image', float, [0.08, 1.0], 'R',
             nargs='+', range='(0, inf)'),
        Flag('--ratio', 'smallest and largest aspect ratio of the random crop', float, [3 / 4, 4 / 3], 'R', nargs='+',
             range='(0, inf)'),
        Flag('--hflip', 'probability of a horizontal flip', float, 0.5, 'P', range='[0, 1]'),
        Flag('--vflip', 'probability of a vertical flip', float, 0.0, 'P', range='[0, 1]'),
        Flag('--color-jitter', 'strength of the colour jitter', float, 0.4, 'F', range='[0, 100]'),
        Flag('--color-jitter-prob', 'probability of the colour jitter', float, metavar='P', range='[0, 1]'),
        Flag('--grayscale-prob', 'probability of a conversion to grey', float, metavar='P', range='[0, 1]'),
        Flag('--gaussian-blur-prob', 'probability of a blur', float, metavar='P', range='[0, 1]'),
        Flag('--aa', 'AutoAugment policy, such as rand-m9-mstd0.5', str, metavar='NAME'),
        Flag('--aug-repeats', 'number of augmented copies of an image in an epoch, with several processes', float, 0,
             'N', range='[0, 1000]'),
        Flag('--aug-splits', 'number of parts of a batch, each augmented in another way; 0 is off', int, 0, 'N',
             range='[0, 100]'),
        Flag('--reprob', 'probability that a region of an image is erased', float, 0.0, 'P', range='[0, 1]'),
        Flag('--remode', 'what an erased region is filled with', str, 'pixel', 'MODE',
             choices=('pixel', 'const', 'rand')),
        Flag('--recount', 'number of regions that are erased', int, 1, 'N', range='[1, 1000]'),
        Flag('--resplit', 'erase nothing in the first augmentation split'),
        Flag('--mixup', 'alpha of mixup; 0 is off', float, 0.0, 'A', range='[0, inf)'),
        Flag('--cutmix', 'alpha of cutmix; 0 is off', float, 0.0, 'A', range='[0, inf)'),
        Flag('--cutmix-minmax', 'smallest and largest share of the area for cutmix, instead of alpha', float,
             metavar='R', nargs='+', range='[0, 1]'),
        Flag('--mixup-prob', 'probability that a batch is mixed, by mixup or cutmix', float, 1.0, 'P', range='[0, 1]'),
        Flag('--mixup-switch-prob', 'probability of cutmix, where both mixup and cutmix are on', float, 0.5, 'P',
             range='[0, 1]'),
        Flag('--mixup-mode', 'what is mixed with one ratio', str, 'batch', 'MODE',
             choices=('batch', 'pair', 'elem', 'half')),
        Flag('--mixup-off-epoch', 'epoch from which on nothing is mixed; 0 mixes in all epochs', int, 0, 'N',
             range='[0, inf]'),
        Flag('--train-interpolation', 'how training images are resized', str, 'random', 'NAME',
             choices=('', 'random', *INTERPOLATIONS)),
        Flag('--drop', 'dropout probability', float, 0.0, 'P', range='[0, 1)'),
        Flag('--drop-connect', 'old name of --drop-path', float, metavar='P', range='[0, 1)'),
        Flag('--drop-path', 'probability that a block is skipped (stochastic depth)', float, metavar='P',
             range='[0, 1)'),
        Flag('--drop-block', 'probability of DropBlock, for models that have it', float, metavar='P', range='[0, 1)'),
    )),
    Group('BatchNorm', (
        Flag('--bn-momentum', 'momentum of the running statistics', float, metavar='M', range='[0, 1]'),
        Flag('--bn-eps', 'epsilon of BatchNorm', float, metavar='EPS', range='(0, 1]'),
        Flag('--sync-bn', 'compute batch statistics over all processes',
             excludes={'--split-bn': 'the split norms would be lost'}),
        Flag('--dist-bn', 'what happens to the running statistics of several processes after an epoch', str, 'reduce',
             'MODE', choices=('', 'broadcast', 'reduce')),
        Flag('--split-bn', 'use a BatchNorm of its own for each augmentation split',
             refused_with_netaug='its BatchNorms are not elastic; --aug-splits goes without it'),
    )),
    Group('Model EMA', (
        Flag('--model-ema', 'keep an exponential moving average of the weights, and validate it'),
        Flag('--model-ema-force-cpu', 'keep the moving average on the CPU, without validating it', needs='--model-ema'),
        Flag('--model-ema-decay', 'decay of the moving average', float, 0.9998, 'D', range='[0, 1)',
             needs='--model-ema'),
        Flag('--model-ema-warmup', 'raise the decay of the moving average from 0 at the beginning',
             needs='--model-ema'),
    )),
    Group('Miscellaneous', (
        Flag('--seed', 'seed of all random numbers', int, 42, 'N', range='[0, 4294967295]'),
        Flag('--worker-seeding', 'which random generators of the loader processes are seeded', str, 'all', 'MODE',
             choices=('all', 'part')),
        Flag('--log-interval', 'number of batches between two log lines', int, 50, 'N', range='[1, inf]', free=True),
        Flag('--val-interval', 'number of epochs between two validations', int, 1, 'N', range='[1, inf]'),
        Flag('--recovery-interval', 'number of batches between two recovery checkpoints; 0 writes none', int, 0, 'N',
             range='[0, inf]', free=True),
        Flag('--checkpoint-hist', 'number of the best checkpoints to keep', int, 10, 'N', range='[1, inf]', free=True),
        Flag('--save-epochs', 'keep the checkpoint after these numbers of epochs, as milestone-N', int, metavar='N',
             nargs='+', range='[1, inf]', free=True),
        Flag('-j --workers', 'number of loader processes', int, 4, 'N', range='[0, 1024]'),
        Flag('--save-images', 'save a batch of training images with every log line', free=True),
        Flag('--output', 'folder for the folders of runs (default: output/train)', str, '', 'DIR', free=True),
        Flag('--experiment', "name of this run's folder", str, '', 'NAME', free=True),
        Flag('--eval-metric', 'metric that decides which checkpoints are the best: top1, top5 or loss; of a multi-label'
             ' training map (its default), micro_f1, macro_f1, sample_f1 or loss', str, 'top1', 'NAME'),
        Flag('--tta', 'number of augmented copies in evaluation', int, 0, 'N',
             refused="timm's loaders make no augmented copies of the images in validation"),
        Flag('--use-multi-epochs-loader', 'keep the loader processes from one epoch to the next'),
        Flag('--log-wandb', 'log to Weights & Biases', free=True),
        Flag('--wandb-project', 'project at Weights & Biases', str, metavar='NAME', needs='--log-wandb', free=True),
        Flag('--wandb-tags', 'tags at Weights & Biases', str, [], 'TAG', nargs='+', needs='--log-wandb', free=True),
        Flag('--wandb-resume-id', 'run at Weights & Biases to continue', str, '', 'ID', needs='--log-wandb', free=True),
    )),
    Group('Scheduled resolutions', (
        Flag('--train-img-sizes', 'input sizes to train with', int, metavar='N', nargs='+', range='[1, inf]'),
        Flag('--train-batch-sizes', 'batch size for each of the input sizes', int, metavar='N', nargs='+',
             range='[1, inf]', needs='--train-img-sizes'),
        Flag('--train-size-probs', 'probability of each of the input sizes', float, metavar='P', nargs='+',
             needs='--train-img-sizes', range='[0, inf)'),
        Flag('--train-size-schedule', 'whether the choice moves from small to large sizes', str, 'constant', 'NAME',
             choices=('constant', 'progressive'), needs='--train-img-sizes'),
        Flag('--train-size-schedule-spread', 'standard deviation of the progressive schedule', float, 0.65, 'STD',
             needs='--train-img-sizes', range='(0, inf)'),
        Flag('--train-size-random-mix', 'share of sizes that are chosen uniformly', float, 0.1, 'R', range='[0, 1]',
             needs='--train-img-sizes'),
        Flag('--train-batches-per-epoch --train-steps-per-epoch', 'number of batches in an epoch', int, metavar='N',
             range='[1, inf]', needs='--train-img-sizes'),
        Flag('--variable-batch-loss-scale', 'how the loss follows the batch size', str, 'none', 'NAME',
             choices=_LOSS_SCALES, needs='--train-batch-sizes'),
    )),
    Group('NaFlex', (
        Flag('--naflex-loader', 'loader for sequences of patches', refused=_NAFLEX),
        Flag('--naflex-train-seq-lens', 'lengths of the sequences', int, [128, 256, 576, 784, 1024], 'N', nargs='+',
             refused=_NAFLEX),
        Flag('--naflex-max-seq-len', 'length of a sequence in validation', int, 576, 'N', refused=_NAFLEX),
        Flag('--naflex-patch-sizes', 'sizes of the patches', int, metavar='N', nargs='+', refused=_NAFLEX),
        Flag('--naflex-patch-size-probs', 'probability of each patch size', float, metavar='P', nargs='+',
             refused=_NAFLEX),
        Flag('--naflex-loss-scale', 'how the loss follows the batch size', str, 'linear', 'NAME', choices=_LOSS_SCALES,
             refused=_NAFLEX),
        Flag('--naflex-patchify-channels-first', 'put channels first within a patch', refused=_NAFLEX),
    )),
    Group('Knowledge distillation', (
        Flag('--kd-model-name', 'teacher to learn from: a timm name with weights, local-dir:DIR or hf-hub:OWNER/NAME',
             str, metavar='NAME'),
        Flag('--kd-distill-type', "what is learned from the teacher: its logits, its features, or its logits by a token"
             ' of the student', str, 'logit', 'NAME', choices=('logit', 'feature', 'token'), needs='--kd-model-name'),
        Flag('--kd-loss-type', "loss against the teacher's logits", str, 'kl', 'NAME', choices=('kl',),
             needs='--kd-model-name'),
        Flag('--distill-loss-weight', "weight of the loss against the teacher", float, metavar='W', range='[0, inf)',
             needs='--kd-model-name'),
        Flag('--task-loss-weight', 'weight of the loss against the labels; without --distill-loss-weight, the other'
             ' weight is 1 minus this one', float, metavar='W', range='[0, inf)', needs='--kd-model-name'),
        Flag('--kd-temperature', 'temperature that softens the classes', float, 4.0, 'T', range='(0, inf)',
             needs='--kd-model-name --netaug-distill'),
        Flag('--kd-student-feature-dim', "number of the student's features; without the flag, train.py finds it out",
             int, metavar='N'),
        Flag('--kd-teacher-feature-dim', "number of the teacher's features; without the flag, train.py finds it out",
             int, metavar='N'),
        Flag('--kd-token-distill-type', "what the distillation token learns: the teacher's softened classes, or its"
             ' choice', str, 'soft', 'NAME', choices=('soft', 'hard')),
    )),
)
_PAIRS = ('scale', 'ratio', 'cutmix_minmax')
_METRICS = {
    'classification': ('top1', 'top5', 'loss'),
    'multilabel': ('map', 'micro_f1', 'macro_f1', 'sample_f1', 'loss'),
}


def train_parser() -> argparse.ArgumentParser:
    """Build the command line of `train.py`."""
    return build_parser(
        "Train a timm model, with --netaug inside a wider super-network. Flags and defaults are timm's.", TRAIN_FLAGS)


def check_train_args(args: argparse.Namespace) -> None:
    """Refuse, before anything is read or written, flags that would be ignored or would fail later.

    Raises:
        UserError: One sentence with the flag's name.
    """
    check_flags(TRAIN_FLAGS, args, args.netaug)
    _check_loss(args)
    _check_distillation(args)
    _check_train_sizes(args)
    _check_augmentation(args)
    check_shared(args)
    if args.netaug and args.torchcompile and args.grad_checkpointing:
        raise UserError('--torchcompile and --grad-checkpointing do not go together with --netaug: compiled code'
                        ' cannot bring back the widths of the forward pass. Leave one of the two out.')
    if args.local_rank and 'LOCAL_RANK' not in os.environ:
        raise UserError('--local_rank is set by old launchers: start the processes with torchrun.')
    if args.pretrained_path and args.initial_checkpoint:  # beside --resume, they are what the run was begun with
        raise UserError('Give only one of --pretrained-path and --initial-checkpoint.')
    if os.path.isabs(args.experiment) or os.pardir in args.experiment.split(os.sep):
        raise UserError(f'--experiment {args.experiment} leaves the folder of --output: give the name of a folder.')
    if args.resume == 'auto' and not args.experiment:
        raise UserError('--resume auto needs --experiment: the name of the folder that it looks for a checkpoint in.')


def flag_of_weights(args: argparse.Namespace) -> str:
    """Return the flag that gives the model's initial weights, '' for a model that is trained from scratch."""
    given = [name for name in ('pretrained', 'pretrained_path', 'initial_checkpoint') if getattr(args, name)]
    return flag_name(given[0]) if given else ''


def loss_of(args: argparse.Namespace) -> str:
    """Return timm's name of the loss that the flags choose."""
    chosen = 'jsd' if args.jsd_loss else 'bce' if args.bce_loss else args.loss
    return chosen or ('bce' if args.task == 'multilabel' else 'ce')


def mixes_images(args: argparse.Namespace) -> bool:
    """Return whether images and their labels are mixed."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def _check_loss(args: argparse.Namespace) -> None:
    metrics = _METRICS[args.task]
    if args.task == 'multilabel' and args.eval_metric == 'top1':  # timm's default, of the other task
        args.eval_metric = metrics[0]
    if args.eval_metric not in metrics:
        raise UserError(f'--eval-metric must be one of {", ".join(metrics)}, got {args.eval_metric!r}.')
    loss = loss_of(args)
    if args.jsd_loss and args.bce_loss:
        raise UserError('--jsd-loss and --bce-loss are two losses: choose one.')
    if args.task == 'multilabel' and loss not in MULTI_LABEL_LOSS_TYPES:
        raise UserError(f'--loss {loss} is for one class per image; --task multilabel takes one of'
                        f' {", ".join(MULTI_LABEL_LOSS_TYPES)}.')
    if args.task != 'multilabel' and loss in ('twoway', 'zlpr', 'db'):
        raise UserError(f'--loss {loss} needs --task multilabel.')
    if args.task != 'multilabel' and args.target_format != 'indices':
        raise UserError('--target-format does nothing without --task multilabel.')
    if loss in ('twoway', 'zlpr') and (args.smoothing or mixes_images(args)):
        raise UserError(f'--loss {loss} takes labels of 0 and 1 alone: add --smoothing 0, and leave --mixup and'
                        f' --cutmix out.')
    if args.task == 'multilabel' and args.kd_model_name:
        raise UserError('--kd-model-name does not go together with --task multilabel: distillation compares classes'
                        ' that exclude each other.')
    if args.task == 'multilabel' and args.netaug_distill:
        raise UserError('--netaug-distill does not go together with --task multilabel: distillation compares classes'
                        ' that exclude each other.')
    if args.task == 'multilabel' and args.aug_splits:
        raise UserError('--aug-splits does not go together with --task multilabel.')
    if loss == 'jsd' and args.aug_splits < 2:
        raise UserError('--loss jsd needs --aug-splits of at least 2.')
    weighted = loss == 'bce' or (loss == 'asl' and args.task == 'multilabel')
    for dest, allowed, needed in (
            *((d, loss == 'bce', '--loss bce') for d in ('bce_sum', 'bce_target_thresh', 'bce_pos_weight')),
            *((d, loss == 'poly', '--loss poly') for d in ('poly_epsilon', 'poly_gamma')),
            *((d, weighted, '--loss bce or asl') for d in ('loss_pos_weight', 'loss_class_weight'))):
        flag = next(flag for flag in all_flags(TRAIN_FLAGS) if flag.dest == dest)
        if flag in given_flags(TRAIN_FLAGS, args) and not allowed:
            raise UserError(f'{flag_name(dest)} does nothing without {needed}.')
    if args.poly_gamma and args.task != 'multilabel':
        raise UserError('--poly-gamma does nothing without --task multilabel.')
    if args.bce_pos_weight is not None and args.loss_pos_weight is not None:
        raise UserError('--bce-pos-weight is the same as --loss-pos-weight: give one of the two.')
    computed = {args.loss_pos_weight, args.loss_class_weight} & {'neg_pos', 'inv_freq', 'effective_num'}
    if (loss == 'db' or computed) and not args.class_stats:
        named = '--loss db' if loss == 'db' else f'The weight {min(computed)}'
        raise UserError(f'{named} needs --class-stats FILE: JSON with num_samples and pos_counts.')
    if args.class_stats and not (loss == 'db' or computed):
        raise UserError('--class-stats does nothing without --loss db or a weight that is computed (neg_pos, inv_freq,'
                        ' effective_num).')


def _check_distillation(args: argparse.Namespace) -> None:
    kind = args.kd_distill_type
    if args.netaug and args.kd_model_name and kind != 'logit':
        raise UserError(f'--kd-distill-type {kind} does not go together with --netaug: both of its sub-networks learn'
                        f' from logits, their features have different widths. Use logit.')
    if args.task_loss_weight is not None and args.task_loss_weight > 1 and args.distill_loss_weight is None:
        raise UserError('--task-loss-weight above 1 needs --distill-loss-weight, which would be negative otherwise.')
    for dest, wanted in (('kd_student_feature_dim', 'feature'), ('kd_teacher_feature_dim', 'feature'),
                         ('kd_token_distill_type', 'token')):
        if getattr(args, dest) not in (None, 'soft') and (kind != wanted or not args.kd_model_name):
            raise UserError(f'{flag_name(dest)} does nothing without --kd-distill-type {wanted}.')


def _check_train_sizes(args: argparse.Namespace) -> None:
    sizes = args.train_img_sizes or []
    for dest in ('train_batch_sizes', 'train_size_probs'):
        values = getattr(args, dest)
        if values and len(values) != len(sizes):
            raise UserError(f'{flag_name(dest)} needs a value for each of the {len(sizes)} --train-img-sizes, got'
                            f' {len(values)}.')


def _check_augmentation(args: argparse.Namespace) -> None:
    for dest in _PAIRS:
        if getattr(args, dest) is not None and len(getattr(args, dest)) != 2:
            raise UserError(f'{flag_name(dest)} takes two numbers, got {len(getattr(args, dest))}.')
        if getattr(args, dest) is not None and getattr(args, dest)[0] > getattr(args, dest)[1]:
            raise UserError(f'{flag_name(dest)} takes the smaller number first, got'
                            f' {" ".join(f"{v:g}" for v in getattr(args, dest))}.')
    if args.train_crop_mode in (None, 'rrc') and args.scale[1] > 1:
        raise UserError(f'--scale must be at most 1, got {args.scale[1]:g}: a crop is a part of the image.')
    mixed = mixes_images(args)
    if mixed and any(size % 2 for size in args.train_batch_sizes or [args.batch_size]):
        raise UserError('--mixup and --cutmix need an even --batch-size.')
    if mixed and loss_of(args) == 'asl' and args.task != 'multilabel':
        raise UserError('--loss asl takes one class per image: leave --mixup and --cutmix out.')
    if args.aug_splits == 1:
        raise UserError('--aug-splits must be at least 2.')
    if args.aug_splits and args.netaug_batch_fraction not in (None, 1):
        raise UserError('--netaug-batch-fraction does not go together with --aug-splits, whose batches are made of'
                        ' parts: leave one of the two out.')
    if args.aug_splits and not args.no_prefetcher and mixed:
        raise UserError('--aug-splits with --mixup or --cutmix needs --no-prefetcher.')
    if args.split_bn and args.aug_splits < 2 and not args.resplit:
        raise UserError('--split-bn needs --aug-splits or --resplit.')
    if args.drop_path is not None and args.drop_connect is not None:
        raise UserError('--drop-connect is the old name of --drop-path: leave it out.')


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
        unused = sorted({*fields} - {'width_mults', 'expand_mults', 'divisor', 'from_stage'})
        if args.netaug:
            raise UserError('--netaug-init does nothing with --netaug, which starts from these weights: leave it out.')
        if unused:
            raise UserError(f'{flag_name(f"netaug_{unused[0]}")} does nothing with --netaug-init: leave it out.')
        if flag_of_weights(args):
            raise UserError(f'--netaug-init is for a training from scratch: leave it out, or {flag_of_weights(args)}.')
    elif not args.netaug:
        if fields:
            raise UserError('NetAug flags do nothing without --netaug: add it, or leave them out.')
        return None
    try:
        return split_fields(fields)
    except ValueError as e:
        flag = re.sub(r'NetAug(?:Config|Training)\.(\w+)', lambda m: '--netaug-' + m[1].replace('_', '-'), str(e))
        raise UserError(flag) from e
