"""The experiments: their rows are command lines of train.py, and the page of results is what their files make."""
import csv
import json
import os
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.utils import random_seed

from conftest import NETAUG, ROOT, run_python
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


@pytest.mark.parametrize('on_gpu', [(), ('unit',), ('row',), ('unit', 'row')])
def test_no_cost_on_a_gpu(on_gpu):
    """Processor time is the cost of runs on a CPU alone."""
    unit, row = (report.Row(name, '', 1, [[]], [seconds], 'unit', '', dict(device='cuda') if name in on_gpu else {})
                 for name, seconds in (('unit', 2.0), ('row', 3.0)))
    assert report.cost(row, [unit, row]) == (None if on_gpu else 1.5)


FLAGS = ['--num-classes', 10, '--img-size', 32, '--model', 'netaug_mbv2_tiny', '-b', 60, '-j', 0, '--epochs', 2,
         '--warmup-epochs', 0, '--lr', 0.05, *NETAUG, '--netaug-stop-width-at', 1, '--color-jitter', 0]


@pytest.fixture(scope='module')
def as_ever(few_digits, tmp_path_factory):
    """The summary of a training without a variant."""
    out = tmp_path_factory.mktemp('as-ever')
    run_python('train.py', '--data-dir', few_digits, *FLAGS, '--output', out, '--experiment', 'run')
    return (out / 'run/summary.csv').read_text()


@pytest.mark.parametrize('variant', sorted(set(variants.VARIANTS) - {'in-memory'}))  # tested below
def test_variants_differ(variant, as_ever, few_digits, tmp_path):
    """Each does what it is there for: the weights are others than those of the same training without it."""
    flags = [*FLAGS, '--output', tmp_path, '--experiment', 'run']
    run_python('experiments/variants.py', variant, '--data-dir', few_digits, *flags)
    assert (tmp_path / 'run/summary.csv').read_text() != as_ever


CONFIG = dict(input_size=(3, 24, 24), interpolation='bilinear', crop_pct=0.875, crop_mode='center',
              mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1))


@pytest.fixture
def in_memory_loaders(monkeypatch, tmp_path):
    """A function that returns data sets and loaders of both splits."""
    monkeypatch.setattr(in_memory, 'CACHE', tmp_path / 'cache')

    def loaders(data, *flags, config=CONFIG):
        args = parse_args(train_parser(), [
            '--data-dir', str(data), '--num-classes', '10', '-b', '20', '--color-jitter', '0', *map(str, flags)])
        args.distributed = False
        splits = [create_dataset('', root=data / split) for split in ('train', 'validation')]
        train, validation, _ = in_memory.set_up_loaders(
            args, types.SimpleNamespace(train=splits[0], validation=splits[1]), config, torch.device('cpu'),
            torch.float32)
        return splits, train, validation

    return loaders


def test_validation_images_in_memory(few_digits, in_memory_loaders):
    """They are the batches of timm's loader."""
    _, _, loader = in_memory_loaders(few_digits)
    theirs = create_loader(
        create_dataset('', root=few_digits / 'validation'), batch_size=20, use_prefetcher=False, num_workers=0,
        **CONFIG)
    batches = list(zip(loader, theirs, strict=True))
    assert len(batches) == len(loader) > 1
    for (images, target), (their_images, their_target) in batches:
        assert torch.equal(target, their_target)
        torch.testing.assert_close(images, their_images, rtol=0, atol=1e-5)  # normalised before or after / 255


