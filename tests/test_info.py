"""What `python -m timm_netaug info` tells of a model, against figures by hand, and the picture of a run."""
import csv
import json
from argparse import Namespace

import pytest
import timm
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import timm_netaug
from conftest import MODELS, generator, images, make, make_supernet
from timm_netaug import NetAugConfig, augment
from timm_netaug.cli import info
from timm_netaug.cli.curves import write_curves
from timm_netaug.detection import create_detector, export_detector
from timm_netaug.errors import UserError
from timm_netaug.fits import Board, check_fits
from timm_netaug.info import describe, stages
from timm_netaug.io.folder import export_folder
from timm_netaug.io.run import RunDescription

# Peak of the activations by hand, from the layer tables: the largest expanded tensor with the output of its depthwise
# convolution, and where there is a skip connection the block's input; or with the input that it is made from.
PEAKS = {
    'netaug_mbv2_tiny': ('blocks.1.0.conv_dw', 48 * 72 * 72 + 48 * 36 * 36),
    'netaug_mbv2_035': ('blocks.1.0.conv_dw', 48 * 80 * 80 + 48 * 40 * 40),
    'netaug_mbv3_035': ('blocks.1.0.conv_pw', 8 * 80 * 80 + 24 * 80 * 80),
    'netaug_proxylessnas_035': ('blocks.0.0.conv_dw', 16 * 80 * 80 + 16 * 80 * 80),
    'netaug_mcunet': ('blocks.1.1.conv_dw', 16 * 44 * 44 + 80 * 44 * 44 + 80 * 44 * 44),
}
# The README's table: million parameters of the super-network, mean MACs of its samples relative to the tiny model.
SUPERNETS = {
    'netaug_mbv2_tiny': (5.83, 5.3),
    'netaug_mcunet': (7.27, 4.4),
    'netaug_mbv2_035': (8.62, 5.1),
    'netaug_proxylessnas_035': (9.73, 5.0),
    'netaug_mbv3_035': (25.18, 6.9),
}


class SkipAndExcite(nn.Module):
    """A convolution, a block with squeeze-excite and a skip connection around it, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(4)
        self.dw = nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False)
        self.dw_bn = nn.BatchNorm2d(4)
        self.squeeze = nn.Conv2d(4, 2, 1)
        self.excite = nn.Conv2d(2, 4, 1)
        self.project = nn.Conv2d(4, 4, 1, bias=False)
        self.last_bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu_(self.stem_bn(self.stem(x)))
        y = torch.relu(self.dw_bn(self.dw(x)))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.last_bn(self.project(y) + x)  # a norm that follows no convolution
        return self.classifier(self.dropout(y.mean((2, 3)).flatten(1)))


def test_by_hand():
    """At 8 x 8 pixels: the image has 192 bytes, the others 4 channels of 4 x 4 pixels, 64 bytes."""
    rows = describe(SkipAndExcite(), (3, 8, 8))['layers']
    assert [(r['name'], r['shape'], r['macs'], r['weight_bytes'], r['live_bytes']) for r in rows] == [
        ('(normalise)', [3, 8, 8], 0, 3 + 3 * 16, 192 + 192),
        ('stem', [4, 4, 4], 16 * 4 * 27, 4 * 3 * 16 + 4 * 16, 192 + 64),  # with kernels of 4 x 4
        ('dw', [4, 4, 4], 16 * 4 * 9, 4 * 9 + 4 * 16, 64 + 64),
        ('(mean)', [4, 1, 1], 0, 0, 64 + 64 + 4 + 4 * 4),  # the skip, the input, the means, their sums in int32
        ('squeeze', [2, 1, 1], 8, 8 + 2 * 16, 64 + 64 + 4 + 2),
        ('excite', [4, 1, 1], 8, 8 + 4 * 16, 64 + 64 + 2 + 4),
        ('(sigmoid)', [4, 1, 1], 0, 0, 64 + 64 + 4 + 4),
        ('(mul)', [4, 4, 4], 0, 0, 64 + 64 + 4 + 64),
        ('project', [4, 4, 4], 16 * 16, 16 + 4 * 16, 64 + 64 + 64),
        ('(add)', [4, 4, 4], 0, 0, 64 + 64 + 64),
        ('last_bn (batch_norm)', [4, 4, 4], 0, 4 * 2, 64 + 64),
        ('(mean)', [4], 0, 0, 64 + 4 + 4 * 4),
        ('classifier', [5], 20, 20 + 5 * 16, 4 + 5),
    ]


def test_padded_copies():
    """Without the larger kernels, the stem's input is copied with a border of a pixel."""
    rows = describe(SkipAndExcite(), (3, 8, 8), same_kernels=False)['layers']
    assert [(r['name'], r['shape'], r['weight_bytes'], r['live_bytes']) for r in rows[1:3]] == [
        ('stem (pad)', [3, 10, 10], 0, 192 + 300), ('stem', [4, 4, 4], 4 * 27 + 4 * 16, 300 + 64)]


