"""The super-network: the tiny model outside `sampled`, exactly a stock sub-network inside, sortable without a trace."""
import copy
import json

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.optim import create_optimizer_v2
from timm.utils import freeze

import timm_netaug
from conftest import MODELS, OTHERS, generator, images, make, make_supernet
from timm_netaug import NetAugConfig, augment, export, layers
from timm_netaug.layers import LAYER_STATE, ElasticBatchNormAct2d

# Parameters of the whole super-network, in millions, with 1000 classes (measured on the reference implementation).
SUPERNET_PARAMS = {
    'netaug_mbv2_tiny': ((1, 1.8, 2.6), 5.83), 'netaug_mbv2_035': ((1, 1.8, 2.6), 8.62),
    'netaug_mbv3_035': ((1, 1.8, 2.6), 19.4), 'netaug_proxylessnas_035': ((1, 1.8, 2.6), 9.73),
    'netaug_mcunet': ((1, 1.8, 2.6), 9.94),
}


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def leading(tensor, like):
    return tensor[tuple(slice(n) for n in like.shape)]


def assert_equal_networks(supernet, stock, x):
    """Logits and gradients to the last bit, those of the unused weights zero."""
    got, want = supernet(x), stock(x)
    assert torch.equal(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    count = 0
    for name, p in stock.named_parameters():
        grad = supernet.get_parameter(name).grad
        assert torch.equal(leading(grad, p), p.grad), name
        assert grad.count_nonzero() == p.grad.count_nonzero(), name
        count += 1
    assert count > 50
    supernet.zero_grad()
    stock.zero_grad()


@pytest.mark.parametrize('name', MODELS + OTHERS)
def test_tiny_outside(name):
    model = make(name)
    before = snapshot(model)
    supernet = augment(model)
    assert isinstance(supernet, type(model)) and isinstance(supernet, timm_netaug.SuperNet)
    assert list(supernet.state_dict()) == list(before)
    assert sum(p.numel() for p in supernet.parameters()) > 2 * sum(p.numel() for p in model.parameters())
    assert_same_state(snapshot(model), before)
    x = images(2, 48)
    for mode in (True, False):
        assert_equal_networks(supernet.train(mode), model.train(mode), x)
    # a training pass of the tiny network writes what a stock training pass writes
    assert_same_state(export(supernet).state_dict(), model.state_dict())
    assert supernet.num_classes == 10 and supernet.pretrained_cfg == model.pretrained_cfg


@pytest.mark.parametrize('name', MODELS)
def test_supernet_size(name):
    mults, millions = SUPERNET_PARAMS[name]
    with torch.device('meta'):
        supernet = augment(timm.create_model(name), NetAugConfig(width_mults=mults))
    digits = 1 if millions > 10 else 2
    assert round(sum(p.numel() for p in supernet.parameters()) / 1e6, digits) == millions


@pytest.mark.parametrize('divisor', [1, 8])
@pytest.mark.parametrize('name', MODELS + OTHERS)
def test_sampled_is_a_stock_network(name, divisor):
    supernet = make_supernet(name, dict(width_mults=(1, 1.3, 1.6), expand_mults=(1, 1.4, 1.8), divisor=divisor))
    stock_type = type(make(name))
    g = generator(3)
    x = images(2, 48)
    seen = set()
    for i in range(3):
        supernet.train(i % 2 == 0)
        with supernet.sampled(g) as widths:
            stock = export(supernet, widths)
            assert type(stock) is stock_type
            assert not any(type(m).__module__.startswith('timm_netaug') for m in stock.modules())
            assert_equal_networks(supernet, stock, x)
        assert json.loads(json.dumps(widths)) == widths
        assert all(w % divisor == 0 or w == supernet.layout.tiny[k] for k, w in widths.items())
        convs = [m for m in stock.modules() if type(m) is nn.Conv2d]
        assert all((c.out_channels, c.in_channels // c.groups) == c.weight.shape[:2] for c in convs)
        final, features = stock.eval().forward_intermediates(x)
        assert [f['num_chs'] for f in stock.feature_info] == [f.shape[1] for f in features]
        assert stock.forward_head(stock.forward_features(x), pre_logits=True).shape[1] == stock.head_hidden_size
        seen.add(tuple(widths.values()))
    assert len(seen) == 3


@pytest.mark.parametrize('kwargs', [dict(memory_format=torch.channels_last), dict(dtype=torch.bfloat16),
                                    dict(dtype=torch.float64)], ids=str)
def test_memory_format_and_dtype_stay(kwargs):
    model = make('netaug_mbv3_035').to(**kwargs)
    supernet = augment(model)
    x = images(2, **kwargs)
    for name, p in model.named_parameters():
        q = supernet.get_parameter(name)
        assert q.dtype == p.dtype and q.device == p.device
        if p.ndim == 4 and p.shape[2] > 1 and p.shape[1] > 1:
            assert q.is_contiguous(memory_format=kwargs.get('memory_format', torch.contiguous_format))
    assert torch.equal(supernet.eval()(x), model.eval()(x))
    supernet.train()
    with supernet.sampled(generator()) as widths:
        stock = export(supernet, widths)
        assert torch.equal(supernet(x), stock(x))
    strides = {k: v.stride() for k, v in export(supernet).state_dict().items()}
    assert strides == {k: v.stride() for k, v in model.state_dict().items()}


def test_widths_are_whole_numbers():
    supernet = make_supernet()
    widths = supernet.sample_widths(generator())
    with pytest.raises(ValueError, match='is not a whole number'):
        supernet.check_widths({**widths, next(iter(widths)): next(iter(widths.values())) + 0.5})


def test_drawn_from_the_generator_alone():
    supernet = make_supernet()
    draws = []
    for noise in range(2):
        torch.manual_seed(noise)
        g = generator(7)
        draws.append([supernet.sample_widths(g) for _ in range(5)])
    assert draws[0] == draws[1]
    assert len({tuple(d.values()) for d in draws[0]}) == 5
    state = torch.get_rng_state()
    supernet.sample_widths(generator())
    assert torch.equal(state, torch.get_rng_state())


def test_choices_and_ties():
    supernet = make_supernet('netaug_mbv2_tiny')
    tiny, g = supernet.layout.tiny, generator()
    draws = [supernet.sample_widths(g) for _ in range(200)]
    assert {d['conv_stem'] for d in draws} == {16, 29, 42}  # 16 x 1, 1.8, 2.6
    assert {d['conv_head'] for d in draws} == {448, 806, 1165}
    ratios = {round(d['blocks.1.0.conv_pw'] / d['blocks.0.0.conv_pw'], 1) for d in draws}
    assert ratios == {6.0, 9.6, 13.2, 16.8}  # 6 x 1, 1.6, 2.2, 2.8
    # blocks joined by a skip have one width: 'blocks.2.1.conv_pwl' writes the channels of 'blocks.2.0.conv_pwl'
    assert 'blocks.2.1.conv_pwl' not in tiny
    assert supernet.layout.channels['blocks.2.0.conv_pwl'].writers == [f'blocks.2.{i}.conv_pwl' for i in range(3)]
    only = [supernet.sample_widths(g, expand_only=True) for _ in range(50)]
    assert all(w[k] == tiny[k] for w in only for k in tiny if supernet.layout.channels[k].kind == 'width')
    assert len({w['blocks.1.0.conv_pw'] for w in only}) == 4


def test_multiplier_of_one_is_the_stored_width():
    config = NetAugConfig(width_mults=(1,), expand_mults=(1,), divisor=32)
    for name in MODELS + OTHERS:
        supernet = augment(make(name), config)
        assert supernet.max_widths == supernet.sample_widths(generator()) == supernet.layout.tiny


def test_restores():
    supernet, x = make_supernet().eval(), images(2)
    with torch.no_grad():
        tiny = supernet(x)
        with pytest.raises(KeyError):
            with supernet.sampled(generator()):
                raise KeyError
        assert torch.equal(supernet(x), tiny)
        with supernet.sampled(generator(1)) as outer:
            wide = supernet(x)
            with supernet.active(supernet.max_widths):
                assert not torch.equal(supernet(x), wide)
            assert torch.equal(supernet(x), wide) and not torch.equal(wide, tiny)
        assert torch.equal(supernet(x), tiny)
    with pytest.raises(ValueError, match='not between'):
        with supernet.active({**outer, 'conv_stem': 10_000}):
            pass
    with pytest.raises(ValueError, match='missing or unknown: conv_stem'):
        export(supernet, {k: v for k, v in outer.items() if k != 'conv_stem'})
    assert torch.equal(supernet(x), tiny)


def test_backward_after_the_block():
    """The gradient of the sum is the sum of the gradients, though the block is left before `backward`."""
    supernet, x = make_supernet('netaug_mbv3_035').train(), images(4)
    with supernet.sampled(generator()) as widths:
        parts = [export(supernet).train(), export(supernet, widths).train()]
    loss = supernet(x).square().mean()
    with supernet.active(widths):
        loss = loss + supernet(x).square().mean()
    loss.backward()
    for part in parts:
        part(x).square().mean().backward()
    tiny, wide = (dict(part.named_parameters()) for part in parts)
    for name, p in supernet.named_parameters():
        want = torch.zeros_like(p)
        leading(want, wide[name]).copy_(wide[name].grad)
        leading(want, tiny[name]).add_(tiny[name].grad)
        assert torch.equal(p.grad, want), name


class OtherConv(nn.Conv2d):
    pass


def broken(what):
    model = make('netaug_mbv3_035')
    if what == 'subclass':
        model.blocks[1][0].conv_dw.__class__ = OtherConv
    elif what == 'activation':
        model.blocks[1][0].bn1.act = nn.PReLU(24)
    elif what == 'norm':
        model.blocks[1][0].bn1 = nn.GroupNorm(1, 24)
    elif what == 'groups':
        model.blocks[1][0].conv_pw = nn.Conv2d(8, 24, 1, groups=2)
    elif what == 'statistics':
        model.blocks[1][0].bn1.running_mean = None
    elif what == 'across channels':
        model.blocks[1][0].bn1.act = nn.Softmax2d()
    elif what == 'hook':
        model.blocks[1][0].register_forward_hook(lambda *_: None)
    elif what == 'shape':
        model.blocks[1][0] = nn.Identity()
    return model


@pytest.mark.parametrize('what, module, kind', [
    ('subclass', 'blocks.1.0.conv_dw', 'OtherConv'), ('activation', 'blocks.1.0.bn1.act', 'PReLU'),
    ('norm', 'blocks.1.0.bn1', 'GroupNorm'), ('groups', 'blocks.1.0.conv_pw', 'Conv2d'),
    ('statistics', 'blocks.1.0.bn1', 'BatchNormAct2d'), ('across channels', 'blocks.1.0.bn1.act', 'Softmax2d'),
    ('hook', 'blocks.1.0', 'InvertedResidual'),
])
def test_refusals_name_the_module(what, module, kind):
    model = broken(what)
    before, types = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"'{module}' of type {kind}, which .*Supported types: Conv2d, "):
        augment(model)
    assert_same_state(snapshot(model), before)
    assert [type(m) for m in model.modules()] == types


def test_classifier_without_bias():
    model = make('netaug_mcunet')
    model.classifier = nn.Linear(model.num_features, 10, bias=False)
    assert_equal_networks(augment(model).eval(), model.eval(), images(2))


@pytest.mark.parametrize('name, kwargs', [
    ('mixnet_s', {}), ('test_vit', {}), ('mobilenetv4_hybrid_medium_075', {}), ('convnext_atto', {}),
    ('netaug_mbv2_tiny', dict(global_pool='catavgmax')),
])
def test_refused_models(name, kwargs):
    with pytest.raises(ValueError, match='Supported types'):
        augment(timm.create_model(name, **kwargs))


def test_not_a_stock_model():
    supernet = make_supernet()
    with pytest.raises(ValueError, match='EfficientNetSuperNet'):
        augment(supernet)
    with pytest.raises(ValueError, match='of the stock model, then augment'):
        supernet.reset_classifier(3)


@pytest.mark.parametrize('name', MODELS)
def test_from_the_registry(name):
    supernet = timm.create_model(name, num_classes=4, netaug=True)
    assert isinstance(supernet, timm_netaug.SuperNet)
    assert supernet.netaug_config == NetAugConfig().resolve(name)
    other = timm.create_model(name, num_classes=4, netaug=dict(width_mults=[1, 2], divisor=8))
    assert other.netaug_config.width_mults == (1, 2) and other.netaug_config.divisor == 8
    with pytest.raises(ValueError, match='depth'):
        timm.create_model(name, num_classes=4, netaug=dict(depth=2))
    tiny = export(supernet)
    assert 'netaug' not in tiny._model_args and tiny(images(2)).shape == (2, 4)
    assert repr(tiny) == repr(timm.create_model(name, num_classes=4))


def test_export_owns_its_memory():
    supernet = make_supernet('netaug_mbv3_035')
    x = images(2)
    tiny = export(supernet.eval())
    want = tiny(x)
    for t in tiny.state_dict().values():
        assert t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size()
    with torch.no_grad():
        for p in supernet.parameters():
            p.zero_()
    assert torch.equal(tiny(x), want)


def test_initialisation():
    torch.manual_seed(0)
    supernet = augment(make('netaug_mbv3_035'))
    tiny = snapshot(export(supernet))
    supernet.init_weights(sort=False)
    checked = 0
    for name, p in supernet.named_parameters():
        if not name.endswith('weight') or p.ndim == 1:
            continue
        checked += 1
        if name == 'classifier.weight':
            assert abs(p.std().item() - 0.02) < 1e-3
        else:  # uniform in +-1 / sqrt(fan-in) of the full tensor
            bound = p[0].numel() ** -0.5
            assert p.abs().max() <= bound and p.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.15), name
        assert not torch.equal(leading(p, tiny[name]), tiny[name])
    assert checked > 50


@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'rmsproptf', 'lookahead_sgd'])
@pytest.mark.parametrize('name', ['netaug_mbv2_tiny', 'netaug_mbv3_035'])
def test_sort(name, opt):
    """In float64, where a sum in another order differs by 1e-12 at the most."""
    config = dict(width_mults=(1, 1.4), expand_mults=(1, 1.6))
    supernet = make_supernet(name, config, dtype=torch.float64).double().train()
    supernet.init_weights(sort=False)  # weights of one size throughout, so that a sort mixes the slice and what is behind it
    optimizer = create_optimizer_v2(supernet, opt, lr=1e-3, momentum=0.9, weight_decay=1e-3)
    x = images(2, 48, dtype=torch.float64)

    def step(net, optimizer):
        optimizer.zero_grad()
        with net.active(net.max_widths):
            nn.functional.cross_entropy(net(x), torch.tensor([1, 2])).backward()
        optimizer.step()

    for _ in range(5):  # lookahead's slow weights come in with the sixth step, behind the sort
        step(supernet, optimizer)
    supernet.zero_grad()
    other = copy.deepcopy(supernet)
    other_optimizer = create_optimizer_v2(other, opt, lr=1e-3, momentum=0.9, weight_decay=1e-3)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    orders = other.sort_channels(other_optimizer)
    assert set(orders) == {k for k, c in supernet.layout.channels.items() if c.kind != 'width'}
    assert any(not torch.equal(o, torch.arange(len(o))) for o in orders.values())
    with torch.no_grad():
        tiny = [copy.deepcopy(export(n))(x) for n in (other, supernet)]
        assert (tiny[0] - tiny[1]).abs().max() > 1e-3  # the tiny slice has other channels now
    for block in [b for stage in other.blocks for b in stage if hasattr(b, 'conv_pwl')]:
        norms = block.conv_pwl.weight.abs().sum((0, 2, 3))
        assert (norms[:-1] >= norms[1:] - 1e-9).all()
        if hasattr(block.se, 'conv_expand'):
            norms = block.se.conv_expand.weight.abs().sum((0, 2, 3))
            assert (norms[:-1] >= norms[1:] - 1e-9).all()
    for _ in range(2):  # the same function, and the same function after the optimizer's next step
        with torch.no_grad(), supernet.active(supernet.max_widths), other.active(other.max_widths):
            torch.testing.assert_close(other(x), supernet(x), rtol=1e-9, atol=1e-9)
        step(supernet, optimizer)
        step(other, other_optimizer)


