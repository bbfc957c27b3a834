"""Any network, inside any module: what the tracer finds, what it refuses, and that every sub-network is exact."""
import copy
import pickle
import types

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d
from timm.optim import create_optimizer_v2
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, weight_norm
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

from conftest import generator, images, make, randomise
from timm_netaug import NetAugConfig, NetAugTask, SuperNet, augment, export, graph, layers, register_elastic
from timm_netaug.layers import Elastic, ElasticBatchNorm

CONFIG = NetAugConfig(width_mults=(1, 1.5, 2), expand_mults=(1, 1.7))
SIZE = 48  # pixels, of which stride 32 leaves 2 x 2
NARROW = dict(channels=(16, 32, 64, 128))  # of a ResNet's stages, a quarter of its own: all else is as it is


class Residual(nn.Module):
    def __init__(self, channels, inner):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.norm = nn.BatchNorm2d(inner)
        self.conv = nn.Conv2d(inner, inner + 2, 3, padding=1)
        self.expand = nn.Conv2d(inner + 2, channels, 1, bias=False)
        self.scale = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.norm(self.squeeze(x)))
        return x + self.scale(self.expand(torch.tanh(self.conv(y))))


class Own(nn.Module):
    """A network that nobody has seen before: stem, two residual blocks, and a list of two predictions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.blocks = nn.ModuleList([Residual(12, 5), Residual(12, 7)])
        self.down = nn.Conv2d(12, 20, 3, stride=2, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(12, 4, 1), nn.Conv2d(20, 4, 1)])

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = block(x)
        deep = F.max_pool2d(F.hardswish(self.down(x)), 2)
        return [self.heads[0](x), dict(deep=F.interpolate(self.heads[1](deep), scale_factor=2))]


def own(cls=Own, **kwargs):
    torch.manual_seed(0)
    return randomise(cls(**kwargs))


def supernet_of(model, config=CONFIG, size=32):
    return randomise(augment(model, config, example_input=images(2, size)), 1)


def tensors(output):
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def assert_exact(supernet, whole=None, seeds=3, size=32):
    """Outputs and gradients of sampled sub-networks are those of stock modules of these widths, to the last bit.

    Args:
        whole: The module around the super-network that is run; None for the super-network itself.
    """
    whole = supernet if whole is None else whole
    x, seen = images(2, size), set()
    for seed in range(seeds):
        whole.train(seed % 2 == 0)
        with supernet.sampled(generator(seed)) as widths:
            stock = export(whole, widths)
            assert not any(isinstance(m, Elastic) for m in stock.modules())
            got, want = tensors(whole(x)), tensors(stock(x))
            assert len(got) == len(want) > 0 and all(torch.equal(a, b) for a, b in zip(got, want))
            sum(t.square().sum() for t in got).backward()
            sum(t.square().sum() for t in want).backward()
        for name, p in stock.named_parameters():
            grad = whole.get_parameter(name).grad
            if p.grad is None:  # a layer behind the last feature map
                assert grad is None
                continue
            assert torch.equal(grad[tuple(slice(n) for n in p.shape)], p.grad), name
            assert grad.count_nonzero() == p.grad.count_nonzero(), name
        whole.zero_grad()
        seen.add(tuple(widths.values()))
    assert len(seen) > 1


def assert_step(supernet, whole=None, size=32):
    """A training step changes the tiny network, whose export computes what it does; a sort keeps the full function."""
    whole = supernet if whole is None else whole
    whole.train()
    optimizer = torch.optim.SGD(whole.parameters(), lr=1e-2, momentum=0.9)
    task = NetAugTask(whole, lambda output, target: sum(t.square().mean() for t in tensors(output)), verbose=False)
    before = copy.deepcopy(whole.state_dict())
    task(images(2, size), None)['loss'].backward()
    optimizer.step()
    assert any(not torch.equal(before[k], v) for k, v in whole.state_dict().items())
    whole.double().eval()
    for state in optimizer.state.values():
        state['momentum_buffer'] = state['momentum_buffer'].double()
    x = images(2, size, dtype=torch.float64)
    with torch.no_grad(), supernet.active(supernet.max_widths):
        want = tensors(whole(x))
        orders = supernet.sort_channels(optimizer)
        for a, b in zip(tensors(whole(x)), want):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    whole.float()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tensors(export(whole)(x.float())), tensors(whole(x.float()))))
    return orders


def test_a_network_of_the_users_own():
    model = own()
    supernet = supernet_of(model)
    kinds = {name: (c.kind, c.base, c.source and c.source.name) for name, c in supernet.layout.channels.items()}
    assert kinds == {
        'stem': ('width', 12, None), 'down': ('width', 20, None),
        'blocks.0.squeeze': ('expand', 5, 'stem'), 'blocks.0.conv': ('expand', 7, 'stem'),
        'blocks.1.squeeze': ('expand', 7, 'stem'), 'blocks.1.conv': ('expand', 9, 'stem'),
    }
    assert supernet.layout.channels['stem'].writers == ['stem', 'blocks.0.expand', 'blocks.1.expand']
    assert list(supernet.state_dict()) == list(model.state_dict())
    assert_exact(supernet)
    orders = assert_step(supernet)
    assert set(orders) == {k for k, (kind, *_) in kinds.items() if kind == 'expand'}
    with pytest.raises(ValueError, match='example_input'):
        augment(model)


def test_predictions_keep_their_bias():
    """A set that reaches the output keeps its width, and `init_weights` its bias: the prior of a focal loss, say."""
    model = own()
    with torch.no_grad():
        model.heads[0].bias.fill_(-4.6)
    supernet = supernet_of(model)
    assert supernet.get_parameter('heads.0.weight').shape[:2] == (4, 24)
    with torch.no_grad():
        supernet.heads[0].bias.fill_(-4.6)
    supernet.init_weights()
    assert (supernet.heads[0].bias == -4.6).all()


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'mobileone_s0', 'resnetblur50', 'tf_efficientnet_lite0'])
def test_other_timm_models(name):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=10, **(NARROW if 'resnet' in name else {})))
    supernet = augment(model, CONFIG)
    assert_exact(supernet, size=SIZE, seeds=2)
    orders = assert_step(supernet, size=SIZE)
    assert orders or name == 'mobileone_s0'  # its blocks are single convolutions


def test_bottleneck_sorting():
    """A dense inner convolution reads an inner set and writes another one: each is ranked by what reads it."""
    supernet = randomise(augment(make('test_resnet'), CONFIG))
    channels = supernet.layout.channels
    bottlenecks = [n for n, c in channels.items() if n.endswith('conv2') and c.kind == 'expand']
    assert bottlenecks
    for name in bottlenecks:
        block = name.rpartition('.')[0]
        assert channels[name].readers == [f'{block}.conv3']
        assert channels[f'{block}.conv1'].readers == [f'{block}.conv2']
        assert channels[name].source is channels[f'{block}.conv1'].source
    supernet.sort_channels()
    for name in bottlenecks:
        block = name.rpartition('.')[0]
        for reader in ('conv2', 'conv3'):
            norms = supernet.get_parameter(f'{block}.{reader}.weight').abs().sum((0, 2, 3))
            assert (norms[:-1] >= norms[1:] - 1e-4).all()


@pytest.mark.parametrize('aa', ['avg', 'blur', 'blurpc'])
def test_anti_aliasing(aa):
    model = make('mobilenetv4_conv_small_035', aa_layer=aa)
    assert_exact(augment(model, CONFIG), size=SIZE)


@pytest.mark.parametrize('kwargs', [
    dict(), dict(feature_cls='list'), dict(feature_cls='dict'), dict(feature_cls='hook'), dict(feature_cls='getter'),
    dict(out_indices=(1, 3)),
], ids=str)
@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'resnet18', 'netaug_mbv3_035'])
def test_features_only(name, kwargs):
    """In every form that timm has: feature maps keep their widths, what lies between them is augmented."""
    torch.manual_seed(0)
    narrow = NARROW if 'resnet' in name else {}
    try:
        model = randomise(timm.create_model(name, features_only=True, **narrow, **kwargs))
        model(images(1, SIZE))
    except (AssertionError, RuntimeError, AttributeError, TypeError) as e:
        pytest.skip(f'timm has no such form of this model: {e}')
    supernet = augment(model, CONFIG)
    assert supernet.feature_info.channels() == model.feature_info.channels()
    assert any(c.kind == 'expand' for c in supernet.layout.channels.values())
    with supernet.sampled(generator(1)):
        features = supernet(images(1, SIZE))
    features = features.values() if isinstance(features, dict) else features
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert_exact(supernet, size=SIZE)


def test_statistics_behind_kept_channels():
    """A norm on channels that keep their width sees augmented inputs, too; its statistics are the tiny network's."""
    supernet = supernet_of(own()).train()
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    fixed = nn.Sequential(own(Residual, channels=6, inner=4), nn.Conv2d(6, 6, 1))
    whole = augment(fixed, CONFIG, example_input=torch.zeros(2, 6, 8, 8)).train()
    norm = whole[0].scale
    assert isinstance(norm, ElasticBatchNorm) and norm.tiny_width == norm.num_features == 6
    with whole.sampled(generator()):
        whole(torch.randn(2, 6, 8, 8))
    assert norm.running_mean.equal(fixed[0].scale.running_mean) and norm.num_batches_tracked == 0
    with supernet.sampled(generator()):
        supernet(images(2, 32))
    tiny = export(supernet).state_dict()
    assert all(torch.equal(tiny[k], before[k][tuple(slice(n) for n in tiny[k].shape)]) for k in tiny)


