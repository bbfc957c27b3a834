"""Annotations of boxes, Pascal VOC XML and COCO JSON: read, and checked before anything is trained."""
import json
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from PIL import Image

from ..errors import UserError, first_line, rewording
from .fcos import Fcos

__all__ = ['AnnotatedImage', 'Split', 'find_classes', 'read_class_map', 'read_split', 'size_notes']

_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp')
_BACKGROUND = ('background', '__background__')
_CHECKED_BOXES = 1000  # of a class, for `size_notes`


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and the objects in it.

    Args:
        file: Path of the image.
        size: Height and width in pixels.
        boxes: (N, 4), left, upper, right and lower side in pixels of the image.
        classes: Names of the N classes.
        ignored: (N,), which objects the evaluation neither wants to be found nor counts as wrong where they are:
            Pascal VOC's difficult ones, COCO's crowds.
        trained: (N,), which objects are learned: all but COCO's crowds.
    """
    file: str
    size: Tuple[int, int]
    boxes: torch.Tensor
    classes: Tuple[str, ...]
    ignored: torch.Tensor
    trained: torch.Tensor


@dataclass(frozen=True)
class Split:
    """A part of a data set.

    Args:
        name: As the user has given it.
        images: In the order of the file that lists them.
        declared: The classes that the data set names itself, in its order; None where it does not.
        notes: Sentences about what was mended.
    """
    name: str
    images: List[AnnotatedImage]
    declared: Optional[List[str]] = None
    notes: List[str] = field(default_factory=list)


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')


# Pascal VOC


def _number(element: Optional[ElementTree.Element], tag: str, file: str) -> float:
    text = element.findtext(tag) if element is not None else None
    try:
        return float(text)
    except (TypeError, ValueError):
        raise UserError(f'{file} has a box whose {tag} is {text!r}, which is not a number: mend the file.') from None


def _image_size(file: str) -> Tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as e:  # whatever Pillow finds wrong
        raise UserError(f'{file} cannot be read as an image ({first_line(e)}): mend it, or take it out of the'
                        f' split.') from e


def _check_size(image: str, size: Tuple[int, int], told: Sequence[Any], file: str) -> None:
    """Refuse an image of another size than its annotation says. Sides that are no number above 0 say nothing."""
    try:
        told = [float(side) for side in told]
    except (TypeError, ValueError):
        return
    if all(side > 0 for side in told) and tuple(told) != size:
        raise UserError(f'{image} has {size[0]} x {size[1]} pixels (height x width), and {file} says'
                        f' {told[0]:g} x {told[1]:g}: mend the annotation.')


def _read_xml(file: str, image: str) -> AnnotatedImage:
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as e:
        raise UserError(f'{file} cannot be read as Pascal VOC XML ({first_line(e)}): mend it.') from e
    if root.tag != 'annotation':
        raise UserError(f'{file} is not Pascal VOC XML: its root is <{root.tag}>, not <annotation>. Convert it.')
    boxes, classes, difficult = [], [], []
    for item in root.iter('object'):
        name = (item.findtext('name') or '').strip()
        if not name:
            raise UserError(f'{file} has an object without a name: name its class.')
        box = item.find('bndbox')
        boxes.append([_number(box, tag, file) for tag in ('xmin', 'ymin', 'xmax', 'ymax')])
        classes.append(name)
        difficult.append((item.findtext('difficult') or '0').strip() == '1')
    size = _image_size(image)
    _check_size(image, size, [root.findtext(f'size/{side}') for side in ('height', 'width')], file)
    return AnnotatedImage(
        image, size, torch.tensor(boxes).reshape(-1, 4), tuple(classes),
        torch.tensor(difficult, dtype=torch.bool), torch.ones(len(boxes), dtype=torch.bool))


def _read_voc(root: Path, name: str) -> Split:
    """Read `ImageSets/Main/NAME.txt`, `Annotations/` and `JPEGImages/` of a folder."""
    listed = root / 'ImageSets' / 'Main' / f'{name}.txt'
    files = {Path(file).stem: file for file in sorted(os.listdir(root / 'JPEGImages'))
             if file.lower().endswith(_EXTENSIONS)}
    wanted = []
    with rewording(str(listed), UnicodeDecodeError, hint='Save the file as UTF-8.'):
        lines = listed.read_text(encoding='utf-8-sig').splitlines()
    for line in filter(None, map(str.strip, lines)):
        *image, mark = line.rsplit(None, 1)  # the lists of one class mark each image, and names may have spaces
        if line in files or not image or mark not in ('1', '0', '-1'):
            wanted.append(line)
        elif mark != '-1':
            wanted += image
    without_image = [n for n in wanted if n not in files]
    if without_image:
        raise UserError(f'Images of the split {name} are not in {root / "JPEGImages"} ({len(without_image)} of'
                        f' {len(wanted)}: {_some(without_image)}): add them, or take them out of {listed}.')
    without_xml = [n for n in wanted if not (root / 'Annotations' / f'{n}.xml').is_file()]
    if without_xml:
        raise UserError(f'Images of the split {name} have no XML file in {root / "Annotations"} ({len(without_xml)} of'
                        f' {len(wanted)}: {_some(without_xml)}): add one without objects where there are none, or take'
                        f' the images out of {listed}.')
    images = [_read_xml(str(root / 'Annotations' / f'{n}.xml'), str(root / 'JPEGImages' / files[n])) for n in wanted]
    return Split(name, images)


# COCO


def _json_file(root: Path, name: str) -> Optional[Path]:
    for file in (root / 'annotations' / f'instances_{name}.json', root / 'annotations' / f'{name}.json',
                 root / name / '_annotations.coco.json', root / f'{name}.json'):
        if file.is_file():
            return file
    return None


def _image_folder(root: Path, file: Path, name: str, first: str) -> Path:
    """Return the folder below which a JSON file's images lie."""
    folders = [root / name, root / 'images' / name, root / 'images', file.parent, root]
    found = next((folder for folder in folders if (folder / first).is_file()), None)
    if found is None:
        raise UserError(f'{file} lists the image {first}, which is in none of {_some(map(str, folders), 5)}: put the'
                        f' images there.')
    return found


