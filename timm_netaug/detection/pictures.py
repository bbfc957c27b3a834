"""Pictures of images with the boxes that are there and those that were found."""
import os
from typing import List, Mapping, Optional, Sequence, Union

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ..io.atomic import atomic_write

__all__ = ['SCORE', 'draw', 'draw_grid']

SCORE = 0.3  # boxes of a lower score are not drawn
# Okabe and Ito's colours, told apart by colour-blind readers too; they are repeated where there are more classes.
_COLORS = ('#E69F00', '#56B4E9', '#009E73', '#F0E442', '#0072B2', '#D55E00', '#CC79A7')
_COLUMNS = 4
Boxes = Mapping[str, torch.Tensor]


def _draw_on(axes, image: Image.Image, found: Boxes, true: Optional[Boxes], names: Sequence[str], score: float) -> None:
    axes.imshow(image)
    axes.set_axis_off()
    for box in true['boxes'].tolist() if true is not None else ():
        axes.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, color='white', linewidth=1.2))
        axes.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, color='black', linewidth=1.2,
                                 linestyle=(0, (3, 3))))
    for box, value, label in zip(*(found[k].tolist() for k in ('boxes', 'scores', 'labels'))):
        if value < score:
            continue
        color = _COLORS[label % len(_COLORS)]
        axes.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, color=color, linewidth=1.6))
        axes.text(
            max(box[0], 0), max(box[1], 0.02 * image.height), f'{names[label]} {value:.2f}', fontsize=6, color='black',
            verticalalignment='bottom', clip_on=True,
            bbox=dict(facecolor=color, edgecolor='none', pad=0.8, alpha=0.85))


def _save(figure: Figure, out: Union[str, os.PathLike]) -> None:
    kind = os.path.splitext(os.fspath(out))[1].lower().lstrip('.') or 'png'
    with atomic_write(out, 'wb') as f:
        figure.savefig(f, format=kind, dpi=120)


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
        found: 'boxes' (N, 4) in pixels of the image, 'scores' and 'labels' of every image; coloured by class.
        true: The same without scores, drawn black and white; None for an image whose objects are not known.
        out: Path of the picture; an existing one is replaced at once.
        score: Boxes of a lower score are not drawn.
    """
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    ratio = max(image.height / image.width for image in images)
    figure = Figure(figsize=(4 * columns, 4 * ratio * rows + 0.5), layout='constrained')
    FigureCanvasAgg(figure)  # no pyplot: it would choose a backend for the whole process
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes in grid:
        axes.set_axis_off()
    for axes, image, one, other in zip(grid, images, found, true):
        _draw_on(axes, image, one, other, class_names, score)
    there = any(boxes is not None for boxes in true)
    legend = f'coloured: found, with class and score from {score:g}' + ('; black and white: true' if there else '')
    figure.suptitle(f'{title} ({legend})' if title else legend, fontsize=10)
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
