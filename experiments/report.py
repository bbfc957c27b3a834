#!/usr/bin/env python3
"""Make the tables and pictures of docs/results.md anew, from the files in experiments/results/ alone.

    python experiments/report.py

Accuracies are those after the last epoch, never the best of all. `cost` is the processor time of a run (data loading
and validation included, one thread), relative to the mean of its unit: the row that its YAML file names, or MODEL-init.
"""
import csv
import json
import re
import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import yaml
from run import HERE, Run, done, read_experiment

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

    def last(self, column: str) -> List[float]:
        return [float(curve[-1][column]) for curve in self.curves]


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
            rows[name].get('unit') or content.get('unit') or name.partition('-')[0] + '-init')
        for name, these in runs.items() if these
    ]


def spread(values: List[float], digits: int = 1) -> str:
    """Return the mean, and the standard deviation where there is more than one value."""
    text = f'{statistics.mean(values):.{digits}f}'
    return text if len(values) == 1 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def cost(row: Row, rows: List[Row]) -> Optional[float]:
    unit = next((r.cpu_seconds for r in rows if r.name == row.unit), None)
    if not unit or not row.cpu_seconds:
        return None
    return statistics.mean(row.cpu_seconds) / statistics.mean(unit)


def table(rows: List[Row]) -> str:
    lines = ['| row | what | epochs | seeds | top-1 | top-1 in training | cost |', '|---|---|---|---|---|---|---|']
    for row in rows:
        relative = cost(row, rows)
        known = '' if len(row.cpu_seconds) == len(row.curves) else f' ({len(row.cpu_seconds)} of the seeds)'
        top1, in_training = (spread(row.last(column)) for column in ('eval_top1', 'train_top1'))
        lines.append(f'| `{row.name}` | {row.about} | {row.epochs} | {len(row.curves)} | {top1} | {in_training} |'
                     f' {"" if relative is None else f"{relative:.2f}{known}"} |')
    return '\n'.join(lines)


def pictures(experiment: str, rows: List[Row], shown: List[str]) -> None:
    """Draw accuracy over epochs, in validation and training, and accuracy over cost. A row has one colour in both."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    colours = dict(zip((row.name for row in rows), colormaps['tab10' if len(rows) <= 10 else 'tab20'].colors))
    figure = Figure(figsize=(12, 4.5), layout='constrained')
    curves, costs = figure.subplots(1, 2)
    for row in (r for r in rows if r.name in shown):
        epochs = range(1, row.epochs + 1)
        for column, style in (('eval_top1', '-'), ('train_top1', ':')):
            mean = [statistics.mean(float(c[e][column]) for c in row.curves) for e in range(row.epochs)]
            curves.plot(epochs, mean, style, color=colours[row.name])
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.set(xlabel='epoch', ylabel='top-1, %', title='Over epochs (dotted: in training, on augmented images)')
    for row in rows:
        relative = cost(row, rows)
        if relative is None:
            continue
        accuracies = row.last('eval_top1')
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
        costs.errorbar(relative, statistics.mean(accuracies), deviation, fmt='o', capsize=3, color=colours[row.name],
                       label=f'{row.name} ({len(row.curves)} seed{"s" * (len(row.curves) > 1)})')
    costs.set(xlabel='processor time, in runs without NetAug', ylabel='top-1 after the last epoch, %',
              title='Over cost (bars: standard deviation)')
    figure.legend(*costs.get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    figure.suptitle(f'{experiment}: top-1 on the 10,000 validation images')
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f'{experiment}.png', dpi=110)


def page(text: str, draw: bool = True) -> str:
    """Return the page with every table between `<!-- experiment -->` and `<!-- end -->` made anew."""
    for name in re.findall(r'<!-- (\w+) -->', text):
        path = HERE / f'{name}.yaml'
        if not path.exists():
            continue
        rows = read(path)
        if draw and rows:
            pictures(name, rows, yaml.safe_load(path.read_text()).get('curves', []))
        made = f'<!-- {name} -->\n{table(rows) if rows else "None is done yet."}\n<!-- end -->'
        text = re.sub(rf'<!-- {name} -->\n.*?<!-- end -->', lambda m: made, text, flags=re.S)
    return text


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    print(f'Written: {PAGE.relative_to(HERE.parent)} and {PICTURES.relative_to(HERE.parent)}/')


if __name__ == '__main__':
    main()