def _id(annotation: Mapping[str, Any], key: str) -> Any:
    value = annotation.get(key)
    return value if isinstance(value, (int, float, str)) else None  # a list cannot be looked up


def _read_coco(root: Path, file: Path, name: str) -> Split:
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
        images = {entry['id']: entry for entry in data['images']}
        categories = {entry['id']: str(entry['name']) for entry in data['categories']}
        annotations = data.get('annotations', [])
        if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
            raise ValueError('its annotations are no list of objects')
        for key, unique in (('images', images), ('categories', categories)):
            if len(unique) < len(data[key]):
                raise ValueError(f'two of its {key} share an id')
        if len({isinstance(key, str) for key in categories}) > 1:
            raise ValueError('the ids of its categories are numbers and texts')
    except (ValueError, KeyError, TypeError, OSError) as e:
        told = f'it has no {e}' if isinstance(e, KeyError) else first_line(e)
        raise UserError(f'{file} cannot be read as COCO JSON ({told}): mend it.') from e
    if not images:
        raise UserError(f'The split {name} is empty: {file} lists no images.')
    for key, entry in images.items():
        if not isinstance(entry.get('file_name'), str):
            raise UserError(f'{file} has an image (id {key}) whose file_name is {entry.get("file_name")!r}: name its'
                            f' file.')
    folder = _image_folder(root, file, name, next(iter(images.values()))['file_name'])
    missing = [entry['file_name'] for entry in images.values() if not (folder / entry['file_name']).is_file()]
    if missing:
        raise UserError(f'Images of {file} are not in {folder} ({len(missing)} of {len(images)}: {_some(missing)}): add'
                        f' them.')
    of_images: Dict[Any, List[Mapping[str, Any]]] = {key: [] for key in images}
    for a in annotations:
        if _id(a, 'category_id') not in categories:
            raise UserError(f'{file} has an annotation (id {a.get("id")}) of the category {a.get("category_id")!r}, and'
                            f' its categories are {_some(map(str, categories), 5)}: mend the file.')
        if _id(a, 'image_id') not in images:
            raise UserError(f'{file} has an annotation (id {a.get("id")}) of the image {a.get("image_id")!r}, which it'
                            f' does not list: mend the file.')
        if not isinstance(a.get('bbox'), list) or len(a['bbox']) != 4 or not all(
                isinstance(v, float) or isinstance(v, int) and abs(v) < 1e9 for v in a['bbox']):
            raise UserError(f'{file} has an annotation (id {a.get("id")}) whose bbox is {a.get("bbox")!r}, not four'
                            f' numbers: mend the file.')
        of_images[a['image_id']].append(a)
    found = []
    for key, entry in images.items():
        own, path = of_images[key], str(folder / entry['file_name'])
        xywh = torch.tensor([a['bbox'] for a in own], dtype=torch.float32).reshape(-1, 4)
        crowd = torch.tensor([bool(a.get('iscrowd')) for a in own], dtype=torch.bool)
        size = _image_size(path)
        _check_size(path, size, (entry.get('height'), entry.get('width')), str(file))
        found.append(AnnotatedImage(
            path, size, torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
            tuple(categories[a['category_id']] for a in own), crowd, ~crowd))
    used = {a['category_id'] for a in annotations}
    names = Counter(categories[key] for key in used)
    twice = [n for n, count in names.items() if count > 1]
    if twice:
        raise UserError(f'{file} has two categories with the name {twice[0]}: give each its own name.')
    # Some tools write a category that groups the others and has no boxes, named as one of them or as the background.
    declared = [n for key, n in sorted(categories.items())
                if key in used or n not in _BACKGROUND and n not in names]
    return Split(name, found, list(dict.fromkeys(declared)))


