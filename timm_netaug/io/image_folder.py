"""Folders of images: a class is a folder directly below the split.

timm uses the name of the innermost folder as the class. So sub-folders of a class (`cat/session1/`) would become
classes of their own, and images outside class folders would become a class without a name.
"""
import logging
import os
from collections import Counter
from typing import Dict, List, Mapping, Optional, Tuple, Union

from PIL import Image
from timm.data.readers import get_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from ..errors import UserError, rewording

__all__ = ['label_by_class_folder', 'read_class_map']

_logger = logging.getLogger(__name__)
_told = set()  # folders that a warning about other image formats has named


def label_by_class_folder(
        reader: ReaderImageFolder,
        class_map: Union[str, Mapping[str, int]] = '',
        types: Optional[str] = None,
) -> None:
    """Label every image of timm's reader by the folder directly below the reader's root that contains it.

    Files and folders whose names begin with a dot are left out. Image files of formats that timm does not read are
    counted in a warning. The order of the images is that of timm.

    Args:
        class_map: Labels by name, or a text file of the names in label order; empty: the folders in natural order.
        types: File endings that are read, separated by semicolons; None for timm's.

    Raises:
        UserError: Images lie outside class folders, a folder with images is not in the class map, or a link leads to a
            folder that contains it.
    """
    endings = set(types.split(';')) if types else get_img_extensions(as_set=True)
    known = set(Image.registered_extensions()) - endings
    flat, images, other = [], {}, Counter()
    for folder, subfolders, files in os.walk(reader.root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        for subfolder in subfolders:
            _check_link(os.path.join(folder, subfolder), reader.root)
        name = os.path.relpath(folder, reader.root).split(os.sep)[0]
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if file.startswith('.'):
                continue
            if ending in endings:
                (flat if name == os.curdir else images.setdefault(name, [])).append(os.path.join(folder, file))
            elif ending in known:
                other[ending] += 1
    if flat:
        raise UserError(f'{len(flat)} images lie directly in {reader.root} ({os.path.basename(min(flat))}): put each'
                        f' one into the folder of its class, as in {os.path.join(reader.root, "CLASS", "IMAGE")}.')
    if other and reader.root not in _told:
        _told.add(reader.root)
        kinds = ', '.join(f'{count} {ending}' for ending, count in sorted(other.items()))
        _logger.warning(f'Image files of other formats than {" ".join(sorted(endings))} below {reader.root} are left'
                        f' out: {kinds}. Convert them to use them.')
    labels = read_class_map(class_map, reader.root) if class_map else {
        name: i for i, name in enumerate(sorted(images, key=_in_order))}
    missing = sorted(set(images) - set(labels))
    if missing:
        raise UserError(f'The class map has no entry for the folder {missing[0]} of {reader.root}'
                        f'{f" and {len(missing) - 1} others" if missing[1:] else ""}, whose images would be left out:'
                        f' add the names, or remove the folders.')
    reader.class_to_idx = labels
    reader.samples = sorted(
        ((path, labels[name]) for name, paths in images.items() for path in paths), key=lambda s: _in_order(s[0]))
    if not reader.samples:
        raise UserError(f'There are no images in the class folders of {reader.root}.')


def _in_order(name: str) -> Tuple[List[Union[int, str]], str]:
    """Return timm's key for sorting. Where it tells two names not apart (`Cat` and `cat`), the names themselves do."""
    return natural_key(name), name


def _check_link(folder: str, root: str) -> None:
    if not os.path.islink(folder):
        return
    target, place = os.path.join(os.path.realpath(folder), ''), folder
    while len(place) > len(root):  # the places on the way may be links, too
        place = os.path.dirname(place)
        if os.path.join(os.path.realpath(place), '').startswith(target):
            raise UserError(f'{folder} is a link to a folder that contains it, so its images would count many times:'
                            f' remove the link.')


def read_class_map(class_map: Union[str, Mapping[str, int]], root: str) -> Dict[str, int]:
    """Return labels by class name.

    Args:
        class_map: A mapping; or a text file with one name on each line, in label order (`NAME`, or `NUMBER NAME`
            with numbers from 0 or from 1); or a .pkl file as timm reads it. The file may lie below `root`.

    Raises:
        UserError: The file does not exist, is not UTF-8, or lists a name twice.
    """
    if not isinstance(class_map, str):
        return dict(class_map)
    path = class_map if os.path.exists(class_map) else os.path.join(root, class_map)
    if not class_map.endswith('.txt') or not os.path.exists(path):
        with rewording(f'--class-map {class_map}'):
            return dict(load_class_map(class_map, root))
    with rewording(f'--class-map {class_map}', UnicodeDecodeError, hint='Save the file as UTF-8.'), \
            open(path, encoding='utf-8-sig') as f:
        lines: List[str] = [line.strip() for line in f if line.strip()]
    parts = [line.split(None, 1) for line in lines]
    counted = [[str(i) for i in range(first, first + len(lines))] for first in (0, 1)]
    numbered = all(len(part) == 2 for part in parts) and [part[0] for part in parts] in counted
    if numbered and not any(os.path.isdir(os.path.join(root, line)) for line in lines):  # '1 cat' may be a folder
        lines = [name for _, name in parts]
    twice = [name for name, count in Counter(lines).items() if count > 1]
    if twice:
        raise UserError(f'--class-map {class_map}: the name {twice[0]} is listed twice.')
    return {name: i for i, name in enumerate(lines)}