class Detector(nn.Module):
    """A module around a backbone, with a norm and a convolution of its own."""

    def __init__(self, backbone, channels):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.ModuleList([nn.Conv2d(c, 8, 1) for c in channels])
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return dict(maps=[self.norm(neck(f)) for neck, f in zip(self.neck, self.backbone(x))])


def detector():
    torch.manual_seed(0)
    backbone = timm.create_model('tf_efficientnet_lite0', features_only=True, out_indices=(2, 3, 4))
    model = randomise(Detector(backbone, backbone.feature_info.channels()))
    model.backbone = randomise(augment(model.backbone, CONFIG), 1)
    return model


def test_part_of_a_larger_module():
    model = detector()
    supernet = model.backbone
    assert supernet.layout.channels['conv_stem'].kind == 'width'
    assert_exact(supernet, model, size=SIZE)
    assert_step(supernet, model, size=SIZE)
    stock = export(model)
    assert type(stock) is Detector and type(stock.backbone) is supernet.stock
    assert list(stock.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        x = images(2, SIZE)
        with supernet.active(supernet.max_widths):
            assert not torch.equal(model.eval()(x)['maps'][0], stock.eval()(x)['maps'][0])
        assert torch.equal(model(x)['maps'][0], stock(x)['maps'][0])


def test_task_over_a_larger_module():
    """Any loss over any output; the norms around the super-network keep the tiny pass's statistics alone."""
    def criterion(output, target):
        return sum(F.mse_loss(o, t) for o, t in zip(output['maps'], target['maps']))

    x = images(4, SIZE)
    target = dict(maps=[torch.zeros_like(t) for t in detector()(x)['maps']])
    results = []
    for early in (False, True):
        task = NetAugTask(detector().train(), criterion, early_backward=early, batch_fraction=0.5, verbose=False)
        optimizer = torch.optim.SGD(task.network.parameters(), lr=0.01, momentum=0.9)
        task.setup_ema(decay=0.9)
        for epoch in range(2):
            task.start_epoch(epoch, 4, optimizer)
            task(x, target)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
        results.append(task.network.state_dict())
    for a, b in zip(results[0].values(), results[1].values()):  # the neck's norm sums three levels, in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    state = task.get_checkpoint_state()
    stock = Detector(timm.create_model('tf_efficientnet_lite0', features_only=True, out_indices=(2, 3, 4)),
                     task.supernet.feature_info.channels())
    stock.load_state_dict(state['state_dict'])
    other = NetAugTask(detector(), criterion, batch_fraction=0.5, verbose=False)
    other.load_checkpoint_state(**{k: state[k] for k in ('state_dict', 'task_state')})
    assert all(torch.equal(a, b) for a, b in zip(other.network.state_dict().values(), results[1].values()))

    model = detector().train()
    task = NetAugTask(model, criterion, verbose=False)
    tiny = copy.deepcopy(export(model))
    task(x, target)
    tiny(x)
    assert torch.equal(model.norm.running_mean, tiny.norm.running_mean)
    assert model.norm.num_batches_tracked == tiny.norm.num_batches_tracked == 3


def test_in_situ_distillation_of_any_output():
    model = supernet_of(own())
    task = NetAugTask(
        model, lambda output, target: output[0].square().mean(), distill=0.5, verbose=False,
        distill_criterion=lambda output, known: F.mse_loss(output[0], known[0]))
    result = task(images(4, 32), None)
    assert torch.equal(result['loss'], result['tiny_loss'] + result['aug_loss'] + 0.5 * result['distill_loss'])
    result['loss'].backward()


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'pickle'])
@pytest.mark.parametrize('make_model', [lambda: supernet_of(own()), detector], ids=['alone', 'within'])
def test_copies(copied, make_model):
    model = make_model()
    supernet = model if isinstance(model, SuperNet) else model.backbone
    supernet.set_grad_checkpointing()
    twin = copied(model)
    twin_supernet = twin if isinstance(twin, SuperNet) else twin.backbone
    assert type(twin_supernet) is type(supernet) and twin_supernet.layout == supernet.layout
    x = images(2, SIZE)
    with supernet.sampled(generator(2)) as widths, twin_supernet.active(widths):
        got, want = tensors(twin(x)), tensors(model(x))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    want = tensors(export(model)(x))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not any(torch.equal(a, b) for a, b in zip(tensors(twin(x)), want))
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), want))


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'pickle'])
def test_a_copy_made_inside_sampled_is_the_tiny_network(copied):
    model = supernet_of(own())
    want = tensors(model(images(2, 32)))
    with model.active(model.max_widths):
        twin = copied(model)
    assert all(torch.equal(a, b) for a, b in zip(tensors(twin(images(2, 32))), want))