# Both


def _read_part(root: Path, name: str) -> Split:
    if not name:
        raise UserError('A split without a name cannot be read: name it with --train-split and --val-split.')
    folder, _, last = name.rpartition('/')
    base = root / folder
    file = _json_file(base, last)
    if file is not None:
        return _read_coco(base, file, last)
    if (base / 'ImageSets' / 'Main' / f'{last}.txt').is_file():
        for needed in ('Annotations', 'JPEGImages'):
            if not (base / needed).is_dir():
                raise UserError(f'{base} looks like Pascal VOC, and has no folder {needed}.')
        return _read_voc(base, last)
    there = sorted(p.stem for p in (base / 'ImageSets' / 'Main').glob('*.txt')) if base.is_dir() else []
    hint = f'the splits there are {_some(there, 5)}' if there else (
        'a data set is in the layout of Pascal VOC (ImageSets/Main/SPLIT.txt, Annotations/, JPEGImages/) or of COCO'
        ' (annotations/instances_SPLIT.json)')
    raise UserError(f'There is no split {last} in {base}: {hint}.')


def read_split(data_dir: str, name: str) -> Split:
    """Read a part of a data set, and mend what can be mended.

    Boxes are clipped to their image; those without an area are dropped. An image without objects stays.

    Args:
        data_dir: Root of the data set. Its layout, Pascal VOC's or COCO's, is found out by looking.
        name: Name of the split; FOLDER/NAME of one in a subfolder, and A+B of two together, as in
            VOC2007/trainval+VOC2012/trainval.

    Raises:
        UserError: There is no such split, it is empty, files are missing, or an annotation is not valid.
    """
    if not data_dir or not os.path.isdir(data_dir):
        raise UserError(f'There is no folder {data_dir or "for the data set"}: name it with --data-dir.')
    parts = [_read_part(Path(data_dir), part) for part in name.split('+')]
    images = [image for part in parts for image in part.images]
    declared = parts[0].declared
    if any(part.declared != declared for part in parts):
        raise UserError(f'The parts of the split {name} have different classes: mend their categories.')
    if not images:
        raise UserError(f'The split {name} of {data_dir} is empty: it lists no images.')
    cleaned, notes = _clean(images, name)
    twice = [Path(file).stem for file, count in Counter(image.file for image in images).items() if count > 1]
    if twice:
        notes.append(f'{name}: {len(twice):,} images are listed more than once ({_some(twice)}).')
    return Split(name, cleaned, declared, notes)


