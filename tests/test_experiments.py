"""The experiments: their rows are command lines of train.py, and the page of results is what their files make."""
import csv
import json
import sys

import pytest

from conftest import ROOT, run_python
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_flags import check_train_args, train_parser

sys.path.insert(0, str(ROOT / 'experiments'))
import report  # noqa: E402
import run  # noqa: E402
import variants  # noqa: E402

EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.yaml'))


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_rows(path):
    runs = run.read_experiment(str(path))
    assert runs and len({r.name for r in runs}) == len(runs)
    for r in runs:
        words = run.command(r, 'D', 'O')
        assert r.variant is None or r.variant in variants.VARIANTS
        parser = train_parser()
        args = parse_args(parser, words[words.index('--data-dir'):])
        check_train_args(args)
        assert (args.seed, args.experiment, args.epochs) == (r.seed, r.name, r.epochs)


def test_results():
    """Every result is one of a row as it stands, and complete."""
    runs = {r.result: r for path in EXPERIMENTS for r in run.read_experiment(str(path))}
    results = sorted((ROOT / 'experiments/results').glob('*/*.csv'))
    assert results
    for result in results:
        r = runs[result]
        assert [row['epoch'] for row in csv.DictReader(result.open())] == [str(e) for e in range(r.epochs)]
        there = json.loads(result.with_suffix('.json').read_text())
        words = there['command'].split()
        assert words == run.command(r, 'DATA', f'experiments/runs/{r.experiment}'), result
        assert there['images_per_class'] == r.images_per_class
        assert there['cpu_seconds'] is None or there['cpu_seconds'] > 0


def test_page():
    assert report.page(report.PAGE.read_text(), draw=False) == report.PAGE.read_text()


FLAGS = ['--num-classes', 10, '--img-size', 32, '--model', 'netaug_mbv2_tiny', '-b', 60, '-j', 0, '--epochs', 2,
         '--warmup-epochs', 0, '--lr', 0.05, '--netaug', '--netaug-stop-width-at', 1]


@pytest.fixture(scope='module')
def as_ever(few_digits, tmp_path_factory):
    """The summary of a training without a variant."""
    out = tmp_path_factory.mktemp('as-ever')
    run_python('train.py', '--data-dir', few_digits, *FLAGS, '--output', out, '--experiment', 'run')
    return (out / 'run/summary.csv').read_text()


@pytest.mark.parametrize('variant', sorted(variants.VARIANTS))
def test_variants_differ(variant, as_ever, few_digits, tmp_path):
    """Each does what it is there for: the weights are others than those of the same training without it."""
    run_python('experiments/variants.py', variant, '--data-dir', few_digits, *FLAGS, '--output', tmp_path, '--experiment',
               'run')
    assert (tmp_path / 'run/summary.csv').read_text() != as_ever
