"""The experiments: their rows are command lines of train.py, and the page of results is what their files make."""
import csv
import json
import sys

import numpy as np
import pytest
import torch
from timm.data import create_dataset, create_loader

from conftest import ROOT, run_python
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_flags import check_train_args, train_parser

sys.path.insert(0, str(ROOT / 'experiments'))
import in_memory  # noqa: E402
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
         '--warmup-epochs', 0, '--lr', 0.05, '--netaug', '--netaug-stop-width-at', 1, '--color-jitter', 0]


@pytest.fixture(scope='module')
def as_ever(few_digits, tmp_path_factory):
    """The summary of a training without a variant."""
    out = tmp_path_factory.mktemp('as-ever')
    run_python('train.py', '--data-dir', few_digits, *FLAGS, '--output', out, '--experiment', 'run')
    return (out / 'run/summary.csv').read_text()


@pytest.mark.parametrize('variant', sorted(variants.VARIANTS))
def test_variants_differ(variant, as_ever, few_digits, tmp_path):
    """Each does what it is there for: the weights are others than those of the same training without it."""
    run_python(
        'experiments/variants.py', variant, '--data-dir', few_digits, *FLAGS, '--output', tmp_path, '--experiment', 'run')
    assert (tmp_path / 'run/summary.csv').read_text() != as_ever


CONFIG = dict(input_size=(3, 24, 24), interpolation='bilinear', crop_pct=0.875, crop_mode='center',
              mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1))


def in_memory_loaders(data, monkeypatch, tmp_path, *flags):
    monkeypatch.setattr(in_memory, 'CACHE', tmp_path)
    args = parse_args(train_parser(), [
        '--data-dir', str(data), '--num-classes', '10', '-b', '20', '--color-jitter', '0', *map(str, flags)])
    args.distributed = False
    splits = [create_dataset('', root=data / split) for split in ('train', 'validation')]
    return splits, (loader(args, split, CONFIG, torch.device('cpu')) for loader, split in zip(
        (in_memory.TrainLoader, in_memory.ValidationLoader), splits))


def test_validation_images_in_memory(few_digits, monkeypatch, tmp_path):
    """They are the batches of timm's loader."""
    (_, dataset), (_, loader) = in_memory_loaders(few_digits, monkeypatch, tmp_path)
    theirs = create_loader(
        create_dataset('', root=few_digits / 'validation'), batch_size=20, use_prefetcher=False, num_workers=0,
        **CONFIG)
    batches = list(zip(loader, theirs, strict=True))
    assert len(batches) == len(loader) > 1
    for (images, target), (their_images, their_target) in batches:
        assert torch.equal(target, their_target)
        torch.testing.assert_close(images, their_images, rtol=0, atol=1e-5)  # normalised before or after / 255


@pytest.mark.parametrize('hflip', [0, 1])
def test_training_images_in_memory(hflip, few_digits, monkeypatch, tmp_path):
    """A crop of the whole image at its own size is the image, mirrored or not; every image comes once."""
    size = create_dataset('', root=few_digits / 'train')[0][0].size
    whole = dict(CONFIG, input_size=(3, *size), crop_pct=1.0)
    monkeypatch.setitem(globals(), 'CONFIG', whole)
    (dataset, _), (loader, _) = in_memory_loaders(
        few_digits, monkeypatch, tmp_path, '--scale', 1, 1, '--ratio', 1, 1, '--hflip', hflip)
    want = {}
    for i in range(len(dataset)):
        image, label = dataset[i]
        pixels = np.asarray(image.convert('RGB'))[:, ::-1 if hflip else 1].copy()
        want.setdefault((pixels.tobytes(), label), 0)
        want[pixels.tobytes(), label] += 1
    got = 0
    mean, std = (torch.tensor(whole[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    for images, target in loader:
        pixels = ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for image, label in zip(pixels, target.tolist()):
            key = image.tobytes(), label
            assert want.get(key, 0) > 0
            want[key] -= 1
            got += 1
    assert got == len(loader) * 20 > 100


def test_crops_in_memory_are_drawn_as_timms(few_digits, monkeypatch, tmp_path):
    """Areas and aspect ratios are those of timm's `RandomResizedCropAndInterpolation`, on wide images, too."""
    from PIL import Image
    from timm.data.transforms import RandomResizedCropAndInterpolation
    _, (loader, _) = in_memory_loaders(few_digits, monkeypatch, tmp_path, '--scale', 0.3, 1)
    loader.sizes = np.array([[60, 100]] * 4000)
    np.random.seed(0)
    top, left, height, width = loader.boxes().T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 60).all() and (left + width <= 100).all()
    assert top.max() > 20 and left.max() > 20
    image = Image.new('RGB', (100, 60))
    draw = RandomResizedCropAndInterpolation.get_params
    theirs = np.array([draw(image, (0.3, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    for ours, other in ((height * width, theirs[:, 2] * theirs[:, 3]), (width / height, theirs[:, 3] / theirs[:, 2]),
                        (top, theirs[:, 0]), (left, theirs[:, 1])):
        # Means and spreads of 4,000 draws each: within four standard errors, of which sqrt(2) is for two samples.
        assert abs(ours.mean() - other.mean()) < 4 * 2 ** 0.5 * other.std() / 4000 ** 0.5
        assert 0.9 < ours.std() / other.std() < 1.1


@pytest.mark.parametrize('flags', [['--reprob', '0.5'], ['--color-jitter', '0.4'], ['--aa', 'rand-m9']])
def test_what_images_in_memory_cannot_do(flags):
    args = parse_args(train_parser(), ['--data-dir', 'D', '--color-jitter', '0', *flags])
    args.distributed = False
    with pytest.raises(in_memory.UserError, match=f'leave {flags[0]} out'):
        in_memory.set_up_loaders(args, None, CONFIG, torch.device('cpu'), torch.float32)
