#!/usr/bin/env python3
"""Make the tables and pictures of docs/results.md anew, from the files in experiments/results/ alone.

    python experiments/report.py

Accuracies are those after the last epoch, never the best of all. `cost` is the processor time of a run (data loading
and validation included, one thread), relative to the mean of its unit: the row that its YAML file names, or MODEL-init.
It is left out for runs on a GPU.

Pictures name a row by its method, which follows from its flags, and by its field `detail`, which sets it apart from
other rows of that method. Each method has one colour in all pictures (methods.py). The rows that the field `curves` of
the YAML file lists are drawn as curves, in that order, those of each model in panels of their own. With
`training_curves: true`, dotted lines show their accuracy in training, too, and there is no panel over processor time.
Mixed images (mixup, CutMix) have no accuracy in training.
"""
import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from methods import METHODS, augments_widths, method_name, method_of
from run import HERE, Run, done, read_experiment

sys.path.insert(0, str(HERE.parent))
from timm_netaug.cli.style import Label, add_labels, new_figure, style, text_colour  # noqa: E402

PAGE = HERE.parent / 'docs' / 'results.md'
PICTURES = HERE.parent / 'docs' / 'results'


class Row(NamedTuple):
    """The runs of a row that are done."""
    name: str
    about: str
    epochs: int
    curves: List[List[dict]]  # of each seed: its summary
    cpu_seconds: List[float]  # of those of which it is known
    unit: str  # name of the row that its cost is relative to
    label: str  # what pictures call it
    flags: Dict[str, Any]

    @property
    def colour(self) -> str:
        return METHODS[method_of(self.flags)].colour

    @property
    def model(self) -> str:
        return self.flags['model']

    @property
    def dashes(self) -> str:
        """The style of its lines, which tells stages of one method apart."""
        return {2: ':', 4: '--'}.get(self.flags.get('netaug_from_stage'), '-')

    def course(self, column: str) -> Tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation over the seeds, for every epoch; nan where there is no value."""
        values = np.array([[float(epoch[column] or 'nan') for epoch in curve] for curve in self.curves])
        return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])

    def last(self, column: str) -> List[float]:
        """Return the values after the last epoch, of the seeds that have one."""
        return [float(curve[-1][column]) for curve in self.curves if curve[-1][column]]


def read(path: Path) -> List[Row]:
    """Return the rows of an experiment of which a run at least is done."""
    content = yaml.safe_load(path.read_text())
    rows = content['rows']
    runs: Dict[str, List[Run]] = {name: [] for name in rows}
    for run in read_experiment(str(path)):
        if done(run):
            runs[run.row].append(run)
    return [
        Row(name, rows[name]['about'], these[0].epochs,
            [list(csv.DictReader(run.result.open())) for run in these],
            [c for run in these if (c := json.loads(run.result.with_suffix('.json').read_text())['cpu_seconds'])],
            unit_of(name, content), label_of(these[0], content), these[0].flags)
        for name, these in runs.items() if these
    ]


def unit_of(name: str, content: Dict[str, Any]) -> str:
    """Return the name of the row that the cost of a row is relative to."""
    return content['rows'][name].get('unit') or content.get('unit') or name.partition('-')[0] + '-init'


def label_of(run: Run, content: Dict[str, Any]) -> str:
    """Return what pictures call a row: its method, and what sets it apart from other rows of that method."""
    detail = content['rows'][run.row].get('detail')
    return method_name(run.flags) + (f', {detail}' if detail else '')


def spread(values: List[float], digits: int = 1) -> str:
    """Return the mean, and the standard deviation where there is more than one value; '' where there is none."""
    if not values:
        return ''
    text = f'{statistics.mean(values):.{digits}f}'
    return text if len(values) == 1 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def cost(row: Row, rows: List[Row]) -> Optional[float]:
    unit = next((r for r in rows if r.name == row.unit), None)
    if unit is None or not unit.cpu_seconds or not row.cpu_seconds:
        return None
    if any(r.flags.get('device') for r in (row, unit)):  # on a GPU, the time of the processor tells nothing
        return None
    return statistics.mean(row.cpu_seconds) / statistics.mean(unit.cpu_seconds)


def table(rows: List[Row]) -> str:
    timed = any(cost(row, rows) is not None for row in rows)
    lines = ['| row | what | epochs | seeds | top-1 | top-1 in training |' + ' cost |' * timed,
             '|---|---|---|---|---|---|' + '---|' * timed]
    for row in rows:
        relative = cost(row, rows)
        known = '' if len(row.cpu_seconds) == len(row.curves) else f' ({len(row.cpu_seconds)} of the seeds)'
        top1, in_training = (spread(row.last(column)) for column in ('eval_top1', 'train_top1'))
        lines.append(f'| `{row.name}` | {row.about} | {row.epochs} | {len(row.curves)} | {top1} | {in_training} |'
                     + f' {"" if relative is None else f"{relative:.2f}{known}"} |' * timed)
    return '\n'.join(lines)


def picture(title: str, rows: List[Row], shown: List[str], training: bool = False) -> Figure:
    """Draw accuracy over epochs and over processor time of the rows in `shown`, and the end of every row as dots.

    Each model has panels of its own. A row without a known cost is left out of the panel over processor time alone.
    With `training`, the panel over epochs shows the accuracy in training, too, and there is no
    panel over processor time.
    """
    headline = sorted((row for row in rows if row.name in shown), key=lambda row: shown.index(row.name))
    groups = sorted({row.model for row in rows})
    by_model = [[row for row in headline if row.model == model] for model in dict.fromkeys(r.model for r in headline)]
    costly = [] if training else [[row for row in these if cost(row, rows) is not None] for these in by_model]
    costly = [these for these in costly if these]
    heights = [3.5] * len(by_model + costly) + [1 + 0.27 * (len(rows) + len(groups) * (len(groups) > 1))]
    figure = new_figure(10, sum(heights) + 0.5)
    figure.suptitle(title, x=0.02, ha='left')
    parts = figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    panels = [part.subplots() for part in parts]  # each with margins of its own
    draw_ends(panels[-1], rows, groups)

    def of(these: List[Row]) -> str:
        return f' of {these[0].model}' if len(groups) > 1 else ''

    labels = [draw_epochs(axes, these, of(these), training) for axes, these in zip(panels, by_model)]
    labels += [draw_costs(axes, these, rows, of(these)) for axes, these in zip(panels[len(by_model):], costly)]
    for axes, these in zip(panels, labels):  # last, when the layout is settled
        low, new_low = axes.get_ylim()[0], min(label.y for label in these) - 15
        if new_low > low + 5:  # the first epochs may lie below the panel, so that the ends can be told apart
            axes.set_ylim(new_low, None)
        add_labels(axes, these)
    return figure


def draw_epochs(axes: Axes, rows: List[Row], of: str, training: bool) -> List[Label]:
    labels = []
    for row in rows:
        epochs = range(1, row.epochs + 1)
        mean, deviation = row.course('eval_top1')
        axes.plot(epochs, mean, row.dashes, color=row.colour)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=row.colour, alpha=0.15, linewidth=0)
        if training:
            axes.plot(epochs, row.course('train_top1')[0], ':', color=row.colour, linewidth=1)
        labels.append(Label(row.epochs, mean[-1], row.label, row.colour))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel('epoch' + ' (of several seeds: the mean, and a band of the standard deviation)' * any(
        len(row.curves) > 1 for row in rows), loc='left')
    title = f'Accuracy{of} over epochs' + ' (dotted: of augmented training images)' * training
    axes.set(ylabel='top-1, %' if training else 'validation top-1, %', title=title)
    return labels


def draw_costs(axes: Axes, rows: List[Row], all_rows: List[Row], of: str) -> List[Label]:
    labels = []
    for row in rows:
        end = cost(row, all_rows)
        mean, deviation = row.course('eval_top1')
        if not augments_widths(row.flags):
            times = end * np.arange(1, row.epochs + 1) / row.epochs
            axes.plot(times, mean, row.dashes, color=row.colour, linewidth=1.2)
        axes.errorbar(end, mean[-1], deviation[-1] if len(row.curves) > 1 else None, fmt='o', markersize=7, capsize=3,
                      color=row.colour)
        labels.append(Label(end, mean[-1], row.label, row.colour))
    unit = next(row for row in all_rows if row.name == rows[0].unit)
    text = (f'processor time (1: {unit.label}, {unit.epochs} epochs)\n'
            'The epochs of a run count as equally long.')
    if any(augments_widths(row.flags) for row in rows):
        text += " In the paper's schedule the first half takes longer: only its end is shown."
    axes.set_xlabel(text, loc='left')
    axes.set(ylabel='validation top-1, %', title=f'Accuracy{of} over processor time', xlim=(0, None))
    return labels


def draw_ends(axes: Axes, rows: List[Row], groups: List[str]) -> None:
    """Draw a line of dots for every row, the best first, by model where there are several."""
    places, names, colours = [], [], []
    timed = any(cost(row, rows) is not None for row in rows)
    for group in groups:
        if len(groups) > 1:
            places, names, colours = places + [len(places)], names + [group], colours + ['#333333']
        for row in sorted((r for r in rows if r.model == group), key=lambda r: -statistics.mean(r.last('eval_top1'))):
            y = len(places)
            places, names, colours = places + [y], names + [row.label], colours + [text_colour(row.colour)]
            top1, in_training = row.last('eval_top1'), row.last('train_top1')
            if in_training:
                axes.plot(statistics.mean(in_training), y, 'o', markersize=6, color=row.colour, markerfacecolor='white')
            axes.errorbar(statistics.mean(top1), y, xerr=statistics.stdev(top1) if len(top1) > 1 else None, fmt='o',
                          markersize=7, capsize=3, color=row.colour)
            relative = cost(row, rows)
            times = ['?' if relative is None else f'{relative:.2f}'] * timed
            draw_columns(axes, y, spread(top1), *times, color=colours[-1])
    draw_columns(axes, -0.9, 'top-1, %', *['time'] * timed, weight='bold')
    axes.set_yticks(places, names)
    for tick, colour in zip(axes.get_yticklabels(), colours):
        tick.set(color=colour, weight='bold' if tick.get_text() in groups else 'normal')
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.set(xlabel='top-1, % (filled: validation images; hollow: augmented training images)',
             title='After the last epoch of each run')


def draw_columns(axes: Axes, y: float, *texts: str, **how: Any) -> None:
    """Write texts to the right of a panel, in columns."""
    for offset, text in zip((12, 90), texts):
        axes.annotate(text, (1, y), (offset, 0), axes.get_yaxis_transform(), 'offset points', va='center', **how)


def page(text: str, draw: bool = True) -> str:
    """Return the page with every table between `<!-- experiment -->` and `<!-- end -->` made anew."""
    for name in re.findall(r'<!-- (\w+) -->', text):
        path = HERE / f'{name}.yaml'
        if not path.exists():
            continue
        rows = read(path)
        if draw and rows:
            content = yaml.safe_load(path.read_text())
            PICTURES.mkdir(exist_ok=True)
            with style():
                figure = picture(content.get('title', name), rows, content.get('curves', []),
                                 content.get('training_curves', False))
                figure.savefig(PICTURES / f'{name}.png', dpi=120)
        made = f'<!-- {name} -->\n{table(rows) if rows else "None is done yet."}\n<!-- end -->'
        text = re.sub(rf'<!-- {name} -->\n.*?<!-- end -->', lambda m: made, text, flags=re.S)
    return text


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    print(f'Written: {PAGE.relative_to(HERE.parent)} and {PICTURES.relative_to(HERE.parent)}/')


if __name__ == '__main__':
    main()
