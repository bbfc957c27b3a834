"""From a model to a file for microcontrollers: rewrites, repairs, sentences; and the chain, where its packages are."""
import copy
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.layers import BatchNormAct2d, Conv2dSame

from conftest import MODELS, images, make, randomise
from detection_data import write_voc
from timm_netaug.bundled import bundled_cfgs
from timm_netaug.card import model_card
from timm_netaug.cli import deploy as deploy_command
from timm_netaug.cli import hub as hub_command
from timm_netaug.cli import info as info_command
from timm_netaug.costs import costs, greedy_plan
from timm_netaug.deploy.c_source import c_header, c_source
from timm_netaug.deploy.detector import DenseOutputs, deploy_detector, measure_detector, raw_predictions
from timm_netaug.deploy.equalise import _run as pairs_of_channels
from timm_netaug.deploy.equalise import with_equal_channels
from timm_netaug.deploy.images import batches, normalised, open_pixels, spread
from timm_netaug.deploy.measure import from_camera, measure, quantised
from timm_netaug.deploy.onnx import deploy_onnx
from timm_netaug.deploy.output import captured
from timm_netaug.deploy.packages import require
from timm_netaug.deploy.pipeline import (
    DeployConfig, _others, _weights_hash, calibration_pixels, check_drop, check_same_task, deploy, measured_images,
    read_deployment)
from timm_netaug.deploy.repair import inline_buffers, outside_buffers, strip
from timm_netaug.deploy.report import card_section, text_table
from timm_netaug.deploy.rewrite import on_pixels, with_same_kernels
from timm_netaug.deploy.rounding import with_rounded_weights
from timm_netaug.deploy.tflm import Quantised
from timm_netaug.detection import create_detector
from timm_netaug.detection.annotations import read_split
from timm_netaug.detection.data import DetectionDataset, pixel_transform
from timm_netaug.detection.detector import DetectorConfig, build_detector
from timm_netaug.detection.evaluate import evaluate_detector
from timm_netaug.detection.fcos import Fcos
from timm_netaug.detection.folder import export_detector
from timm_netaug.errors import UserError
from timm_netaug.fits import Board, check_fits, parse_board
from timm_netaug.info import describe
from timm_netaug.io.data import DataSource
from timm_netaug.load import LoadedModel, load_model

NAME = 'netaug_mbv2_tiny.netaug_cifar10'
SIZE = bundled_cfgs()[NAME]['input_size'][-1]
CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
HAS_EXTRA = all(map(importlib.util.find_spec, ('litert_torch', 'ai_edge_quantizer', 'tflite_micro')))
needs_metric = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('torchmetrics', 'faster_coco_eval'))), reason='no [detection]')
needs_extra = pytest.mark.skipif(not HAS_EXTRA, reason="the packages of [deploy] (1 GB) are not installed")
HAS_ONNX = all(map(importlib.util.find_spec, ('onnx', 'onnxscript', 'onnxruntime')))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason='the packages of [onnx] are not installed')
REPORT = dict(
    model='a_model', architecture='netaug_mcunet', file='model.tflite', bytes=20, num_classes=2,
    class_names=['a "b"', 'c'], float_top1=60.0, int8_top1=59.5, agreement=98.0, images=1000, split='validation',
    arena=dict(activations=1000, persistent=505, total=1505),
    estimate=dict(flash=21, arena=1500, activations=1000, persistent=500),
    operators=dict(CONV_2D=3, FULLY_CONNECTED=1, HARD_SWISH=2),
    input=dict(shape=[8, 6, 3], scale=1 / 255, zero_point=-128),
    output=dict(scale=0.25, zero_point=-3), calibration=dict(images=200, classes=2, split='train', seed=0),
    tflm_against_reference=dict(images=32, steps=0), versions={'tflite-micro': '0'},
    beside=[dict(file='other.tflite', bytes=30, top1=58.0, arena=dict(activations=1, persistent=2, total=3))])


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Images of the model's size with the classes of CIFAR-10: three to train on and two to validate on, of each."""
    root, random = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for split, count in (('train', 3), ('validation', 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(small).resize((SIZE, SIZE)).save(root / split / name / f'{i}.png')
    return root


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('size', [64, 72])  # 72 becomes 9 after three halvings, and is padded as SAME from there on
def test_same_kernels_compute_the_same(name, size):
    model = make(name).eval().double()
    rewritten = with_same_kernels(model.float(), (3, size, size)).double()
    sizes = [tuple(m.kernel_size) for m in rewritten.modules() if type(m) is nn.Conv2d]
    assert any(k[0] % 2 == 0 for k in sizes) and all(m.kernel_size[0] % 2 for m in model.modules()
                                                     if isinstance(m, nn.Conv2d))
    x = images(2, size).double()
    # Sums of zeros change nothing; 1e-12: another kernel size may be summed in another order.
    torch.testing.assert_close(rewritten(x), model.double()(x), rtol=0, atol=1e-12)


def test_same_kernels_leave_other_convolutions_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 0), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 2, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)).eval()
    rewritten = with_same_kernels(model, (3, 33, 31))
    assert [m.kernel_size for m in rewritten] == [(3, 3), (3, 3), (2, 2), (3, 4)]  # of 9 x 8 pixels
    assert model[3].kernel_size == (3, 3)


