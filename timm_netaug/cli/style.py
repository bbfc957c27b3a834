"""The look of all pictures: colours, text sizes, and labels beside the lines that they name.

`curves.py`, `experiments/report.py`, `benchmarks/step.py` and `docs/idea.py` draw with it. `experiments/methods.py`
gives each method of training its colour.
"""
from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

__all__ = ['AUGMENTED', 'BLACK', 'BLUE', 'BROWN', 'GREEN', 'GREY', 'Label', 'ORANGE', 'PURPLE', 'SKY_BLUE', 'TINY',
           'VERMILION', 'add_labels', 'new_figure', 'style', 'text_colour']

# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers can see, a grey, and a
# brown that is darker than all of its colours but black.
BLACK, ORANGE, SKY_BLUE, GREEN = '#000000', '#E69F00', '#56B4E9', '#009E73'
BLUE, VERMILION, PURPLE, GREY = '#0072B2', '#D55E00', '#CC79A7', '#8C8C8C'
BROWN = '#6B3F1D'

# Colours of the networks of one training: the tiny network, and the augmented sub-network that it is a part of.
TINY, AUGMENTED = BLUE, ORANGE

# Darker shades of the colours that are too light for text on white.
_TEXT = {ORANGE: '#A86F00', SKY_BLUE: '#2378A8', PURPLE: '#A8527F', GREY: '#6E6E6E'}

_RC = {
    'font.family': 'sans-serif',
    'font.sans-serif': ['DejaVu Sans'],  # comes with matplotlib: the same picture on every machine
    'font.size': 10.5,
    'axes.titlesize': 12,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.titlepad': 10,
    'axes.labelsize': 10.5,
    'axes.labelcolor': '#333333',
    'axes.edgecolor': '#888888',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.grid.axis': 'y',
    'axes.axisbelow': True,
    'axes.ymargin': 0.08,
    'figure.titlesize': 14,
    'figure.titleweight': 'bold',
    'figure.facecolor': 'white',
    'figure.constrained_layout.h_pad': 0.12,
    'figure.constrained_layout.w_pad': 0.12,
    'grid.color': '#E4E4E4',
    'lines.linewidth': 2,
    'xtick.color': '#666666',
    'xtick.labelcolor': '#333333',
    'ytick.color': '#666666',
    'ytick.labelcolor': '#333333',
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the look of this project inside the block. matplotlib's settings outside are left as they are."""
    with matplotlib.rc_context(_RC):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. It is made without pyplot, which would choose a backend for the process."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def text_colour(colour: str) -> str:
    """Return the shade of a colour of this module for text."""
    return _TEXT.get(colour, colour)


class Label(NamedTuple):
    """A text for a point of a panel, in the panel's data units."""
    x: float
    y: float
    text: str
    colour: str


def add_labels(axes: Axes, labels: Sequence[Label], fontsize: float = 10) -> List[Annotation]:
    """Write labels beside their points, without overlap, and widen the x-axis where that needs room.

    Call it last: a later change of the limits or of the layout moves points away from their labels. A label goes to
    the right of its point if there is room, otherwise above, below or to the left. A thin line connects a label that
    had to move far with its point.
    """
    if not labels:
        return []
    figure = axes.figure.canvas.figure  # of a sub-figure, too
    figure.draw_without_rendering()  # the layout is settled here
    figure.set_layout_engine('none')
    texts = [axes.annotate(
        label.text, label[:2], (0, 0), textcoords='offset points', fontsize=fontsize, color=text_colour(label.colour),
        va='center', ha='left', in_layout=False, annotation_clip=False) for label in labels]
    sizes = [(box.width, box.height) for box in (text.get_window_extent() for text in texts)]
    gap = 0.55 * sizes[0][1] / (1 + labels[0].text.count('\n'))  # about half a line
    _make_room(axes, labels, [width + 2 * gap for width, _ in sizes])
    frame = axes.get_window_extent()
    frame = Bbox.from_extents(frame.x0, frame.y0, frame.x1 + gap, frame.y1 + 2 * gap)
    at = axes.transData.transform([label[:2] for label in labels])
    down = np.argsort(-at[:, 1], kind='stable')
    obstacles = _drawn(axes)
    trials = [_place(order, at, sizes, obstacles, frame, gap) for order in (down, down[::-1])]
    _, boxes = min(trials, key=lambda trial: trial[0])
    points = 72 / figure.dpi  # points per pixel; offsets in points are valid at every resolution of the saved picture
    for label, text, point, box in zip(labels, texts, at, boxes):
        text.xyann = (box.x0 - point[0]) * points, ((box.y0 + box.y1) / 2 - point[1]) * points
        away = np.clip(point, box.min, box.max) - point
        if np.linalg.norm(away) > 1.6 * gap:
            axes.annotate('', label[:2], away * points, textcoords='offset points', annotation_clip=False,
                          arrowprops=dict(arrowstyle='-', color=label.colour, linewidth=0.7, shrinkA=0, shrinkB=3))
    return texts


def _make_room(axes: Axes, labels: Sequence[Label], widths: Sequence[float]) -> None:
    """Move the right limit so that every label fits to the right of its point."""
    low, high = axes.get_xlim()
    pixels = axes.get_window_extent().width
    for label, width in zip(labels, widths):
        if width < 0.9 * pixels:
            high = max(high, low + (label.x - low) / (1 - width / pixels))
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= axes.get_xlim()[1]]
    axes.spines['bottom'].set_bounds(low, axes.get_xlim()[1])
    axes.set_xticks(ticks)  # none where there are labels alone
    axes.set_xlim(low, high)


