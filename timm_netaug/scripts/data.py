"""Opening timm's data sets, with checks that `train.py` and `validate.py` share."""
import os
from typing import Any, List, Optional

from timm.data import create_dataset

from ..errors import UserError

__all__ = ['class_names', 'open_dataset', 'check_split']

_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


def class_names(dataset: Any) -> Optional[List[str]]:
    """Return the names of a data set's classes in label order, None where it has none."""
    index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return [str(name) for name in sorted(index, key=index.get)] if index else None


def open_dataset(args: Any, split: str, channels: int, **kwargs: Any) -> Any:
    """Open a split of the data set that the flags of either script name.

    Args:
        channels: Of the model's input; images of other than three are read as grey.
        kwargs: Further arguments of timm's create_dataset().

    Raises:
        UserError: Its type is none of timm's (which would take it for a folder of images), or it can not be opened.
    """
    if '/' in args.dataset and args.dataset.split('/')[0].lower() not in _PREFIXES:
        raise UserError(f'--dataset {args.dataset}: timm knows the types {", ".join(_PREFIXES)}, as in torch/cifar10.')
    if args.data_dir and not args.dataset and not os.path.isdir(args.data_dir):
        raise UserError(f'--data-dir: there is no folder {args.data_dir}.')
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            download=args.dataset_download,
            input_img_mode=args.input_img_mode or ('RGB' if channels == 3 else 'L'),
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    except (RuntimeError, FileNotFoundError, AssertionError) as e:
        raise UserError(f'The data set can not be opened: {e}') from e


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
        flags = '--train-split and --val-split' if required else '--split'
        raise UserError(f'There is no folder {os.path.join(data_dir, split)}: --data-dir is the folder around the'
                        f' splits, which have their names from {flags}.')
