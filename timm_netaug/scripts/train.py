"""Train a timm model, with `--netaug` inside a wider super-network.

    python train.py --data-dir DATA --num-classes 10 --model netaug_mbv2_tiny --netaug

Flags and defaults are those of timm's own script; what is trained, saved and evaluated goes through timm's library
(data sets, loaders, optimizers, schedulers, task, evaluator, saver).
"""
import importlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
import torchvision
import yaml
from timm import create_model
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    create_loader,
    resolve_input_data_config,
)
from timm.layers import convert_splitbn_model, set_fast_norm
from timm.models import resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    AverageMeter,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    get_outdir,
    init_distributed_device,
    is_primary,
    random_seed,
    reduce_tensor,
    setup_default_logging,
    trim_summary,
    update_summary,
)

import timm_netaug

from ..checkpoint import AtomicSaver, aside, classes_in_file, describe_run, read_checkpoint
from ..errors import UserError, check_model_name, told_plainly
from .args import FREE_FLAGS, check_train_args, netaug_config, parse_args, train_parser
from .curves import write_curves
from .data import check_split, class_names, open_dataset
from .device import choose_device, mixed_precision
from .evaluate import evaluate, progress_bar

_logger = logging.getLogger('train')


def set_up_device(args) -> torch.device:
    """Choose the device and join the other processes."""
    choose_device(args, _logger)
    try:
        for name in args.device_modules or ():
            importlib.import_module(name)
        return init_distributed_device(args)
    except (ImportError, RuntimeError, AssertionError) as e:
        raise UserError(f'--device {args.device} can not be used: {str(e).splitlines()[0]}') from e


def set_up_model(args) -> nn.Module:
    """Build the stock model, with whatever weights it starts from."""
    check_model_name(args.model)
    for flag in ('pretrained_path', 'initial_checkpoint'):
        if getattr(args, flag) and not os.path.isfile(getattr(args, flag)):
            raise UserError(f'--{flag.replace("_", "-")}: there is no file {getattr(args, flag)}.')
    pretrained, overlay = args.pretrained, {}
    if args.pretrained_path:
        pretrained = True
        classes = classes_in_file(args.pretrained_path, args.model)
        overlay = dict(file=args.pretrained_path, num_classes=-1 if classes is None else classes)
        if classes is not None and args.num_classes not in (None, classes):
            _logger.info(f'The weights are for {classes} classes, not {args.num_classes}: the classifier is a new one.')
    optional = dict(  # models without such an argument are only asked where a flag is given
        drop_connect_rate=args.drop_connect,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        global_pool=args.gp,
    )
    try:
        model = create_model(
            pretrained=pretrained,
            checkpoint_path=args.initial_checkpoint or None,
            **resolve_model_input_args(
                args.model,
                vars(args),
                in_chans=args.in_chans,
                num_classes=args.num_classes,
                drop_rate=args.drop,
                pretrained_cfg_overlay=overlay,
                **optional,
                **args.model_kwargs,
            ),
        )
    except TypeError as e:
        raise UserError(f'{args.model} does not take one of the arguments given: {e}.') from e
    except (FileNotFoundError, RuntimeError, ValueError, AssertionError) as e:
        hint = ' (--pretrained-path takes weights with another classifier, or of the reference implementation.)'
        raise UserError(f'{args.model} can not be built: {" ".join(str(e).split())[:300]}'
                        + (hint if args.initial_checkpoint else '')) from e
    if isinstance(model, timm_netaug.SuperNet):
        raise UserError('Use --netaug instead of --model-kwargs netaug=...')
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    return model


@torch.no_grad()
def set_up_head(args, model: nn.Module) -> None:
    if args.head_init_scale is not None:
        for p in model.get_classifier().parameters():
            p.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)


