"""Train a tiny detector on a timm backbone, with `--netaug` inside a wider super-network.

    python train_detection.py --data-dir DATA --model netaug_mbv2_tiny --pretrained --img-size 224

The loop, the run's folder, schedules, checkpoints and resuming are those of `train.py`; here is what detection does in
its own way: data, model, task and pictures.
"""
import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

import torch.nn as nn
from timm.task import TrainingTask
from torch.utils.data import DataLoader, DistributedSampler

from ..detection.annotations import find_classes, read_class_map, read_split, size_notes
from ..detection.data import DetectionDataset, DetectionLoader, collate, eval_transform, train_transform
from ..detection.detector import DenseDetector, create_backbone, describe_detector, name_in_model
from ..detection.fcos import Fcos
from ..detection.folder import detector_run, load_dense_weights
from ..detection.metric import METRICS, check_metric
from ..detection.pictures import draw_results
from ..detection.task import DetectionTask, NetAugDetectionTask
from ..errors import UserError, exit_on_user_error
from ..io.checkpoint import read_weights
from ..io.run import RunDescription
from ..reference import input_config, is_reference
from .detection_flags import detection_flags, with_defaults
from .flags import Flag, build_parser, check_flags
from .loaders import Splits
from .train import train
from .train_flags import TRAIN_FLAGS, check_train_args, netaug_config

__all__ = ['Detection', 'main', 'train_detection_parser']

_logger = logging.getLogger('train')
_PICTURES = 8  # images in `detections.jpg`

# Flags of train.py that mean the same here.
_FLAGS = (
    'netaug', 'netaug_width_mults', 'netaug_expand_mults', 'netaug_divisor', 'netaug_from_stage', 'netaug_alpha',
    'netaug_stop_width_at', 'netaug_no_sort', 'netaug_batch_fraction', 'netaug_every', 'netaug_init',
    'data', 'data_dir', 'train_split', 'val_split', 'class_map',
    'model', 'pretrained', 'pretrained_path', 'initial_checkpoint', 'resume', 'no_resume_opt', 'batch_size',
    'validation_batch_size', 'grad_accum_steps', 'img_size', 'input_size', 'mean', 'std', 'interpolation',
    'model_kwargs', 'drop', 'drop_path', 'bn_momentum', 'bn_eps',
    'channels_last', 'device', 'amp', 'amp_dtype', 'pin_mem', 'local_rank', 'no_ddp_bb', 'dist_bn', 'synchronize_step',
    'opt', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'clip_grad', 'clip_mode', 'opt_kwargs',
    'sched', 'sched_on_updates', 'lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'lr_noise', 'lr_noise_pct',
    'lr_noise_std', 'lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit', 'lr_k_decay', 'warmup_lr', 'min_lr', 'epochs',
    'start_epoch', 'decay_milestones', 'decay_epochs', 'warmup_epochs', 'warmup_prefix', 'cooldown_epochs',
    'patience_epochs', 'decay_rate',
    'no_aug', 'hflip', 'vflip', 'color_jitter', 'scale', 'ratio',
    'model_ema', 'model_ema_force_cpu', 'model_ema_decay', 'model_ema_warmup',
    'seed', 'log_interval', 'val_interval', 'recovery_interval', 'checkpoint_hist', 'save_epochs', 'stop_epoch',
    'workers', 'output', 'experiment',
    'eval_metric', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
)
# Where the defaults are not those of train.py: what a detector of a few hundred thousand parameters needs.
_DEFAULTS = dict(
    model='netaug_mbv2_tiny', train_split='train', val_split='val', img_size=224, batch_size=16, epochs=100,
    opt='adamw', lr=0.002, weight_decay=0.05, warmup_epochs=1, color_jitter=0.2,
    scale=[0.3, 1.0], ratio=[0.5, 2.0], eval_metric='AP50', checkpoint_hist=1)