def _drawn(axes: Axes) -> np.ndarray:
    """Return points in pixels along everything that labels should not cover."""
    points = [np.empty((0, 2))]
    for line in axes.get_lines():
        xy = line.get_transform().transform(line.get_xydata())
        points.append(xy)
        for a, b in zip(xy[:-1], xy[1:]):
            points.append(np.linspace(a, b, 2 + int(np.linalg.norm(b - a) / 4)))
    return np.concatenate(points)


def _candidates(point: np.ndarray, size: Tuple[float, float], gap: float) -> Iterator[Bbox]:
    """Yield places for a label, by the side of its point: right, left, and centred above and below."""
    (x, y), (width, height) = point, size
    for step in range(-24, 25):
        bottom = y - height / 2 + step * height / 4
        for left in (x + gap, x - gap - width):
            yield Bbox.from_bounds(left, bottom, width, height)
        if abs(step) >= 4:
            yield Bbox.from_bounds(x - width / 2, bottom, width, height)


def _place(
        order: Sequence[int],
        points: np.ndarray,
        sizes: Sequence[Tuple[float, float]],
        obstacles: np.ndarray,
        frame: Bbox,
        gap: float,
) -> Tuple[float, List[Bbox]]:
    """Place one label after the other at the lowest cost. Return the total cost, and the place of each label."""
    total, placed = 0.0, {}
    for i in order:
        others = [(points[j], box) for j, box in placed.items()]
        cost, _, placed[i] = min(
            (_cost(box, points[i], others, obstacles, frame, gap), number, box)
            for number, box in enumerate(_candidates(points[i], sizes[i], gap)))
        total += cost
    return total, [placed[i] for i in range(len(points))]


def _connection(point: np.ndarray, box: Bbox) -> Path:
    """Return the line from a point to the nearest point of its label."""
    return Path([point, np.clip(point, box.min, box.max)])


def _cost(
        box: Bbox,
        point: np.ndarray,
        placed: Sequence[Tuple[np.ndarray, Bbox]],
        obstacles: np.ndarray,
        frame: Bbox,
        gap: float,
) -> float:
    """Return the cost of a place for a label. One pixel of distance from the point costs 1.

    These places are bad, the worst first: on another label, above a label whose point is higher (or below one whose
    point is lower), where the line from a point to its label crosses another label (as bad as ten pixels outside the
    panel), outside the panel, on lines, far from the point, to the left of the point.
    """
    crossed = sum(_connection(point, box).intersects_bbox(other, filled=False)
                  or _connection(its_point, other).intersects_bbox(box, filled=False) for its_point, other in placed)
    on_others = sum(box.overlaps(other) for _, other in placed)
    out_of_order = sum(
        (box.y0 - other.y0) * (point[1] - its_point[1]) < 0 and box.x0 < other.x1 and other.x0 < box.x1
        for its_point, other in placed)
    outside = sum(np.maximum(frame.min - box.min, 0) + np.maximum(box.max - frame.max, 0))
    on_lines = ((obstacles > box.min - gap / 4) & (obstacles < box.max + gap / 4)).all(1).sum()
    distance = np.linalg.norm(np.clip(point, box.min, box.max) - point) + abs((box.y0 + box.y1) / 2 - point[1])
    return (1e6 * on_others + 1e5 * out_of_order + 1e4 * crossed + 1e3 * outside + 4 * gap * min(on_lines, 12)
            + distance + 5 * gap * (box.x0 < point[0]))