def set_up_data(args, data_config: Dict[str, Any], device: torch.device, dtype) -> Tuple[Any, Any, Any, Any]:
    """Build both loaders; returns them with the mixup function (or None) and the names of the classes (or None)."""
    channels = data_config['input_size'][0]
    common = dict(batch_size=args.batch_size, seed=args.seed, class_map=args.class_map)
    dataset_train = open_dataset(
        args, args.train_split, channels, is_training=True, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples, **common)
    dataset_eval = open_dataset(
        args, args.val_split, channels, is_training=False, num_samples=args.val_num_samples, **common)
    check_split(dataset_train, args.data_dir, args.train_split)
    check_split(dataset_eval, args.data_dir, args.val_split)
    names, eval_names = class_names(dataset_train), class_names(dataset_eval)
    if names and eval_names and names != eval_names:
        odd = sorted(set(names) ^ set(eval_names))
        raise UserError(f'The two splits have different classes ({", ".join(odd[:5])}), so their labels would not'
                        f' agree: mend the folders, or give the classes with --class-map.')
    if names and len(names) > args.num_classes:
        raise UserError(f'The data set has {len(names)} classes, the model {args.num_classes}:'
                        f' add --num-classes {len(names)}.')
    if names and len(names) < args.num_classes:
        _logger.warning(f'The model has {args.num_classes} classes, the data set {len(names)}:'
                        f' --num-classes {len(names)} would make it smaller.')

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
        # Workers that live on would draw on where the last epoch ended, which a resumed run can not know.
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
        raise UserError(f'The loaders can not be built: {e}') from e
    if not len(loader_train):
        raise UserError(f'The train split has fewer images than a batch ({args.batch_size}): use a smaller -b.')
    return loader_train, loader_eval, mixup_fn, names


def set_up_task(args, model: nn.Module, device: torch.device) -> ClassificationTask:
    mixup = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    criterion_kwargs = dict(
        loss_type='jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=mixup and not args.jsd_loss,
        jsd_splits=args.aug_splits,
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        pos_weight=args.bce_pos_weight,
    )
    if args.netaug:
        return timm_netaug.NetAugTask(model, criterion_kwargs=criterion_kwargs, seed=args.seed, device=device)
    return ClassificationTask(model, criterion_kwargs=criterion_kwargs, device=device)


def set_up_lr(args) -> None:
    """Work out the learning rate from the images per update, where none was given."""
    if args.lr is not None:
        return
    images = args.batch_size * args.world_size * args.grad_accum_steps
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = images / args.lr_base_size
    args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    if is_primary(args):
        _logger.info(f'Learning rate {args.lr:g}: {args.lr_base:g} x {images} / {args.lr_base_size} images ({scale}).')


# Fields of an optimizer's groups that flags set; others may be counters.
_OF_FLAGS = ('lr', 'weight_decay', 'momentum', 'betas', 'eps', 'lr_scale')


def check_resume(args, parser, run: Dict[str, Any]) -> List[Optional[float]]:
    """Refuse a checkpoint of another model or training, naming what differs, and warn of other flags.

    Returns:
        The metric after every epoch so far, which schedules that follow it are stepped with.
    """
    saved = read_checkpoint(args.resume).get('args')
    there = getattr(saved, 'run', None)
    if there is None:
        raise UserError(f'--resume: {args.resume} is not a checkpoint of train.py.')
    old, new = ({'architecture': r['architecture'], **r['model_args'], 'classes': r['class_names']}
                for r in (there, run))
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if changed:
        raise UserError(f'--resume: {args.resume} is of another model: ' + ', '.join(
            f'{k} is {old.get(k)!r} there and {new.get(k)!r} here' for k in changed) + '.')
    if bool(there.get('netaug')) != bool(run.get('netaug')):
        raise UserError(f'--resume: {args.resume} was trained with{"" if there.get("netaug") else "out"} --netaug.')
    if saved.opt != args.opt and not args.no_resume_opt:
        raise UserError(f'--resume: {args.resume} was trained with --opt {saved.opt}: take the same, or start the'
                        f' optimizer anew with --no-resume-opt.')
    changed = [a.dest for a in parser._actions if a.dest not in (*FREE_FLAGS, 'help', 'num_classes')
               and getattr(saved, a.dest, None) != getattr(args, a.dest)]
    if is_primary(args) and changed:
        _logger.warning('Not the training that the checkpoint is of: ' + ', '.join(
            f'{k} was {getattr(saved, k, None)!r}, is {getattr(args, k)!r}' for k in changed) + '.')
    return there.get('metrics', [])


