"""Pictures: labels that do not overlap, one colour for each method, and pictures of much and of little."""
import csv
import importlib.util
import itertools
import json
import sys

import matplotlib.colors
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.text import Annotation, Text

from conftest import ROOT
from timm_netaug.cli.curves import write_curves
from timm_netaug.cli.style import Label, add_labels, new_figure, style, text_colour

sys.path.insert(0, str(ROOT / 'experiments'))
import report  # noqa: E402
from methods import METHODS, method_name, method_of  # noqa: E402

EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.yaml'))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(figure):
    """Return the texts of a figure and their boxes, as it is drawn."""
    figure.draw_without_rendering()
    hidden = set()  # labels of ticks that are outside a panel, which are there without being drawn
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            hidden |= {tick.label2} if low <= tick.get_loc() <= high else {tick.label1, tick.label2}
    return [(text.get_text(), text.get_window_extent()) for text in figure.findobj(Text)
            if text.get_text().strip() and text.get_visible() and text not in hidden]


def assert_readable(figure):
    """No text covers another one (boxes may touch by a pixel), is cut off, or is crossed by the line of another label;
    returns the texts."""
    boxes = [(text, box.padded(-1)) for text, box in texts(figure)]
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f'{a!r} and {b!r} overlap'
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f'{text!r} is cut off'
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, f'{text!r} is cut off'
    for note in figure.findobj(Annotation):
        if note.arrow_patch is not None:
            line = note.arrow_patch.get_path().transformed(note.arrow_patch.get_transform())
            line = Path(line.vertices[line.codes != Path.CLOSEPOLY])  # the vertex of that code has no meaning
            for text, box in boxes:
                assert not line.intersects_bbox(box, filled=False), f'the line of a label crosses {text!r}'
    return {text for text, _ in boxes}


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved."""
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    return saved


@pytest.mark.parametrize('values', [[1] * 6, [1, 1.01, 1.02, 5], [3, 2, 1], [0]], ids=str)
def test_labels_of_lines(values):
    """Labels at line ends are moved apart, in the order of the ends, and stay near them."""
    with style():
        figure = new_figure(8, 4)
        axes = figure.subplots()
        for value in values:
            axes.plot([0, 10], [0, value])
        labels = [Label(10, value, f'a method with a long name {i}', 'black') for i, value in enumerate(values)]
        placed = add_labels(axes, labels)
    assert_readable(figure)
    for text, label in zip(placed, labels):
        box, point = text.get_window_extent(), axes.transData.transform(label[:2])
        assert abs((box.y0 + box.y1) / 2 - point[1]) <= len(values) * box.height
    ends = [(label.y, -text.get_window_extent().y0) for text, label in zip(placed, labels) if text.xyann[0] > 0]
    assert all(a[1] >= b[1] for a, b in itertools.combinations(ends, 2) if a[0] < b[0])


def test_labels_of_points():
    """Also of points that lie one behind the other, and at every resolution."""
    with style():
        figure = new_figure(9, 4)
        axes = figure.subplots()
        labels = [Label(x, 50 + x / 10, f'point number {x}', 'black') for x in range(6)]
        axes.plot([label.x for label in labels], [label.y for label in labels], 'o-')
        add_labels(axes, labels)
    assert_readable(figure)
    figure.set_dpi(200)
    assert_readable(figure)


def test_methods():
    colours = [method.colour for method in METHODS.values()]
    assert len(set(colours)) == len(colours)
    for flags, method, name in (
            ({}, 'plain-timm-init', "plain training, timm's initial weights"),
            (dict(pretrained_path='weights.pth'), 'plain', 'plain training'),
            (dict(netaug_init=True), 'plain', 'plain training'),
            (dict(netaug_init=True, mixup=0.2), 'regularised', 'regularised training'),
            (dict(kd_model_name='resnet18'), 'teacher', 'plain training with a teacher'),
            (dict(netaug=True), 'widths', "NetAug, the paper's schedule"),
            (dict(netaug=True, netaug_stop_width_at=0), 'expansions', 'NetAug, expansions alone'),
            (dict(netaug=True, netaug_width_mults=[1]), 'expansions', 'NetAug, expansions alone'),
            (dict(netaug=True, netaug_stop_width_at=0, netaug_from_stage=3),
             'stage', 'NetAug, expansions from stage 3'),
            (dict(netaug=True, netaug_from_stage='layer2'),
             'stage-widths', 'NetAug, widths and expansions from layer2'),
            (dict(netaug=True, netaug_distill=1.0), 'distillation', 'NetAug with in-situ distillation')):
        assert (method_of(flags), method_name(flags)) == (method, name)


def rows_of(path, seeds=1):
    """Return the rows of an experiment as if all had been run, and all had the same accuracy."""
    rows, content = {}, yaml.safe_load(path.read_text())
    for run in report.read_experiment(str(path)):
        rows.setdefault(run.row, run)
    return [report.Row(
        name, 'about', run.epochs, [[dict(
            eval_top1=str(s + 90 * (1 - 2 ** -e)), train_top1='' if run.flags.get('mixup') else '20') for e in range(
                run.epochs)] for s in range(seeds)], [100.0 + i], report.unit_of(name, content),
        report.label_of(run, content), run.flags) for i, (name, run) in enumerate(rows.items())]


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_pictures_of_experiments(path):
    """Of the results that there are, of one row of an unknown cost, and of all rows, with ends at the same place."""
    content = yaml.safe_load(path.read_text())
    everything = rows_of(path, seeds=2)
    assert all(f'| `{row.name}` | about | ' in report.table(everything) for row in everything)  # of mixed images, too
    labels = [(row.model, row.label) for row in everything]
    assert len(set(labels)) == len(labels), 'rows need a field "detail" where their method is the same'
    for rows in (report.read(path), [everything[0]._replace(cpu_seconds=[])], everything):
        if rows:
            with style():
                figure = report.picture(
                    content['title'], rows, content['curves'], content.get('training_curves', False))
                # In the style, by which matplotlib chooses ticks each time that it draws.
                assert {content['title'], *(row.label for row in rows)} <= assert_readable(figure)
            shown = [row for row in rows if row.name in content['curves']]
            titles = [axes.get_title(loc='left') for axes in figure.findobj(Axes)]
            of_models = [f' of {row.model}' * (len({row.model for row in rows}) > 1) for row in shown]
            for title in dict.fromkeys(f'Accuracy{of} over epochs' for of in of_models):
                assert sum(one.startswith(title) for one in titles) == 1  # a panel for each model
            assert not content.get('training_curves') or not any('over processor time' in title for title in titles)
            if content.get('training_curves'):
                lines = [list(line.get_ydata()) for line in figure.findobj(Line2D) if line.get_linestyle() == ':']
                assert shown or rows is not everything
                assert all(list(row.course('train_top1')[0]) in lines for row in shown)
            for axes in figure.findobj(Axes):
                for tick in axes.get_yticklabels():
                    for row in rows:
                        if tick.get_text() == row.label:
                            assert tick.get_color() == text_colour(row.colour)


def test_colours_are_the_same_in_benchmarks_and_experiments(figures, tmp_path):
    """And the pictures of old results are drawn again without measuring."""
    step = load(ROOT / 'benchmarks' / 'step.py')
    assert set(step.CONTENDERS) <= set(step.NAMES)
    for name in ('step-cpu-64', 'step-cpu-64-128'):
        source = ROOT / f'benchmarks/results/{name}.json'
        (tmp_path / f'{name}.json').write_bytes(source.read_bytes())
        step.redraw(str(tmp_path / f'{name}.json'))
        assert (tmp_path / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
        figure, content = figures.pop(), json.loads(source.read_text())
        assert_readable(figure)
        contenders = list(content['results']['netaug_mbv2_tiny']['rows'])
        bars = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in figure.axes[0].patches]
        assert bars == [METHODS[step.NAMES[name][0]].colour.upper() for name in contenders]
    for contender, flags in (('stage 3, expansions', dict(netaug=True, netaug_stop_width_at=0, netaug_from_stage=3)),
                             ('all, widths', dict(netaug=True)), (step.UNIT, dict(netaug_init=True))):
        assert step.NAMES[contender][0] == method_of(flags)


def write_summary(path, epochs, **columns):
    with open(path, 'w', newline='') as f:
        rows = csv.writer(f)
        rows.writerow(['epoch', *columns])
        rows.writerows([epoch, *(values[epoch] for values in columns.values())] for epoch in range(epochs))
    return str(path)


@pytest.mark.parametrize('epochs', [1, 2, 40])
def test_curves(figures, tmp_path, epochs):
    """Losses that end at one place, and a best epoch that is the first, somewhere, or the last."""
    loss = [2 / (1 + e) for e in range(epochs)]
    for best in {0, epochs // 2, epochs - 1}:
        top1 = [60 - abs(e - best) for e in range(epochs)]
        summary = write_summary(
            tmp_path / 'summary.csv', epochs, train_loss=[2 * v for v in loss], train_tiny_loss=loss,
            train_aug_loss=loss, train_distill_loss=loss, train_top1=top1, eval_loss=loss, eval_top1=top1)
        write_curves(summary, str(tmp_path / 'curves.png'), title='a model, run of mine')
        figure = figures.pop()
        told = {'a model, run of mine', 'best epoch', f'best: 60 % in epoch {best}'}
        assert told <= assert_readable(figure)


def test_curves_with_empty_columns(figures, tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    summary = write_summary(folder / 'summary.csv', 3, train_loss=[3, 2, 1], eval_loss=[''] * 3, eval_top1=[''] * 3)
    write_curves(summary, str(tmp_path / 'curves.png'))
    assert {'photos', 'no values yet', 'training'} <= assert_readable(figures[0])


def test_idea():
    """The picture of the README is what its script draws, as far as texts tell."""
    idea = load(ROOT / 'docs' / 'idea.py')
    with style():
        assert_readable(idea.picture())
    assert (ROOT / 'docs/idea.png').exists()
