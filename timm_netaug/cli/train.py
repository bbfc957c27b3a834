"""Train a timm model, with `--netaug` inside a wider super-network.

    python train.py --data-dir DATA --num-classes 10 --model netaug_mbv2_tiny --netaug

Flags and defaults are those of timm's own script; what is trained, saved and evaluated goes through timm's library
(data sets, loaders, optimizers, schedulers, task, evaluator, saver).
"""
import importlib
import logging
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torchvision
from timm.data import resolve_input_data_config
from timm.layers import set_fast_norm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask, evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    AverageMeter,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    is_primary,
    random_seed,
    reduce_tensor,
    set_jit_fuser,
    update_summary,
)

from ..errors import UserError, check_model_name, exit_on_user_error, rewording
from ..evaluate import evaluate, to_device
from ..io.run import RunDescription
from .build import prepare_for_training, set_up_model, set_up_task, set_up_teacher
from .command_line import parse_args
from .common_flags import target_of
from .curves import write_curves
from .device import choose_device, join_processes, keep_memory, mixed_precision, uses_channels_last
from .loaders import open_splits, set_up_loaders
from .logs import set_up_logging
from .progress import Progress
from .run_folder import GROUP_FIELDS_SET_BY_FLAGS, check_resume, find_restart, release_folder, set_up_saver, versions
from .signals import Stopped, StopSignals
from .train_flags import TRAIN_FLAGS, check_train_args, netaug_config, train_parser

_logger = logging.getLogger('train')


# Of timm's tasks and ours, in the order of the summary.
_LOSSES = ('loss', 'tiny_loss', 'task_loss', 'kd_loss', 'aug_loss', 'distill_loss')


def set_up_device(args) -> torch.device:
    """Choose the device and join the other processes.

    Raises:
        UserError: PyTorch cannot use the device here.
    """
    choose_device(args, _logger)
    if args.device == 'cpu':
        keep_memory()
    with rewording(f'--device {args.device} cannot be used', ImportError, RuntimeError, AssertionError):
        for name in args.device_modules or ():
            importlib.import_module(name)
        device = join_processes(args)
        torch.empty(0, device=device)  # raises an error if PyTorch cannot use the device
        return device


def set_up_lr(args) -> None:
    """Work out the learning rate from the images per update, where none was given."""
    if args.lr is not None:
        return
    images = args.batch_size * args.world_size * args.grad_accum_steps
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = images / args.lr_base_size
    args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    _logger.info(f'Learning rate {args.lr:g}: {args.lr_base:g} x {images} / {args.lr_base_size} images ({scale}).')


@contextmanager
def _sortable() -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        raise UserError(f'{e} On the command line that is --netaug-no-sort.') from e


def start_of_epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, 1)).generate_state(1)[0])


@contextmanager
def _enough_values() -> Iterator[None]:
    """Tell in a sentence what BatchNorm says of a batch that has no variance."""
    try:
        yield
    except ValueError as e:
        if 'more than 1 value per channel' not in str(e):
            raise
        raise UserError(f'BatchNorm needs more than one value per channel ({e}): use a larger --batch-size or'
                        f' --img-size.') from e


def _mean_lr(optimizer: torch.optim.Optimizer) -> float:
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