def set_up_saver(args, parser, task: ClassificationTask, optimizer, loss_scaler, start_epoch: int) -> AtomicSaver:
    """Set up all that the first process writes: the run's folder, its provenance, and the checkpoints."""
    size = args.run['data_config']['input_size'][-1]
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder, resumed_here = set_up_folder(args, name, start_epoch)
    write_provenance(args, parser, folder)
    saver = AtomicSaver(
        task.get_trainable_module(),
        optimizer,
        args=args,
        amp_scaler=loss_scaler,
        checkpoint_dir=folder,
        recovery_dir=folder,
        decreasing=args.eval_metric == 'loss',
        max_history=args.checkpoint_hist,
        task=task,
    )
    if resumed_here:
        saver.load_state_dict_from_checkpoint(args.resume)
    if args.log_wandb:
        try:
            import wandb
        except ImportError:
            raise UserError('--log-wandb needs the package wandb: pip install wandb.') from None
        wandb.init(project=args.wandb_project, name=args.experiment or None, config=vars(args), tags=args.wandb_tags,
                   resume='must' if args.wandb_resume_id else None, id=args.wandb_resume_id or None)
    return saver


def start_of_epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, 1)).generate_state(1)[0])


def train_one_epoch(
        epoch: int,
        task: ClassificationTask,
        loader,
        optimizer: torch.optim.Optimizer,
        args,
        device: torch.device,
        dtype=None,
        autocast=nullcontext,
        loss_scaler=None,
        lr_scheduler=None,
        mixup_fn=None,
        saver=None,
        updates_per_epoch: int = 1,
) -> Dict[str, float]:
    """Train for an epoch; returns the means of the task's losses and of top-1 in training, weighted by images."""
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if mixup_fn is not None:
            mixup_fn.mixup_enabled = False
        elif getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False
    model = task.get_trainable_module()
    model.train()
    second_order = getattr(optimizer, 'is_second_order', False)
    primary = is_primary(args)
    meters: Dict[str, AverageMeter] = {}
    pending: List[Tuple[Dict[str, torch.Tensor], int]] = []  # not read back yet: reading waits for the device
    accum = args.grad_accum_steps
    batches = len(loader)
    last_accum = batches % accum or accum
    num_updates = epoch * updates_per_epoch
    images = 0
    start = time.time()
    optimizer.zero_grad()

    bar = progress_bar(loader, f'Epoch {epoch}', primary)
    for i, (input, target) in enumerate(bar):
        last = i == batches - 1
        update = last or (i + 1) % accum == 0
        steps = last_accum if i >= batches - last_accum else accum
        if args.netaug and i % accum == 0:
            task.start_update(num_updates)
        if args.no_prefetcher:
            input, target = input.to(device=device, dtype=dtype), target.to(device=device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        with nullcontext() if update else task.no_sync():
            with autocast():
                result = task(input, target)
                loss = result['loss'] / steps if steps > 1 else result['loss']
            if loss_scaler is not None:
                loss_scaler(
                    loss,
                    optimizer,
                    clip_grad=args.clip_grad,
                    clip_mode=args.clip_mode,
                    parameters=task.get_clip_parameters(exclude_head=args.clip_mode == 'agc'),
                    create_graph=second_order,
                    need_update=update,
                )
            else:
                loss.backward(create_graph=second_order)
                if update:
                    if args.clip_grad is not None:
                        dispatch_clip_grad(
                            task.get_clip_parameters(exclude_head=args.clip_mode == 'agc'),
                            value=args.clip_grad,
                            mode=args.clip_mode,
                        )
                    optimizer.step()
        images += input.shape[0] * args.world_size
        values = {k: v.detach() for k, v in result.items() if k == 'loss' or k.endswith('_loss')}
        if target.ndim == 1 and not args.aug_splits:  # not mixed
            values['top1'] = 100 * (result['output'].detach().argmax(1) == target).float().mean()
        pending.append((values, input.shape[0]))
        if update:
            num_updates += 1
            if args.netaug and num_updates == epoch * updates_per_epoch + 1:
                try:
                    task.check_optimizer(optimizer)
                except ValueError as e:
                    raise UserError(f'{e} On the command line that is --netaug-no-sort.') from e
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
        if args.synchronize_step and device.type == 'cuda':
            torch.cuda.synchronize()

        if last or (update and i % args.log_interval < accum):
            for values, size in pending:
                for key, value in values.items():
                    value = reduce_tensor(value, args.world_size) if args.distributed else value
                    meters.setdefault(key, AverageMeter()).update(value.item(), size)
            pending.clear()
            if not math.isfinite(meters['loss'].avg):
                raise UserError(f'The loss is {meters["loss"].val} in epoch {epoch}, step {i}: try a lower rate.'
                                f' The best checkpoint so far is untouched.')
            if primary:
                lr = np.mean([group['lr'] for group in optimizer.param_groups])
                line = (f'loss {meters["loss"].val:.4g} ({meters["loss"].avg:.4g})  '
                        f'{images / (time.time() - start):.1f} images/s  lr {lr:.3e}')
                if bar.disable:
                    _logger.info(f'Epoch {epoch} [{i + 1}/{batches}]  {line}')
                else:
                    bar.set_postfix_str(line)
                if args.save_images and saver is not None:
                    torchvision.utils.save_image(
                        input, os.path.join(saver.checkpoint_dir, f'train-batch-{i}.jpg'), padding=0, normalize=True)
        if saver is not None and args.recovery_interval and (last or (i + 1) % args.recovery_interval == 0):
            saver.save_recovery(epoch, batch_idx=i)
        if update and lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates, metric=meters['loss'].avg if meters else None)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return {key: meter.avg for key, meter in meters.items()}