@pytest.mark.parametrize('hflip', [0, 1])
def test_training_images_in_memory(hflip, few_digits, in_memory_loaders):
    """A crop of the whole image at its own size is the image, mirrored or not; every image comes once."""
    size = create_dataset('', root=few_digits / 'train')[0][0].size
    whole = dict(CONFIG, input_size=(3, *size), crop_pct=1.0)
    (dataset, _), loader, _ = in_memory_loaders(
        few_digits, '--scale', 1, 1, '--ratio', 1, 1, '--hflip', hflip, config=whole)
    want = Counter()
    for i in range(len(dataset)):
        image, label = dataset[i]
        pixels = np.asarray(image.convert('RGB'))[:, ::-1 if hflip else 1].copy()
        want[pixels.tobytes(), label] += 1
    got = Counter()
    mean, std = (torch.tensor(whole[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    for images, target in loader:
        pixels = ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        got.update((image.tobytes(), label) for image, label in zip(pixels, target.tolist()))
    assert got <= want and got.total() == len(loader) * 20 > 100


@pytest.fixture
def two_pictures(tmp_path):
    """Pictures of noise and of different sizes, one of each of two classes, in both splits."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((30, 40), (20, 50))]
    for split in ('train', 'validation'):
        for name, picture in zip('ab', pictures):
            (tmp_path / split / name).mkdir(parents=True)
            picture.save(tmp_path / split / name / 'picture.png')
    return tmp_path, pictures


@pytest.mark.parametrize('hflip', [0, 1])
def test_crops_in_memory_are_resized_as_pillows(hflip, two_pictures, in_memory_loaders, monkeypatch):
    """Up to their edges, and not to a square alone."""
    data, pictures = two_pictures
    boxes = np.array([[3, 5, 20, 24], [2, 9, 15, 30]])  # top, left, height, width
    monkeypatch.setattr(in_memory.TrainLoader, 'boxes', lambda self: boxes)
    config = dict(CONFIG, input_size=(3, 64, 48), mean=(0, 0, 0), std=(1, 1, 1))
    _, loader, _ = in_memory_loaders(data, '-b', 2, '--hflip', hflip, config=config)
    (images, labels), = loader
    assert sorted(labels.tolist()) == [0, 1]
    for image, i in zip(images, labels.tolist()):
        want = TF.resized_crop(pictures[i], *boxes[i].tolist(), (64, 48), TF.InterpolationMode.BILINEAR)
        want = np.asarray(TF.hflip(want) if hflip else want)
        np.testing.assert_allclose(image.permute(1, 2, 0) * 255, want, atol=1.01)  # Pillow rounds twice


def test_crops_in_memory_are_drawn_as_timms(two_pictures, in_memory_loaders):
    """Areas, aspect ratios and places are those of timm's `RandomResizedCropAndInterpolation`, on wide images, too."""
    _, loader, _ = in_memory_loaders(two_pictures[0], '-b', 2, '--scale', 0.3, 1)
    loader.sizes = np.array([[60, 100]] * 4000)
    random_seed(0)
    top, left, height, width = loader.boxes().T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 60).all() and (left + width <= 100).all()
    assert top.max() > 20 and left.max() > 20
    draw, image = RandomResizedCropAndInterpolation.get_params, Image.new('RGB', (100, 60))
    theirs = np.array([draw(image, (0.3, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    for ours, other in ((height * width, theirs[:, 2] * theirs[:, 3]), (width / height, theirs[:, 3] / theirs[:, 2]),
                        (top, theirs[:, 0]), (left, theirs[:, 1])):
        # Within four standard errors of the difference of two means. The ratio of the spreads has one of about 1.6 %.
        assert abs(ours.mean() - other.mean()) < 4 * 2 ** 0.5 * other.std() / 4000 ** 0.5
        assert 0.9 < ours.std() / other.std() < 1.1


@pytest.mark.parametrize('size', [(101, 60), (60, 101), (50, 60)])
def test_crops_in_memory_where_none_fits(size, two_pictures, in_memory_loaders):
    _, loader, _ = in_memory_loaders(two_pictures[0], '-b', 2, '--scale', 5, 6)
    loader.sizes = np.array([size])
    theirs = RandomResizedCropAndInterpolation.get_params(Image.new('RGB', size[::-1]), (5, 6), (3 / 4, 4 / 3))
    assert loader.boxes().tolist() == [list(theirs)]


def test_epochs_in_memory_follow_the_seed(few_digits, in_memory_loaders):
    """The same seed gives the same batches, which makes a resumed run equal to an undisturbed one; mixup, too."""
    _, loader, _ = in_memory_loaders(few_digits, '--mixup', 0.5)
    epochs = []
    for seed in (0, 0, 1):
        random_seed(seed)
        epochs.append(list(loader))
    assert all(torch.equal(a, b) for one, other in zip(*epochs[:2], strict=True) for a, b in zip(one, other))
    assert not torch.equal(epochs[0][0][0], epochs[2][0][0])
    assert epochs[0][0][1].shape == (20, 10)  # mixed targets


def test_images_in_memory_follow_the_files(two_pictures, in_memory_loaders):
    """What was decoded once is not used for other images of the same names."""
    data, pictures = two_pictures
    first = in_memory_loaders(data, '-b', 2)[1].images
    assert torch.equal(first, in_memory_loaders(data, '-b', 2)[1].images)
    pictures[1].save(data / 'train/a/picture.png')
    os.utime(data / 'train/a/picture.png', (1, 1))  # two writes may come within a tick of the file system's clock
    assert not torch.equal(first, in_memory_loaders(data, '-b', 2)[1].images)


@pytest.mark.parametrize('flags, said', [
    (['--reprob', 0.5], 'leave --reprob out'), (['--color-jitter', 0.4], 'add --color-jitter 0'),
    (['--aa', 'rand-m9'], 'leave --aa out'), (['--in-chans', 1], 'leave --in-chans out'),
    (['-b', 3], 'smaller --batch'), (['--task', 'multilabel'], 'leave --task out')])
def test_what_images_in_memory_cannot_do(flags, said, two_pictures, in_memory_loaders):
    with pytest.raises(in_memory.UserError, match=said):
        in_memory_loaders(two_pictures[0], '-b', 2, *flags)
