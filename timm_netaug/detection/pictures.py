"""Pictures of images with the boxes that are there and those that were found."""
import os
from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from ..errors import UserError
from ..io.atomic import atomic_write

__all__ = ['SCORE', 'check_picture', 'draw', 'draw_grid', 'draw_results']

SCORE = 0.5  # boxes of a lower score are not drawn
# Okabe and Ito's colours, told apart by colour-blind readers too; they are repeated where there are more classes.
_COLORS = ('#E69F00', '#56B4E9', '#009E73', '#F0E442', '#0072B2', '#D55E00', '#CC79A7')
_COLUMNS = 4
_WIDTH = 4.0  # inches of an image
_DPI, _FONT = 120, 6  # dots in an inch, and the height of a label in points
_IN_LEGEND = 12  # classes
Boxes = Mapping[str, torch.Tensor]
Place = Tuple[float, float, float, float]


def _color(label: int) -> str:
    return _COLORS[label % len(_COLORS)]


def _label_place(box: List[float], text: str, image: Image.Image, taken: List[Place]) -> Optional[Place]:
    """Return where a label goes, in pixels of the image: above its box, or below or inside it where another label is;
    None where there is no room."""
    dot = image.width / (_WIDTH * _DPI)  # pixels of the image in a dot
    points = _DPI / 72 * dot
    height, width = 1.5 * _FONT * points, 0.68 * _FONT * points * len(text)
    left = min(max(box[0], 0), max(image.width - width, 0))
    for top in (box[1] - height, box[3], box[1], box[3] - height):
        place = (left, top, left + width, top + height)
        if 0 <= top and place[3] <= image.height and not any(
                place[0] < o[2] and o[0] < place[2] and place[1] < o[3] and o[1] < place[3] for o in taken):
            return place
    return None


def _draw_on(axes, image: Image.Image, found: Boxes, true: Optional[Boxes], names: Sequence[str], score: float) -> None:
    axes.imshow(image)
    for box in true['boxes'].tolist() if true is not None else ():
        outline = dict(xy=box[:2], width=box[2] - box[0], height=box[3] - box[1], fill=False, linewidth=1.2)
        axes.add_patch(Rectangle(**outline, color='white'))
        axes.add_patch(Rectangle(**outline, color='black', linestyle=(0, (3, 3))))
    taken: List[Place] = []
    for box, value, label in zip(*(found[k].tolist() for k in ('boxes', 'scores', 'labels'))):
        if value < score:
            continue
        axes.add_patch(Rectangle(
            box[:2], box[2] - box[0], box[3] - box[1], fill=False, color=_color(label), linewidth=1.6))
        text = f'{names[label]} {value:.2f}'
        place = _label_place(box, text, image, taken)
        if place is not None:
            taken.append(place)
            axes.text(
                (place[0] + place[2]) / 2, (place[1] + place[3]) / 2, text, fontsize=_FONT, color='black',
                horizontalalignment='center', verticalalignment='center', clip_on=True, parse_math=False,
                bbox=dict(facecolor=_color(label), edgecolor='none', pad=0.6, alpha=0.85))
    axes.set(xlim=(0, image.width), ylim=(image.height, 0))


def _kind(out: Union[str, os.PathLike]) -> str:
    return os.path.splitext(os.fspath(out))[1].lower().lstrip('.') or 'png'


def check_picture(out: str) -> None:
    """Refuse a path whose suffix is not one of a picture that can be written.

    Raises:
        UserError: The suffix is unknown.
    """
    known = FigureCanvasAgg.get_supported_filetypes()
    if _kind(out) not in known:
        raise UserError(f'{out} cannot be written as a picture: take one of the suffixes {", ".join(sorted(known))}.')


def _save(figure: Figure, out: Union[str, os.PathLike]) -> None:
    kind = _kind(out)
    with atomic_write(out, 'wb') as f:
        figure.savefig(f, format=kind, dpi=_DPI)


def draw_grid(
        images: Sequence[Image.Image],
        found: Sequence[Boxes],
        true: Sequence[Optional[Boxes]],
        class_names: Sequence[str],
        out: Union[str, os.PathLike],
        title: str = '',
        score: float = SCORE,
) -> None:
    """Draw images with their boxes into a grid.

    Args:
        found: 'boxes' (N, 4) in pixels of the image, 'scores' and 'labels' of every image; coloured by class. A label
            for which there is no room beside the others is left out.
        true: The same without scores, drawn dashed; None for an image whose objects are not known.
        out: Path of the picture; an existing one is replaced at once.
        score: Boxes of a lower score are not drawn.
    """
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    ratio = max(image.height / image.width for image in images)
    figure = Figure(figsize=(_WIDTH * columns, _WIDTH * ratio * rows + 0.7), layout='constrained')
    FigureCanvasAgg(figure)  # no pyplot: it would choose a backend for the whole process
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes in grid:
        axes.set_axis_off()
    for axes, image, one, other in zip(grid, images, found, true):
        _draw_on(axes, image, one, other, class_names, score)
    there = any(boxes is not None for boxes in true)
    told = f'found, with a score of at least {score:g}' + ('; dashed: true boxes' if there else '')
    figure.suptitle(f'{title}: {told}' if title else told[0].upper() + told[1:], fontsize=10, parse_math=False)
    labels = sorted({label for boxes in found for label in boxes['labels'][boxes['scores'] >= score].tolist()})
    if 0 < len(labels) <= _IN_LEGEND and len(images) > 1:
        legend = figure.legend(handles=[Patch(color=_color(label), label=class_names[label]) for label in labels],
                               loc='outside lower center', ncols=len(labels), fontsize='small', frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a class may have dollar signs in its name
    _save(figure, out)


def draw(
        image: Image.Image,
        found: Boxes,
        class_names: Sequence[str],
        out: Union[str, os.PathLike],
        score: float = SCORE,
) -> None:
    """Draw one image with the boxes found in it. See `draw_grid`."""
    draw_grid([image], [found], [None], class_names, out, score=score)


def draw_results(
        dataset: Any,
        evaluator: Any,
        class_names: Sequence[str],
        out: Union[str, os.PathLike],
        count: int,
) -> None:
    """Draw images of an evaluation, spread over the split, with their true and found boxes.

    Args:
        dataset: The `DetectionDataset` that was evaluated.
        evaluator: The evaluator, after the evaluation.
        class_names: In label order.
        out: Path of the picture.
        count: Largest number of images.
    """
    indices = sorted(evaluator.found)
    count = min(count, len(indices))
    chosen = [indices[i * len(indices) // count] for i in range(count)]
    draw_grid([dataset.image(i) for i in chosen], [evaluator.found[i] for i in chosen],
              [evaluator.true[i] for i in chosen], list(class_names), out)
