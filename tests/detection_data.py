"""A few small images with coloured rectangles, as a data set in the layout of Pascal VOC and in that of COCO."""
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {'blue': (40, 60, 230), 'green': (40, 220, 60), 'red': (230, 50, 40)}
SIZE = (60, 80)  # height and width, which are not those of the input


def rectangles(index):
    """Return the boxes and classes of an image: one to three rectangles, and none in every fifth image."""
    rng = np.random.default_rng(index)
    boxes = []
    for name in rng.permutation(sorted(COLORS))[:0 if index % 5 == 4 else 1 + index % 3]:
        width, height = rng.integers(16, 36, 2)
        x, y = rng.integers(0, SIZE[1] - width), rng.integers(0, SIZE[0] - height)
        boxes.append((str(name), [int(x), int(y), int(x + width), int(y + height)]))
    return boxes


def xml(name, boxes, size=SIZE):
    objects = ''.join(
        '<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>'
        '<ymax>{}</ymax></bndbox></object>'.format(c, *box) for c, box in boxes)
    return (f'<annotation><filename>{name}.png</filename><size><width>{size[1]}</width><height>{size[0]}</height>'
            f'<depth>3</depth></size>{objects}</annotation>')


def _image(index, boxes):
    rng = np.random.default_rng(1000 + index)
    pixels = rng.integers(90, 130, (*SIZE, 3), dtype=np.uint8)
    for name, (x0, y0, x1, y1) in boxes:
        pixels[y0:y1, x0:x1] = COLORS[name]
    return Image.fromarray(pixels)


def write_voc(root: Path, train=10, val=6) -> Path:
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, indices in (('train', range(train)), ('val', range(train, train + val))):
        (root / f'ImageSets/Main/{split}.txt').write_text(''.join(f'i{i}\n' for i in indices))
        for i in indices:
            boxes = rectangles(i)
            _image(i, boxes).save(root / f'JPEGImages/i{i}.png')
            (root / f'Annotations/i{i}.xml').write_text(xml(f'i{i}', boxes))
    return root


def write_coco(root: Path, train=10, val=6) -> Path:
    (root / 'annotations').mkdir(parents=True)
    ids = {name: 10 * (i + 1) for i, name in enumerate(COLORS)}
    for split, indices in (('train', range(train)), ('val', range(train, train + val))):
        (root / split).mkdir()
        data = dict(images=[], annotations=[], categories=[dict(id=v, name=k) for k, v in ids.items()])
        for i in indices:
            boxes = rectangles(i)
            _image(i, boxes).save(root / split / f'i{i}.png')
            data['images'].append(dict(id=i, file_name=f'i{i}.png', height=SIZE[0], width=SIZE[1]))
            for name, (x0, y0, x1, y1) in boxes:
                data['annotations'].append(dict(
                    id=len(data['annotations']), image_id=i, category_id=ids[name], bbox=[x0, y0, x1 - x0, y1 - y0],
                    area=(x1 - x0) * (y1 - y0), iscrowd=0))
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(data))
    return root