def _clean(images: Sequence[AnnotatedImage], name: str) -> Tuple[List[AnnotatedImage], List[str]]:
    cleaned, clipped, dropped = [], [], []
    for image in images:
        if not image.boxes.isfinite().all():
            raise UserError(f'The annotation of {image.file} has a box with NaN or infinite sides: mend it.')
        for c in image.classes:
            if c.lower() in _BACKGROUND:
                raise UserError(f'The annotation of {image.file} has an object of the class {c}, which is no class of'
                                f' objects: an area without objects needs no box. Take it out.')
        height, width = image.size
        boxes = image.boxes.clone()
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        stem = Path(image.file).stem
        clipped += [stem] * int(((boxes != image.boxes).any(1) & keep).sum())
        dropped += [stem] * int((~keep).sum())
        cleaned.append(replace(
            image, boxes=boxes[keep], classes=tuple(c for c, k in zip(image.classes, keep.tolist()) if k),
            ignored=image.ignored[keep], trained=image.trained[keep]))
    notes = []
    if dropped:
        notes.append(f'{name}: {_boxes(dropped, "without an area")} left out ({_some(dict.fromkeys(dropped))}).')
    if clipped:
        notes.append(f'{name}: {_boxes(clipped, "beyond the edge of the image")} clipped to it'
                     f' ({_some(dict.fromkeys(clipped))}).')
    return cleaned, notes


def _boxes(images: Sequence[str], which: str) -> str:
    return f'1 box {which} is' if len(images) == 1 else f'{len(images):,} boxes {which} are'


def find_classes(train: Split, val: Optional[Split] = None, class_names: Optional[Sequence[str]] = None) -> List[str]:
    """Return the names of the classes in label order: the given ones, those that the data set declares, or those of the
    boxes, sorted.

    Args:
        train: Split to train on, or to evaluate on where the names are given.
        val: Split to validate on.

    Raises:
        UserError: A split has a class that is not among them, or that is only in validation.
    """
    counts = Counter(c for image in train.images for c in image.classes)
    names = list(class_names or train.declared or sorted(counts))
    learned = sum(counts.values()) if val is None else sum(int(image.trained.sum()) for image in train.images)
    if not names or not learned:
        raise UserError(f'The split {train.name} has no boxes at all: there is nothing to learn or to find in it.')
    unknown = sorted(set(counts) - set(names))
    if unknown:
        raise UserError(f'The split {train.name} has boxes of the classes {_some(unknown)}, which are not among the'
                        f' {len(names)} of the model ({_some(names)}).')
    found = Counter(c for image in val.images for c in image.classes) if val is not None else Counter()
    if val is not None and not found:
        raise UserError(f'The split {val.name} has no boxes at all: there is nothing to measure on it.')
    unseen = sorted(c for c in found if not counts[c])
    if unseen:
        raise UserError(f'The split {val.name} has boxes of the classes {_some(unseen)}, which the split {train.name}'
                        f' never shows: mend the names, or split the data anew.')
    return names


def read_class_map(path: str) -> List[str]:
    """Read a text file of class names, one on a line, in label order.

    Raises:
        UserError: There is no such file, it is empty, or a name stands there twice.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding='utf-8-sig').splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise UserError(f'--class-map {path} cannot be read: {first_line(e)}.') from e
    twice = [n for n, count in Counter(names).items() if count > 1]
    if not names or twice:
        raise UserError(f'--class-map {path} must have a different class name on every line, it'
                        f' {f"has {twice[0]} twice" if twice else "is empty"}.')
    return names


def size_notes(split: Split, names: Sequence[str], fcos: Fcos, img_size: Sequence[int]) -> List[str]:
    """Tell the classes with boxes that are too small for any point of the detector at an input size, with their shares.

    At most 1000 boxes of a class are looked at.

    Args:
        img_size: Height and width of the input.
    """
    by_class: Dict[str, List[torch.Tensor]] = {name: [] for name in names}
    for image in split.images:
        factor = torch.tensor([img_size[1] / image.size[1], img_size[0] / image.size[0]] * 2)
        for c, box in zip(image.classes, image.boxes * factor):
            if len(by_class[c]) < _CHECKED_BOXES:
                by_class[c].append(box)
    shares = {}
    for name, boxes in by_class.items():
        share = 1 - fcos.has_point(torch.stack(boxes), img_size).float().mean().item() if boxes else 0
        if share:
            shares[name] = share
    if not shares:
        return []
    told = _some((f'{max(100 * shares[n], 0.1):.1f} % of {n}' for n in sorted(shares, key=shares.get, reverse=True)), 8)
    size = f'{img_size[0]} x {img_size[1]}'
    return [f'{split.name}: boxes that are too small to be learned at {size}, because no point of the detector is'
            f' theirs: {told}. A larger --img-size keeps more of them.']