class _TrainMetrics:
    """Means of a task's losses and of top-1 over the images of an epoch.

    Args:
        args: Flags; `task`, `aug_splits`, `distributed` and `world_size` are read.
    """

    def __init__(self, args) -> None:
        self.args = args
        self.meters: Dict[str, AverageMeter] = {}
        self.pending: List[Tuple[Dict[str, torch.Tensor], int]] = []  # not read back yet: reading waits for the device
        self.of_classes = False  # whether targets are classes, so that there is a top-1

    def add(self, result: Dict[str, torch.Tensor], target: Any, images: int) -> None:
        """Note what the task has returned for a batch."""
        values = {k: v.detach() for k, v in result.items() if k == 'loss' or k.endswith('_loss')}
        self.of_classes = isinstance(target, torch.Tensor) and self.args.task != 'multilabel'
        if self.of_classes and target.ndim == 1 and not self.args.aug_splits:  # not mixed
            values['top1'] = 100 * (result['output'].detach().argmax(1) == target).float().mean()
        self.pending.append((values, images))

    def read(self, epoch: int, step: int) -> None:
        """Read the values of all batches up to a step.

        Raises:
            UserError: A loss is not finite.
        """
        for number, (values, images) in enumerate(self.pending, step + 1 - len(self.pending)):
            for key, value in values.items():
                value = reduce_tensor(value, self.args.world_size) if self.args.distributed else value
                self.meters.setdefault(key, AverageMeter()).update(value.item(), images)
            if not math.isfinite(self.meters['loss'].val):
                raise UserError(f'The loss is {self.meters["loss"].val} in epoch {epoch}, step {number}: try a lower'
                                f' rate. The checkpoints of the epochs before are untouched.')
        self.pending.clear()

    @property
    def loss(self) -> Optional[float]:
        """The mean loss of the batches that were read, None if there is none."""
        return self.meters['loss'].avg if self.meters else None

    def means(self) -> Dict[str, Any]:
        """Return the columns of the summary. They are the same in every epoch: top-1 is '' if images were mixed."""
        losses = sorted({*self.meters} - {'top1'}, key=_LOSSES.index)
        means = {key: self.meters[key].avg for key in losses}
        if self.of_classes:
            means['top1'] = self.meters['top1'].avg if 'top1' in self.meters else ''
        return means


def _begin_epoch(args, epoch: int, loader: Any, mixup_fn: Any) -> None:
    """Tell data set and samplers the number of the epoch, and switch off mixing from `--mixup-off-epoch` on."""
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if mixup_fn is not None:
            mixup_fn.mixup_enabled = False
        elif getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False
    for owner in ('dataset', 'sampler', 'batch_sampler'):
        if hasattr(getattr(loader, owner, None), 'set_epoch'):
            getattr(loader, owner).set_epoch(epoch)


def _backward_and_step(args, task: TrainingTask, optimizer, loss_scaler, loss: torch.Tensor, update: bool) -> None:
    """Add the gradients of a loss. With `update`, clip them and let the optimizer take a step."""
    second_order = getattr(optimizer, 'is_second_order', False)
    clip = args.clip_grad is not None
    parameters = task.get_clip_parameters(exclude_head=args.clip_mode == 'agc') if clip else None
    if loss_scaler is not None:
        loss_scaler(
            loss,
            optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=parameters,
            create_graph=second_order,
            need_update=update,
        )
        return
    loss.backward(create_graph=second_order)
    if update:
        if clip:
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()


def train_one_epoch(
        epoch: int,
        task: TrainingTask,
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
        progress: Optional[Progress] = None,
        updates_per_epoch: int = 1,
        stop: Optional[StopSignals] = None,
) -> Dict[str, Any]:
    """Train for an epoch; returns the means of the task's losses and of top-1 in training, weighted by images."""
    _begin_epoch(args, epoch, loader, mixup_fn)
    task.get_trainable_module().train()
    primary = is_primary(args)
    metrics = _TrainMetrics(args)
    accum = args.grad_accum_steps
    batches = len(loader)
    last_accum = batches % accum or accum
    num_updates = epoch * updates_per_epoch
    progress = progress or Progress(epoch, epoch + 1, args.log_interval, primary)
    optimizer.zero_grad()

    for i, (input, target) in progress.batches(epoch, loader):
        last = i == batches - 1
        update = last or (i + 1) % accum == 0
        steps = last_accum if i >= batches - last_accum else accum
        if args.netaug and i % accum == 0:
            task.start_update(num_updates)
        if args.no_prefetcher:
            input, target = input.to(device=device, dtype=dtype), to_device(target, device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        if uses_channels_last(args):
            input = input.contiguous(memory_format=torch.channels_last)

        with nullcontext() if update else task.no_sync():
            with autocast(), _enough_values():
                result = task(input, target)
                loss = result['loss'] / steps if steps > 1 else result['loss']
            if args.variable_batch_loss_scale != 'none':
                size = input.shape[0] / args.batch_size
                loss = loss * (size ** 0.5 if args.variable_batch_loss_scale == 'sqrt' else size)
            _backward_and_step(args, task, optimizer, loss_scaler, loss, update)
        metrics.add(result, target, input.shape[0])
        if update:
            num_updates += 1
            if args.netaug and num_updates <= epoch * updates_per_epoch + 20:  # a scaler may skip the first ones
                with _sortable():
                    task.check_optimizer(optimizer)
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
        if args.synchronize_step and device.type == 'cuda':
            torch.cuda.synchronize()

        if last or (update and i % args.log_interval < accum):
            metrics.read(epoch, i)
            if primary and args.save_images and saver is not None:
                torchvision.utils.save_image(
                    input, os.path.join(saver.checkpoint_dir, f'train-batch-{i}.jpg'), padding=0, normalize=True)
        progress.update(
            i, input.shape[0] * args.world_size, result['loss'].detach(), _mean_lr(optimizer), last)
        if saver is not None and args.recovery_interval and (last or (i + 1) % args.recovery_interval == 0):
            saver.save_recovery(epoch, batch_idx=i)
        if update and lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates, metric=metrics.loss)
        if stop is not None:
            stop.check()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return metrics.means()