def test_distributed_data_parallel(tmp_path):
    """The gradients of both passes arrive at the parameters of a larger module inside DistributedDataParallel."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        grads = []
        for distributed in (False, True):
            task = NetAugTask(
                detector().train(), lambda o, t: sum(m.square().mean() for m in o['maps']), verbose=False)
            if distributed:
                task.prepare_distributed()
                assert isinstance(task.trainable_module, DistributedDataParallel)
            task(images(2, SIZE), None)['loss'].backward()
            grads.append([p.grad for p in task.network.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads))
    finally:
        torch.distributed.destroy_process_group()


def test_torchvision_detector():
    """FCOS on a feature pyramid on a torchvision backbone: the backbone, and the whole feature extractor, augmented."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(norm_layer=nn.BatchNorm2d)
    backbone = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4])
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    model = FCOS(backbone, num_classes=3, anchor_generator=anchors, min_size=SIZE, max_size=SIZE)
    randomise(model.backbone.body)
    x = [torch.rand(3, 64, 64, generator=generator(s)) for s in range(2)]
    boxes = [dict(boxes=torch.tensor([[4., 4., 40., 40.]]), labels=torch.tensor([1])) for _ in x]
    want = model.eval()(x)
    model.backbone = augment(model.backbone, CONFIG, example_input=images(2, 64))
    kinds = [c.kind for c in model.backbone.layout.channels.values()]
    assert 'width' in kinds and 'expand' in kinds
    for a, b in zip(model(x), want):  # the tiny network
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    losses = []
    model.train()
    for seed in (0, 1):
        with model.backbone.sampled(generator(seed)) as widths:
            stock = export(model, widths)
            got, own_ = model(x, boxes), stock(x, boxes)
            assert all(torch.equal(got[k], own_[k]) for k in got)
            losses.append(sum(got.values()))
    assert losses[0] != losses[1]
    sum(losses).backward()
    exported = export(model)
    assert type(exported) is FCOS and not any(isinstance(m, Elastic) for m in exported.modules())
    for a, b in zip(exported.eval()(x), model.eval()(x)):
        assert all(torch.equal(a[k], b[k]) for k in a)


