"""`curves.png`: losses and accuracies of a run, from its `summary.csv`."""
import csv
import math
from typing import Dict, List, Optional, Tuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import UserError
from ..io.atomic import atomic_write

__all__ = ['write_curves']

# Column -> what it is called, its colour (Okabe and Ito's, told apart by colour-blind readers too), line and marker.
_LOSSES = {
    'train_loss': ('training', '#0072B2', '-', 'o'),
    'train_tiny_loss': ('training, tiny network', '#56B4E9', '--', '^'),
    'train_aug_loss': ('training, augmented network', '#CC79A7', ':', 'v'),
    'train_distill_loss': ('training, tiny network against augmented', '#E69F00', ':', 'x'),
    'eval_loss': ('validation', '#D55E00', '-', 's'),
}
_ACCURACIES = {
    'train_top1': ('training', '#0072B2', '-', 'o'),
    'eval_top1': ('validation', '#D55E00', '-', 's'),
    'eval_top5': ('validation, top-5', '#009E73', '--', 'D'),
    'eval_AP50': ('validation, AP50', '#D55E00', '-', 's'),
    'eval_AP': ('validation, AP', '#009E73', '--', 'D'),
}

Points = List[Tuple[float, float]]


def _read(summary: str) -> Dict[str, Points]:
    """Return (epoch, value) by column, without the empty cells of epochs that were not validated."""
    columns = {}
    with open(summary, newline='', encoding='utf-8') as f:
        for row in csv.DictReader(f):
            for column, cell in row.items():
                try:
                    point = float(row['epoch']), float(cell)
                except (KeyError, TypeError, ValueError):
                    continue
                if all(map(math.isfinite, point)):
                    columns.setdefault(column, []).append(point)
    return columns


def write_curves(summary: str, out: str, metric: str = 'eval_top1', decreasing: bool = False) -> None:
    """Plot the losses and accuracies of a run, with the best epoch marked. An existing picture is replaced at once.

    Args:
        summary: The run's `summary.csv`.
        out: Path of the PNG file.
        metric: Column that the best epoch is chosen by, the first one where several are equal.
        decreasing: Whether the lowest value of `metric` is the best.

    Raises:
        UserError: There are no epochs in the summary.
    """
    columns = _read(summary)
    if 'epoch' not in columns:
        raise UserError(f'{summary} holds no epochs to plot: train for one first.')
    shown = ('train_top1', 'eval_top1', 'eval_AP50', 'eval_AP', metric)
    accuracies = {k: v for k, v in _ACCURACIES.items() if k in shown}
    points, is_detection = columns.get(metric, []), 'eval_AP50' in columns
    best: Optional[Tuple[float, float]] = None
    if points:
        best = (min if decreasing else max)(points, key=lambda point: point[1])

    figure = Figure(figsize=(11, 4.2), layout='constrained')
    FigureCanvasAgg(figure)  # no pyplot: it would choose a backend for the whole process
    for axes, series, title, unit in zip(
            figure.subplots(1, 2),
            (_LOSSES, accuracies),
            ('Loss', 'Average precision' if is_detection else
             'Top-1 accuracy' if 'eval_top5' not in accuracies else 'Accuracy'),
            ('loss', 'average precision (%)') if is_detection else ('loss (nats)', 'correct images (%)'),
    ):
        for column, (label, color, line, marker) in series.items():
            if column not in columns:
                continue
            if column == 'train_loss' and 'train_aug_loss' in columns:
                label = 'training, weighted sum'
            epochs, values = zip(*columns[column])
            # Markers show where a value stands alone; in long runs they would hide the line.
            axes.plot(epochs, values, line, color=color, marker=marker if len(values) <= 30 else '', markersize=4,
                      label=label)
            if best is not None and column == metric:
                axes.plot(*best, '*', color='black', markersize=13, zorder=3,
                          label=f'best: {best[1]:.4g}{"" if series is _LOSSES else " %"} in epoch {best[0]:.0f}')
        if best is not None:
            axes.axvline(best[0], color='black', linewidth=0.8, linestyle=':', zorder=0)
        axes.set(title=title, xlabel='epoch', ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize='small')
    with atomic_write(out, 'wb') as f:
        figure.savefig(f, format='png', dpi=120)
