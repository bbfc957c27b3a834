"""Evaluate timm models, folders or Hub repositories, checkpoints of `train.py`, or reference checkpoints.

    python validate.py --data-dir DATA --checkpoint output/train/RUN/model_best.pth.tar
    python validate.py --data-dir DATA --model netaug_mbv2_tiny --checkpoint reference.pth --num-classes 1000
    python validate.py --data-dir DATA --checkpoint output/train/RUN --results-file results.csv
"""
import argparse
import json
import logging
import math
import sys
from dataclasses import replace
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.layers import set_fast_norm, set_scriptable
from timm.utils import random_seed, reparameterize_model, set_jit_fuser

from ..errors import UserError, exit_on_user_error, first_line, rewording
from ..evaluate import evaluate_model
from .command_line import parse_args
from .common_flags import data_source, target_of
from .device import check_device, choose_device, mixed_precision
from .evaluated_model import load_evaluated_model, pool_as_in_training
from .flags import flag_name
from .logs import set_up_logging
from .results import bulk_entries, sort_results, write_results
from .validate_flags import check_validate_args, validate_parser

_logger = logging.getLogger('validate')


class _FixedBatch(nn.Module):
    """Pads the last batch for a model that is compiled for the size of the first batch and does not check its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.size = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.size = self.size or len(x)
        return self.model(torch.cat([x, x[:1].expand(self.size - len(x), *x.shape[1:])]))[:len(x)]


def compile_model(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Apply `--torchscript`, `--torchcompile`, `--aot-autograd` and `--num-gpu`.

    Raises:
        UserError: The model cannot be compiled, or the compiler is missing.
    """
    with rewording('The model cannot be compiled', ImportError, RuntimeError):
        if args.torchscript:
            model = torch.jit.script(model)
        elif args.torchcompile:
            torch._dynamo.reset()  # in bulk, the earlier models would count against the limit of recompilations
            model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
        elif args.aot_autograd:
            from functorch.compile import memory_efficient_fusion  # a large import, needed here only
            model = _FixedBatch(memory_efficient_fusion(model))
    return nn.DataParallel(model, device_ids=list(range(args.num_gpu))) if args.num_gpu > 1 else model


def _target(args: argparse.Namespace, trained_with: str) -> str:
    """Return what the targets are: the checkpoint or folder knows, for other models the flags say it.

    Raises:
        UserError: A flag contradicts the checkpoint, or does nothing for several labels.
    """
    if args.target_format != 'indices' and args.task != 'multilabel':
        raise UserError('--target-format does nothing without --task multilabel.')
    target = target_of(args) if trained_with == 'class' else trained_with
    if args.target_format == 'dense' != target:
        raise UserError(f'--target-format {args.target_format}: the model was trained with {trained_with}. Leave the'
                        f' flag out.')
    for dest in ('metrics_avg', 'valid_labels', 'real_labels'):
        if target != 'class' and getattr(args, dest):
            raise UserError(f'{flag_name(dest)} is for one class per image: leave the flag out.')
    return target