class Twice(nn.Module):
    """One block that is called at two levels, and a layer that is called twice in a row."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        levels = [x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]
        return [self.head(self.norm(self.shared(self.shared(level)))) for level in levels]


def test_a_layer_called_more_than_once():
    supernet = supernet_of(own(Twice))
    assert list(supernet.layout.channels) == ['stem']  # what one weight reads and writes has one width
    assert supernet.layout.layers['norm'] == 3
    assert_exact(supernet)
    # After a sort, three calls are one training step: the statistics of the first step are the mean of the three.
    supernet.train().permute_channels({})
    norm, seen = supernet.norm, []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((0, 2, 3)).detach()))
    supernet(images(4, 32))
    torch.testing.assert_close(norm.running_mean[:8], torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)
    handle.remove()
    assert supernet.batches_since_sort == 1
    supernet.batches_since_sort = supernet.batches_since_sort
    assert norm.since_sort == 3


def shared():
    model = own()
    model.blocks[1].squeeze = nn.Conv2d(12, 7, 1)
    model.blocks[1].expand = nn.Conv2d(9, 12, 1, bias=False)
    model.blocks[0].scale.weight = model.blocks[1].scale.weight
    return model


def hooked():
    model = own()
    model.blocks[1].conv.register_forward_hook(lambda *_: None)
    return model


def normed():
    model = own()
    model.blocks[1].conv = weight_norm(model.blocks[1].conv)
    return model


def parametrised():
    model = own()
    model.blocks[1].conv = parametrizations.weight_norm(model.blocks[1].conv)
    return model


class Shuffle(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], 3, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def replaced(place, module):
    model = own()
    parent, _, name = place.rpartition('.')
    setattr(model.get_submodule(parent), name, module)
    return model


@pytest.mark.parametrize('make_model, module, why', [
    (shared, 'blocks.1.scale', "shares its weight with 'blocks.0.scale'"),
    (hooked, 'blocks.1.conv', 'has a forward hook'),
    (normed, 'blocks.1.conv', 'has a forward hook'),
    (parametrised, 'blocks.1.conv', 'computes the weight of a convolution'),
    (lambda: replaced('norm', Shuffle()), 'norm', r'reshapes the channels \(view\)'),
    (lambda: replaced('norm', nn.GroupNorm(3, 12)), 'norm', 'applies native_group_norm'),
    (lambda: replaced('norm', nn.Softmax2d()), 'norm', 'applies _softmax'),
    (lambda: replaced('norm', nn.PReLU(12)), 'norm', 'applies _prelu_kernel'),
    (lambda: replaced('norm', nn.InstanceNorm2d(12)), 'norm', 'is not supported|has no running statistics|reshapes'),
    (lambda: replaced('down', nn.Conv2d(12, 20, 3, groups=2)), 'down', 'has groups=2'),
    (lambda: replaced('down', nn.ConvTranspose2d(12, 20, 2)), 'down', 'is not supported'),
    (lambda: replaced('down', nn.Conv2d(12, 20, 1, padding_mode='reflect')), 'down', 'padding_mode=reflect'),
    (lambda: replaced('norm', nn.BatchNorm2d(12, track_running_stats=False)), 'norm', 'has no running statistics'),
    (lambda: replaced('down', nn.Conv2d(13, 20, 1)), 'down', 'fails in a forward pass'),
])
def test_refusals(make_model, module, why):
    """The message names the module, its type, the reason, and what is supported; nothing has been touched."""
    model = make_model()
    kind = type(model.get_submodule(module)).__name__
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types, state = [type(m) for m in model.modules()], torch.get_rng_state()
    with pytest.raises(ValueError, match=f"module '{module}' of type {kind}, which .*{why}.* Supported types: Conv2d,"):
        augment(model, example_input=images(2, 32))
    assert types == [type(m) for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('channels', [12, None])
def test_numbers_written_into_the_code(channels):
    """A wider model of code that has a number of channels in it computes something else, perhaps without an error."""
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x.view(len(x), channels or x.shape[1], -1).mean(-1))

    if channels is None:
        assert_exact(supernet_of(own(Pooled)))
        return
    why = "a wider Pooled does not have .* Its error: .*module 'head' of type Linear, which fails in a forward pass"
    with pytest.raises(ValueError, match=why):
        augment(own(Pooled), CONFIG, example_input=images(2, 32))


class ReadsAttribute(nn.Module):
    """Its code reads a number of channels off a layer, which is not the active number in a super-network."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x.reshape(len(x), self.stem.out_channels, -1).mean(-1))