def test_kernels_of_one_pixel_stay():
    """A convolution without padding needs no padded copy: its kernel is written as it is, and costs what it did."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, 2), nn.Conv2d(4, 4, 3, 1, 1)).eval()
    assert with_same_kernels(model, (3, 8, 8))[0].kernel_size == (1, 1)
    found = [costs(model, (3, 8, 8), same_kernels) for same_kernels in (True, False)]
    assert found[0].flash_bytes == found[1].flash_bytes and found[0].activation_bytes == found[1].activation_bytes


def shifting(bias=False, padding=0, channels=2):
    """A convolution whose weights all lie just below half a step, but the largest: rounding takes them to zero."""
    conv = nn.Conv2d(3, channels, 3, bias=bias, padding=padding)
    with torch.no_grad():
        conv.weight.fill_(0.49 / 127)
        conv.weight[:, 0, 1, 1] = 1
    return conv


def means_of_layers(model, x):
    """Return the means of the channels of each layer, in the order of the calls."""
    found = []

    def record(layer, args, output):  # at once: an activation behind it may work in place
        found.append(output.mean((0, 2, 3)) if output.ndim == 4 else output.mean(0))

    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize('name', MODELS)
def test_rounded_weights_keep_the_means(name):
    """Every layer has rounded weights, and on the images of the calibration the mean of each channel that it had."""
    model, x = make(name).eval(), images(4, 64)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, means_of_layers(model, x)
    rounded = with_rounded_weights(model, x)
    for layer in (m for m in rounded.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
        weight = layer.weight.detach().flatten(1)
        steps = 127 * weight / weight.abs().amax(1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)  # of a step
    torch.testing.assert_close(means_of_layers(rounded, x), expected, rtol=1e-4, atol=1e-4)  # sums in float32
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('bias', [False, True])
def test_biases_make_up_for_rounding(bias):
    """Where padding has a name, each weight is rounded by itself."""
    conv, x = shifting(bias, padding='valid'), torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    corrected = with_rounded_weights(nn.Sequential(conv), x)[0]
    assert torch.count_nonzero(corrected.weight) == 2
    shift = corrected.bias - (conv.bias if bias else 0)
    torch.testing.assert_close(shift, torch.full((2,), 26 * 0.49 / 127 * 0.5), rtol=0.05, atol=0)  # 0.5: mean of x


@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize('make_conv', [nn.Conv2d, Conv2dSame])
def test_weights_are_rounded_for_the_smallest_error_of_the_output(make_conv, groups):
    """Neighbouring pixels are alike, so the error of a weight can be passed on to the next one. A zero stays, and so
    does the largest weight."""
    torch.manual_seed(0)
    layer = make_conv(6, 6, 3, 2, 1 if make_conv is nn.Conv2d else 0, groups=groups)
    with torch.no_grad():
        layer.weight[:, :, 0] = 0
    x = nn.functional.interpolate(torch.rand(16, 6, 4, 4), 17, mode='bilinear')
    rounded = with_rounded_weights(nn.Sequential(layer), x)[0]
    weight, found = layer.weight.detach().flatten(1), rounded.weight.detach().flatten(1)
    step = weight.abs().amax(1, keepdim=True) / 127
    nearest = copy.deepcopy(layer)
    nearest.weight.data = ((weight / step).round() * step).view_as(layer.weight)
    with torch.no_grad():
        errors = [(other(x) - layer(x)).var((0, 2, 3)).mean() for other in (rounded, nearest)]
    assert errors[0] < 0.7 * errors[1]
    assert not found[weight == 0].any() and (weight == 0).any()
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1), rtol=1e-6, atol=0)


def test_rounding_of_inputs_that_are_always_zero():
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.rand(4, 4, 8, 8)
    x[:, 2] = 0
    with torch.no_grad():
        model[2].weight[1] = 0
    rounded = with_rounded_weights(model, x)
    assert all(parameter.isfinite().all() for parameter in rounded.parameters())
    torch.testing.assert_close(rounded(x), model(x), rtol=0, atol=0.02)


@pytest.mark.parametrize('name', MODELS)
def test_equal_channels_compute_the_same(name):
    """Sums of float32 in another order: the outputs are the same to 1e-5 of the largest."""
    model, x = make(name).eval(), images(8, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    equal = with_equal_channels(model, x)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(equal(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in equal.state_dict().items())


def depthwise_behind_norm(act_layer=nn.ReLU6, groups=4):
    norm = BatchNormAct2d(4, act_layer=act_layer)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([4., 1., 0.01, 0.]))
    return nn.Sequential(norm, nn.Conv2d(4, 4, 3, groups=groups)).eval()


def largest_values(model, x):
    with torch.no_grad():
        return model[0](x).amax((0, 2, 3))


def test_equal_channels_are_nearer_to_the_largest():
    model, x = depthwise_behind_norm(), torch.rand(8, 4, 8, 8)
    before, after = largest_values(model, x), largest_values(with_equal_channels(model, x), x)
    factors = torch.stack([torch.ones(()), (before[0] / before[1]).sqrt(), torch.tensor(3.), torch.ones(())])
    torch.testing.assert_close(after, before * factors)


@pytest.mark.parametrize('changes', [dict(act_layer=nn.SiLU), dict(groups=1)])
def test_other_channels_stay(changes):
    """Scaling before SiLU is not scaling behind it, and a dense convolution has no weights of one channel alone."""
    model, x = depthwise_behind_norm(**changes), torch.rand(8, 4, 8, 8)
    with torch.no_grad():
        assert not pairs_of_channels(model, x)[1]
    assert torch.equal(largest_values(with_equal_channels(model, x), x), largest_values(model, x))


class Reads(nn.Module):
    """Two BatchNorms with a depthwise convolution each; the first one's output is read once more."""

    def __init__(self, again):
        super().__init__()
        self.first, self.second = depthwise_behind_norm(), depthwise_behind_norm()
        self.other = nn.Conv2d(4, 4, 3, groups=4)
        self.again = again

    def forward(self, x):
        norm = self.first[0](x)
        more = norm if self.again == 'sum' else (self.other if self.again == 'convolution' else self.first[1])(norm)
        return self.second(self.first[1](norm)) + more.mean()


@pytest.mark.parametrize('again', ['sum', 'convolution', 'itself'])
def test_channels_that_are_read_twice_stay(again):
    """Those of the other BatchNorm change nevertheless."""
    torch.manual_seed(0)
    model, x = Reads(again).eval(), torch.rand(8, 4, 8, 8)
    equal = with_equal_channels(model, x)
    assert torch.equal(equal.first[0].weight, model.first[0].weight)
    assert not torch.equal(equal.second[0].weight, model.second[0].weight)
    with torch.no_grad():
        torch.testing.assert_close(equal(x), model(x))


def test_weights_make_up_for_rounding():
    """About half of 26 weights of 0.49 steps become a step, so that little is left for the bias."""
    conv, x = shifting(bias=True), torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rounded = with_rounded_weights(nn.Sequential(conv), x)[0]
    assert all(8 < torch.count_nonzero(weight) < 18 for weight in rounded.weight)
    assert (rounded.bias - conv.bias).abs().max() < 1 / 127


def test_rounding_of_a_layer_with_a_named_argument():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(input=x)

    model, x = Named(), torch.rand(8, 3, 8, 8)
    torch.testing.assert_close(with_rounded_weights(model, x)(x), model(x), rtol=0, atol=0.02)


