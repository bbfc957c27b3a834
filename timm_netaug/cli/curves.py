"""`curves.png`: losses and accuracies of a run, from its `summary.csv`."""
import csv
import math
import os
from typing import Dict, List, Optional, Tuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..errors import UserError
from ..io.atomic import atomic_write
from .style import AUGMENTED, BLACK, GREY, PURPLE, SKY_BLUE, TINY, Label, add_labels, new_figure, style

__all__ = ['write_curves']

# Column -> its label, colour, line (dashed for training, solid for validation) and marker.
_LOSSES = {
    'train_loss': ('training', TINY, '--', 'o'),
    'train_tiny_loss': ('training, tiny network', TINY, '--', '^'),
    'train_aug_loss': ('training, augmented network', AUGMENTED, '--', 'v'),
    'train_distill_loss': ('training, tiny network against augmented', PURPLE, '--', 'x'),
    'eval_loss': ('validation', TINY, '-', 's'),
}
_ACCURACIES = {
    'train_top1': ('training', TINY, '--', 'o'),
    'eval_top1': ('validation', TINY, '-', 's'),
    'eval_top5': ('validation, top-5', SKY_BLUE, '-', 'D'),
    'eval_map': ('validation, mAP', TINY, '-', 's'),
    'eval_micro_f1': ('validation, micro F1', SKY_BLUE, '-', 'D'),
    'eval_AP50': ('validation, AP50', TINY, '-', 's'),
    'eval_AP': ('validation, AP', SKY_BLUE, '-', 'D'),
}

Point = Tuple[float, float]  # epoch, value


def _read(summary: str) -> Dict[str, List[Point]]:
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


def write_curves(
        summary: str,
        out: str,
        metric: str = 'eval_top1',
        decreasing: bool = False,
        title: Optional[str] = None,
) -> None:
    """Plot the losses and accuracies of a run, and mark the best epoch. The picture is written atomically.

    Args:
        summary: The run's `summary.csv`.
        out: Path of the PNG file.
        metric: Column that decides which epoch is the best. Of several equal epochs, it is the first.
        decreasing: Whether the lowest value of `metric` is the best.
        title: Title of the picture, None for the name of the run's folder.

    Raises:
        UserError: There are no epochs in the summary.
    """
    columns = _read(summary)
    if 'epoch' not in columns:
        raise UserError(f'{summary} holds no epochs to plot: train for one first.')
    several_labels = 'eval_map' in columns
    shown = ('eval_map', 'eval_micro_f1') if several_labels else (
        'train_top1', 'eval_top1', 'eval_AP50', 'eval_AP', metric)
    accuracies = {k: v for k, v in _ACCURACIES.items() if k in shown}
    losses = dict(_LOSSES)
    if 'train_aug_loss' in columns:
        losses['train_loss'] = ('training, weighted sum', GREY, '--', 'o')
    best: Optional[Point] = None
    if columns.get(metric):
        best = (min if decreasing else max)(columns[metric], key=lambda point: point[1])

    with style():
        figure = new_figure(13, 4.8)
        figure.suptitle(title or os.path.basename(os.path.dirname(os.path.abspath(summary))), x=0.01, ha='left')
        left, right = figure.subplots(1, 2)
        labels = {
            left: _draw(left, columns, losses, metric, best, '{:.4g}'),
            right: _draw(right, columns, accuracies, metric, best, '{:.4g} %'),
        }
        left.set(title='Loss', ylabel='loss' if 'eval_AP50' in columns else 'loss (nats)')
        if several_labels:
            right.set(title='Mean average precision and F1', ylabel='%')
        elif 'eval_AP50' in columns:
            right.set(title='Average precision', ylabel='average precision (%)')
        else:
            accuracy = 'Accuracy' if 'eval_top5' in accuracies else 'Top-1 accuracy'
            right.set(title=accuracy, ylabel='correct images (%)')
        for axes, these in labels.items():
            add_labels(axes, these)
        with atomic_write(out, 'wb') as f:
            figure.savefig(f, format='png', dpi=120)


def _draw(
        axes: Axes,
        columns: Dict[str, List[Point]],
        series: Dict[str, Tuple[str, str, str, str]],
        metric: str,
        best: Optional[Point],
        value: str,
) -> List[Label]:
    """Draw the columns of a panel, and a dotted line through the best epoch. Return the labels of both."""
    labels = []
    for column in (c for c in series if c in columns):
        label, colour, line, marker = series[column]
        epochs, values = zip(*columns[column])
        # Markers show values without neighbours. In long runs, they would hide the line.
        axes.plot(epochs, values, line, color=colour, marker=marker if len(values) <= 30 else '', markersize=4,
                  label=label)
        labels.append(Label(epochs[-1], values[-1], label, colour))
    if not labels:
        axes.text(0.5, 0.5, 'no values yet', transform=axes.transAxes, ha='center', color=GREY)
    elif best is not None:
        low, high = axes.get_ylim()
        axes.axvline(best[0], color=BLACK, linewidth=1, linestyle=':', zorder=0)
        if metric in series:
            text = f'best: {value.format(best[1])} in epoch {best[0]:.0f}'
            axes.plot(*best, '*', color=BLACK, markersize=13, zorder=3, label=text)
            labels.append(Label(*best, text, BLACK))
        else:
            labels.append(Label(best[0], high - 0.03 * (high - low), 'best epoch', BLACK))
    axes.set_xlabel('epoch', loc='left')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return labels