def set_up_folder(args, name: str, start_epoch: int) -> Tuple[str, bool]:
    """Make the folder of a run, and keep the epochs before the one that it goes on with.

    Returns:
        The folder, and whether it is the one of the checkpoint that is resumed.

    Raises:
        UserError: The run would write over another one, or over a later part of itself.
    """
    folder = get_outdir(args.output or os.path.join('output', 'train'), name)
    summary, last = os.path.join(folder, 'summary.csv'), os.path.join(folder, 'last.pth.tar')
    if args.resume and os.path.samefile(os.path.dirname(os.path.abspath(args.resume)), folder):
        if os.path.exists(last) and read_checkpoint(last)['epoch'] >= start_epoch:
            raise UserError(f'{folder} holds later epochs than {args.resume}: go on with {last}, or choose another'
                            f' --experiment to train them anew.')
        if os.path.exists(summary):
            shutil.copyfile(summary, f'{summary}.aside')
            trim_summary(f'{summary}.aside', start_epoch)
            os.replace(f'{summary}.aside', summary)
        return folder, True
    if os.path.exists(last):
        raise UserError(f'{folder} holds a run already: go on with it by --resume {last}, or choose another'
                        f' --experiment.')
    if os.path.exists(summary):
        if len(Path(summary).read_text().splitlines()) > 2:
            raise UserError(f'{folder} holds the results of a run: choose another --experiment.')
        os.remove(summary)  # of a run that was killed before its first checkpoint
    if args.resume:
        _logger.warning(f'{folder} is not the folder of {args.resume}: best metric and summary begin anew.')
    return folder, False


def write_provenance(args, parser, output_dir: str) -> None:
    """Write the resolved flags (as a config for -c) and the versions beside the results."""
    left_out = ['help', 'config', 'data', 'local_rank', 'resume', 'no_resume_opt']
    if not args.device_given:  # what stood in for it here need not be right elsewhere
        left_out.append('device')
    flags = {a.dest: getattr(args, a.dest) for a in parser._actions if a.dest not in left_out}
    flags = {k: v for k, v in flags.items() if v not in (None, [])}
    with aside(os.path.join(output_dir, 'args.yaml')) as f:
        yaml.safe_dump(flags, f, sort_keys=True)
    revision = None
    checkout = Path(timm_netaug.__file__).parents[1]
    if (checkout / '.git').exists():  # not that of a project around an environment
        try:
            git = ['git', 'describe', '--always', '--dirty']
            revision = subprocess.run(git, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    versions = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        timm=timm.__version__,
        timm_netaug=timm_netaug.__version__,
        revision=revision,
        command=[os.path.basename(sys.argv[0]), *sys.argv[1:]],
    )
    with aside(os.path.join(output_dir, 'versions.json')) as f:
        json.dump(versions, f, indent=2)
        f.write('\n')