def test_layers_that_are_called_twice_keep_their_bias():
    linear = nn.Linear(4, 4)
    twice = with_rounded_weights(nn.Sequential(linear, nn.ReLU(), linear), torch.rand(8, 4))
    assert torch.equal(twice[0].bias, linear.bias) and not torch.equal(twice[0].weight, linear.weight)


def test_normalisation_is_in_the_model():
    model, config = make('netaug_mcunet').eval(), dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    # 1e-4: (x - mean) / std and x * (1 / std) - mean / std round differently
    torch.testing.assert_close(on_pixels(model, config)(x), model(normalised(pixels, config)), rtol=0, atol=1e-4)
    assert from_camera(pixels).min() == -128 and from_camera(pixels).max() == 127


def test_input_of_other_files():
    """A file of `deploy` takes pixels minus 128, another one normalised images."""
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    config = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    ours = SimpleNamespace(input=Quantised((1, 1, 3), np.float32(1 / 255), -128))
    assert quantised(pixels, config, ours).ravel().tolist() == [-128, 0, 127]
    other = SimpleNamespace(input=Quantised((1, 1, 3), 0.02, 10))
    assert quantised(pixels, config, other).ravel().tolist() == [-40, 10, 60]


def test_other_files_have_the_shapes_of_the_model():
    file = SimpleNamespace(name='b.tflite', input=Quantised((32, 32, 3), 1 / 255, -128),
                           outputs=[Quantised((10,), 0.1, 0)])
    check_same_task(file, (3, 32, 32), 10)
    with pytest.raises(UserError, match='the input of b.tflite has the shape 32 x 32 x 3, and that of the model.*48'):
        check_same_task(file, (3, 48, 48), 10)
    with pytest.raises(UserError, match='the output of b.tflite has the shape 10, and that of the model has 2'):
        check_same_task(file, (3, 32, 32), 2)


def flatbuffer():
    """Objects as the schema's: two convolutions, one of them with its weights behind the flatbuffer (bytes 8 to 12)."""
    def tensor(buffer, scale):
        quantization = SimpleNamespace(scale=scale, zeroPoint=[0], min=[1.0], max=[2.0])
        return SimpleNamespace(name=b'x', buffer=buffer, quantization=quantization, shapeSignature=[1])

    def buffer(data, offset=0, size=0):
        return SimpleNamespace(data=data, offset=offset, size=size)

    tensors = [tensor(0, [0.1]), tensor(2, [0.1, 0.2]), tensor(3, [0.01, 0.02]), tensor(0, [0.3])]
    operator = SimpleNamespace(opcodeIndex=0, inputs=[0, 1, 2], outputs=[3])
    return SimpleNamespace(
        description=b'x', metadata=[1], metadataBuffer=[1], signatureDefs=[1],
        buffers=[buffer(None), buffer(b'metadata'), buffer(None, 8, 4), buffer(np.arange(8))],
        subgraphs=[SimpleNamespace(name=b'main', tensors=tensors, operators=[operator])])


def test_buffers_come_into_the_flatbuffer():
    model, data = flatbuffer(), bytes(range(12))
    assert outside_buffers(model) == [2]
    inline_buffers(model, data)
    assert bytes(model.buffers[2].data) == data[8:] and not outside_buffers(model)
    with pytest.raises(UserError, match='truncated: buffer 2 ends at byte 12, and the file has 11'):
        inline_buffers(flatbuffer(), data[:11])


def test_what_nothing_reads_is_dropped():
    model = flatbuffer()
    strip(model, ['CONV_2D'])
    graph = model.subgraphs[0]
    assert model.metadata is model.signatureDefs is graph.name is None and all(t.name is None for t in graph.tensors)
    assert [t.quantization is None for t in graph.tensors] == [False, False, True, False]  # the bias
    assert graph.tensors[1].quantization.scale == [0.1, 0.2] and graph.tensors[1].quantization.min is None
    assert len(model.buffers) == 3 and [t.buffer for t in graph.tensors] == [0, 1, 2, 0]
    assert model.buffers[1].size == 4


@pytest.mark.parametrize('inputs, bias', [([2, 1, 0, 3], 3), ([2, 1, 0], None), ([2, 1, 0, -1], None)])
def test_bias_of_transposed_convolutions(inputs, bias):
    """It is the fourth input: the third one is the activation, which keeps its quantisation."""
    model = flatbuffer()
    model.subgraphs[0].operators[0].inputs = inputs
    strip(model, ['TRANSPOSE_CONV'])
    assert [i for i, t in enumerate(model.subgraphs[0].tensors) if t.quantization is None] == (
        [] if bias is None else [bias])


def test_greedy_plan():
    assert greedy_plan([]) == 0 and greedy_plan([(1, 0, 0)]) == 16
    # The largest one first, from 0; 48 beside it; 32 shares the time of 48 alone, and lies where the largest one was.
    assert greedy_plan([(64, 0, 1), (48, 1, 2), (32, 2, 3)]) == 112
    # In no more than 64 bytes live at once, and yet 80: the middle one is placed last, between two that overlap it.
    assert greedy_plan([(32, 0, 1), (16, 1, 2), (48, 2, 3), (32, 1, 1)]) >= 80


@pytest.mark.parametrize('name, activations, persistent', [
    # Measured in TensorFlow Lite Micro, at the paper's input sizes: with larger kernels for stride 2, and without.
    ('netaug_mbv2_tiny', (311040, 511680), 73376),
    ('netaug_mbv2_035', (384000, 629952), 80032),
    ('netaug_mbv3_035', (204800, 314976), 91328),
    ('netaug_proxylessnas_035', (217600, 322944), 82256),
    ('netaug_mcunet', (371712, 397920), 85856),
])
def test_estimates_are_what_was_measured(name, activations, persistent):
    model = timm.create_model(name).to('meta').eval()
    size = model.pretrained_cfg['input_size']
    found = [costs(model, size, same_kernels) for same_kernels in (True, False)]
    assert tuple(c.activation_bytes for c in found) == activations
    assert found[0].persistent_bytes == pytest.approx(persistent, rel=0.01)