_HELP = dict(
    class_map='text file of class names in label order; the classes of the data where not given',
    train_split='split to train on; FOLDER/NAME of one in a subfolder, A+B for two together',
    val_split='split to validate on, likewise',
    data_dir='root of the data set, in the layout of Pascal VOC or COCO',
    model='timm backbone, local-dir:DIR or hf-hub:OWNER/NAME',
    pretrained="start from the backbone's pretrained weights",
    pretrained_path="start from these weights of the backbone (a checkpoint of train.py, a reference .pth)",
    initial_checkpoint='start from a checkpoint of a detector; its class predictions are new where the classes differ',
    img_size='height and width of the input, a multiple of 32',
    input_size='channels (3), height and width of the input',
    scale='sides of the crop, relative to the image', ratio="the crop's aspect ratio",
    no_aug='no flips, crops or colour jitter', model_kwargs="arguments of the backbone's constructor",
    eval_metric='metric that ranks checkpoints: AP50, AP, another one of the summary, or loss')


_OWN = (
    Flag('--crop-prob', 'probability of a crop around some of the objects', float, 0.5, 'P', range='[0, 1]'),
    Flag('--neck-channels', 'channels of the neck and the head', int, 48, 'N', range='[1, inf]'),
)
DETECTION_FLAGS = detection_flags(TRAIN_FLAGS, _FLAGS, _OWN, _DEFAULTS, _HELP)


def train_detection_parser() -> argparse.ArgumentParser:
    """Build the command line of `train_detection.py`."""
    return build_parser(
        'Train a tiny detector on a timm backbone, with --netaug inside a wider super-network.', DETECTION_FLAGS)


