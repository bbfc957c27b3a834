"""The models that `validate.py` evaluates, built from names and checkpoints."""
import argparse
import logging
import math
from typing import Any, Dict, List, NamedTuple, Optional

import torch.nn as nn
from timm import create_model
from timm.data import resolve_input_data_config
from timm.layers import apply_test_time_pool
from timm.models import resolve_model_input_args

import timm_netaug

from ..checkpoint import check_finite, classes_in_file, load_run, load_weights, read_checkpoint, read_weights
from ..errors import UserError, check_model_name, first_line
from ..fetch import local_name
from .args import validate_parser

__all__ = ['Subject', 'set_up_subject', 'pool_as_in_training']

_logger = logging.getLogger('validate')


class Subject(NamedTuple):
    """A model, what it is called, how its input is made and, where known, the names of its classes."""
    model: nn.Module
    name: str
    num_classes: int
    data_config: Dict[str, Any]
    class_names: Optional[List[str]]


def _subject(model: nn.Module, name: str, class_names: Any, flags: Dict[str, Any], **kwargs: Any) -> Subject:
    try:
        data_config = resolve_input_data_config(model, args=flags, **kwargs)
    except (ValueError, AssertionError) as e:
        raise UserError(f'{name} does not take such an input: {first_line(e)}.') from e
    return Subject(model, name, model.num_classes, data_config, class_names)


def _subject_of_run(args: argparse.Namespace, parser: argparse.ArgumentParser, run: Dict[str, Any]) -> Subject:
    """Build the model of a checkpoint of `train.py`, which knows all that there is to know."""
    own = dict(model=run['architecture'], pretrained=False, gp=run['model_args'].get('global_pool'),
               num_classes=run['model_args']['num_classes'], in_chans=run['model_args'].get('in_chans'),
               model_kwargs={})
    for dest, value in own.items():
        if getattr(args, dest) not in (parser.get_default(dest), value):
            raise UserError(f'--{dest.replace("_", "-")}: the checkpoint is of a model of its own,'
                            f' {run["architecture"]} with {run["model_args"]}. Leave the flag out.')
    model, run, _ = load_run(args.checkpoint, args.use_ema)
    if run.get('ema') and not args.use_ema:
        _logger.warning('The metrics of this run are those of the moving average of its weights: see --use-ema.')
    channels, *size = run['data_config']['input_size']
    if args.test_pool and getattr(model, 'feature_info', None):
        # What timm compares the input with; its own numbers are of the registered model.
        stride = model.feature_info[-1]['reduction']
        model.pretrained_cfg.update(
            input_size=(channels, *size), pool_size=tuple(math.ceil(side / stride) for side in size))
    flags = {k: v for k, v in vars(args).items() if v not in (None, '', {})}
    if flags.get('img_size') or flags.get('input_size'):
        run['data_config'].pop('input_size')
    return _subject(
        model, run['architecture'], run['class_names'], {**run['data_config'], 'in_chans': channels, **flags})


def set_up_subject(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Subject:
    """Build the model that `--model` or `--checkpoint` names.

    Raises:
        UserError: There is none, or its weights are broken or of another model.
    """
    weights = None
    if args.checkpoint:
        try:
            run = getattr(read_checkpoint(args.checkpoint).get('args'), 'run', None)
        except UserError:
            run = None  # another format: reading the weights tells whether it holds any
        if run is not None:
            return _subject_of_run(args, parser, run)
        weights = read_weights(args.checkpoint, args.use_ema)
        if not args.model:
            raise UserError(f'{args.checkpoint} does not say which model it is of: name it with --model.')
    name = args.model or validate_parser().get_default('model')
    check_model_name(name)
    source = local_name(name, weights=args.pretrained or weights is None)
    num_classes = args.num_classes
    if weights is not None and num_classes is None:
        num_classes = classes_in_file(args.checkpoint, name)
    try:
        model = create_model(
            pretrained=args.pretrained or weights is None,
            **resolve_model_input_args(
                source,
                vars(args),
                num_classes=num_classes,
                in_chans=args.in_chans,
                global_pool=args.gp,
                **args.model_kwargs,
            ),
        )
        if weights is not None:
            # The filter only renames a reference checkpoint; weights in timm's names pass through it.
            weights = timm_netaug.checkpoint_filter_fn(weights, model)
    except (FileNotFoundError, RuntimeError, ValueError, TypeError) as e:
        raise UserError(f'{name} can not be loaded (--model names the architecture):'
                        f' {" ".join(str(e).split())[:300]}') from e
    if weights is not None:
        load_weights(model, weights, args.checkpoint)
    check_finite(model.state_dict(), name)
    return _subject(
        model, name, model.pretrained_cfg.get('label_names'), vars(args), use_test_size=not args.use_train_size)


def pool_as_in_training(model: nn.Module, data_config: Dict[str, Any]) -> nn.Module:
    """Apply `--test-pool`, which wants whole images: the input's config is changed.

    Raises:
        UserError: The model is not made of features, one pooling and one classifier.
    """
    try:
        pooled, applied = apply_test_time_pool(model, data_config)
    except (AttributeError, KeyError, RuntimeError, TypeError) as e:
        raise UserError(f'--test-pool does not work with a {type(model).__name__}: {first_line(e)}.') from e
    if applied:
        data_config['crop_pct'] = 1.0
    else:
        _logger.warning('--test-pool changes nothing: the input is not larger than in training. See --img-size.')
    return pooled