@pytest.mark.parametrize('name, flash, activations, persistent', [
    # Files of networks for 10 classes and 32 x 32 pixels.
    ('netaug_mbv2_tiny', 413520, 15360, 65488),
    ('netaug_mbv2_035', 528336, 15360, 72144),
    ('netaug_mbv3_035', 977408, 8192, 82768),
    ('netaug_proxylessnas_035', 637360, 8704, 74384),
    ('netaug_mcunet', 708624, 12288, 77984),
])
def test_estimates_at_32_pixels(name, flash, activations, persistent):
    found = costs(timm.create_model(name, num_classes=10).to('meta').eval(), (3, 32, 32))
    assert found.activation_bytes == activations
    assert (found.flash_bytes, found.persistent_bytes) == pytest.approx((flash, persistent), rel=0.01)


@pytest.mark.parametrize('sizes, found', [
    (['320K', '1M'], (327680, 1048576)), (['327680', '1.5mib'], (327680, 1572864)), (['1kB', '2MB'], (1024, 2097152))])
def test_sizes_of_boards(sizes, found):
    board = parse_board(sizes)
    assert (board.sram, board.flash) == found


@pytest.mark.parametrize('size', ['', '320 K', '-1', '0', '1G', 'K'])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match='--fits: .* is no size of a memory'):
        parse_board([size, '1M'])


def test_what_does_not_fit(capsys):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 1000))
    info = describe(model, (3, 64, 64), samples=1)
    live = 3 * 64 * 64 + 16 * 32 * 32
    check_fits(model, info, Board(info['arena_bytes'], info['flash_int8_bytes']))
    with pytest.raises(UserError) as e:
        check_fits(model, info, Board(info['arena_bytes'] - 1, info['flash_int8_bytes'] - 2))
    said = str(e.value)
    assert said.startswith('Sequential does not fit: it is estimated to need')
    assert f'1 more than {info["arena_bytes"] - 1:,} ({info["persistent_bytes"]:,} persist' in said
    assert f'{live:,} of activations are most, at 0); the largest input that fits' in said
    assert 'is 56 x 56 (--img-size 56)' in said and f'2 more than {info["flash_int8_bytes"] - 2:,}' in said
    assert 'most for 5, 24,000 bytes' in said and '\n' not in said
    with pytest.raises(UserError, match='it needs 400,000 bytes of RAM.*no smaller input fits either'):
        check_fits(model, info, Board(500, 1 << 20), dict(arena=400_000, flash=10))
    with pytest.raises(SystemExit) as e:
        info_command.main(['test_efficientnet', '--fits', '10K', '1M', '--samples', '1'])
    assert 'test_efficientnet does not fit' in str(e.value)
    assert 'parameters' in capsys.readouterr().out  # what is known is printed all the same
    with pytest.raises(SystemExit, match='--fits: 1G is no size'):
        info_command.main(['test_efficientnet', '--fits', '1G', '1M'])


def test_c_source():
    data = bytes(range(256)) + b'end'
    text = c_source(data, REPORT)
    array = re.search(r'alignas\(16\) const unsigned char g_model\[\] = \{(.*?)\};', text, re.S)[1]
    assert bytes(int(value, 16) for value in re.findall(r'0x(\w\w)', array)) == data
    assert f'g_model_len = {len(data)};' in text and '    "a \\"b\\"",\n    "c",\n' in text
    header = c_header(REPORT)
    for part in ('kTensorArenaSize = 1520;', 'MicroMutableOpResolver<3> resolver', 'resolver.AddConv2D();',
                 'resolver.AddFullyConnected();', 'resolver.AddHardSwish();', 'kInputHeight = 8;', 'kInputWidth = 6;',
                 'kNumClasses = 2;', '(int8_t)(camera[i] - 128)', '0.25 * (value - (-3))'):
        assert part in header
    rare = c_header(dict(REPORT, operators=dict(PADV2=1, BATCH_MATMUL=1)))
    assert 'resolver.AddPadV2();' in rare and 'resolver.AddBatchMatMul();' in rare
    assert '    "\U0001f431 Käse",\n' in c_source(data, dict(REPORT, class_names=['\U0001f431 Käse', 'c']))
    unnamed = dict(REPORT, class_names=None)
    assert 'kClassNames' not in c_source(data, unnamed) + c_header(unnamed)


def test_report_as_text():
    table, section = text_table(REPORT), card_section(REPORT)
    for part in ('59.50 %', '1,505 bytes', 'CONV_2D 3', 'other.tflite', 'at most 0 steps', '200 images of 2 classes'):
        assert part in table and part in section
    unknown = dict(REPORT, calibration=dict(images=200, split='train', seed=0))
    assert '200 images, train split' in text_table(unknown) and '200 images, train split' in card_section(unknown)
    assert section.startswith('## On a microcontroller\n') and 'tflite-micro 0' in section


def test_report_on_the_card(tmp_path):
    loaded = load_model(NAME)
    config = dict(
        architecture='netaug_mbv2_tiny', timm_netaug=dict(deployed=REPORT),
        pretrained_cfg=dict(loaded.data_config, license=None))
    assert card_section(REPORT) in model_card(loaded.model, config, 'OWNER/NAME')
    config['timm_netaug']['deployed'] = dict(REPORT, arena='broken')
    assert 'On a microcontroller' not in model_card(loaded.model, config, 'OWNER/NAME')


def test_images_are_spread_over_the_classes(pictures):
    loaded = load_model(NAME)
    dataset = open_pixels(DataSource(str(pictures)), 'train', loaded.data_config, 10, loaded.class_names)
    indices, classes = spread(dataset, 20, 0)
    assert classes == 10 and np.bincount([dataset.reader.samples[i][1] for i in indices]).tolist() == [2] * 10
    assert spread(dataset, 20, 0)[0] == indices != spread(dataset, 20, 1)[0]
    assert spread(dataset, 0, 0)[0] == list(range(30))
    pixels, labels = next(batches(dataset, [0, 29]))
    assert pixels.shape == (2, SIZE, SIZE, 3) and pixels.dtype == np.uint8 and labels.tolist() == [0, 9]
    with Image.open(dataset.filename(0, absolute=True)) as image:
        assert np.array_equal(pixels[0], np.asarray(image))


def test_number_of_classes_may_be_unknown(pictures, monkeypatch):
    """Data sets other than folders do not tell their labels before their images are read."""
    indices, classes = spread(range(30), 20, 0)
    assert len(set(indices)) == 20 and classes is None
    loaded, config = load_model(NAME), DeployConfig(calibration_images=20, seed=1)
    assert calibration_pixels(loaded, DataSource(str(pictures)), config)[1] == dict(
        images=20, classes=10, split='train', seed=1)
    monkeypatch.setattr('timm_netaug.deploy.images._labels', lambda dataset: None)
    pixels, about = calibration_pixels(loaded, DataSource(str(pictures)), config)
    assert len(pixels) == 20 and about == dict(images=20, split='train', seed=1)


