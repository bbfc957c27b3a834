"""The models that `validate.py` evaluates, built from names and checkpoints."""
import argparse
import logging
import math
import os
from typing import Any, Dict

import torch.nn as nn
from timm.layers import apply_test_time_pool

from ..errors import UserError, rewording
from ..io.run import RunDescription
from ..load import LoadedModel, load_model, read_run
from .flags import flag_name

__all__ = ['load_evaluated_model', 'pool_as_in_training']

_logger = logging.getLogger('validate')


def _check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser, run: RunDescription) -> None:
    """Refuse flags that contradict a checkpoint of `train.py`, which determines its model completely."""
    own = dict(model=run.architecture, pretrained=False, gp=run.model_args.get('global_pool'),
               num_classes=run.model_args['num_classes'], in_chans=run.model_args.get('in_chans'), model_kwargs={})
    for dest, value in own.items():
        if getattr(args, dest) not in (parser.get_default(dest), value):
            raise UserError(f'{flag_name(dest)}: the checkpoint determines its model, which is'
                            f' {run.architecture} with {run.model_args}. Leave the flag out.')


def _check_pretrained(args: argparse.Namespace, loaded: LoadedModel) -> None:
    """Refuse flags that an exported folder ignores, or that replace the trained classifier by one at random."""
    own = dict(num_classes=loaded.model.num_classes, in_chans=loaded.data_config['input_size'][0])
    given = [dest for dest in ('num_classes', 'in_chans', 'gp', 'model_kwargs')
             if getattr(args, dest) and getattr(args, dest) != own.get(dest)]
    if loaded.folder is not None and given:
        raise UserError(f'{flag_name(given[0])}: the folder {loaded.folder} determines its model. Leave the flag out.')
    trained = (loaded.model.pretrained_cfg or {}).get('num_classes')
    if not args.checkpoint and args.num_classes and trained and args.num_classes != trained:
        raise UserError(f'--num-classes {args.num_classes}: the weights of {args.model} are for {trained} classes, so'
                        f' the classifier would have random weights. Leave the flag out.')


def load_evaluated_model(args: argparse.Namespace, parser: argparse.ArgumentParser) -> LoadedModel:
    """Build the model that `--model` or `--checkpoint` names.

    Raises:
        UserError: The model does not exist, or its weights are broken or belong to another model.
    """
    if not args.model and not args.checkpoint:
        raise UserError('No model is given: name one with --model (and --pretrained), or its file with --checkpoint.')
    run = read_run(args.checkpoint) if args.checkpoint else None
    if run is not None:
        _check_flags(args, parser, run)
    elif args.checkpoint and not os.path.isfile(args.checkpoint):
        raise UserError(f'There is no checkpoint {args.checkpoint}.')
    loaded = load_model(
        args.checkpoint or args.model,
        args.model if args.checkpoint else None,
        args.use_ema,
        args.pretrained or not args.checkpoint,
        vars(args),
        use_test_size=not args.use_train_size,
        num_classes=args.num_classes,
        in_chans=args.in_chans,
        global_pool=args.gp,
        **args.model_kwargs,
    )
    if run is None:
        _check_pretrained(args, loaded)
    if run is not None and run.ema and not args.use_ema:
        _logger.warning('This run validated the moving average of its weights, which --use-ema evaluates.')
    if run is not None and args.test_pool and getattr(loaded.model, 'feature_info', None):
        # timm compares the input with these fields, which otherwise describe the registered model.
        stride = loaded.model.feature_info[-1]['reduction']
        channels, *size = run.data_config['input_size']
        loaded.model.pretrained_cfg.update(
            input_size=(channels, *size), pool_size=tuple(math.ceil(side / stride) for side in size))
    return loaded


def pool_as_in_training(model: nn.Module, data_config: Dict[str, Any]) -> nn.Module:
    """Apply `--test-pool`. It needs images that are not cropped, so `data_config` is changed.

    Raises:
        UserError: The model does not consist of features, one pooling and one classifier.
    """
    with rewording(f'--test-pool does not work with a {type(model).__name__}'):
        pooled, applied = apply_test_time_pool(model, data_config)
    if applied:
        data_config['crop_pct'] = 1.0
    else:
        _logger.warning('--test-pool changes nothing: the input is not larger than in training. See --img-size.')
    return pooled