class UsesTensor(ReadsAttribute):
    """Its code computes with the tensors of a layer, which are larger in a super-network."""

    def forward(self, x):
        return self.head(F.conv2d(x, self.stem.weight, self.stem.bias).mean((2, 3)))


class CosineHead(ReadsAttribute):
    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3))) / self.head.weight.norm(dim=1)


class OwnForward(ReadsAttribute):
    def __init__(self):
        super().__init__()
        self.stem.forward = types.MethodType(lambda stem, x: 2 * F.conv2d(x, stem.weight), self.stem)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


class PoolsChannels(ReadsAttribute):
    def forward(self, x):
        return self.head(F.avg_pool2d(self.stem(x).permute(0, 2, 3, 1), 3, 1, 1).mean((1, 2)))


class PadsChannels(ReadsAttribute):
    def forward(self, x):
        return self.head(F.pad(self.stem(x), (0, 0, 0, 0, 2, 2))[:, 2:-2].mean((2, 3)))


class OwnNames(ReadsAttribute):
    def __init__(self):
        super().__init__()
        self.layout = 'NCHW'


@pytest.mark.parametrize('kind, why', [
    (ReadsAttribute, 'its code contains or reads numbers of channels'),
    (UsesTensor, "module 'stem' of type Conv2d, which has its tensors used by the code of 'the network'"),
    (CosineHead, "module 'head' of type Linear, which has its tensors used by the code of 'the network'"),
    (OwnForward, "module 'stem' of type Conv2d, which has a forward method of its own"),
    (PoolsChannels, 'which applies avg_pool2d, an operator'),
    (PadsChannels, r'which changes the number of channels \(constant_pad_nd\)'),
    (OwnNames, r'OwnNames has attributes with names that a super-network needs \(layout\)'),
])
def test_code_that_knows_its_layers(kind, why):
    with pytest.raises(ValueError, match=f'NetAug cannot augment this model: .*{why}'):
        augment(own(kind), CONFIG, example_input=images(2, 32))