def validate_epoch(args, task: TrainingTask, loader, evaluate_) -> Dict[str, float]:
    """Evaluate the model, and where there is one its moving average, whose metrics then count."""
    metrics: Dict[str, float] = {}
    with_ema = task.has_ema() and not args.model_ema_force_cpu
    for ema in (False, True) if with_ema else (False,):
        evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
        description = 'Validate EMA' if ema else 'Validate'
        metrics = evaluate_(task.get_eval_model(ema=ema), evaluator=evaluator, description=description)
        if not math.isfinite(metrics['loss']):
            raise UserError(f'The validation loss is {metrics["loss"]}: try a lower rate. The checkpoints of the epochs'
                            f' before are untouched.')
    return metrics


def write_epoch(args, epoch: int, train_metrics, metrics, task: TrainingTask, optimizer, saver) -> None:
    """Write an epoch's row, curves and checkpoint, in this order: what is resumed from comes last."""
    # An epoch without validation leaves its columns empty, not out.
    row = metrics or dict.fromkeys(task.create_evaluator().metric_names, '')
    row = {k: '' if v is None else v for k, v in row.items()}
    summary = os.path.join(saver.checkpoint_dir, 'summary.csv')
    update_summary(epoch, train_metrics, row, summary, lr=_mean_lr(optimizer), log_wandb=args.log_wandb)
    curves = os.path.join(saver.checkpoint_dir, 'curves.png')
    title = f'{args.model}, run {os.path.basename(saver.checkpoint_dir)}'
    write_curves(summary, curves, f'eval_{args.eval_metric}', args.eval_metric == 'loss', title)
    saver.save_checkpoint(epoch, metrics.get(args.eval_metric), milestone=epoch + 1 in (args.save_epochs or ()))
    told = {**{f'train_{k}': v for k, v in train_metrics.items()}, **{f'eval_{k}': v for k, v in metrics.items()}}
    if args.num_classes < 6:
        told.pop('eval_top5', None)  # always 100 %
    _logger.info(f'Epoch {epoch}: ' + '  '.join(f'{k} {v:.4g}' for k, v in told.items() if v not in ('', None)))


def stopped(epoch: int, saver, number: int) -> NoReturn:
    """End the run that a signal has stopped, with all that has been trained in a file."""
    name = signal.Signals(number).name
    if saver is not None:
        try:
            saver.save_recovery(epoch, batch_idx=name)
        except UserError as e:
            program = os.path.basename(sys.argv[0])
            sys.exit(f'{program}: stopped by {name} in epoch {epoch}, and nothing was saved of it. {e}')
        last = os.path.join(saver.checkpoint_dir, 'last.pth.tar')
        again = f'with --resume {last}' if os.path.exists(last) else 'by the same command'
        _logger.warning(f'Stopped by {name} in epoch {epoch}. Go on {again}, which does this epoch again, exactly; or'
                        f' with --resume {saver.curr_recovery_file}, which keeps its steps and skips the rest.')
    sys.exit(128 + number)


