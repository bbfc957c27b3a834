"""Checkpoints of `train.py`: written so that a kill leaves none torn, and read without running anything in them."""
import argparse
import os
import shutil
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, TextIO, Tuple

import torch
import torch.nn as nn
from timm import create_model
from timm.models import clean_state_dict, get_pretrained_cfg, load_state_dict
from timm.utils import CheckpointSaver, load_checkpoint_metadata

from .errors import UserError, first_line
from .reference import is_reference

__all__ = [
    'AtomicSaver', 'aside', 'describe_run', 'read_checkpoint', 'read_weights', 'check_finite', 'load_weights',
    'load_run', 'classes_in_file',
]


def _flush(path: str) -> None:
    with open(path, 'rb') as f:
        os.fsync(f.fileno())


@contextmanager
def aside(path: str) -> Iterator[TextIO]:
    """Write a text file that is complete at every moment: aside, flushed to disk, then renamed."""
    with open(f'{path}.aside', 'w', newline='', encoding='utf-8') as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.aside', path)


class AtomicSaver(CheckpointSaver):
    """timm's saver, whose `last`, `model_best` and numbered files are complete at every moment.

    `last`, which a run is resumed from, is renamed when all that belongs to its epoch is on disk: a kill in between
    lets the resumed run do that epoch again, best file and history included.
    """

    _late = ()

    def save_checkpoint(self, epoch, metric=None):
        self._late = []
        result = super().save_checkpoint(epoch, metric)
        for src, dst in self._late:
            os.replace(src, dst)
        return result

    def _save(self, save_path, epoch, metric=None):
        try:
            super()._save(save_path, epoch, metric)
            _flush(save_path)
        except (OSError, RuntimeError) as e:
            if os.path.exists(save_path):
                os.remove(save_path)
            if isinstance(e, RuntimeError) and 'inline_container' not in str(e) and 'StreamWriter' not in str(e):
                raise  # not what torch.save makes of a full disk
            raise self.full(e, save_path) from e

    def full(self, error: Exception, path: Optional[str] = None) -> UserError:
        """Return the sentence for a file that can not be written."""
        path = path or getattr(error, 'filename', None) or self.checkpoint_dir
        last = os.path.join(self.checkpoint_dir, f'last{self.extension}')
        again = f'go on with --resume {last}' if os.path.exists(last) else 'start again'
        return UserError(f'{path} can not be written ({first_line(error)}): make room on the disk, and {again}. The'
                         f' files of the epochs before are whole.')

    def save_recovery(self, epoch, batch_idx=0):
        """Save in mid-epoch, if there is anything to go on with."""
        if self.task is not None:
            check_finite(self.task.get_checkpoint_state()['state_dict'], 'What has been trained')
        super().save_recovery(epoch, batch_idx)

    def _replace(self, src, dst):
        if os.path.basename(dst) == f'last{self.extension}':
            self._late.append((src, dst))
        else:
            os.replace(src, dst)

    def _duplicate(self, src, dst):
        src = next((aside for aside, last in self._late if last == src), src)
        aside = f'{dst}.aside'
        if os.path.exists(aside):
            os.unlink(aside)
        try:
            os.link(src, aside)
        except (OSError, NotImplementedError):
            shutil.copy2(src, aside)
            _flush(aside)
        os.replace(aside, dst)


def describe_run(model: nn.Module, data_config: Dict[str, Any], class_names: Any) -> Dict[str, Any]:
    """Return, as plain data, what it takes to build a model again and to feed it; it goes into every checkpoint."""
    args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k not in ('netaug', 'pretrained_model_args')}
    args['num_classes'] = model.num_classes
    return dict(
        architecture=model.pretrained_cfg['architecture'],
        model_args=args,
        data_config=dict(data_config),
        class_names=list(class_names) if class_names else None,
    )


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
        raise UserError(f'{path} can not be read as weights, it is truncated or no checkpoint: {first_line(e)}.') from e
    if not any(isinstance(t, torch.Tensor) for t in state_dict.values()):
        raise UserError(f'{path} holds no weights.')
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
        return (f'the weights are wider ({shapes}), as those of a super-network are: `python -m timm_netaug.export`'
                f' cuts the tiny model out of a checkpoint of train.py; else {other}')
    return f'{shapes}; {other}'


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load weights that must be all of the model's, no others, and finite.

    Args:
        source: Name of the weights in messages.

    Raises:
        UserError: They are broken, or of another model; the message says of what kind.
    """
    check_finite(state_dict, source)
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as e:
        architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
        raise UserError(f'{source} does not fit {architecture}: {_misfit(model, state_dict)}.') from e


def load_run(path: str, use_ema: Optional[bool] = None) -> Tuple[nn.Module, Dict[str, Any], Dict[str, Any]]:
    """Build the stock timm model of a checkpoint of `train.py`.

    Args:
        use_ema: Take the moving average of the weights; None: where the run's metric is that of the average.

    Returns:
        The model, the description of its run (see `describe_run`), and the whole checkpoint.

    Raises:
        UserError: It is no checkpoint of `train.py`, is broken, or has no moving average.
    """
    checkpoint = read_checkpoint(path)
    args = checkpoint.get('args')
    run = getattr(args, 'run', None) if isinstance(args, argparse.Namespace) else None
    if run is None:
        raise UserError(f'{path} is not a checkpoint of train.py (it does not say which model it is of).')
    use_ema = run.get('ema', False) if use_ema is None else use_ema
    key = 'state_dict_ema' if use_ema else 'state_dict'
    if key not in checkpoint:
        raise UserError(f'{path} has no {key}: it was trained without --model-ema.')
    try:
        model = create_model(run['architecture'], **run['model_args'])
    except (RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{path}: its model can not be built with this version of timm: {first_line(e)}.') from e
    load_weights(model, clean_state_dict(checkpoint[key]), path)
    return model.eval(), run, checkpoint


def classes_in_file(path: str, model_name: str) -> Optional[int]:
    """Tell how many classes the weights in a file are for, None where they have no classifier that is known.

    Raises:
        UserError: The file can not be read as weights, or the model's tag does not exist.
    """
    state_dict = read_weights(path)
    try:
        cfg = get_pretrained_cfg(model_name)
    except RuntimeError as e:
        raise UserError(f'{model_name}: {first_line(e)}.') from e
    if is_reference(state_dict):
        return next((t.shape[0] for k, t in state_dict.items() if k.endswith('linear.bias')), None)
    classifier = getattr(cfg, 'classifier', None)
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    return next((state_dict[f'{n}.weight'].shape[0] for n in names if f'{n}.weight' in state_dict), None)