def validate_one(args: argparse.Namespace, parser: argparse.ArgumentParser, retry: bool) -> Dict[str, Any]:
    """Evaluate one model or checkpoint.

    Args:
        retry: Try again with smaller batches if there is too little memory.

    Returns:
        The row of results: timm's columns, the loss and the number of images.

    Raises:
        UserError: The evaluation is not possible. The message says what to change.
    """
    random_seed(args.seed, 0)
    with set_scriptable(args.torchscript):
        subject = load_evaluated_model(args, parser)
    model, data_config = subject.model, subject.data_config
    num_classes = model.num_classes
    if args.reparam:
        model = reparameterize_model(model, inplace=True)
    param_count = sum(p.numel() for p in model.parameters())
    if args.test_pool:
        model = pool_as_in_training(model, data_config)
    if args.naflex_loader:
        other_loader = dict(naflex_max_seq_len=args.naflex_max_seq_len)
    else:
        other_loader = dict(crop_border_pixels=args.crop_border_pixels, tf_preprocessing=args.tf_preprocessing)
    try:
        measured = evaluate_model(
            model,
            replace(data_source(args), input_img_mode=args.input_img_mode or subject.input_img_mode),
            args.split,
            data_config,
            num_classes,
            subject.class_names,
            batch_size=args.batch_size,
            retry=retry,
            device=args.device,
            dtype=getattr(torch, args.model_dtype or 'float32'),
            autocast=mixed_precision(args, torch.device(args.device)),
            channels_last=args.channels_last,
            compile=partial(compile_model, args=args),
            num_samples=args.num_samples,
            target=_target(args, subject.target),
            valid_labels=args.valid_labels,
            real_labels=args.real_labels,
            metrics_avg=args.metrics_avg,
            log_interval=args.log_freq,
            num_workers=args.workers,
            use_prefetcher=not args.no_prefetcher,
            pin_memory=args.pin_mem,
            **other_loader,
        )
    except RuntimeError as e:
        if not (args.torchscript or args.torchcompile or args.aot_autograd):
            raise
        raise UserError(f'The compiled model does not run: {first_line(e)}.') from e
    loss, images = measured.pop('loss'), measured.pop('images')
    if not math.isfinite(loss):
        raise UserError(f'The loss of {subject.name} is {loss}: the model computes numbers that are not finite, so its'
                        f' accuracy means nothing. Use an earlier checkpoint, or leave --model-dtype and --amp out.')
    accuracies = {}  # for one class per image, in timm's columns
    for name in ('top1', 'top5'):
        if name in measured:
            accuracies[name] = round(measured[name], 4)
            accuracies[f'{name}_err'] = round(100 - measured.pop(name), 4)
    return dict(
        model=subject.name,
        **accuracies,
        **{name: round(value, 4) for name, value in measured.items()},
        param_count=round(param_count / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
        **(dict(checkpoint=args.checkpoint) if args.checkpoint else {}),
        loss=round(loss, 5),
        images=images,
    )


def validate_bulk(
        args: argparse.Namespace,
        parser: argparse.ArgumentParser,
        entries: List[Tuple[str, str]],
) -> List[Dict[str, Any]]:
    """Evaluate models and checkpoints one after the other. An interruption ends the list early.

    Returns:
        One row for each, the best first. The row of a failed model contains the error.
    """
    results = []
    for i, (model, checkpoint) in enumerate(entries):
        name = checkpoint or model
        _logger.info(f'{name} ({i + 1} of {len(entries)})')
        entry = argparse.Namespace(**{**vars(args), 'model': model, 'checkpoint': checkpoint})
        try:
            row = validate_one(entry, parser, retry=True)
        except KeyboardInterrupt:
            _logger.warning(f'Interrupted at {name}.')
            break
        except Exception as e:  # an error of one model must not cost the results of the others
            row = dict(model=model or name, **(dict(checkpoint=checkpoint) if checkpoint else {}),
                       error=' '.join(str(e).split())[:300] or type(e).__name__)
            _logger.error(f'{name}: {row["error"]}')
        results = sort_results([*results, row])
        if args.results_file:
            write_results(args.results_file, results, args.results_format)
    return results


def set_up_device(args: argparse.Namespace) -> None:
    """Choose the device, and apply the settings for all models.

    Raises:
        UserError: The device does not exist, or there are fewer devices than the flags ask for.
    """
    choose_device(args, _logger)
    device = check_device(args.device)
    gpus = torch.cuda.device_count() if device.type == 'cuda' else 0
    if args.num_gpu > 1 and args.num_gpu > gpus:
        raise UserError(f'--num-gpu {args.num_gpu}: there are {gpus} GPUs to evaluate on.')
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()


def validate() -> None:
    """Evaluate what the command line names.

    Raises:
        UserError: The evaluation is not possible. The message says what to change.
    """
    set_up_logging()
    parser = validate_parser()
    parser.set_defaults(model='')  # no default, because a checkpoint of another program needs the right name
    args = parse_args(parser, sys.argv[1:])
    check_validate_args(args)
    set_up_device(args)
    entries = bulk_entries(args.model, args.checkpoint, args.num_classes or 1000)
    if entries is None:
        results = validate_one(args, parser, args.retry)
        if args.results_file:
            write_results(args.results_file, results, args.results_format)
    else:
        results = validate_bulk(args, parser, entries)
    print(f'--result\n{json.dumps(results, indent=2)}')  # timm's script prints the same line before its JSON
    if entries is not None and len(results) < len(entries):
        raise UserError(f'Interrupted after {len(results)} of {len(entries)} models.')
    failed = [row for row in results if 'error' in row] if entries is not None else []
    if failed:
        raise UserError(f'{len(failed)} of {len(entries)} models failed; their "error" says why.')


def main() -> None:
    with exit_on_user_error('validate.py'):
        validate()


if __name__ == '__main__':
    main()
