"""The loaders of training and validation, made by timm from the flags of `train.py`."""
import logging
from typing import Any, Dict, Tuple

import torch
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader, create_transform
from torch.utils.data import IterableDataset

from ..errors import UserError, first_line
from ..io.data import check_channels, check_split, class_names, open_dataset
from .args import data_source

__all__ = ['set_up_loaders']

_logger = logging.getLogger('train')


def set_up_loaders(args, data_config: Dict[str, Any], device: torch.device, dtype) -> Tuple[Any, Any, Any, Any]:
    """Build both loaders; returns them with the mixup function (or None) and the names of the classes (or None)."""
    source, channels = data_source(args), data_config['input_size'][0]
    common = dict(batch_size=args.batch_size, seed=args.seed)
    dataset_train = open_dataset(
        source, args.train_split, channels, is_training=True, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples, **common)
    dataset_eval = open_dataset(
        source, args.val_split, channels, is_training=False, num_samples=args.val_num_samples, **common)
    for dest in ('epoch_repeats', 'train_num_samples', 'val_num_samples'):
        if getattr(args, dest) and not isinstance(dataset_train, IterableDataset):
            raise UserError(f'--{dest.replace("_", "-")} is for iterable data sets alone (tfds, wds, hfids): leave it'
                            f' out.')
    check_split(dataset_train, args.data_dir, args.train_split)
    check_split(dataset_eval, args.data_dir, args.val_split)
    names, eval_names = class_names(dataset_train), class_names(dataset_eval)
    if names and eval_names and names != eval_names:
        odd = sorted(set(names) ^ set(eval_names))
        raise UserError(f'The two splits have different classes ({", ".join(odd[:5])}), so their labels would not'
                        f' agree: mend the folders, or give the classes with --class-map.')
    if names and len(names) == 1 < args.num_classes:
        raise UserError(f'The data set has one class, {names[0]}, the model {args.num_classes}: the images of each'
                        f' class go into a folder of their own below {args.train_split}.')
    if names and len(names) > args.num_classes:
        raise UserError(f'The data set has {len(names)} classes, the model {args.num_classes}:'
                        f' add --num-classes {len(names)}.')
    if names and len(names) < args.num_classes:
        _logger.warning(f'The model has {args.num_classes} classes, the data set {len(names)}:'
                        f' --num-classes {len(names)} would make it smaller.')

    if args.aa:
        try:
            create_transform(data_config['input_size'], is_training=True, auto_augment=args.aa)
        except (AssertionError, ValueError, TypeError, KeyError) as e:
            raise UserError(f'--aa {args.aa} is no policy of timm, as rand-m9-mstd0.5, augmix-m3 or v0 are'
                            f' ({first_line(e)}).') from e

    collate_fn = mixup_fn = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        mixup_args = dict(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        if args.no_prefetcher:
            mixup_fn = Mixup(**mixup_args)
        else:
            collate_fn = FastCollateMixup(**mixup_args)
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
        # Workers that live on would draw on where the last epoch ended, which a resumed run cannot know.
        persistent_workers=False,
    )
    try:
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
    except (AssertionError, ValueError, TypeError) as e:
        raise UserError(f'The loaders cannot be built: {e}') from e
    check_channels(dataset_eval, data_config['input_size'][0])
    if not len(loader_train):
        raise UserError(f'The train split has fewer images than a batch ({args.batch_size}): use a smaller -b.')
    return loader_train, loader_eval, mixup_fn, names