def test_what_needs_memory_of_its_own():
    """An activation whose input is read later is not part of the operator before it; views are free."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            y = torch.relu(x)
            a, b = (x + y).chunk(2, 1)
            return torch.cat([b, a, torch.nn.functional.pad(a, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]], 1)

    rows = describe(Net(), (1, 4, 4))['layers']
    assert [(r['op'], r['live_bytes']) for r in rows] == [
        ('conv2d', 16 + 16), ('conv2d', 16 + 32), ('relu', 32 + 32), ('add', 32 + 32 + 32), ('pad', 32 + 36),
        ('cat', 32 + 36 + 48)]


@pytest.mark.parametrize('name', MODELS)
def test_five_models(name):
    model = timm.create_model(name).train()
    random_state = torch.get_rng_state()
    d = describe(model, samples=200)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    assert json.loads(json.dumps(d)) == d
    assert (d['architecture'], d['num_classes']) == (name, 1000)
    assert tuple(d['input_size']) == model.pretrained_cfg['input_size']
    assert d['parameters'] == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images(1, d['input_size'][1]))
    assert d['macs'] == counter.get_total_flops() // 2

    # tests/test_deploy.py compares the memory with what has been measured.
    peak = max(d['layers'], key=lambda row: row['live_bytes'])
    assert (d['peak_layer'], peak['live_bytes']) == (peak['name'], PEAKS[name][1]) == PEAKS[name]
    assert d['peak_activation_int8_bytes'] >= peak['live_bytes']
    assert d['arena_bytes'] == d['peak_activation_int8_bytes'] + d['persistent_bytes']
    assert d['flash_int8_bytes'] > sum(row['weight_bytes'] for row in d['layers']) > d['parameters']
    parameters, ratio = SUPERNETS[name]
    assert round(d['netaug']['parameters'] / 1e6, 2) == parameters
    assert round(d['netaug']['mean_macs_ratio'], 1) == ratio


@pytest.mark.parametrize('name', ['netaug_mcunet', 'resnet18'])
def test_stages(name):
    """The later the branch, the smaller the super-network and the step; from stage 0 they are those of all."""
    model = timm.create_model(name, **(dict(channels=(16, 32, 64, 128)) if name == 'resnet18' else {}))
    d = describe(model, (3, 64, 64), samples=1)
    rows = stages(model, d['layers'], samples=20)
    assert [row['from_stage'] for row in rows] == list(range(len(rows))) and len(rows) >= 4
    assert rows[0]['trunk_macs'] == 0 and rows[0]['parameters'] == d['netaug']['parameters']
    for column in ('parameters', 'step', 'step_expand_only'):
        values = [row[column] for row in rows]
        assert values == sorted(values, reverse=True) and min(values) > 1
    assert all(row['step'] > row['step_expand_only'] for row in rows)
    macs = {row['name']: row['macs'] for row in d['layers']}
    trunk = augment(model, NetAugConfig(from_stage=2)).netaug_trunk.names
    inside = sum(m for n, m in macs.items() if any(n == t or n.startswith(f'{t}.') for t in trunk))
    assert rows[2]['trunk_macs'] == pytest.approx(inside / d['macs'])


def test_macs_of_samples_are_those_that_are_computed():
    supernet = make_supernet('netaug_mbv3_035').eval()
    d = describe(supernet, (3, 64, 64), samples=2)
    total = 0
    g = generator()
    for _ in range(2):
        with supernet.sampled(g), FlopCounterMode(display=False) as counter, torch.no_grad():
            supernet(images(1, 64))
        total += counter.get_total_flops() // 2
    assert d['netaug']['mean_macs_ratio'] == pytest.approx(total / 2 / d['macs'])
    assert d['netaug']['parameters'] == sum(p.numel() for p in supernet.parameters())
    assert d['parameters'] < d['netaug']['parameters']  # the tiny model's


@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite0', 'vit_tiny_patch16_224'])
def test_other_models(name, capsys):
    info.main([name, '--num-classes', '10', '--samples', '2'])
    out = capsys.readouterr().out
    assert f'{name}, input 3 x 224 x 224, 10 classes' in out
    refused = name == 'vit_tiny_patch16_224'
    assert ('NetAug cannot augment this model' in out) == refused and ('super-network ' in out) != refused
    if name == 'resnet18':  # the pooling behind the stem: 64 channels, and a copy of them with a border of a pixel
        assert f'{64 * 112 * 112 + 64 * 114 * 114:,} bytes' in out and 'most at maxpool (max_pool2d) (pad)' in out


def test_command(tmp_path, capsys):
    info.main(['netaug_mbv2_tiny', '--layers'])
    out = capsys.readouterr().out
    for part in ('750,280', '23.50 M', '311,040 bytes (303.8 KiB)', '871,540 bytes', '5,827,439', 'TinyEngine'):
        assert part in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith('<- peak')] == ['blocks.1.0.conv_dw']

    model = make('netaug_mbv2_tiny', in_chans=1)
    model._model_args = dict(in_chans=1)
    netaug = timm_netaug.NetAugConfig(width_mults=(1.0,)).to_dict()
    run = RunDescription.from_model(model, dict(input_size=(1, 64, 64)), netaug=netaug)
    path = str(tmp_path / 'last.pth.tar')
    torch.save(dict(state_dict=model.state_dict(), args=Namespace(run=run.to_dict())), path)
    info.main([path, '--json', '--samples', '3', '--netaug-expand-mults', '1', '2'])
    d = json.loads(capsys.readouterr().out)
    assert (d['input_size'], d['num_classes'], d['netaug']['samples']) == ([1, 64, 64], 10, 3)
    assert (d['netaug']['config']['width_mults'], d['netaug']['config']['expand_mults']) == ([1.0], [1.0, 2.0])
    assert 'layers' not in d
    info.main([path, '--json', '--layers', '--img-size', '32', '--samples', '1'])
    d = json.loads(capsys.readouterr().out)
    assert d['input_size'] == [1, 32, 32] and [row['name'] for row in d['layers'][:2]] == ['(normalise)', 'conv_stem']

    export_folder(model, tmp_path / 'folder', run)
    info.main([f'local-dir:{tmp_path / "folder"}', '--samples', '1'])
    assert 'netaug_mbv2_tiny, input 1 x 64 x 64, 10 classes' in capsys.readouterr().out

    for argv, told in (
            (['netaug_mbv2_tinny'], 'Unknown model netaug_mbv2_tinny; the nearest name is netaug_mbv2_tiny.'),
            ([str(tmp_path / 'none.pth.tar')], 'There is no checkpoint'),
            ([path, '--num-classes', '3'], '--num-classes: a checkpoint has its own'),
            (['netaug_mcunet', '--img-size', '0'], '--img-size must be at least 1, got 0.'),
            (['netaug_mcunet', '--samples', '-1'], '--samples must be at least 1'),
            (['netaug_mcunet', '--netaug-divisor', '0'], 'divisor must be a whole number'),
            (['local-dir:none'], 'cannot be built'),
    ):
        with pytest.raises(SystemExit) as e:
            info.main(argv)
        assert str(e.value).startswith('timm_netaug info: error: ') and told in str(e.value)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='EfficientNet cannot be traced with an input of 3 x 64 x 64'):
        describe(model, (3, 64, 64))


def write_summary(path, epochs, **columns):
    with open(path, 'w', newline='') as f:
        rows = csv.writer(f)
        rows.writerow(['epoch', *columns])
        for epoch in range(epochs):
            rows.writerow([epoch, *(values[epoch] for values in columns.values())])
    return str(path)


def series(path, monkeypatch, *args):
    """Return what is drawn, by panel and label, and check the picture's file."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    out = path.with_suffix('.png')
    write_curves(str(path), str(out), *args)
    assert out.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, out.name])
    return [{line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()} for axes in figures[0].axes]