@pytest.mark.parametrize('mults', [(1,), (1, 2)])
def test_exactness_is_checked_whatever_the_config(mults):
    """A config that widens nothing leaves nothing unchecked for the next one."""
    for config in (NetAugConfig(width_mults=mults, expand_mults=mults), CONFIG):
        with pytest.raises(ValueError, match='contains or reads numbers of channels'):
            augment(own(ReadsAttribute), config, example_input=images(2, 32))


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.out, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.out(self.same(self.same(x))))


def test_a_layer_that_reads_what_it_writes():
    assert_exact(supernet_of(nn.Sequential(own(Again), nn.Conv2d(4, 4, 1))))


@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile, lambda m: torch.jit.trace(m, images(2, 32))])
def test_wrappers_are_refused(wrap):
    with pytest.raises(ValueError, match='takes the module inside'):
        augment(wrap(own(Again)), example_input=images(2, 32))


def test_example_input_without_tensors():
    with pytest.raises(ValueError, match='example_input must be a tensor'):
        augment(own(), example_input=(2, 3, 32, 32))


def test_wrong_number_of_channels_is_refused_as_by_the_stock_network():
    supernet = supernet_of(own())
    for channels in (1, 4):
        with pytest.raises(RuntimeError, match='channels'):
            supernet(torch.zeros(2, channels, 32, 32))