def _check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot be carried out, before anything is touched; see `check_train_args`."""
    check_flags(DETECTION_FLAGS[:1], args)
    with_defaults(TRAIN_FLAGS, args, no_prefetcher=True)
    if args.eval_metric not in (*METRICS, 'loss'):
        raise UserError(f'--eval-metric must be one of {", ".join(METRICS)}, loss, got {args.eval_metric!r}.')
    check_train_args(argparse.Namespace(**{**vars(args), 'eval_metric': 'loss'}))
    if args.input_size and args.input_size[0] != 3:
        raise UserError(f'--input-size: a detector takes images of 3 channels, got {args.input_size[0]}.')
    check_metric()


class Detection:
    """What a training of detectors does in its own way; see `train.Classification`."""
    flags = DETECTION_FLAGS
    parser = staticmethod(train_detection_parser)
    check_args = staticmethod(_check_args)

    def set_up_model(self, args: argparse.Namespace) -> Tuple[nn.Module, Dict[str, Any], Splits]:
        """Read the data, whose classes the model has, and build the dense part of the detector; returns it with how
        images are prepared in timm's terms, and the splits."""
        train, val = read_split(args.data_dir, args.train_split), read_split(args.data_dir, args.val_split)
        names = find_classes(train, val, read_class_map(args.class_map) if args.class_map else None)
        args.num_classes = len(names)
        size = args.input_size[1:] if args.input_size else [args.img_size] * 2
        fields = dict(class_names=names, channels=args.neck_channels, mean=args.mean, std=args.std,
                      interpolation=args.interpolation or None)
        backbone = self._backbone(args)
        try:
            self.config = describe_detector(
                backbone, args.num_classes, size, **{k: v for k, v in fields.items() if v is not None})
        except ValueError as e:
            raise UserError(str(e)) from e
        model = DenseDetector(backbone, self.config)
        if args.initial_checkpoint:
            load_dense_weights(model, args.initial_checkpoint)
        for note in [*train.notes, *val.notes, *size_notes(train, names, self._fcos(), self.config.img_size)]:
            _logger.warning(note)
        return model, self.config.data_config, Splits(train, val, names)

    @staticmethod
    def _backbone(args: argparse.Namespace) -> nn.Module:
        optional = dict(drop_rate=args.drop, drop_path_rate=args.drop_path, bn_momentum=args.bn_momentum,
                        bn_eps=args.bn_eps)
        kwargs = {k: v for k, v in optional.items() if v}
        if not args.pretrained_path:
            return create_backbone(args.model, args.pretrained, **kwargs, **args.model_kwargs)
        weights = read_weights(args.pretrained_path)
        overlay = dict(file=args.pretrained_path, **input_config(weights))
        backbone = create_backbone(args.model, True, pretrained_cfg_overlay=overlay, **kwargs, **args.model_kwargs)
        if is_reference(weights):  # its names are mapped by the whole model, which has refused what does not fit
            return backbone
        missing = [n for n, _ in backbone.named_parameters() if name_in_model(n, weights) is None]
        if missing:
            raise UserError(f'--pretrained-path: {args.pretrained_path} is of another model than {args.model}:'
                            f' {len(missing)} of its tensors are not there ({", ".join(missing[:2])}).')
        return backbone

    def _fcos(self) -> Fcos:
        return Fcos(self.config.num_classes, self.config.scale)

    @staticmethod
    def set_up_loaders(args, splits: Splits, data_config: Dict[str, Any], device, dtype) -> Tuple[Any, Any, None]:
        """Return the loaders of training and validation, and None for what mixes batches."""
        transform = eval_transform(data_config) if args.no_aug else train_transform(
            data_config, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter, crop_prob=args.crop_prob,
            scale=args.scale, ratio=args.ratio)
        dataset = DetectionDataset(splits.train, splits.class_names, transform, is_training=True)
        if len(dataset) // args.world_size < args.batch_size:
            raise UserError(f'The train split has fewer images than a batch ({args.batch_size}): use a smaller -b.')
        evaluated = DetectionDataset(splits.validation, splits.class_names, eval_transform(data_config))
        return _loader(dataset, args, True), _loader(evaluated, args, False), None

    def describe(self, model: nn.Module, data_config: Any, names: List[str], **fields: Any) -> RunDescription:
        return detector_run(self.config, **fields)

    def set_up_task(self, args, model: nn.Module, teacher: None, data_config: Any, device, dtype) -> TrainingTask:
        common = dict(fcos=self._fcos(), device=device, dtype=dtype)
        if not args.netaug:
            return DetectionTask(model, **common)
        return NetAugDetectionTask(model, seed=args.seed, **netaug_config(args)[1].to_dict(), **common)

    def write_pictures(self, task: TrainingTask, loader: DataLoader, folder: str) -> None:
        """Write `detections.jpg`: images of the validation, spread over the split, as the last evaluation saw them."""
        draw_results(loader.dataset, task.evaluator, self.config.class_names, os.path.join(folder, 'detections.jpg'),
                     _PICTURES)

    @staticmethod
    def how_to_load(run: RunDescription, best: str) -> str:
        return (f'Evaluate the checkpoint with\n\n    python validate_detection.py --data-dir DATA --split SPLIT'
                f' --checkpoint {best}\n')


def _loader(dataset: DetectionDataset, args: argparse.Namespace, is_training: bool) -> DataLoader:
    sampler: Optional[Any] = None
    if args.distributed and is_training:
        sampler = DistributedSampler(dataset, args.world_size, args.rank, shuffle=True, seed=args.seed, drop_last=True)
    elif args.distributed:
        sampler = range(args.rank, len(dataset), args.world_size)  # each image once: no process waits for the others
    return DetectionLoader(
        dataset,
        batch_size=args.batch_size if is_training else args.validation_batch_size or args.batch_size,
        shuffle=is_training and sampler is None,
        sampler=sampler,
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=args.pin_mem,
        drop_last=is_training,
    )


def main() -> None:
    with exit_on_user_error('train_detection.py'):
        train(Detection())


if __name__ == '__main__':
    main()