def test_sort_refuses_before_it_touches():
    supernet = make_supernet()
    optimizer = create_optimizer_v2(supernet, 'adafactor', lr=1e-3)
    supernet.train()(images(2)).mean().backward()
    optimizer.step()
    before = snapshot(supernet)
    with pytest.raises(ValueError, match='Adafactor keeps .*sort=False'):
        supernet.sort_channels(optimizer)
    assert_same_state(snapshot(supernet), before)


def norms_of(net):
    return [m for m in net.modules() if isinstance(m, BatchNormAct2d)]


def test_statistics_of_the_tiny_slice_are_the_tiny_pass_s():
    supernet, x = make_supernet().train(), images(4)
    stock = export(supernet)
    before = snapshot(supernet)
    for seed in range(3):
        with supernet.sampled(generator(seed)):
            supernet(images(4, seed=seed))
    tiny = stock.state_dict()
    assert_same_state(snapshot(export(supernet)), snapshot(stock))
    means = {k: v for k, v in supernet.state_dict().items() if k.endswith('running_mean')}
    moved = [k for k, v in means.items() if not torch.equal(v, before[k])]
    assert len(moved) > 40  # the channels behind the slice are kept up to date
    supernet(x), stock(x)
    assert_same_state(export(supernet).state_dict(), tiny)