def set_up_optimizer(args, task: TrainingTask) -> torch.optim.Optimizer:
    model = task.get_trainable_module()
    with rewording(f'--opt {args.opt} cannot be built', ValueError, TypeError, AssertionError, whole=True):
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def resume_training(args, task: TrainingTask, optimizer: torch.optim.Optimizer, loss_scaler) -> Optional[int]:
    """Load what `--resume` names, but the moving average; returns the epoch to go on with."""
    given = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    with rewording('--resume', ValueError, RuntimeError, whole=True):
        epoch = resume_task_checkpoint(
            task,
            args.resume,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else loss_scaler,
            log_info=is_primary(args),
        )
    for group, flags in zip(optimizer.param_groups, given):  # the flags hold, not those of the checkpoint
        fields = {k: v for k, v in flags.items() if k in (*GROUP_FIELDS_SET_BY_FLAGS, *args.opt_kwargs)}
        group.update(fields, initial_lr=flags['lr'])
    return epoch


def _prepare_task(args, task: TrainingTask, device: torch.device) -> None:
    """Set up the moving average, compilation, and the exchange of gradients between processes."""
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        with rewording(f'--torchcompile {args.torchcompile} cannot be carried out', RuntimeError):
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        ddp_kwargs = dict(broadcast_buffers=False) if args.no_ddp_bb and not args.netaug else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **ddp_kwargs)


def set_up_schedule(args, optimizer: torch.optim.Optimizer, updates_per_epoch: int, start_epoch: int, history: list):
    """Build the schedule, brought to the epoch to start with; returns it with the number of all epochs."""
    with rewording(f'--sched {args.sched} cannot be built', ValueError, AssertionError, whole=True):
        lr_scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
            updates_per_epoch=updates_per_epoch,
        )
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        elif len(history) >= start_epoch:
            for epoch in range(start_epoch):  # a plateau is found in the whole history alone
                lr_scheduler.step(epoch + 1, history[epoch])
        else:
            lr_scheduler.step(start_epoch)
    return lr_scheduler, num_epochs


def check_task(args, task: TrainingTask, start_epoch: int, num_epochs: int, updates_per_epoch: int) -> None:
    """Refuse a training without an epoch, or without a NetAug step in an epoch."""
    if start_epoch >= num_epochs:
        raise UserError(f'There is nothing to train: the run would start at epoch {start_epoch} of {num_epochs}.'
                        f' Raise --epochs{" or --stop-epoch" if args.stop_epoch else ""}.')
    if args.netaug and task.training_config.every > updates_per_epoch:
        raise UserError(f'--netaug-every must be at most the {updates_per_epoch} updates of an epoch here.')
    if args.warmup_epochs >= num_epochs:
        _logger.warning(f'All {num_epochs} epochs are warm-up (--warmup-epochs {args.warmup_epochs}).')


def _check_same_start(args, start_epoch: int) -> None:
    """Refuse processes that would start at different epochs, because they see different files.

    Raises:
        UserError: The epochs differ.
    """
    starts = [None] * args.world_size
    torch.distributed.all_gather_object(starts, start_epoch)
    if len(set(starts)) > 1:
        raise UserError(f'The processes would start at different epochs ({", ".join(map(str, starts))}): --output must'
                        f' be on a file system that all machines share.')


def primary_saver(args, run: RunDescription, *to_set_up: Any):
    """Set up, in the first process, what writes the results. An error of this process ends all processes."""
    saver, refusal = None, ''
    if is_primary(args):
        args.run = run.to_dict()  # travels in every checkpoint
        try:
            saver = set_up_saver(args, *to_set_up)
        except (UserError, OSError) as e:
            refusal = str(e)
    if args.distributed:
        refusals = [refusal]
        torch.distributed.broadcast_object_list(refusals)
        refusal = refusals[0]
    if refusal:
        raise UserError(refusal)
    return saver