def test_largest_input_of_a_detector(tmp_path, capsys):
    """It is a multiple of 32, and may be larger than the smaller side of an input that does not fit."""
    export_detector(create_detector('test_efficientnet', 3, (64, 160)), tmp_path / 'detector')
    info.main([str(tmp_path / 'detector'), '--json', '--samples', '1'])
    arena = json.loads(capsys.readouterr().out)['arena_bytes']
    with pytest.raises(SystemExit, match=r'in steps of 32 pixels, is 96 x 96 \(--img-size 96\)'):
        info.main([str(tmp_path / 'detector'), '--fits', str(arena - 1), '4M', '--samples', '1'])
    with pytest.raises(SystemExit, match='no smaller input fits either, in steps of 32 pixels'):
        info.main([str(tmp_path / 'detector'), '--fits', '1K', '4M', '--samples', '1'])


def test_largest_input_of_a_model_that_takes_few_sizes():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            if x.shape[-1] not in (24, 56, 64):
                raise ValueError('another size')
            return self.conv(x).mean((2, 3))

    model = Picky()
    for above, side in ((64, 56), (56, 24)):
        arena = describe(model, (3, above, above), samples=1)['arena_bytes']
        with pytest.raises(UserError, match=f'is {side} x {side} '):
            check_fits(model, describe(model, (3, 64, 64), samples=1), Board(arena - 1, 1 << 20))


