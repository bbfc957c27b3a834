"""Evaluate a registered timm model, a folder or Hub repository, a checkpoint of `train.py`, or a reference checkpoint.

    python validate.py --data-dir DATA --checkpoint output/train/RUN/model_best.pth.tar
    python validate.py --data-dir DATA --model netaug_mbv2_tiny --checkpoint reference.pth --num-classes 1000
"""
import json
import logging
import os
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm import create_model
from timm.data import create_loader, resolve_input_data_config
from timm.layers import set_fast_norm
from timm.models import load_state_dict, resolve_model_input_args
from timm.task import ClassificationEvaluator
from timm.utils import random_seed, setup_default_logging

import timm_netaug

from ..checkpoint import classes_in_file, load_run, read_checkpoint
from ..errors import UserError, told_plainly
from .args import check_model_name, check_validate_args, parse_args, validate_parser
from .data import check_split, class_names, open_dataset
from .evaluate import evaluate

_logger = logging.getLogger('validate')


def set_up_model(args, parser) -> Tuple[nn.Module, Dict[str, Any], Optional[List[str]]]:
    """Build the model; returns it with how its input is made and, where known, the names of its classes."""
    run = None
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise UserError(f'There is no checkpoint {args.checkpoint}.')
    if args.checkpoint:
        try:
            run = getattr(read_checkpoint(args.checkpoint).get('args'), 'run', None)
        except UserError:
            pass  # weights in another format: loading them tells whether they are any
    if run is not None:
        own = dict(model=run['architecture'], pretrained=False, gp=run['model_args'].get('global_pool'),
                   num_classes=run['model_args']['num_classes'], in_chans=run['model_args'].get('in_chans'),
                   model_kwargs={})
        for dest, value in own.items():
            if getattr(args, dest) not in (parser.get_default(dest), value):
                raise UserError(f'--{dest.replace("_", "-")}: the checkpoint is of a model of its own,'
                                f' {run["architecture"]} with {run["model_args"]}. Leave the flag out.')
        model, run, _ = load_run(args.checkpoint, args.use_ema or None)
        flags = {k: v for k, v in vars(args).items() if v not in (None, '', {})}
        if flags.get('img_size') or flags.get('input_size'):
            run['data_config'].pop('input_size')
        data_config = resolve_input_data_config(model, args={**run['data_config'], **flags})
        return model, data_config, run['class_names']
    check_model_name(args.model)
    if args.checkpoint and args.num_classes is None:
        args.num_classes = classes_in_file(args.checkpoint, args.model)
    try:
        model = create_model(
            pretrained=args.pretrained or not args.checkpoint,
            **resolve_model_input_args(
                args.model,
                vars(args),
                num_classes=args.num_classes,
                in_chans=args.in_chans,
                global_pool=args.gp,
                **args.model_kwargs,
            ),
        )
        if args.checkpoint:
            # The filter only renames a reference checkpoint; weights in timm's names pass through it.
            state_dict = timm_netaug.checkpoint_filter_fn(load_state_dict(args.checkpoint, use_ema=args.use_ema), model)
            model.load_state_dict(state_dict)
    except (FileNotFoundError, RuntimeError, ValueError, TypeError) as e:
        raise UserError(f'{args.model} can not be loaded (--model names the architecture):'
                        f' {" ".join(str(e).split())[:300]}') from e
    data_config = resolve_input_data_config(model, args=vars(args), use_test_size=not args.use_train_size)
    return model, data_config, model.pretrained_cfg.get('label_names')


def validate() -> None:
    """Evaluate as the command line says.

    Raises:
        UserError: It can not be done as it stands; the message says what to change.
    """
    setup_default_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)
    parser = validate_parser()
    args = parse_args(parser, sys.argv[1:])
    check_validate_args(parser, args)
    random_seed(args.seed, 0)
    if args.device == 'cuda' and not torch.cuda.is_available():
        if args.device_given:
            raise UserError('--device cuda was asked for, but PyTorch finds no GPU here: use --device cpu.')
        _logger.info('No GPU found: evaluating on the CPU.')
        args.device = 'cpu'
    device = torch.device(args.device)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else torch.float32
    if args.fast_norm:
        set_fast_norm()
    model, data_config, names = set_up_model(args, parser)
    model = model.to(device=device, dtype=dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    open_split = partial(
        open_dataset, args, args.split, data_config['input_size'][0], num_samples=args.num_samples)
    dataset = open_split(class_map=args.class_map)
    check_split(dataset, args.data_dir, args.split, required=False)
    classes = class_names(dataset)
    if names and classes and classes != list(names) and not args.class_map:
        # Fewer classes than the model's would be counted from 0 again, and every label be wrong.
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise UserError(f'The data set has classes that the model does not know: {", ".join(unknown[:5])}.')
        dataset = open_split(class_map={name: i for i, name in enumerate(names)})
    if classes and len(classes) > model.num_classes:
        raise UserError(f'The data set has {len(classes)} classes, the model {model.num_classes}.')
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        use_prefetcher=not args.no_prefetcher,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        crop_border_pixels=args.crop_border_pixels,
        pin_memory=args.pin_mem,
        device=device,
        img_dtype=dtype,
        tf_preprocessing=args.tf_preprocessing,
    )
    autocast = nullcontext
    if args.amp:
        autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    metrics = evaluate(
        model,
        loader,
        ClassificationEvaluator(device=device),
        device,
        dtype=dtype,
        autocast=autocast,
        channels_last=args.channels_last,
        log_interval=args.log_freq,
    )
    results = dict(
        model=args.checkpoint or args.model,
        top1=round(metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        loss=round(metrics['loss'], 5),
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
        images=len(dataset),
    )
    print(json.dumps(results, indent=2))


def main() -> None:
    with told_plainly('validate.py'):
        validate()


if __name__ == '__main__':
    main()