class Classification:
    """What of `train` is for image classification alone. Another kind of training has a class with these members, as
    `train_detection.Detection`."""
    flags = TRAIN_FLAGS
    parser = staticmethod(train_parser)
    check_args = staticmethod(check_train_args)
    set_up_loaders = staticmethod(set_up_loaders)
    set_up_task = staticmethod(set_up_task)
    describe = staticmethod(RunDescription.from_model)  # its result is stored in the run's checkpoints

    @staticmethod
    def set_up_model(args) -> Tuple[nn.Module, Dict[str, Any], Any]:
        """Open the data set and build the model; returns the model, how its images are prepared in timm's terms, and
        the splits of the data set."""
        check_model_name(args.model)  # before a data set is downloaded
        channels = args.in_chans or (args.input_size or [3])[0]
        splits = open_splits(args, channels)
        model = set_up_model(args)
        with rewording('The input cannot be set up', ValueError, AssertionError, whole=True):
            data_config = resolve_input_data_config(model, args=vars(args))
        if data_config['input_size'][0] != channels:  # the model has other channels by itself
            splits = open_splits(args, data_config['input_size'][0])
        return model, data_config, splits

    @staticmethod
    def write_pictures(task: TrainingTask, loader: Any, folder: str) -> None:
        """Write pictures of the last validation into the run's folder."""

    @staticmethod
    def how_to_load(run: RunDescription, best: str) -> str:
        """Return a sentence and the code that loads the best checkpoint."""
        loading = [f"'{run.architecture}'", f"checkpoint_path='{best}'"] + [
            f'{k}={v!r}' for k, v in run.model_args.items() if v or not k.startswith('drop')]
        return (f'The checkpoint {best} is a stock timm model:\n\n    import timm, timm_netaug\n'
                f'    model = timm.create_model({", ".join(loading)})\n')