def test_criterion_with_parameters():
    """Its gradient is that of both losses, also where the network's gradient could be taken ahead."""
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output, target):
            return self.scale * output[0].square().mean()

    grads = []
    for early in (False, True):
        criterion = Scaled()
        NetAugTask(supernet_of(own()), criterion, early_backward=early, verbose=False)(
            images(2, 32), None)['loss'].backward()
        grads.append(criterion.scale.grad)
    assert grads[0] == grads[1] > 0


def test_in_inference_mode():
    with torch.inference_mode():
        supernet = augment(own(), CONFIG, example_input=images(2, 32))
        assert len(supernet.layout.channels) == 6


class Odd:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize('forward, why', [
    (lambda self, x: Odd(Own.forward(self, x)), 'returns a Odd'),
    (lambda self, x: self.norm(self.stem(x)), 'has no channels between two layers'),
])
def test_refused_outputs(forward, why):
    model = own(type('Other', (Own,), dict(forward=forward)))
    with pytest.raises(ValueError, match=f'it is of type Other, which {why}'):
        augment(model, example_input=images(2, 32))


def test_what_only_reaches_the_output_is_no_obstacle():
    """Predictions may be reshaped, and probabilities taken of them: nothing behind them has weights."""
    class Reshaped(Own):
        def forward(self, x):
            near, far = super().forward(x)
            near = near.view(len(x), 2, 2, *near.shape[2:]).permute(0, 3, 4, 1, 2).reshape(len(x), -1, 2)
            return near.softmax(-1), torch.cat([far['deep'], x[:, :, ::4, ::4]], 1)

    supernet = supernet_of(own(Reshaped))
    assert supernet.layout.channels.keys() == supernet_of(own()).layout.channels.keys()
    assert_exact(supernet)


