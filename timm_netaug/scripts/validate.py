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
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import create_loader, create_naflex_loader
from timm.layers import set_fast_norm, set_scriptable
from timm.utils import (
    check_batch_size_retry,
    decay_batch_step,
    random_seed,
    reparameterize_model,
    set_jit_fuser,
    setup_default_logging,
)

from ..errors import UserError, first_line, told_plainly
from .args import check_validate_args, parse_args, validate_parser
from .device import choose_device, mixed_precision
from .data import check_split, class_names, open_dataset
from .evaluate import evaluate
from .labels import LabelEvaluator, read_real_labels, read_valid_labels
from .results import bulk_entries, sort_results, write_results
from .subject import Subject, pool_as_in_training, set_up_subject

_logger = logging.getLogger('validate')


class _FixedBatch(nn.Module):
    """Fills the last batch up for a model that is compiled for the first one's size, without a check of its input."""

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
        UserError: The model, or what it is compiled with, is not fit for it.
    """
    try:
        if args.torchscript:
            model = torch.jit.script(model)
        elif args.torchcompile:
            torch._dynamo.reset()  # in bulk, the models before would count against its limit
            model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
        elif args.aot_autograd:
            from functorch.compile import memory_efficient_fusion  # imports much that nothing else needs
            model = _FixedBatch(memory_efficient_fusion(model))
    except (ImportError, RuntimeError) as e:
        raise UserError(f'The model can not be compiled: {first_line(e)}.') from e
    return nn.DataParallel(model, device_ids=list(range(args.num_gpu))) if args.num_gpu > 1 else model


def set_up_dataset(args: argparse.Namespace, subject: Subject) -> Tuple[Any, Optional[List[int]]]:
    """Open the split; returns it with the model's class of each of its labels where these are not the same.

    Raises:
        UserError: It can not be opened, or its classes are not the model's.
    """
    names, num_classes = subject.class_names, subject.num_classes
    open_split = partial(open_dataset, args, args.split, subject.data_config['input_size'][0],
                         num_samples=args.num_samples, load_bytes=args.tf_preprocessing, seed=args.seed)
    dataset = open_split(class_map=args.class_map)
    check_split(dataset, args.data_dir, args.split, required=False)
    classes = class_names(dataset)
    files = [sample[0] for sample in getattr(getattr(dataset, 'reader', None), 'samples', ())]
    if args.tf_preprocessing and any(isinstance(f, str) and not f.lower().endswith(('.jpg', '.jpeg')) for f in files):
        raise UserError('--tf-preprocessing reads JPEG images only, the data set has others.')
    if args.valid_labels:
        valid = read_valid_labels(args.valid_labels, num_classes)
        if classes and len(classes) != len(valid):
            raise UserError(f'--valid-labels has {len(valid)} lines, the data set {len(classes)} classes.')
        if classes and names and classes != [names[i] for i in valid]:
            raise UserError(f'--valid-labels does not list the classes of the data set in its order, which is'
                            f' {", ".join(classes[:5])} and so on.')
        return dataset, valid
    if names and classes and classes != list(names) and not args.class_map:
        # Fewer classes than the model's would be counted from 0 again, and every label be wrong.
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise UserError(f'The data set has classes that the model does not know: {", ".join(unknown[:5])}.')
        dataset = open_split(class_map={name: i for i, name in enumerate(names)})
    if classes and len(classes) > num_classes:
        raise UserError(f'The data set has {len(classes)} classes, the model {num_classes}.')
    return dataset, None


def make_loader(args: argparse.Namespace, subject: Subject, dataset: Any, batch_size: int, dtype: torch.dtype) -> Any:
    """Build the loader of `--naflex-loader` or the usual one."""
    config = subject.data_config
    common = dict(
        batch_size=batch_size,
        use_prefetcher=not args.no_prefetcher,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=torch.device(args.device),
        img_dtype=dtype,
    )
    if not args.naflex_loader:
        return create_loader(
            dataset,
            input_size=config['input_size'],
            crop_pct=config['crop_pct'],
            crop_mode=config['crop_mode'],
            crop_border_pixels=args.crop_border_pixels,
            tf_preprocessing=args.tf_preprocessing,
            **common,
        )
    patch_size = getattr(getattr(subject.model, 'embeds', None), 'patch_size', None)
    if patch_size is None:
        raise UserError(f'--naflex-loader needs a NaFlex model (naflexvit_*), {subject.name} is none.')
    return create_naflex_loader(
        dataset, patch_size=patch_size, max_seq_len=args.naflex_max_seq_len, channels=config['input_size'][0], **common)


def _smaller_batch(error: BaseException, batch_size: int, retry: bool, args: argparse.Namespace) -> int:
    """Return the batch size to go on with after an error; raise what a smaller one does not help against."""
    signs = ('out of memory', "can't allocate memory", 'alloc_failed')  # of CUDA, the CPU, and cuDNN or cuBLAS
    if not (isinstance(error, MemoryError) or any(s in str(error).lower() for s in signs)):
        if args.torchscript or args.torchcompile or args.aot_autograd:
            raise UserError(f'The compiled model does not run: {first_line(error)}.') from error
        raise error
    smaller = decay_batch_step(batch_size) if retry and check_batch_size_retry(str(error)) else 0
    if not smaller:
        raise UserError(f'There is too little memory for batches of {batch_size}: use a smaller --batch-size'
                        f'{"" if retry else " or --retry"}.') from error
    _logger.warning(f'There is too little memory for batches of {batch_size}: going on with {smaller}.')
    return smaller


def _measure(
        args: argparse.Namespace,
        subject: Subject,
        model: nn.Module,
        dataset: Any,
        valid_labels: Optional[List[int]],
        retry: bool,
) -> Dict[str, float]:
    """Return the metrics of a model that is ready, with batches that fit into the memory."""
    device, dtype = torch.device(args.device), getattr(torch, args.model_dtype or 'float32')
    batch_size = args.batch_size
    while True:
        real_labels = read_real_labels(args.real_labels, dataset, subject.num_classes) if args.real_labels else None
        evaluator = LabelEvaluator(device, valid_labels, real_labels, args.metrics_avg)
        try:
            metrics = evaluate(
                compile_model(model, args),
                make_loader(args, subject, dataset, batch_size, dtype),
                evaluator,
                device,
                dtype=dtype,
                autocast=mixed_precision(args, device),
                channels_last=args.channels_last,
                log_interval=args.log_freq,
            )
            return dict(metrics, images=evaluator.num_samples)
        except (RuntimeError, MemoryError) as e:
            batch_size = _smaller_batch(e, batch_size, retry, args)
        if device.type == 'cuda':
            torch.cuda.empty_cache()


def validate_one(args: argparse.Namespace, parser: argparse.ArgumentParser, retry: bool) -> Dict[str, Any]:
    """Evaluate one model or checkpoint.

    Args:
        retry: Use smaller batches where memory is short.

    Returns:
        The row of results: timm's columns, the loss and the number of images.

    Raises:
        UserError: It can not be done as it stands; the message says what to change.
    """
    random_seed(args.seed, 0)
    with set_scriptable(args.torchscript):
        subject = set_up_subject(args, parser)
    dataset, valid_labels = set_up_dataset(args, subject)
    model = reparameterize_model(subject.model, inplace=True) if args.reparam else subject.model
    param_count = sum(p.numel() for p in model.parameters())
    if args.test_pool:
        model = pool_as_in_training(model, subject.data_config)
    model = model.eval().to(device=args.device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    measured = _measure(args, subject, model, dataset, valid_labels, retry)
    top1, top5, loss, images = (measured.pop(k) for k in ('top1', 'top5', 'loss', 'images'))
    return dict(
        model=subject.name,
        top1=round(top1, 4),
        top1_err=round(100 - top1, 4),
        top5=round(top5, 4),
        top5_err=round(100 - top5, 4),
        **{name: round(value, 4) for name, value in measured.items()},
        param_count=round(param_count / 1e6, 2),
        img_size=subject.data_config['input_size'][-1],
        crop_pct=subject.data_config['crop_pct'],
        interpolation=subject.data_config['interpolation'],
        **(dict(checkpoint=args.checkpoint) if args.checkpoint else {}),
        loss=round(loss, 5) if math.isfinite(loss) else None,  # JSON has no such numbers
        images=images,
    )


def validate_bulk(
        args: argparse.Namespace,
        parser: argparse.ArgumentParser,
        entries: List[Tuple[str, str]],
) -> List[Dict[str, Any]]:
    """Evaluate models and checkpoints one after the other, as far as an interruption lets it.

    Returns:
        Their rows, the best first; those of failed ones say why.
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
        except Exception as e:  # whatever it is, it must not cost the results of the others
            row = dict(model=model or name, **(dict(checkpoint=checkpoint) if checkpoint else {}),
                       error=' '.join(str(e).split())[:300] or type(e).__name__)
            _logger.error(f'{name}: {row["error"]}')
        results = sort_results([*results, row])
        if args.results_file:
            write_results(args.results_file, results, args.results_format)
    return results