def test_calibration_images_of_one_class(pictures, tmp_path):
    loaded, config = load_model(NAME), DeployConfig(calibration_images=5)
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'cat').symlink_to(pictures / 'train' / 'cat')
    with pytest.raises(UserError, match='All 3 images of the train split are of one class, and the model has 10'):
        calibration_pixels(loaded, DataSource(str(tmp_path)), config)
    with pytest.raises(UserError, match='5 images of the train split are too few'):
        calibration_pixels(loaded, DataSource(str(pictures)), config)


def test_too_much_lost_is_refused():
    check_drop(60.0, 59.0, 1.0)
    with pytest.raises(UserError, match='has 58.90 % top-1 and the float model 60.00 %, 1.10 points more; 1 are'):
        check_drop(60.0, 58.9, 1.0)


@pytest.mark.parametrize('run', [deploy, deploy_onnx])
def test_models_that_are_refused(run, pictures, tmp_path):
    loaded = dataclasses.replace(load_model(NAME), target='indices')
    with pytest.raises(UserError, match='A model is a multi-label model.*one class per image'):
        run(loaded, 'A model', str(tmp_path / 'out'), DataSource(str(pictures)))
    loaded = dataclasses.replace(load_model(NAME), class_names=CLASSES[:9])
    with pytest.raises(UserError, match='A model has 10 classes, but names for 9'):
        run(loaded, 'A model', str(tmp_path / 'out'), DataSource(str(pictures)))
    assert not (tmp_path / 'out').exists()


def test_missing_extra(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'litert_torch', None)
    with pytest.raises(SystemExit) as e:
        deploy_command.main([NAME, str(tmp_path / 'out'), '--data-dir', str(pictures)])
    said = str(e.value)
    assert said.startswith('timm_netaug deploy: error: The package litert_torch cannot be imported')
    assert "pip install -e '.[deploy]'" in said and '1 GB' in said and 'older than 2.15' in said
    assert not (tmp_path / 'out').exists() and '\n' not in said
    with pytest.raises(UserError, match=r"\[onnx\]"):
        require('no_such_package', 'onnx')


@pytest.mark.parametrize('flags, told', [
    (['--images', '-1'], '--images must be at least 0'), (['--calibration-images', '0'], 'must be at least 1'),
    (['--max-drop', '-1'], '--max-drop must be at least 0'), (['--max-drop', 'nan'], '--max-drop must be at least 0'),
    (['--fits', '1', 'x'], '--fits: x is no size')])
def test_flags_out_of_range(flags, told, tmp_path):
    with pytest.raises(SystemExit, match=told):
        deploy_command.main([NAME, str(tmp_path / 'out'), '--data-dir', str(tmp_path), *flags])


def test_captured(capfd):
    with captured() as output:
        os.write(1, b'one ')
        os.write(2, b'two')
    os.write(1, b'three')
    assert output == ['one two'] and capfd.readouterr().out == 'three'


@pytest.fixture(scope='module')
def deployed(pictures, tmp_path_factory):
    """The folder of a deployment."""
    out = tmp_path_factory.mktemp('deployed') / 'out'
    deploy_command.main([
        NAME, str(out), '--data-dir', str(pictures), '--calibration-images', '30', '--max-drop', '100'])
    return out


@needs_extra
def test_chain(deployed, pictures, capsys):
    from timm_netaug.deploy.repair import read_model
    from timm_netaug.deploy.tflm import Tflm
    report, data = json.loads((deployed / 'report.json').read_text()), (deployed / 'model.tflite').read_bytes()
    assert sorted(f.name for f in deployed.iterdir()) == ['model.cc', 'model.h', 'model.tflite', 'report.json']
    assert report['bytes'] == len(data) and report['class_names'] == CLASSES and report['images'] == 20
    assert report['tflm_against_reference']['steps'] <= 1 and report['arena']['activations'] == 15 * SIZE ** 2
    assert report['input'] == dict(shape=[SIZE, SIZE, 3], scale=pytest.approx(1 / 255), zero_point=-128)
    for part in ('flash', 'arena'):
        measured = report['bytes'] if part == 'flash' else report['arena']['total']
        assert report['estimate'][part] == pytest.approx(measured, rel=0.01)
    # The file computes what the model does, up to the steps of int8.
    loaded = load_model(NAME)
    dataset = open_pixels(DataSource(str(pictures)), 'validation', loaded.data_config, 10, loaded.class_names)
    pixels, _ = next(batches(dataset, range(20)))
    file = Tflm(data, 'the file')
    found = file.outputs[0].values(np.stack([file(image)[0] for image in from_camera(pixels)]))
    with torch.inference_mode():
        logits = loaded.model(normalised(pixels, loaded.data_config)).numpy()
    assert np.corrcoef(found.ravel(), logits.ravel())[0, 1] > 0.98
    # A push takes it for this model alone.
    assert read_deployment(str(deployed), loaded.model) == (deployed / 'model.tflite', report)
    with pytest.raises(UserError, match='is not a deployment of this model: it was made of other weights'):
        read_deployment(str(deployed), make('netaug_mbv2_tiny'))
    with pytest.raises(UserError, match='is not a folder that `python -m timm_netaug deploy` has written'):
        read_deployment(str(pictures), loaded.model)
    # All weights are inside the flatbuffer, where a processor can read them as words.
    assert not outside_buffers(read_model(data))
    capsys.readouterr()
    broken = deployed.parent / 'broken.tflite'
    broken.write_bytes(with_outside_buffer(data))
    with pytest.raises(SystemExit, match='broken.tflite has 1 buffers behind the flatbuffer, which TensorFlow Lite'):
        deploy_command.main([NAME, str(deployed.parent / 'x'), '--data-dir', str(pictures), '--beside', str(broken)])
    assert not (deployed.parent / 'x').exists()


