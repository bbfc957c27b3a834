"""Read checkpoints and files of weights, without running code in them."""
import os
from typing import Any, Dict, List, Mapping, Optional

import torch
import torch.nn as nn
from timm.models import clean_state_dict, get_pretrained_cfg, load_state_dict
from timm.utils import load_checkpoint_metadata

from ..errors import UserError, rewording
from ..reference import checkpoint_filter_fn, input_config, is_reference
from .run import RunDescription

__all__ = ['read_checkpoint', 'read_weights', 'run_weights', 'check_finite', 'load_weights', 'count_classes']


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Read the contents of a checkpoint. Tensors are memory-mapped, and no code in the file is run.

    Raises:
        UserError: The file does not exist, or is not a checkpoint.
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
        use_ema: Read the moving average of the weights.

    Raises:
        UserError: The file does not exist, or does not hold such weights.
    """
    if not os.path.isfile(path):
        raise UserError(f'There is no checkpoint {path}.')
    with rewording(f'{path} cannot be read as weights, it is truncated or not a checkpoint'):
        state_dict = load_state_dict(path, use_ema=use_ema)
    if not any(isinstance(t, torch.Tensor) for t in state_dict.values()):
        raise UserError(f'{path} holds no weights, it is not a checkpoint.')
    # Without a moving average, timm would return the plain weights.
    if use_ema and (path.endswith('.safetensors') or not {'state_dict_ema', 'model_ema'} & set(read_checkpoint(path))):
        raise UserError(f'{path} has no moving average of the weights: leave --use-ema out.')
    return state_dict


def run_weights(
        checkpoint: Mapping[str, Any],
        run: RunDescription,
        use_ema: Optional[bool],
        path: str,
) -> Dict[str, Any]:
    """Return the weights in a checkpoint of `train.py` or `train_detection.py`.

    Args:
        run: The description of its run.
        use_ema: Take the moving average of the weights. None: take it if the run validated it.
        path: Name of the checkpoint in the message.

    Raises:
        UserError: The run kept no moving average.
    """
    key = 'state_dict_ema' if (run.ema if use_ema is None else use_ema) else 'state_dict'
    if key not in checkpoint:
        raise UserError(f'{path} has no {key}: it was trained without --model-ema.')
    return clean_state_dict(checkpoint[key])


def check_finite(state_dict: Mapping[str, Any], source: str) -> None:
    """Refuse weights of a training that has diverged.

    Args:
        source: Name of the weights in the message.

    Raises:
        UserError: A tensor has NaN or infinite values.
    """
    for name, t in state_dict.items():
        if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all():
            raise UserError(f'{source} is broken, {name} has NaN or infinite values: use an earlier checkpoint.')


def _misfit(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Return why weights do not fit a model, and what to do."""
    here = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    there = {k: tuple(t.shape) for k, t in state_dict.items() if isinstance(t, torch.Tensor)}
    missing = [n for n in here if n not in there and not n.endswith('num_batches_tracked')]
    unknown = [n for n in there if n not in here]
    other = 'the file is of another architecture: name it with --model'
    if missing or unknown:
        return (f'{len(missing)} tensors of the model are not in the file ({", ".join(missing[:2]) or "none"}),'
                f' {len(unknown)} tensors of the file are not in the model ({", ".join(unknown[:2]) or "none"});'
                f' {other}')
    unlike = [n for n in here if n in there and here[n] != there[n]]
    if not unlike:
        return other
    shapes = f'{unlike[0]} is {list(there[unlike[0]])} in the file and {list(here[unlike[0]])} in the model'
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    for part, flag in (('classifier', '--num-classes'), ('first_conv', '--in-chans')):
        layers: List[str] = [cfg[part]] if isinstance(cfg.get(part), str) else list(cfg.get(part) or ())
        if all(n.rpartition('.')[0] in layers for n in unlike):
            return f'{shapes}: set {flag} to the number in the file'
    if all(len(here[n]) == len(there[n]) and all(a <= b for a, b in zip(here[n], there[n])) for n in unlike):
        return (f'the weights are wider ({shapes}), as those of a super-network are: `python -m timm_netaug export`'
                f' cuts the tiny model out of a checkpoint of train.py; otherwise {other}')
    return f'{shapes}; {other}'


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load weights into a model. They must be finite, and must be exactly the model's tensors.

    If the kind of file determines the normalisation of the input, it is noted in the model's config.

    Args:
        state_dict: Weights in timm's names, or in those of the reference implementation.
        source: Name of the weights in messages.

    Raises:
        UserError: The weights are broken, or belong to another model. The message says how they differ.
    """
    own_input = input_config(state_dict)
    with rewording(source, ValueError):
        state_dict = checkpoint_filter_fn(state_dict, model)
    check_finite(state_dict, source)
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as e:
        architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
        raise UserError(f'{source} does not fit {architecture}: {_misfit(model, state_dict)}.') from e
    if own_input:
        model.pretrained_cfg.update(own_input)


def count_classes(state_dict: Mapping[str, Any], model_name: str) -> Optional[int]:
    """Return the number of classes of a state dict, None if its classifier is unknown.

    Raises:
        UserError: The model's tag does not exist.
    """
    with rewording(model_name, RuntimeError):
        cfg = get_pretrained_cfg(model_name)
    if is_reference(state_dict):
        return next((t.shape[0] for k, t in state_dict.items() if k.endswith('linear.bias')), None)
    classifier = getattr(cfg, 'classifier', None)
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    return next((state_dict[f'{n}.weight'].shape[0] for n in names if f'{n}.weight' in state_dict), None)
