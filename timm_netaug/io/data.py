"""Open timm's data sets, with checks that training and evaluation share."""
import atexit
import importlib.util
import logging
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Union

import numpy as np
from PIL import Image
from timm.data import ImageDataset, MultiLabelTarget, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import IterableDataset

from ..errors import UserError, rewording
from .image_folder import label_by_class_folder
from .label_table import LabelTable

__all__ = ['DataSource', 'class_names', 'check_channels', 'check_split', 'encode_targets', 'labels_of_folder',
           'open_dataset', 'watched']

_logger = logging.getLogger(__name__)
logging.getLogger('timm.data.dataset').setLevel(logging.ERROR)  # it would warn of the same image in every epoch
_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_PACKAGES = {  # type of data set -> modules that it needs, and the names of their packages
    'hfds': (('datasets', 'datasets'),), 'hfids': (('datasets', 'datasets'),),
    'tfds': (('tensorflow', 'tensorflow'), ('tensorflow_datasets', 'tensorflow-datasets')),
    'wds': (('webdataset', 'webdataset'),),
}
_MODES = ('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV')  # of Pillow, with 8 bits in a channel
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


@dataclass(frozen=True)
class DataSource:
    """Where images are, and how a sample is read. The fields are the flags of the same names."""
    data_dir: str
    dataset: str = ''
    class_map: Union[str, Mapping[str, int]] = ''
    dataset_download: bool = False
    input_img_mode: Optional[str] = None
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    dataset_trust_remote_code: bool = False


class WatchedImages(ImageDataset):
    """timm's data set of image files, in which the next image replaces an image that cannot be read.

    The names of such images are written to a file, because the worker processes of the loader find them.
    """
    _max_retries = 1  # switches off timm's own retries, which are not counted

    @classmethod
    def watch(cls, dataset: ImageDataset) -> None:
        """Turn a data set of timm into this class, in place."""
        dataset.__class__ = cls
        vars(dataset).pop('_max_retries', None)
        handle, dataset.notes = tempfile.mkstemp(prefix='unreadable-', suffix='.txt')
        os.close(handle)
        atexit.register(_remove, dataset.notes)
        dataset.unreadable, dataset.read_notes = set(), 0

    @property
    def limit(self) -> int:
        """Number of unreadable images that are tolerated. With more of them, the data set counts as broken."""
        return max(10, len(self) // 100)

    def __getitem__(self, index: int) -> Any:
        for _ in range(self.limit + 1):
            try:
                image, *rest = self._read(index)
                break
            # timm turns an OSError into a RuntimeError; Pillow raises each of the others for some kind of damage.
            except (RuntimeError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                with open(self.notes, 'a', encoding='utf-8', errors='surrogateescape') as f:
                    f.write(f'{self.filename(index, absolute=True)}\n')
                index = (index + 1) % len(self)
        else:
            raise RuntimeError(f'{self.limit + 1} images in a row cannot be read.')
        if rest[0] is None:
            rest[0] = -1
        elif self.target_transform is not None:
            with rewording(f'The label of {self.filename(index, absolute=True)} is wrong'):
                rest[0] = self.target_transform(rest[0])
        return (image if self.transform is None else self.transform(image), *rest)

    def _read(self, index: int) -> Any:
        """Read a sample without its transforms: an error in a transform does not mean that the image is unreadable."""
        if self.load_bytes:
            transforms = self.transform, self.target_transform
            self.transform = self.target_transform = None
            try:
                return super().__getitem__(index)
            finally:
                self.transform, self.target_transform = transforms
        file, target, *features = self.reader[index]
        with file:
            image = eight_bits(Image.open(file)).convert(self.input_img_mode)
        return (image, target) if self.additional_features is None else (image, target, *features)

    def check(self) -> None:
        """Warn of unreadable images that were found since the last call.

        Raises:
            UserError: More than ten images, and more than one in a hundred, are unreadable.
        """
        if not os.path.exists(self.notes) or os.path.getsize(self.notes) == self.read_notes:
            return
        with open(self.notes, encoding='utf-8', errors='surrogateescape') as f:
            f.seek(self.read_notes)
            new = set(f.read().splitlines()) - self.unreadable
            self.read_notes = f.tell()
        self.unreadable |= new
        files = ', '.join(sorted(new)[:5]) + (' ...' if len(new) > 5 else '')
        if len(self.unreadable) > self.limit:
            raise UserError(f'{len(self.unreadable)} of {len(self)} images cannot be read ({files}): repair or remove'
                            f' them.')
        if new:
            _logger.warning(f'{len(self.unreadable)} of {len(self)} images cannot be read so far, and the next image'
                            f' replaces each of them. Found since the last warning: {files}')


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of 16 bits to 8, which Pillow's conversion would clip to white instead."""
    if image.mode not in ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N'):
        return image
    values = np.asarray(image)
    return Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).astype(np.uint8))


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)