@needs_extra
def test_files_beside_of_one_name(deployed, pictures, tmp_path):
    """Each is measured, and a file of `deploy` has the accuracy that its own report gives."""
    copy = tmp_path / 'model.tflite'
    copy.write_bytes((deployed / 'model.tflite').read_bytes())
    files, loaded = [str(deployed / 'model.tflite'), str(copy)], load_model(NAME)
    others = _others(files, (3, SIZE, SIZE), 10)
    assert [name for name, _, _ in others] == files and _others(files[:1], (3, SIZE, SIZE), 10)[0][0] == 'model.tflite'
    dataset = open_pixels(DataSource(str(pictures)), 'validation', loaded.data_config, 10, loaded.class_names)
    found = measure(loaded.model, others[0][2], dataset, range(20), loaded.data_config, [o for _, _, o in others])
    assert found.others == [found.int8_top1] * 2
    with pytest.raises(UserError, match='--beside: .*none.tflite cannot be read'):
        _others([str(tmp_path / 'none.tflite')], (3, SIZE, SIZE), 10)


def with_outside_buffer(data):
    """Return a file with its largest buffer behind the flatbuffer, as the quantizer writes it."""
    import flatbuffers
    from timm_netaug.deploy.repair import read_model
    model = read_model(data)
    largest = max((b for b in model.buffers if b.data is not None), key=lambda b: len(b.data))
    content, largest.data, largest.offset, largest.size = bytes(largest.data), None, 1 << 30, len(largest.data)
    for _ in range(2):  # the second time, with the place that the first one has found
        builder = flatbuffers.Builder(0)
        builder.Finish(model.Pack(builder), b'TFL3')
        largest.offset = len(builder.Output())
    return bytes(builder.Output()) + content


@needs_extra
def test_outside_buffers_are_mended(deployed):
    from timm_netaug.deploy.repair import repair
    from timm_netaug.deploy.tflm import Tflm
    data = (deployed / 'model.tflite').read_bytes()
    mended = repair(with_outside_buffer(data))
    x = np.random.default_rng(0).integers(-128, 128, (SIZE, SIZE, 3), dtype=np.int8)
    assert np.array_equal(Tflm(mended, 'mended')(x), Tflm(data, 'file')(x)) and len(mended) == len(data)
    with pytest.raises(UserError, match='not a TensorFlow Lite model'):
        repair(b'no such file')


DETECTOR_REPORT = {
    **{k: v for k, v in REPORT.items() if k not in ('float_top1', 'int8_top1', 'agreement', 'output', 'beside')},
    'float': dict(AP=30.0, AP50=60.0), 'int8': dict(AP=29.5, AP50=59.0), 
    'decoding': dict(anchor_scale=0.4, score_thresh=0.05, nms_thresh=0.6, detections_per_img=100),
    'outputs': [dict(kind='cls_logits', stride=8, shape=[1, 2, 2], scale=0.5, zero_point=3),
                dict(kind='bbox_regression', stride=8, shape=[1, 2, 4], scale=0.25, zero_point=-128)]}


def test_report_of_a_detector():
    table, section, header = (f(DETECTOR_REPORT) for f in (text_table, card_section, c_header))
    for part in ('60.00 % over 1,000 images', '59.00 %', 'cls_logits, stride 8', '1 x 2 x 4 int8 (scale 0.25'):
        assert part in table and part in section
    for part in ('//   output(1): bbox_regression, stride 8, 1 x 2 x 4, scale 0.25, zero point -128',
                 'stride * 0.4 away', 'above 0.6,', 'up to 0.05.', 'the best 100.', 'kNumClasses = 2;'):
        assert part in header
    assert 'the largest one is of the class' not in header and max(map(len, header.splitlines())) <= 120


NAMES = ['blue', 'green', 'red', 'yellow']


@pytest.fixture(scope='module')
def boxes(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp('boxes'), train=12)


@pytest.fixture(scope='module')
def detector_run(tmp_path_factory):
    """The folder of an untrained detector. With four classes, two kinds of predictions have one shape."""
    config = DetectorConfig('test_efficientnet', 4, (64, 96), class_names=NAMES)
    torch.manual_seed(0)
    detector = build_detector(config)
    randomise(detector.dense)
    folder = tmp_path_factory.mktemp('detector') / 'folder'
    export_detector(detector.eval(), folder)
    return folder


def test_raw_predictions():
    """Whatever runs the file: kind by kind, each at its strides, channels first."""
    outputs = [Quantised((2, 3, n), 0.5, 1) for n in (5, 5, 5, 4, 4, 4, 1, 1, 1)]

    class File:
        def __call__(self, image):
            return [np.full(o.shape, i, np.int8) + np.arange(o.shape[-1], dtype=np.int8) + image[0, 0, 0]
                    for i, o in enumerate(self.outputs)]

    file = File()
    file.outputs = outputs
    found = raw_predictions(file, np.stack([np.full((1, 1, 3), i, np.int8) for i in range(2)]))
    assert {k: [tuple(t.shape) for t in v] for k, v in found.items()} == dict(
        cls_logits=[(2, 5, 2, 3)] * 3, bbox_regression=[(2, 4, 2, 3)] * 3, bbox_ctrness=[(2, 1, 2, 3)] * 3)
    assert found['bbox_regression'][1][1, 2].unique().tolist() == [(4 + 2 + 1 - 1) * 0.5]


def test_outputs_of_the_dense_part(detector_run):
    dense = create_detector(f'local-dir:{detector_run}').eval().dense
    x = images(1, 64)
    with torch.inference_mode():
        want, found = dense(x), DenseOutputs(dense)(x)
    assert len(found) == 9
    for i, kind in enumerate(('cls_logits', 'bbox_regression', 'bbox_ctrness')):
        assert all(map(torch.equal, found[3 * i:3 * i + 3], want[kind]))


@pytest.mark.parametrize('flags, told', [
    (['--beside', 'x.tflite'], '--beside: not for a detector'), (['--img-size', '64'], '--img-size: not for a det'),
    (['--dataset', 'a/b'], '--dataset: not for a det'), (['--class-map', 'x'], '--class-map: not for a det'),
    (['--model', 'x'], '--model: not for a det'), (['--format', 'onnx'], '--format onnx is for classifiers')])
def test_flags_that_are_not_for_detectors(flags, told, detector_run, boxes, tmp_path):
    with pytest.raises(SystemExit, match=told):
        deploy_command.main([str(detector_run), str(tmp_path / 'out'), '--data-dir', str(boxes), *flags])
    assert not (tmp_path / 'out').exists()


