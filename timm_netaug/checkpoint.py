"""Checkpoints of `train.py`: written so that a kill leaves none torn, and read without running anything in them."""
import argparse
import os
import pickle
import shutil
from typing import Any, Dict, Optional, Tuple

import torch.nn as nn
from timm import create_model
from timm.models import clean_state_dict, get_pretrained_cfg, load_state_dict
from timm.utils import CheckpointSaver, load_checkpoint_metadata

from .errors import UserError
from .reference import is_reference

__all__ = ['AtomicSaver', 'describe_run', 'read_checkpoint', 'load_run', 'classes_in_file']


def _flush(path: str) -> None:
    with open(path, 'rb') as f:
        os.fsync(f.fileno())


class AtomicSaver(CheckpointSaver):
    """timm's saver, whose `last`, `model_best` and numbered files are complete at every moment."""

    def _save(self, save_path, epoch, metric=None):
        super()._save(save_path, epoch, metric)
        _flush(save_path)

    def _replace(self, src, dst):
        os.replace(src, dst)

    def _duplicate(self, src, dst):
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
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as e:
        raise UserError(f'{path} is not a checkpoint that PyTorch can read safely.') from e
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint.')
    return checkpoint


def load_run(path: str, use_ema: Optional[bool] = None) -> Tuple[nn.Module, Dict[str, Any], Dict[str, Any]]:
    """Build the stock timm model of a checkpoint of `train.py`.

    Args:
        use_ema: Take the moving average of the weights; None: where the run's metric is that of the average.

    Returns:
        The model, the description of its run (see `describe_run`), and the whole checkpoint.

    Raises:
        UserError: It is no checkpoint of `train.py`, or has no moving average.
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
    model = create_model(run['architecture'], **run['model_args'])
    model.load_state_dict(clean_state_dict(checkpoint[key]))
    return model.eval(), run, checkpoint


def classes_in_file(path: str, model_name: str) -> Optional[int]:
    """Tell how many classes the weights in a file are for, None where they have no classifier that is known.

    Raises:
        UserError: The file can not be read as weights, or the model's tag does not exist.
    """
    try:
        state_dict = load_state_dict(path)
        cfg = get_pretrained_cfg(model_name)
    except Exception as e:  # whatever torch, pickle or safetensors find wrong in a file
        raise UserError(f'{path} can not be read as weights of {model_name}: {str(e).splitlines()[0]}') from e
    if is_reference(state_dict):
        return next((t.shape[0] for k, t in state_dict.items() if k.endswith('linear.bias')), None)
    classifier = getattr(cfg, 'classifier', None)
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    return next((state_dict[f'{n}.weight'].shape[0] for n in names if f'{n}.weight' in state_dict), None)