def train() -> None:
    """Train as the command line says.

    Raises:
        UserError: It can not be done as it stands; the message says what to change.
    """
    setup_default_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)
    parser = train_parser()
    args = parse_args(parser, sys.argv[1:])
    check_train_args(parser, args)
    config = netaug_config(args)
    device = set_up_device(args)
    primary = is_primary(args)
    if not primary:
        _logger.setLevel(logging.WARNING)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else torch.float32
    random_seed(args.seed, args.rank)
    if args.fast_norm:
        set_fast_norm()

    model = set_up_model(args)
    try:
        data_config = resolve_input_data_config(model, args=vars(args))
    except (ValueError, AssertionError) as e:
        raise UserError(f'The input can not be set up: {e}') from e
    loader_train, loader_eval, mixup_fn, names = set_up_data(args, data_config, device, dtype)
    run = describe_run(model, data_config, names)
    run['ema'] = args.model_ema and not args.model_ema_force_cpu  # then the metric is that of the moving average
    if config is not None:
        try:
            model = timm_netaug.augment(model, config)
        except ValueError as e:
            raise UserError(f'--netaug: {e} The models that it takes are listed in docs/models.md.') from e
        if not (args.pretrained or args.pretrained_path or args.initial_checkpoint):
            model.init_weights()
        run['netaug'] = model.netaug_config.to_dict()
    set_up_head(args, model)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _logger.info(f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters in training'
                 + (f', NetAug {run["netaug"]}' if config else ''))

    set_up_lr(args)
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (ValueError, TypeError, AssertionError) as e:
        raise UserError(f'The optimizer {args.opt} can not be built: {e}') from e
    autocast, loss_scaler = mixed_precision(args, device), None
    if args.amp and device.type == 'cuda' and args.amp_dtype == 'float16':
        loss_scaler = NativeScaler(device=device.type)

    task = set_up_task(args, model, device)
    resume_epoch = None
    history: List[Optional[float]] = []  # the metric after every epoch
    if args.resume:
        history = check_resume(args, parser, run)
        given = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
        try:
            resume_epoch = resume_task_checkpoint(
                task,
                args.resume,
                optimizer=None if args.no_resume_opt else optimizer,
                loss_scaler=None if args.no_resume_opt else loss_scaler,
                log_info=primary,
            )
        except (ValueError, RuntimeError) as e:
            raise UserError(f'--resume: {e}') from e
        for group, flags in zip(optimizer.param_groups, given):  # the flags hold, not those of the checkpoint
            fields = {k: v for k, v in flags.items() if k in (*_OF_FLAGS, *args.opt_kwargs)}
            group.update(fields, initial_lr=flags['lr'])
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        ddp_kwargs = dict(broadcast_buffers=False) if args.no_ddp_bb and not args.netaug else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **ddp_kwargs)

    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    decreasing = args.eval_metric == 'loss'
    try:
        lr_scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing), updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError) as e:
        raise UserError(f'The schedule {args.sched} can not be built: {e}') from e
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        elif len(history) >= start_epoch:
            for epoch in range(start_epoch):  # a plateau is found in the whole history alone
                lr_scheduler.step(epoch + 1, history[epoch])
        else:
            lr_scheduler.step(start_epoch)
    history = (history + [None] * start_epoch)[:start_epoch]

    if args.resume and start_epoch == num_epochs:
        _logger.info(f'All {num_epochs} epochs of {args.resume} are done.')
        return
    if start_epoch >= num_epochs:
        raise UserError(f'There is nothing to train: the run would start at epoch {start_epoch} of {num_epochs}.'
                        f' Raise --epochs.')
    if args.warmup_epochs >= num_epochs and primary:
        _logger.warning(f'All {num_epochs} epochs are warm-up (--warmup-epochs {args.warmup_epochs}).')

    saver, refusal = None, ''
    if primary:
        args.run = run  # travels in every checkpoint
        try:
            saver = set_up_saver(args, parser, task, optimizer, loss_scaler, start_epoch)
            _logger.info(f'Epochs {start_epoch} to {num_epochs - 1}, results in {saver.checkpoint_dir}')
        except (UserError, OSError) as e:
            refusal = str(e)
    if args.distributed:  # what the first process alone finds wrong ends them all
        refusals = [refusal]
        torch.distributed.broadcast_object_list(refusals)
        refusal = refusals[0]
    if refusal:
        raise UserError(refusal)

    evaluate_ = partial(
        evaluate, loader=loader_eval, device=device, dtype=dtype, autocast=autocast, channels_last=args.channels_last,
        log_interval=args.log_interval, distributed=args.distributed, primary=primary)
    evaluator = partial(task.create_evaluator, max_samples=evaluation_sample_limit(loader_eval))
    for epoch in range(start_epoch, num_epochs):
        # Every epoch starts from seed, rank and its own number, so that a resumed run draws as an undisturbed one.
        random_seed(start_of_epoch_seed(args.seed, epoch), args.rank)
        for owner in (getattr(loader_train, 'dataset', None), getattr(loader_train, 'sampler', None)):
            if hasattr(owner, 'set_epoch'):
                owner.set_epoch(epoch)
        if args.netaug:
            task.start_epoch(epoch, num_epochs, optimizer)
        train_metrics = train_one_epoch(
            epoch, task, loader_train, optimizer, args, device, dtype, autocast, loss_scaler, lr_scheduler, mixup_fn,
            saver, updates_per_epoch)

        validate_ema = task.has_ema() and not args.model_ema_force_cpu
        if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
            for ema in (False, True) if validate_ema else (False,):
                distribute_bn(task.get_trainable_module(ema=ema), args.world_size, args.dist_bn == 'reduce')
        metrics = {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs:
            metrics = evaluate_(task.get_eval_model(), evaluator=evaluator())
            if validate_ema:
                metrics = evaluate_(task.get_eval_model(ema=True), evaluator=evaluator(), description='Validate EMA')
        history.append(metrics.get(args.eval_metric, history[-1] if history else None))  # the last one measured
        run['metrics'] = history
        if primary:
            lrs = [group['lr'] for group in optimizer.param_groups]
            # An epoch without validation leaves its columns empty, not out.
            row = metrics or dict.fromkeys(evaluator().metric_names, '')
            summary = os.path.join(saver.checkpoint_dir, 'summary.csv')
            update_summary(epoch, train_metrics, row, summary, lr=sum(lrs) / len(lrs), log_wandb=args.log_wandb)
            curves = os.path.join(saver.checkpoint_dir, 'curves.png')
            write_curves(summary, curves, f'eval_{args.eval_metric}', decreasing)
            saver.save_checkpoint(epoch, metric=metrics.get(args.eval_metric))
            _logger.info(f'Epoch {epoch}: ' + '  '.join(
                f'{split}_{k} {v:.4g}'
                for split, values in (('train', train_metrics), ('eval', metrics)) for k, v in values.items()))
        if lr_scheduler is not None:
            lr_scheduler.step(epoch + 1, history[-1])

    if args.distributed:
        torch.distributed.destroy_process_group()
    if primary and saver.best_metric is not None:
        best = os.path.join(saver.checkpoint_dir, 'model_best.pth.tar')
        loading = [f"'{run['architecture']}'", f"checkpoint_path='{best}'"] + [
            f'{k}={v!r}' for k, v in run['model_args'].items() if v or not k.startswith('drop')]
        print(f'\nBest {args.eval_metric}: {saver.best_metric:.2f} (epoch {saver.best_epoch}).'
              f' The checkpoint {best} is a stock timm model:\n\n    import timm, timm_netaug\n'
              f'    model = timm.create_model({", ".join(loading)})\n')


def main() -> None:
    with told_plainly('train.py'):
        train()


if __name__ == '__main__':
    main()