def test_decoding_in_the_header():
    """The formulas in the comment of model.h are those that the average precision is measured with."""
    fcos, (height, width) = Fcos(2, 0.5), (64, 96)
    levels = [(height // s, width // s) for s in (8, 16, 32)]
    output = dict(cls_logits=[torch.full((1, 2, *s), -20.0) for s in levels],
                  bbox_regression=[torch.ones(1, 4, *s) for s in levels],
                  bbox_ctrness=[torch.zeros(1, 1, *s) for s in levels])
    row, column, stride, sides = 1, 3, 16, torch.tensor([0.5, 1.5, 2.0, 9.0])
    output['cls_logits'][1][0, 1, row, column] = 2.0
    output['bbox_regression'][1][0, :, row, column] = sides
    found = fcos.detections(output)[0]
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    left, upper, right, lower = (sides * stride * 0.5).tolist()
    assert found['labels'].tolist() == [1]
    assert found['scores'].item() == pytest.approx((torch.tensor(2.0).sigmoid() * 0.5).sqrt().item())
    assert found['boxes'][0].tolist() == pytest.approx([x - left, y - upper, x + right, height])  # lower: at the edge


class Knowing(nn.Module):
    """A dense part that knows the images of a data set, and predicts their true boxes."""

    def __init__(self, dataset, config, scale):
        super().__init__()
        self.known = []
        for pixels, target in (dataset[i] for i in range(len(dataset))):
            height, width = (n // 8 for n in pixels.shape[1:])
            maps = dict(cls_logits=torch.full((4, height, width), -20.0), bbox_regression=torch.ones(4, height, width),
                        bbox_ctrness=torch.full((1, height, width), 10.0))
            for box, label in zip(target['boxes'], target['labels']):
                column, row = (int((box[i] + box[i + 2]) / 2 // 8) for i in (0, 1))
                point = torch.tensor([column + 0.5, row + 0.5]) * 8
                maps['cls_logits'][label, row, column] = 10.0
                maps['bbox_regression'][:, row, column] = torch.cat([point - box[:2], box[2:] - point]) / (8 * scale)
            x = normalised(pixels.permute(1, 2, 0).numpy()[None], config)[0]
            self.known.append((x, maps))

    def forward(self, images):
        found = [next(maps for known, maps in self.known if torch.allclose(x, known, atol=1e-4)) for x in images]
        output = {}
        for kind in found[0]:
            finest = torch.stack([maps[kind] for maps in found])
            empty = -20.0 if kind == 'cls_logits' else 1.0
            output[kind] = [finest, *(torch.full_like(finest[..., ::n, ::n], empty) for n in (2, 4))]
        return output


@needs_metric
def test_metrics_of_model_and_file(detector_run, boxes):
    """A file that computes what the model does has its metrics, which are those of the evaluation."""
    detector = create_detector(f'local-dir:{detector_run}').eval()
    config, split = detector.config.data_config, read_split(str(boxes), 'val')
    dataset = DetectionDataset(split, NAMES, pixel_transform(config))
    detector.dense = Knowing(dataset, config, detector.config.scale)

    class File:
        outputs = [Quantised((), 1.0, 0)] * 9

        def __call__(self, image):
            pixels = (image.astype(int) + 128).astype(np.uint8)[None]
            return [t[0].permute(1, 2, 0).numpy() for t in DenseOutputs(detector.dense)(normalised(pixels, config))]

    lines = []
    in_float, in_int8 = measure_detector(detector, File(), dataset, range(6), config, lines.append)
    metrics = evaluate_detector(detector, split)[0]
    assert in_float == {k: metrics[k] for k in ('AP', 'AP50')} and in_float['AP50'] == pytest.approx(100)
    assert in_int8 == pytest.approx(in_float, abs=1e-3)  # batches of one image round in another way
    assert lines == ['  6 of 6 images']

    class Blind(File):
        def __call__(self, image):
            return [np.full_like(t, -20) for t in super().__call__(image)]

    again, blind = measure_detector(detector, Blind(), dataset, range(6), config, lines.append)
    assert again == in_float and blind['AP50'] == 0


@needs_metric
@pytest.mark.parametrize('mistake, told', [
    ('names', 'has 4 classes without names, and the train split has 3: write the names in label order into its config'),
    ('objects', 'The 1 images of the val split that are measured have no objects: measure more (--images)')])
def test_data_that_do_not_fit_a_detector(mistake, told, detector_run, boxes, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_netaug.deploy.detector.require_chain', lambda: None)
    monkeypatch.setattr('timm_netaug.deploy.detector.build', lambda *args: pytest.fail('it is too late'))
    detector, config = create_detector(f'local-dir:{detector_run}'), DeployConfig(split='val')
    if mistake == 'names':
        detector.config = dataclasses.replace(detector.config, class_names=None)
    else:  # of the images that are drawn: every fifth one has no objects
        monkeypatch.setattr('timm_netaug.deploy.detector._drawn', lambda split, count, seed: (
            list(range(len(split.images))) if count else [i for i, x in enumerate(split.images) if not x.classes][:1]))
    with pytest.raises(UserError, match=re.escape(told)):
        deploy_detector(detector, 'a detector', str(tmp_path / 'out'), str(boxes), config)
    assert not (tmp_path / 'out').exists()


@needs_metric
@needs_extra
def test_chain_of_a_detector(detector_run, boxes, tmp_path):
    """The predictions of the file are those of the model, in its places, up to the steps of int8."""
    from timm_netaug.deploy.tflm import Tflm
    out, argv = tmp_path / 'out', [str(detector_run), str(tmp_path / 'out'), '--data-dir', str(boxes)]
    with pytest.raises(SystemExit, match='5 images of the train split are too few to calibrate'):
        deploy_command.main([*argv, '--calibration-images', '5'])
    deploy_command.main([*argv, '--max-drop', '100'])
    report, data = json.loads((out / 'report.json').read_text()), (out / 'model.tflite').read_bytes()
    assert sorted(f.name for f in out.iterdir()) == ['model.cc', 'model.h', 'model.tflite', 'report.json']
    assert report['class_names'] == NAMES and report['images'] == 6 and report['split'] == 'val'
    assert report['arena']['activations'] == report['estimate']['activations']
    assert [o['stride'] for o in report['outputs']] == [8, 16, 32] * 3
    assert [o['shape'] for o in report['outputs'][:3]] == [[8, 12, 4], [4, 6, 4], [2, 3, 4]]
    detector = create_detector(f'local-dir:{detector_run}').eval()
    config = detector.config.data_config
    dataset = DetectionDataset(read_split(str(boxes), 'val'), NAMES, pixel_transform(config))
    pixels = np.stack([dataset[i][0].permute(1, 2, 0).numpy() for i in range(6)])
    found = raw_predictions(Tflm(data, 'file'), from_camera(pixels))
    with torch.inference_mode():
        want = detector.dense(normalised(pixels, config))
    for kind, levels in want.items():
        for one, other in zip(levels, found[kind]):
            assert one.shape == other.shape and np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98, kind
    assert read_deployment(str(out), detector.dense) == (out / 'model.tflite', report)


def test_push_of_a_deployed_detector(detector_run, tmp_path):
    """A push takes the int8 file of this detector alone; the next push without one removes it."""
    dry, deployed = tmp_path / 'dry', tmp_path / 'deployed'
    deployed.mkdir()
    (deployed / 'model.tflite').write_bytes(b'int8')
    weights = create_detector(f'local-dir:{detector_run}').dense
    report = dict(DETECTOR_REPORT, sha256=hashlib.sha256(b'int8').hexdigest(), weights_sha256=_weights_hash(weights))
    (deployed / 'report.json').write_text(json.dumps(report))
    push = ['push', str(detector_run), 'OWNER/NAME', '--dry-run', str(dry)]
    hub_command.main([*push, '--deployed', str(deployed)])
    assert (dry / 'model.tflite').read_bytes() == b'int8' and card_section(report) in (dry / 'README.md').read_text()
    hub_command.main(push)
    assert not (dry / 'model.tflite').exists() and 'microcontroller' not in (dry / 'README.md').read_text()
    (deployed / 'report.json').write_text(json.dumps(dict(report, weights_sha256='0')))
    with pytest.raises(SystemExit, match='it was made of other weights'):
        hub_command.main([*push, '--deployed', str(deployed)])


@needs_extra
def test_operators_that_int8_does_not_have():
    from timm_netaug.deploy.tflite import to_tflite

    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x).mean((2, 3))

    config = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(UserError, match='A sine has an operator that cannot be quantised to int8, SIN: '):
        to_tflite(Sine(), config, np.zeros((2, 8, 8, 3), np.uint8), name='A sine')


@needs_extra
def test_operators_that_the_interpreter_does_not_have():
    from timm_netaug.deploy.tflite import to_tflite
    from timm_netaug.deploy.tflm import Tflm
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    config = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    data = to_tflite(model, config, pixels)
    with pytest.raises(UserError, match='a net has an operator that TensorFlow Lite Micro does not have, GELU: replace'):
        Tflm(data, 'a net')


@needs_extra
def test_file_has_the_mean_of_the_model():
    """Without the correction of biases, rounding shifts it by 26 * 0.49 / 127 * 0.5, some 12 steps."""
    from timm_netaug.deploy.tflite import to_tflite
    from timm_netaug.deploy.tflm import Tflm
    model = nn.Sequential(shifting(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    config = dict(input_size=(3, 8, 8), mean=(0.,) * 3, std=(1.,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    file = Tflm(to_tflite(model, config, pixels), 'file')
    found = file.outputs[0].values(np.stack([file(image)[0] for image in from_camera(pixels)]))
    with torch.inference_mode():
        expected = model(normalised(pixels, config)).numpy()
    assert abs((found - expected).mean()) < 2 * file.outputs[0].scale


def run_onnx(path, pixels):
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    x = np.moveaxis(pixels, -1, 1).astype(np.float32) / 255
    return np.concatenate([session.run(None, dict(pixels=image[None]))[0] for image in x])


@needs_onnx
def test_onnx(pictures, tmp_path, capsys):
    """The float file computes what the model computes, the int8 file nearly so."""
    deploy_command.main([
        NAME, str(tmp_path), '--data-dir', str(pictures), '--format', 'onnx', '--max-drop', '100'])
    report, told = json.loads((tmp_path / 'report_onnx.json').read_text()), capsys.readouterr().out
    assert {path.name: path.stat().st_size for path in tmp_path.glob('*.onnx')} == report['bytes']
    for part in (f'{report["int8_top1"]:.2f} % (the same class as float for {report["agreement"]:.2f} %)',
                 f'{report["float_top1"]:.2f} % of 20 images', f'1 x 3 x {SIZE} x {SIZE} float32',
                 f'{report["bytes"]["model_int8.onnx"]:,} bytes', f'Written to {tmp_path} in'):
        assert part in told
    loaded, source = load_model(NAME), DataSource(str(pictures))
    pixels = calibration_pixels(loaded, source, DeployConfig())[0]
    with torch.inference_mode():
        logits = loaded.model.eval()(normalised(pixels, loaded.data_config)).numpy()
    # 1e-3: kernels that sum in another order
    np.testing.assert_allclose(run_onnx(tmp_path / 'model.onnx', pixels), logits, rtol=0, atol=1e-3)
    assert np.corrcoef(run_onnx(tmp_path / 'model_int8.onnx', pixels).ravel(), logits.ravel())[0, 1] > 0.98
    evaluated, indices = measured_images(loaded, source, DeployConfig())
    pixels, labels = next(batches(evaluated, indices))
    found = [run_onnx(tmp_path / file, pixels).argmax(1) for file in ('model.onnx', 'model_int8.onnx')]
    assert [report['float_top1'], report['int8_top1'], report['agreement']] == [
        100 * np.mean(a == b) for a, b in ((found[0], labels), (found[1], labels), found)]


@needs_onnx
def test_onnx_has_the_mean_of_the_model(pictures, tmp_path):
    """As `test_file_has_the_mean_of_the_model`."""
    model = nn.Sequential(shifting(channels=10), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    model.num_classes = 10
    config = dict(input_size=(3, SIZE, SIZE), mean=(0.,) * 3, std=(1.,) * 3, interpolation='bilinear', crop_pct=1.0,
                  crop_mode='center')
    loaded, source = LoadedModel(model, 'a net', config, CLASSES), DataSource(str(pictures))
    deploy_onnx(loaded, 'a net', str(tmp_path), source, DeployConfig(max_drop=100))
    pixels = calibration_pixels(loaded, source, DeployConfig())[0]
    with torch.inference_mode():
        expected = model(normalised(pixels, config)).numpy()
    step = (expected.max() - expected.min()) / 255
    assert abs((run_onnx(tmp_path / 'model_int8.onnx', pixels) - expected).mean()) < 2 * step