def test_curves(tmp_path, monkeypatch):
    path = tmp_path / 'summary.csv'
    write_summary(
        path, 4, train_loss=[4, 3, 2, 1], train_tiny_loss=[2, 1.5, 1, 0.5], train_aug_loss=[2, 1.5, 1, 0.5],
        train_top1=[10, 20, 30, 40], eval_loss=['', 2, '', 'nan'], eval_top1=['', 25.5, '', 25.5],
        eval_top5=['', 50, '', 60], lr=[0.1] * 4)
    loss, top1 = series(path, monkeypatch)
    assert loss['training, augmented network'] == [[0, 2], [1, 1.5], [2, 1], [3, 0.5]]
    assert loss['validation'] == [[1, 2]]
    assert top1['training'][3] == [3, 40] and top1['validation'] == [[1, 25.5], [3, 25.5]]
    assert top1['best: 25.5 % in epoch 1'] == [[1, 25.5]]  # the first of equals, as timm's saver keeps it
    loss, top1 = series(path, monkeypatch, 'eval_top5')
    assert top1['best: 60 % in epoch 3'] == [[3, 60]]


def test_curves_of_one_epoch_and_of_none(tmp_path, monkeypatch):
    path = tmp_path / 'summary.csv'
    write_summary(path, 1, train_loss=[2.0], eval_loss=[1.25], eval_top1=[30], eval_top5=[60], lr=[0.1])
    loss, top1 = series(path, monkeypatch, 'eval_loss', True)
    assert loss['best: 1.25 in epoch 0'] == [[0, 1.25]] and top1['validation'] == [[0, 30]]
    with pytest.raises(UserError, match='holds no epochs'):
        write_curves(write_summary(tmp_path / 'empty.csv', 0, train_loss=[]), str(tmp_path / 'empty.png'))
    assert not (tmp_path / 'empty.png').exists()
