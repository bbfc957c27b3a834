"""Checks on timm's data sets that `train.py` and `validate.py` share."""
import os
from typing import Any, List, Optional

from .args import UserError

__all__ = ['class_names', 'check_dataset_name', 'check_split']

_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


def class_names(dataset: Any) -> Optional[List[str]]:
    """Return the names of a data set's classes in label order, None where it has none."""
    index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return [str(name) for name in sorted(index, key=index.get)] if index else None


def check_dataset_name(name: str) -> None:
    """Refuse a type of data set that timm would take for a folder of images.

    Raises:
        UserError: The part before the slash is none of timm's types.
    """
    if '/' in name and name.split('/')[0].lower() not in _PREFIXES:
        raise UserError(f'--dataset {name}: timm knows the types {", ".join(_PREFIXES)}, as in torch/cifar10.')


def check_split(dataset: Any, data_dir: str, split: str, required: bool = True) -> None:
    """Refuse image folders without a folder for the split: timm would take all images below the root, both splits'.

    Args:
        required: Refuse a root that is itself a folder of classes, too.

    Raises:
        UserError: There is no such folder.
    """
    root = getattr(getattr(dataset, 'reader', None), 'root', None)
    if root is None or os.path.abspath(root) != os.path.abspath(data_dir):
        return
    has_splits = any(os.path.isdir(os.path.join(data_dir, name)) for name in _SPLITS)
    if required or has_splits:
        raise UserError(f'There is no folder {os.path.join(data_dir, split)}: name the split that there is with'
                        f' {"--train-split or --val-split" if required else "--split"}.')