def set_up_device(args: argparse.Namespace) -> None:
    """Choose the device, and what holds for all models on it.

    Raises:
        UserError: PyTorch does not find such a device, or not so many of them.
    """
    choose_device(args, _logger)
    try:
        device = torch.device(args.device)
    except RuntimeError as e:
        raise UserError(f'--device {args.device}: {first_line(e)}.') from e
    gpus = torch.cuda.device_count() if device.type == 'cuda' else 0
    if args.num_gpu > 1 and args.num_gpu > gpus:
        raise UserError(f'--num-gpu {args.num_gpu}: there are {gpus} GPUs to evaluate on.')
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()


def validate() -> None:
    """Evaluate as the command line says.

    Raises:
        UserError: It can not be done as it stands; the message says what to change.
    """
    setup_default_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)
    parser = validate_parser()
    parser.set_defaults(model='')  # a checkpoint of another origin needs a name that was given
    args = parse_args(parser, sys.argv[1:])
    check_validate_args(parser, args)
    set_up_device(args)
    entries = bulk_entries(args.model, args.checkpoint, args.num_classes or 1000)
    if entries is None:
        results = validate_one(args, parser, args.retry)
        if args.results_file:
            write_results(args.results_file, results, args.results_format)
    else:
        results = validate_bulk(args, parser, entries)
    print(json.dumps(results, indent=2))
    if entries is not None and len(results) < len(entries):
        raise UserError(f'Interrupted after {len(results)} of {len(entries)} models.')
    failed = [row for row in results if 'error' in row] if entries is not None else []
    if failed:
        raise UserError(f'{len(failed)} of {len(entries)} models failed; their "error" says why.')


def main() -> None:
    with told_plainly('validate.py'):
        validate()


if __name__ == '__main__':
    main()
