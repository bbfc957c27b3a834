"""Build timm's loaders of training and validation from the flags of `train.py`."""
import logging
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader, create_transform
from torch.utils.data import IterableDataset

from ..errors import UserError, rewording
from ..io.data import check_channels, check_split, class_names, encode_targets, labels_of_folder, open_dataset
from .common_flags import data_source, target_of
from .flags import flag_name
from .train_flags import flag_of_weights, mixes_images

__all__ = ['Splits', 'open_splits', 'set_up_loaders']

_logger = logging.getLogger('train')


@dataclass
class Splits:
    """The data sets of training and validation (of a detector: their annotations), and the names of their classes (None
    if they do not name them)."""
    train: Any
    validation: Any
    class_names: Optional[List[str]]


def open_splits(args, channels: int) -> Splits:
    """Open both splits, and set the number of classes if no flag does.

    Args:
        channels: Number of channels of the model's input.

    Raises:
        UserError: A split cannot be opened, or its classes do not fit the other split or `--num-classes`.
    """
    source = data_source(args)
    common = dict(batch_size=args.batch_size, seed=args.seed, target=target_of(args))
    train = open_dataset(
        source, args.train_split, channels, is_training=True, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples, **common)
    validation = open_dataset(
        source, args.val_split, channels, is_training=False, num_samples=args.val_num_samples, **common)
    for dest in ('epoch_repeats', 'train_num_samples', 'val_num_samples'):
        if getattr(args, dest) and not isinstance(train, IterableDataset):
            raise UserError(f'{flag_name(dest)} is for iterable data sets alone (tfds, wds, hfids): leave it out.')
    check_split(train, args.data_dir, args.train_split)
    check_split(validation, args.data_dir, args.val_split)
    names, validation_names = class_names(train), class_names(validation)
    if names and validation_names and names != validation_names:
        odd = sorted(set(names) ^ set(validation_names))
        if not odd:
            raise UserError(f'The two splits have the same classes in another order: {names[:5]} in {args.train_split},'
                            f' and {validation_names[:5]} in {args.val_split}. Give both the same order.')
        raise UserError(f'The two splits have different classes ({", ".join(odd[:5])}), so their labels would not'
                        f' agree: correct the folders, or give the classes with --class-map.')
    unseen = labels_of_folder(validation) - labels_of_folder(train)
    if names and unseen and not flag_of_weights(args) and not args.resume:
        raise UserError(f'The class {names[min(unseen)]} has images in {args.val_split} and none in'
                        f' {args.train_split}: it would never be learned.')
    if names:
        _check_number_of_classes(args, names)
    elif args.num_classes is None and args.task == 'multilabel':
        raise UserError('--task multilabel needs --num-classes, because the data set does not name its classes.')
    encode_targets((train, validation), args.num_classes, target_of(args))
    return Splits(train, validation, names)


def _check_number_of_classes(args, names: List[str]) -> None:
    if args.num_classes is None:
        args.num_classes = len(names)
        _logger.info(f'The data set has {len(names)} classes, so the classifier has {len(names)} outputs (--num-classes'
                     f' sets another number).')
    if len(names) == 1 and args.task != 'multilabel':
        raise UserError(f'The data set has one class, {names[0]}, and a classifier needs at least two: put the images'
                        f' of each class into a folder of their own below {args.train_split}.')
    if args.task == 'multilabel' and len(names) != args.num_classes:
        raise UserError(f'labels.csv has {len(names)} classes, but --num-classes is {args.num_classes}: leave the flag'
                        f' out.')
    if len(names) > args.num_classes:
        raise UserError(f'The data set has {len(names)} classes, but the model has {args.num_classes}:'
                        f' add --num-classes {len(names)}.')
    if len(names) < args.num_classes:
        _logger.warning(f'The model has {args.num_classes} classes, but the data set has {len(names)}:'
                        f' --num-classes {len(names)} would make the model smaller.')


def _set_up_mixing(args, size: Sequence[int]) -> Tuple[Optional[Callable], Optional[Callable]]:
    """Return the loader's collate function that mixes images, and the function that mixes a finished batch. At most one
    of the two is not None."""
    minmax = args.cutmix_minmax
    if minmax and any(int(side * minmax[0]) >= int(side * minmax[1]) for side in size):
        raise UserError(f'--cutmix-minmax {minmax[0]:g} {minmax[1]:g} are the same number of pixels of an image of'
                        f' {" x ".join(map(str, size))}: take numbers further apart.')
    if not mixes_images(args):
        return None, None
    kwargs = dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
        multi_label=args.task == 'multilabel',
    )
    return (None, Mixup(**kwargs)) if args.no_prefetcher else (FastCollateMixup(**kwargs), None)


def set_up_loaders(args, splits: Splits, data_config: Dict[str, Any], device: torch.device, dtype) -> Tuple[Any, ...]:
    """Build the loaders of training and validation. Return both, and the mixup function (or None)."""
    dataset_train, dataset_eval = splits.train, splits.validation
    if args.aa:
        with rewording(f'--aa {args.aa} is not a policy of timm, such as rand-m9-mstd0.5, augmix-m3 or v0'):
            create_transform(data_config['input_size'], is_training=True, auto_augment=args.aa)

    collate_fn, mixup_fn = _set_up_mixing(args, data_config['input_size'][1:])
    if args.aug_splits:
        dataset_train = AugMixDataset(dataset_train, num_splits=args.aug_splits)

    scheduled = dict(
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
    ) if args.train_img_sizes else {}
    common = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        use_prefetcher=not args.no_prefetcher,
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        device=device,
        img_dtype=dtype,
        # Persistent workers would continue with the random state of the last epoch, which a resumed run does not know.
        persistent_workers=False,
    )
    with rewording('The loaders cannot be built', AssertionError, ValueError, TypeError):
        loader_train = create_loader(
            dataset_train,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            re_split=args.resplit,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            num_aug_splits=args.aug_splits,
            interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
            collate_fn=collate_fn,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            worker_seeding=args.worker_seeding,
            **scheduled,
            **common,
        )
        loader_eval = create_loader(
            dataset_eval,
            batch_size=args.validation_batch_size or args.batch_size,
            is_training=False,
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            crop_mode=data_config['crop_mode'],
            **common,
        )
    check_channels(dataset_eval, data_config['input_size'][0])
    if not len(loader_train):
        raise UserError(f'The train split has fewer images than a batch ({args.batch_size}): use a smaller'
                        f' --batch-size.')
    if not (args.aug_repeats or args.train_img_sizes):  # then an epoch has another number of images
        left_out = len(dataset_train) - len(loader_train) * args.batch_size * args.world_size
        if left_out > len(dataset_train) / 10:
            _logger.warning(f'Each epoch leaves out {left_out:,} of {len(dataset_train):,} training images, because'
                            f' the last batch would not be full: another --batch-size can use more of them.')
    return loader_train, loader_eval, mixup_fn