def test_statistics_start_anew_after_a_sort():
    supernet = make_supernet().train()
    assert supernet.batches_since_sort is None
    supernet.sort_channels()
    batch = images(8)
    supernet(batch)
    stock = export(supernet).train()
    for m in norms_of(stock):
        m.reset_running_stats()
        m.momentum = None
    stock(batch)
    for a, b in zip(norms_of(export(supernet)), norms_of(stock)):  # one batch: the statistics are that batch's
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)
    for _ in range(30):
        supernet(batch)
    assert supernet.batches_since_sort is None  # the stock moving average again


def test_statistics_after_an_epoch_of_ten_steps():
    """An epoch that begins with a sort: top-1 within a point of that after full re-estimation."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    x = nn.functional.interpolate(x / 16, 32, mode='bilinear').sub(0.3).div(0.35)
    x = x.contiguous(memory_format=torch.channels_last)  # in which a step takes half the time
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    config = NetAugConfig(width_mults=(1, 1.5), expand_mults=(1, 2))
    supernet = augment(timm.create_model('netaug_mbv2_tiny', num_classes=10), config)
    supernet.to(memory_format=torch.channels_last).init_weights()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    task = timm_netaug.NetAugTask(supernet)

    def top1(model):
        with torch.no_grad():
            return (model.eval()(x).argmax(1) == y).float().mean().item() * 100

    checked = 0
    for epoch in range(9):
        # While the weights move fast, no mean of past batches is right, sort or not: slow down before the check, and
        # let an epoch pass, in which the momentum is still that of the fast ones. (Without it the gap was 0.0 to 1.4
        # points, by seed and by machine; so it is 0.1, and 3.7 where the statistics do not start anew.)
        optimizer.param_groups[0]['lr'] = 0.05 if epoch < 5 else 0.01
        task.start_epoch(epoch, 1000, optimizer)
        supernet.train()
        for batch in torch.randperm(len(x)).split(128)[:10]:
            optimizer.zero_grad()
            task(x[batch], y[batch])['loss'].backward()
            optimizer.step()
        if epoch < 6:
            continue
        got = top1(export(supernet))
        model = export(supernet).train()
        for m in norms_of(model):
            m.reset_running_stats()
            m.momentum = None
        with torch.no_grad():
            for batch in x.split(175):
                model(batch)
        want = top1(model)
        assert want > 90 and abs(got - want) <= 1.0, (got, want)
        checked += 1
    assert checked == 3
    assert any(isinstance(m, ElasticBatchNormAct2d) for m in supernet.modules())


@pytest.mark.parametrize('name', MODELS + OTHERS)
def test_gradient_checkpointing(name):
    """Gradients and statistics are those without it, though the backward pass comes when the widths are others."""
    stock = make(name, drop_path_rate=0.3)
    stock.set_grad_checkpointing()
    config = NetAugConfig(width_mults=(1, 1.4), expand_mults=(1, 1.6))
    checkpointed = augment(stock, config)
    plain = augment(make(name, drop_path_rate=0.3), config)
    plain.load_state_dict(checkpointed.state_dict())
    x, y = images(4, 48), torch.arange(4)
    calls = []
    checkpointed.blocks[1][0].register_forward_pre_hook(lambda *args: calls.append(1))
    for supernet in (plain, checkpointed):
        supernet.train().sort_channels()  # the statistics start anew, which counts batches
        torch.manual_seed(0)
        loss = F.cross_entropy(supernet(x), y)
        with supernet.sampled(generator(3)):
            loss = loss + F.cross_entropy(supernet(x), y)
        loss.backward()
    assert len(calls) == 4  # two passes, each of them twice
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), checkpointed.parameters()))
    for (key, one), two in zip(plain.state_dict().items(), checkpointed.state_dict().values()):
        assert torch.equal(one, two), key
    assert plain.batches_since_sort == checkpointed.batches_since_sort == 1
    checkpointed.zero_grad(set_to_none=True)
    checkpointed.set_grad_checkpointing(False)
    calls.clear()
    checkpointed(x).sum().backward()
    assert len(calls) == 1
    checkpointed.set_grad_checkpointing()
    tiny = export(checkpointed)
    assert type(tiny.blocks) is torch.nn.Sequential and not tiny.grad_checkpointing
    assert not {k for m in tiny.modules() for k in vars(m)} & set(LAYER_STATE)


def test_synchronised_batchnorm(monkeypatch):
    """Where there are several processes, every norm hands its slices to PyTorch's own function, which needs CUDA."""
    seen = []

    class Stub:
        @staticmethod
        def apply(x, weight, bias, mean, var, eps, momentum, group, processes):
            seen.append((x.shape[1], processes))
            return F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)

    monkeypatch.setattr(layers, 'sync_batch_norm', Stub)
    plain, synchronised = make_supernet('netaug_mbv3_035').train(), make_supernet('netaug_mbv3_035').train()
    synchronised.synchronise_batchnorm()
    x = images()
    assert torch.equal(plain(x), synchronised(x)) and not seen  # one process
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda *args: 2)
    for supernet in (plain, synchronised):
        supernet(x)
        with supernet.sampled(generator()):
            supernet(x)
    norms = [m for m in synchronised.modules() if isinstance(m, ElasticBatchNormAct2d)]
    assert len(seen) == 2 * len(norms) > 60 and {p for _, p in seen} == {2}
    for (key, one), two in zip(plain.state_dict().items(), synchronised.state_dict().values()):
        assert torch.equal(one, two), key
    synchronised.eval()(x)
    assert len(seen) == 2 * len(norms)
    assert type(export(synchronised)) is type(make('netaug_mbv3_035'))