def watched(loader: Any) -> Iterator[Any]:
    """Yield the batches of a loader, and warn of images that cannot be read.

    Raises:
        UserError: Too many images cannot be read.
    """
    dataset = loader.dataset
    while not hasattr(dataset, 'check') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    check = getattr(dataset, 'check', lambda: None)
    with _telling_unreadable(dataset):
        for batch in loader:
            check()
            yield batch


@contextmanager
def _telling_unreadable(dataset: Any) -> Iterator[None]:
    """Turn the error of a `WatchedImages` that finds no image to read into a sentence with the names of the files."""
    try:
        yield
    except RuntimeError as e:  # perhaps from a worker process, which has written the names of the images to the file
        if hasattr(dataset, 'check'):
            dataset.check()
        if 'images in a row cannot be read' not in str(e):
            raise
        raise UserError(f'No image can be read ({", ".join(sorted(dataset.unreadable)[:5])}): repair them.') from e


def class_names(dataset: Any) -> Optional[List[str]]:
    """Return the names of a data set's classes in label order, None if it does not name them."""
    reader = getattr(dataset, 'reader', dataset)
    index = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)  # readers of archives
    if not index:
        return None
    names: Dict[int, str] = {}
    for name, label in index.items():
        names.setdefault(label, str(name))  # a class may have several names
    if sorted(names) != list(range(len(names))):
        raise UserError(f'The labels of the classes must be 0 to {len(names) - 1}, they are {sorted(names)[:5]} and so'
                        f' on: correct the --class-map.')
    return [names[label] for label in sorted(names)]


def labels_of_folder(dataset: Any) -> Set[int]:
    """Return the labels that images in folders of classes have, none for data sets of other kinds."""
    reader = getattr(dataset, 'reader', None)
    return {label for _, label in reader.samples} if type(reader) is ReaderImageFolder else set()


def _mode(channels: int) -> str:
    return 'RGB' if channels == 3 else 'L'


def encode_targets(datasets: Sequence[Any], num_classes: int, target: str) -> None:
    """Let multi-label data sets return one number for each class.

    Args:
        datasets: As `open_dataset` returns them.
        target: See `open_dataset`.
    """
    for dataset in datasets if target != 'class' else ():
        dense = target == 'dense' or isinstance(getattr(dataset, 'reader', None), LabelTable)
        dataset.target_transform = MultiLabelTarget(num_classes, dense=dense)