class Whitened(Own):
    """Layers that are not supported, and a stock norm, before the first convolution: no channels are lost there."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.InstanceNorm2d(3), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.GroupNorm(1, 3))

    def forward(self, x):
        return super().forward(self.before(x))


def test_layers_on_the_image_need_no_support():
    supernet = supernet_of(own(Whitened))
    assert supernet.layout.channels.keys() == supernet_of(own()).layout.channels.keys()
    assert_exact(supernet)


def test_channels_of_a_fixed_width_are_listed():
    class Returned(Own):
        def forward(self, x):
            return *super().forward(x), self.down(self.norm(self.stem(x)))

    model = own(Returned)
    fixed = supernet_of(model).layout.fixed
    assert fixed == {'down': 'the network returns them'}
    assert not supernet_of(own()).layout.fixed


def test_no_classifier():
    """What a model without classifier returns keeps its width."""
    supernet = augment(make('netaug_mbv2_tiny', num_classes=0), CONFIG)
    assert 'conv_head' not in supernet.layout.channels and len(supernet.layout.channels) > 20
    with supernet.sampled(generator()):
        assert supernet(images(2, 64)).shape == (2, 448)
    assert_exact(supernet, size=SIZE)


def test_registering_a_layer():
    """One decorated class makes another layer elastic."""
    class ScaledConv(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = own()
    model.down.__class__ = ScaledConv
    with pytest.raises(ValueError, match="'down' of type ScaledConv, which is not supported"):
        augment(model, example_input=images(2, 32))
    try:
        @register_elastic(ScaledConv)
        class ElasticScaledConv(layers.ElasticConv2d, ScaledConv):
            def forward(self, x):
                return 2 * layers.ElasticConv2d.forward(self, x)

        assert_exact(supernet_of(model))
    finally:
        del layers.ELASTIC[ScaledConv]


@pytest.mark.parametrize('op', ['hardtanh', 'relu', 'elu', 'hardsigmoid'])
def test_in_place_operators_without_a_tag(op):
    """An in-place operator counts as its counterpart, which PyTorch has tagged for longer (2.11 lacks `hardtanh_`)."""
    untagged = types.SimpleNamespace(tags=(), _overloadname='default', namespace='aten')
    assert graph._is_pointwise(untagged, op)
    assert not graph._is_pointwise(untagged, 'softmax')
    untagged.namespace = 'another_library'
    assert not graph._is_pointwise(untagged, op)


def test_traced_once(monkeypatch):
    """A second model that computes the same is not traced again; another one is."""
    make_model = lambda **kwargs: timm.create_model('lcnet_035', num_classes=7, **kwargs)  # noqa: E731
    first = augment(make_model())

    def fail(*args):
        raise AssertionError('traced')

    monkeypatch.setattr(graph, '_Tracer', fail)
    second = augment(make_model())
    assert second.layout is first.layout
    for other in (make_model(in_chans=1), make_model(act_layer='relu')):
        with pytest.raises(AssertionError, match='traced'):
            augment(other)
    changed = make_model()
    changed.blocks[0][0].has_skip = True
    with pytest.raises(AssertionError, match='traced'):
        augment(changed)


def test_two_super_networks():
    """Each is sampled by itself; a task, which trains one, says so."""
    model = nn.Sequential(own(Residual, channels=3, inner=4), own(Residual, channels=3, inner=6))
    for i in range(2):
        model[i] = augment(model[i], CONFIG, example_input=images(2, 32))
    with pytest.raises(ValueError, match="must have one super-network, found '0', '1'"):
        NetAugTask(model)
    with pytest.raises(ValueError, match='is a super-network already'):
        augment(model, example_input=images(2, 32))


def test_checkpointing_of_any_network():
    """Recomputed activations give the same gradients, and every block with two convolutions is recomputed."""
    model = supernet_of(own()).train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert type(model.blocks[0]).__name__ == ('ResidualRecomputed' if enable else 'Residual')
        with model.sampled(generator(3)):
            loss = sum(t.square().mean() for t in tensors(model(images(2, 32))))
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert type(export(model).blocks[0]) is Residual


def test_frozen_layers_stay_frozen():
    """requires_grad is kept, and the optimizer of the unfrozen rest can be sorted with it."""
    model = make('netaug_mbv3_035')
    model.blocks[3].requires_grad_(False)
    supernet = augment(model, CONFIG).train()
    assert not any(p.requires_grad for p in supernet.blocks[3].parameters())
    optimizer = create_optimizer_v2(supernet, 'sgd', lr=0.01, momentum=0.9)
    NetAugTask(supernet, verbose=False)(images(2, 64), torch.tensor([1, 2]))['loss'].backward()
    optimizer.step()
    supernet.sort_channels(optimizer)
    assert not any(p.requires_grad for p in export(supernet).blocks[3].parameters())
    assert any(isinstance(m, BatchNormAct2d) for m in supernet.blocks[3].modules())