def test_optimizers_that_cannot_be_sorted():
    """One that holds other parameters, and one whose state of a parameter is that of all."""
    supernet = make_supernet(config=dict(width_mults=(1,)))
    with pytest.raises(ValueError, match="SGD holds none of the super-network's parameters"):
        supernet.sort_channels(torch.optim.SGD(make('test_resnet').parameters(), lr=0.1))
    optimizer = torch.optim.LBFGS(supernet.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = supernet(images(2, 32)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = copy.deepcopy(supernet.state_dict())
    with pytest.raises(ValueError, match="LBFGS keeps a '.*' for 'conv_stem.weight' that belongs to other parameters"):
        supernet.sort_channels(optimizer)
    assert all(torch.equal(before[k], v) for k, v in supernet.state_dict().items())


def test_frozen_layers_are_refused_by_name():
    """timm.utils.freeze puts stock layers in the place of the elastic ones, unless it is told to leave them."""
    supernet = make_supernet('netaug_mbv2_tiny')
    freeze(supernet, ['blocks.0'], include_bn_running_stats=False)
    supernet.train()
    assert not any(p.requires_grad for p in supernet.blocks[0].parameters())
    freeze(supernet, ['blocks.1'])
    for use in (supernet.train, lambda: timm_netaug.export(supernet)):
        with pytest.raises(ValueError, match=r"layer 'blocks\.1\..*FrozenBatchNormAct2d.*include_bn_running_stats=False"):
            use()