def open_dataset(source: DataSource, split: str, channels: int, target: str = 'class', **kwargs: Any) -> Any:
    """Open a split of a data set.

    Args:
        channels: Number of channels of the model's input. Unless it is three, images are read as greyscale.
        target: Kind of targets: the 'class' of an image, or in multi-label data sets the 'indices' of its classes or a
            'dense' vector with one number for each class. Image folders with several labels have a table `labels.csv`.
        kwargs: Further arguments of timm's create_dataset().

    Raises:
        UserError: timm does not know the type of the data set (it would read a folder of images), or the data set
            cannot be opened.
    """
    name, root = source.dataset, source.data_dir
    if source.input_img_mode not in (None, '', *_MODES):
        raise UserError(f'--input-img-mode must be one of {", ".join(_MODES)}, got {source.input_img_mode}.')
    if '/' in name and name.split('/')[0].lower() not in _PREFIXES:
        raise UserError(f'--dataset {name}: timm knows the types {", ".join(_PREFIXES)}, as in torch/cifar10.')
    if root and not name and not (os.path.isdir(root) or os.path.isfile(root) and root.endswith('.tar')):
        raise UserError(f'--data-dir: there is no folder {root}.')
    kind = name.split('/')[0].lower() if '/' in name else ''
    if kind in ('torch', 'tfds', 'wds') and not root:
        raise UserError(f'--dataset {name}: give the folder of the data set with --data-dir.')
    for module, package in _PACKAGES.get(kind, ()):
        if importlib.util.find_spec(module) is None:
            raise UserError(f'--dataset {name} needs {package}: pip install {package}.')
    if target != 'class' and not name:
        if source.class_map:
            raise UserError('--class-map does nothing with --task multilabel: the header of labels.csv names the'
                            ' classes.')
        dataset = ImageDataset(
            root, reader=LabelTable(root, split), input_img_mode=source.input_img_mode or _mode(channels))
        WatchedImages.watch(dataset)
        return dataset
    with rewording('The data set cannot be opened'):
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            class_map=source.class_map if name or os.path.isfile(root) else None,  # for folders, it is read below
            download=source.dataset_download,
            input_img_mode=source.input_img_mode or _mode(channels),
            input_key=source.input_key,
            target_key=source.target_key,
            trust_remote_code=source.dataset_trust_remote_code,
            **kwargs,
        )
    if type(getattr(dataset, 'reader', None)) is ReaderImageFolder:
        label_by_class_folder(dataset.reader, source.class_map, source.input_key)
    if type(dataset) is ImageDataset:
        WatchedImages.watch(dataset)
    return dataset


def check_channels(dataset: Any, channels: int) -> None:
    """Refuse a data set whose images have another number of channels than the model's input. This reads one image.

    Args:
        dataset: Data set with the transform of evaluation, which draws no random numbers.

    Raises:
        UserError: The numbers differ, or no image can be read.
    """
    if isinstance(dataset, IterableDataset) or not len(dataset):
        return
    with _telling_unreadable(dataset):
        image = dataset[0][0]
    shape = getattr(image, 'shape', ())
    found = shape[0] if len(shape) == 3 else 1
    if len(shape) in (2, 3) and found != channels:
        raise UserError(f'The images have {found} channel{"s" * (found > 1)}, but the model\'s input has {channels}:'
                        f' add --in-chans {found}, or read images with --input-img-mode (L: 1, LA: 2, RGB: 3, RGBA:'
                        f' 4).')


def check_split(dataset: Any, data_dir: str, split: str, required: bool = True) -> None:
    """Refuse image folders without a folder for the split: timm would read all images below the root, of all splits.

    Args:
        required: Also refuse a root that holds the folders of classes itself.

    Raises:
        UserError: The split has no folder, or one of its classes has a folder without images.
    """
    if os.path.isfile(data_dir):
        if required:
            _logger.warning(f'{data_dir} is one archive: the {split} split consists of all of its images.')
        return
    root = getattr(getattr(dataset, 'reader', None), 'root', None)
    if root is None or isinstance(dataset.reader, LabelTable):
        return
    if os.path.abspath(root) != os.path.abspath(data_dir):
        _check_class_folders(dataset, root)
        return
    has_splits = any(os.path.isdir(os.path.join(data_dir, name)) for name in _SPLITS)
    if required or has_splits:
        flags = '--train-split and --val-split give' if required else '--split gives'
        raise UserError(f'There is no folder {os.path.join(data_dir, split)}: --data-dir is the folder that contains'
                        f' the folders of the splits, and {flags} their names.')


def _check_class_folders(dataset: Any, root: str) -> None:
    """Refuse a class folder without images. It would not count as a class, which would shift the labels behind it."""
    known = set(getattr(dataset.reader, 'class_to_idx', None) or class_names(dataset) or ())
    for folder in sorted(os.scandir(root), key=lambda entry: entry.name) if os.path.isdir(root) else ():
        if folder.name.startswith('.') or folder.name in known:
            continue
        if folder.is_symlink() and not os.path.exists(folder.path):
            raise UserError(f'{folder.path} is a link that leads nowhere, so that class would be missing: mend the'
                            f' link, or remove it.')
        if folder.is_dir():
            raise UserError(f'{folder.path} holds no images, so that class would be missing: fill the folder, or remove'
                            f' it.')
