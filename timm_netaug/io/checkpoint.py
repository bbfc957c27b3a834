"""Checkpoints and files of weights, read without running anything in them."""
import os
from typing import Any, Dict, List, Mapping, Optional

import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg, load_state_dict
from timm.utils import load_checkpoint_metadata

from ..errors import UserError, first_line
from ..reference import checkpoint_filter_fn, input_config, is_reference

__all__ = ['read_checkpoint', 'read_weights', 'check_finite', 'load_weights', 'count_classes']


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint's contents; tensors are mapped from the file, no code in it is run.

    Raises:
        UserError: There is no such file, or it is no checkpoint.
    """
    if not os.path.isfile(path):
        raise UserError(f'There is no checkpoint {path}.')
    try:
        checkpoint = load_checkpoint_metadata(path)
    except Exception as e:  # a truncated file makes torch and pickle raise nearly anything
        raise UserError(f'{path} is not a checkpoint that PyTorch can read safely, or it is truncated.') from e
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint.')
    return checkpoint


def read_weights(path: str, use_ema: bool = False) -> Dict[str, Any]:
    """Read the state dict of a file in any of the formats that timm reads.

    Args:
        use_ema: Take the moving average of the weights.

    Raises:
        UserError: There is no such file, it holds no weights, or no moving average.
    """
    if not os.path.isfile(path):
        raise UserError(f'There is no checkpoint {path}.')
    try:
        state_dict = load_state_dict(path, use_ema=use_ema)
    except Exception as e:  # whatever torch, pickle or safetensors find wrong in a file
        raise UserError(
            f'{path} cannot be read as weights, it is truncated or not a checkpoint: {first_line(e)}.') from e
    if not any(isinstance(t, torch.Tensor) for t in state_dict.values()):
        raise UserError(f'{path} holds no weights, it is not a checkpoint.')
    # timm takes the plain weights where there are no others.
    if use_ema and (path.endswith('.safetensors') or not {'state_dict_ema', 'model_ema'} & set(read_checkpoint(path))):
        raise UserError(f'{path} has no moving average of the weights: leave --use-ema out.')
    return state_dict


def check_finite(state_dict: Mapping[str, Any], source: str) -> None:
    """Refuse weights of a training that broke down.

    Args:
        source: Name of the weights in the message.

    Raises:
        UserError: A tensor has NaN or infinite values.
    """
    for name, t in state_dict.items():
        if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all():
            raise UserError(f'{source} is broken, {name} has NaN or infinite values: take an earlier checkpoint.')


def _misfit(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Tell why weights do not fit a model, and what would."""
    here = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    there = {k: tuple(t.shape) for k, t in state_dict.items() if isinstance(t, torch.Tensor)}
    missing = [n for n in here if n not in there and not n.endswith('num_batches_tracked')]
    unknown = [n for n in there if n not in here]
    other = 'it is of another architecture, whose name is needed (--model)'
    if missing or unknown:
        return (f'{len(missing)} of its tensors are not in the file ({", ".join(missing[:2]) or "none"}),'
                f' {len(unknown)} in the file are not of it ({", ".join(unknown[:2]) or "none"}); {other}')
    unlike = [n for n in here if n in there and here[n] != there[n]]
    if not unlike:
        return other
    shapes = f'{unlike[0]} is {list(there[unlike[0]])} in the file and {list(here[unlike[0]])} in the model'
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    for part, flag in (('classifier', '--num-classes'), ('first_conv', '--in-chans')):
        layers: List[str] = [cfg[part]] if isinstance(cfg.get(part), str) else list(cfg.get(part) or ())
        if all(n.rpartition('.')[0] in layers for n in unlike):
            return f'{shapes}: give the number that the file is of with {flag}'
    if all(len(here[n]) == len(there[n]) and all(a <= b for a, b in zip(here[n], there[n])) for n in unlike):
        return (f'the weights are wider ({shapes}), as those of a super-network are: `python -m timm_netaug export`'
                f' cuts the tiny model out of a checkpoint of train.py; else {other}')
    return f'{shapes}; {other}'


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load weights that must be all of the model's, no others, and finite; note the normalisation of their input in
    the model's config where the file is of a kind that settles it.

    Args:
        state_dict: Weights in timm's names, or in those of the reference implementation.
        source: Name of the weights in messages.

    Raises:
        UserError: They are broken, or of another model; the message says of what kind.
    """
    own_input = input_config(state_dict)
    try:
        state_dict = checkpoint_filter_fn(state_dict, model)
    except ValueError as e:
        raise UserError(f'{source}: {first_line(e)}.') from e
    check_finite(state_dict, source)
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as e:
        architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
        raise UserError(f'{source} does not fit {architecture}: {_misfit(model, state_dict)}.') from e
    if own_input:
        model.pretrained_cfg.update(own_input)


def count_classes(state_dict: Mapping[str, Any], model_name: str) -> Optional[int]:
    """Tell how many classes weights are for, None where they have no classifier that is known.

    Raises:
        UserError: The model's tag does not exist.
    """
    try:
        cfg = get_pretrained_cfg(model_name)
    except RuntimeError as e:
        raise UserError(f'{model_name}: {first_line(e)}.') from e
    if is_reference(state_dict):
        return next((t.shape[0] for k, t in state_dict.items() if k.endswith('linear.bias')), None)
    classifier = getattr(cfg, 'classifier', None)
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    return next((state_dict[f'{n}.weight'].shape[0] for n in names if f'{n}.weight' in state_dict), None)
