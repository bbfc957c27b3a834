"""Every model of timm's EfficientNet and MobileNet families: which are supported, and that those work."""
import hashlib
import json
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    UniversalInvertedResidual,
)

from conftest import MODELS, ROOT, generator, images, randomise
from timm_netaug import NetAugConfig, NetAugTask, SuperNet, augment, export

sys.path.insert(0, str(ROOT / 'docs'))
import models as page  # noqa: E402 (docs/models.py)

BLOCKS = (InvertedResidual, DepthwiseSeparableConv, ConvBnAct, EdgeResidual, UniversalInvertedResidual)
SMALL = 6e6  # parameters up to which every supported model is trained for a step


@lru_cache(maxsize=None)
def family():
    """Classify all names once, on the meta device: name -> (parameters, row of the page, types of its blocks)."""
    found = {}
    for name, model, supernet, why in page.classify():
        row = name, page.millions(model), page.millions(supernet) if supernet else '', why
        blocks = {type(m) for m in model.modules()} & set(BLOCKS)
        found[name] = sum(p.numel() for p in model.parameters()), row, blocks, supernet and digest(supernet.layout)
    return found


# Names alone, so that tests can be collected without building anything; `test_lists` holds them against the truth.
SUPPORTED = [line.split('`')[1] for line in page.PAGE.read_text().partition('## Refused')[0].splitlines()
             if line.startswith('| `')]
SUPPORTED_SMALL = [line.split('`')[1] for line in page.PAGE.read_text().partition('## Refused')[0].splitlines()
                   if line.startswith('| `') and float(line.split('|')[2].split()[0]) * 1e6 <= SMALL]


def digest(layout):
    """Return a hash of all that is known of a model's channels."""
    channels = [(c.name, c.base, c.kind, c.source.name if c.source else None, c.writers)
                for c in layout.channels.values()]
    axes = {name: {str(dim): c.name for dim, c in of.items()} for name, of in layout.axes.items()}
    return hashlib.sha256(json.dumps([channels, axes]).encode()).hexdigest()[:16]


def test_layouts_are_those_of_the_block_tables():
    """The channels that are found in the graph are those that tables of timm's blocks once said, name by name."""
    known = json.loads((Path(__file__).parent / 'data' / 'layouts.json').read_text())
    assert len(known) == 80
    for name in MODELS:
        with torch.device('meta'):
            assert digest(augment(timm.create_model(name)).layout) == known.pop(name), name
    assert len(known) == 75 and all(family()[name][3] == value for name, value in known.items())


def test_lists():
    """The page in the docs, which is generated, is what the code does."""
    rows = [row for _, row, *_ in family().values()]
    assert len(rows) == len(page.names())
    if timm.__version__ == '1.0.31':
        assert (len(rows), len(SUPPORTED)) == (148, 117)
        assert page.page(rows) == page.PAGE.read_text(), 'run: python docs/models.py'
    else:  # another timm may know more models, but none that was supported may be lost
        assert set(SUPPORTED) <= {r[0] for r in rows if r[2]}
    assert all(bool(r[2]) != bool(r[3]) for r in rows)


def check(name):
    """Augment, sample, train for a step, export; every network equals its stock model to the last bit."""
    torch.manual_seed(0)
    check_model(randomise(timm.create_model(name, num_classes=10)))


def check_model(model):
    supernet = augment(model, NetAugConfig(width_mults=(1, 1.5), expand_mults=(1, 1.7))).train()
    assert isinstance(supernet, SuperNet)
    randomise(supernet, 1)
    x, y = images(2), torch.tensor([1, 2])
    # A random draw that is wider somewhere in every kind of channels that there is.
    g = generator(1)
    with supernet.sampled(g) as widths:
        stock = export(supernet, widths)
        got = supernet(x)
        got.square().mean().backward()
    assert any(widths[k] > supernet.layout.tiny[k] for k in widths)
    want = stock(x)
    assert type(stock) is type(model) and torch.equal(got, want)
    want.square().mean().backward()
    for key, p in stock.named_parameters():
        grad = supernet.get_parameter(key).grad
        assert torch.equal(grad[tuple(slice(n) for n in p.shape)], p.grad), key
        assert grad.count_nonzero() == p.grad.count_nonzero(), key
    supernet.zero_grad()

    optimizer = torch.optim.SGD(supernet.parameters(), lr=1e-3)
    before = export(supernet)
    NetAugTask(supernet, verbose=False)(x, y)['loss'].backward()
    optimizer.step()
    tiny = export(supernet)
    assert type(tiny) is type(model) and repr(tiny) == repr(model)
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), tiny.parameters()))
    with torch.no_grad():
        assert torch.equal(tiny.eval()(x), supernet.eval()(x))


@pytest.mark.parametrize('name', SUPPORTED_SMALL)
def test_small(name):
    check(name)


def test_there_are_small_ones():
    assert len(SUPPORTED_SMALL) > 40


@pytest.mark.parametrize('block', list(BLOCKS), ids=lambda t: t.__name__)
def test_large(block):
    """For every kind of block the smallest model that is too large for the test above."""
    sizes = {n: size for n, (size, row, blocks, _) in family().items() if row[2] and block in blocks and size > SMALL}
    check(min(sizes, key=sizes.get))


def test_layer_scale_and_last_depthwise():
    """Parts of a MobileNetV4 block that no supported name has by itself."""
    torch.manual_seed(0)
    model = randomise(timm.create_model('mobilenetv4_conv_small_035', num_classes=10))
    width = model.blocks[2][1].pw_proj.out_channels
    model.blocks[2][1] = UniversalInvertedResidual(
        width, width, dw_kernel_size_end=3, exp_ratio=3, layer_scale_init_value=0.3)
    supernet = augment(model)
    gamma = supernet.get_parameter('blocks.2.1.layer_scale.gamma')
    assert len(gamma) > width and gamma[width:].eq(0.3).all()
    check_model(model)


@pytest.mark.parametrize('name', [
    'test_efficientnet_gn', 'test_efficientnet_evos', 'test_efficientnet_ln', 'mixnet_s', 'mobilenet_edgetpu_v2_xs',
    'mobilenetv4_hybrid_medium_075', 'efficientnet_cc_b0_4e', 'gc_efficientnetv2_rw_t',
])
def test_refused_is_left_untouched(name):
    model = timm.create_model(name, num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, types = torch.get_rng_state(), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match='NetAug cannot augment this model: module .* of type .*Supported types: '):
        augment(model)
    assert torch.equal(state, torch.get_rng_state()) and types == [type(m) for m in model.modules()]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