def train(kind: Any = Classification) -> None:
    """Train as the command line says.

    Args:
        kind: What the kind of training does in its own way.

    Raises:
        UserError: It cannot be done as it stands; the message says what to change.
    """
    set_up_logging()
    args = parse_args(kind.parser(), sys.argv[1:])
    kind.check_args(args)
    find_restart(args)
    config = netaug_config(args)
    device = set_up_device(args)
    primary = is_primary(args)
    if not primary:
        _logger.setLevel(logging.ERROR)
    if args.sync_bn and device.type != 'cuda':
        raise UserError('--sync-bn: PyTorch synchronises BatchNorm on CUDA only, leave it out.')
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else torch.float32
    random_seed(args.seed, args.rank)
    if args.fast_norm:
        set_fast_norm()
    if args.fuser:
        set_jit_fuser(args.fuser)

    model, data_config, splits = kind.set_up_model(args)
    run = kind.describe(
        model,
        data_config,
        splits.class_names,
        ema=args.model_ema and not args.model_ema_force_cpu,  # then the metric is that of the moving average
        versions=versions(),
        input_img_mode=args.input_img_mode,
        target=target_of(args),
    )
    model = prepare_for_training(args, model, config, device, dtype)
    loader_train, loader_eval, mixup_fn = kind.set_up_loaders(args, splits, data_config, device, dtype)
    set_up_lr(args)
    teacher = set_up_teacher(args, data_config, splits.class_names, device, dtype)
    task = kind.set_up_task(args, model, teacher, data_config, device, dtype)
    if args.netaug:
        run = replace(run, netaug=task.netaug_fields())
    _logger.info(f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters in training')
    for key, value in (run.netaug or {}).items():
        _logger.info(f'    NetAug {key}: {value}')
    optimizer = set_up_optimizer(args, task)
    if args.netaug:
        # Behind a shared trunk, the activations of both passes are few, and the gradients of one sum take less time.
        task.early_backward = not getattr(optimizer, 'is_second_order', False) and not task.supernet.netaug_trunk.names
    autocast, loss_scaler = mixed_precision(args, device), None
    if args.amp and device.type == 'cuda' and args.amp_dtype == 'float16':
        loss_scaler = NativeScaler(device=device.type)
    resume_epoch = None
    history: List[Optional[float]] = []  # the metric after every epoch
    if args.resume:
        history = check_resume(args, kind.flags, run)
        resume_epoch = resume_training(args, task, optimizer, loss_scaler)
    _prepare_task(args, task, device)
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    lr_scheduler, num_epochs = set_up_schedule(args, optimizer, updates_per_epoch, start_epoch, history)
    history = (history + [None] * start_epoch)[:start_epoch]
    end_epoch = min(num_epochs, args.stop_epoch or num_epochs)
    if args.distributed:
        _check_same_start(args, start_epoch)
    if args.resume and start_epoch == end_epoch:
        stopped_at = f' (--stop-epoch, of {num_epochs})' if end_epoch < num_epochs else ''
        _logger.info(f'All {end_epoch} epochs of {args.resume} are done{stopped_at}.')
        return
    check_task(args, task, start_epoch, end_epoch, updates_per_epoch)
    saver = primary_saver(args, run, kind.flags, task, optimizer, loss_scaler, start_epoch)
    if primary:
        _logger.info(f'Epochs {start_epoch} to {end_epoch - 1}, results in {saver.checkpoint_dir}')

    stop = StopSignals()
    train_epoch = partial(
        train_one_epoch, task=task, loader=loader_train, optimizer=optimizer, args=args, device=device, dtype=dtype,
        autocast=autocast, loss_scaler=loss_scaler, lr_scheduler=lr_scheduler, mixup_fn=mixup_fn, saver=saver,
        updates_per_epoch=updates_per_epoch, stop=stop,
        progress=Progress(start_epoch, end_epoch, args.log_interval, primary))
    evaluate_ = partial(
        evaluate, loader=loader_eval, device=device, dtype=dtype, autocast=autocast,
        channels_last=uses_channels_last(args), log_interval=args.log_interval, distributed=args.distributed,
        primary=primary, after_batch=stop.check)
    epoch = start_epoch
    with stop:
        try:
            for epoch in range(start_epoch, end_epoch):
                # From seed, rank and its own number, so that a resumed run draws as an undisturbed one.
                random_seed(start_of_epoch_seed(args.seed, epoch), args.rank)
                if args.netaug:
                    with _sortable():
                        task.start_epoch(epoch, num_epochs, optimizer)
                train_metrics = train_epoch(epoch)
                if args.distributed and args.dist_bn:
                    for ema in (False, True) if task.has_ema() and not args.model_ema_force_cpu else (False,):
                        distribute_bn(task.get_trainable_module(ema=ema), args.world_size, args.dist_bn == 'reduce')
                metrics = {}
                if (epoch + 1) % args.val_interval == 0 or epoch + 1 == end_epoch:
                    metrics = validate_epoch(args, task, loader_eval, evaluate_)
                history.append(metrics.get(args.eval_metric, history[-1] if history else None))  # the last one measured
                if primary:
                    args.run = replace(run, metrics=history).to_dict()
                    try:
                        write_epoch(args, epoch, train_metrics, metrics, task, optimizer, saver)
                        if metrics:
                            kind.write_pictures(task, loader_eval, saver.checkpoint_dir)
                    except OSError as e:
                        raise saver.full(e) from e
                if lr_scheduler is not None:
                    lr_scheduler.step(epoch + 1, history[-1])
        except (Stopped, RuntimeError):  # the latter of a process that the others, or those of the loader, have left
            time.sleep(0.1)  # theirs may have come first
            if stop.number is None:
                raise
            stopped(epoch, saver, stop.number)
    if args.distributed:
        torch.distributed.destroy_process_group()
    release_folder()
    if primary and saver.best_metric is not None:
        best = os.path.join(saver.checkpoint_dir, 'model_best.pth.tar')
        print(f'\nBest {args.eval_metric}: {saver.best_metric:.2f} (epoch {saver.best_epoch}).'
              f' {kind.how_to_load(run, best)}')


def main() -> None:
    with exit_on_user_error('train.py'):
        train()


if __name__ == '__main__':
    main()
