"""The shared trunk: a step that computes it once is the step that computes it twice, with the trunk's widths kept."""
import copy
import pickle
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from conftest import MODELS, SMALL_RUN, generator, images, make, randomise, run_python
from timm_netaug import NetAugConfig, NetAugTask, augment, export, init_weights
from timm_netaug.task import step_generator
from timm_netaug.trunk import SharedTrunk, stage_names

SIZE = 48  # pixels, of which stride 32 leaves 2 x 2
X, Y = images(4, SIZE, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
CONFIG = dict(width_mults=(1, 1.3, 1.6), expand_mults=(1, 1.4, 1.8))  # narrow: none of what follows is about widths


def supernet_of(name='netaug_mbv2_tiny', from_stage=3, shared=True, **kwargs):
    config = NetAugConfig(from_stage=from_stage, **CONFIG)
    supernet = randomise(augment(make(name, **kwargs), config), 1).double().train()
    if not shared:
        supernet.netaug_trunk.unwatch(supernet)
    return supernet


def step(supernet, **kwargs):
    """Return what a training step reports, its gradients, and the buffers after it."""
    task = NetAugTask(supernet, verbose=False, **kwargs)
    result = task(X, Y)
    result['loss'].backward()
    return result, {n: p.grad for n, p in supernet.named_parameters()}, dict(supernet.named_buffers())


def assert_same(one, other):
    """Losses and statistics to the last bit; gradients but for the order of a sum, in float64."""
    assert all(torch.equal(one[0][k], other[0][k]) for k in one[0])
    largest = max(g.abs().max() for g in one[1].values() if g is not None)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert (grad is None) == (other[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, other[1][name], rtol=0, atol=1e-12 * largest.item())
    assert all(torch.equal(one[2][k], other[2][k]) for k in one[2])


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
@pytest.mark.parametrize('name, from_stage', [
    *((name, 3) for name in MODELS), ('netaug_mbv2_tiny', 1), ('netaug_mbv2_tiny', 'blocks.3.1')])
def test_same_step(name, from_stage, early):
    want = step(supernet_of(name, from_stage, shared=False))
    assert_same(want, step(supernet_of(name, from_stage), early_backward=early))


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
@pytest.mark.parametrize('name, kwargs', [
    ('resnet18', dict(channels=(16, 32, 64, 128))), ('test_efficientnet', {}), ('mobileone_s0', {})],
    ids=['resnet18', 'test_efficientnet', 'mobileone_s0'])
def test_same_step_of_other_networks(name, kwargs, early):
    want = step(supernet_of(name, 2, shared=False, **kwargs))
    assert_same(want, step(supernet_of(name, 2, **kwargs), early_backward=early))


@pytest.mark.parametrize('kwargs', [dict(distill=0.5), dict(alpha=0.3, every=2), dict(stop_width_at=0.0)], ids=str)
def test_same_step_with_settings(kwargs):
    assert_same(step(supernet_of(shared=False), **kwargs), step(supernet_of(), **kwargs))


def test_same_step_with_a_teacher():
    tasks = [step(supernet_of(shared=shared), teacher=make('test_efficientnet').double()) for shared in (False, True)]
    assert_same(*tasks)


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
def test_same_step_with_checkpointing(early):
    """Recomputed blocks of the trunk, and of both tails."""
    supernet = supernet_of()
    supernet.set_grad_checkpointing()
    assert_same(step(supernet_of(shared=False)), step(supernet, early_backward=early))


def test_same_step_in_mixed_precision():
    """Losses to the last bit; gradients are summed in bfloat16 at the branch, so they agree to its precision."""
    results = []
    for shared in (False, True):
        supernet = supernet_of(shared=shared).float()
        with torch.autocast('cpu', torch.bfloat16):
            result = NetAugTask(supernet, verbose=False)(X.float(), Y)
        result['loss'].backward()
        results.append((result['loss'], supernet.blocks[1][0].conv_pw.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*(grad for _, grad in results), rtol=0, atol=0.03 * results[0][1].abs().max().item())


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
def test_same_accumulated_gradients(early):
    results = []
    for shared in (False, True):
        supernet = supernet_of(shared=shared)
        task = NetAugTask(supernet, verbose=False, early_backward=early and shared)
        for seed in range(2):
            result = task(images(4, SIZE, seed, dtype=torch.float64), Y)
            (result['loss'] / 2).backward()
        grads = {n: p.grad for n, p in supernet.named_parameters()}
        results.append((result, grads, dict(supernet.named_buffers())))
    assert_same(*results)


def test_trunk_runs_once():
    """Forward and backward; and the trunk keeps the tiny network's widths."""
    supernet = supernet_of()
    calls, backward_calls = [], []
    for name in supernet.netaug_trunk.names:
        module = supernet.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, forward=forward, name=name: calls.append(name) or forward(*args)
    for p in [supernet.conv_stem.weight, supernet.blocks[2][0].conv_pw.weight]:
        p.register_hook(lambda grad: backward_calls.append(grad.shape))
    step(supernet)
    assert calls == ['conv_stem', 'bn1', 'blocks.0', 'blocks.1', 'blocks.2'] and len(backward_calls) == 2
    tiny = supernet.layout.tiny
    tails = ('blocks.3', 'blocks.4', 'blocks.5', 'blocks.6', 'conv_head')
    assert tiny and all(name.startswith(tails) for name in tiny)
    assert supernet.conv_stem.weight.shape[0] == 16


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
def test_batch_fraction(early):
    """The trunk sees the whole batch, the augmented tail the leading images of what the trunk computed."""
    supernet, plain = supernet_of(), supernet_of()
    result, grads, _ = step(supernet, batch_fraction=0.5, early_backward=early)
    with plain.shared_trunk() as trunk:
        output = plain(X)
        (count, kept), = trunk.outputs['blocks.2']
        with plain.active(plain.sample_widths(step_generator(42, 0))):
            aug = plain(X[:2])
    assert count == kept.shape[0] == 4 and aug.shape[0] == 2 and len(output) == 4
    loss = nn.functional.cross_entropy(output, Y) + nn.functional.cross_entropy(aug, Y[:2])
    assert torch.equal(result['loss'].detach(), loss.detach())
    loss.backward()
    largest = max(p.grad.abs().max() for p in plain.parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=0, atol=1e-12 * largest.item())


class Detector(nn.Module):
    """A module with weights before and behind its backbone."""

    def __init__(self):
        super().__init__()
        self.before = nn.Conv2d(3, 3, 1)
        self.backbone = timm.create_model('tf_efficientnet_lite0', features_only=True, out_indices=(2, 3, 4))
        self.neck = nn.ModuleList([nn.Conv2d(c, 8, 1) for c in self.backbone.feature_info.channels()])

    def forward(self, x):
        return [neck(f) for neck, f in zip(self.neck, self.backbone(self.before(x)))]


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
def test_inside_a_detector(early):
    """The branch lies behind the first feature map, which goes to the neck, too."""
    results = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = randomise(Detector())
        model.backbone = randomise(augment(model.backbone, NetAugConfig(from_stage=3, **CONFIG)), 1)
        model.double().train()
        if not shared:
            model.backbone.netaug_trunk.unwatch(model.backbone)
        task = NetAugTask(model, lambda output, _: sum(t.square().mean() for t in output), verbose=False,
                          early_backward=early and shared)
        result = task(X, None)
        result['loss'].backward()
        del result['output']
        results.append((result, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    assert_same(*results)


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
def test_distributed(early, tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        want = step(supernet_of())
        supernet = supernet_of()
        task = NetAugTask(supernet, verbose=False, early_backward=early).prepare_distributed()
        assert isinstance(task.trainable_module, DistributedDataParallel)
        result = task(X, Y)
        result['loss'].backward()
        got = result, {n: p.grad for n, p in supernet.named_parameters()}, dict(supernet.named_buffers())
        assert_same(want, got)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
def test_compiled(early):
    """The tiny pass is compiled once, whatever the augmented one's widths."""
    want = step(supernet_of('test_efficientnet', 2))
    supernet = supernet_of('test_efficientnet', 2)
    task = NetAugTask(supernet, verbose=False, early_backward=early)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    task.compile(backend=backend)
    for _ in range(2):
        supernet.zero_grad()
        supernet.load_state_dict(supernet_of('test_efficientnet', 2).state_dict())
        task.start_update(0)
        result = task(X, Y)
        result['loss'].backward()
        count = len(graphs)
    assert graphs and count == len(graphs)
    assert_same(want, (result, {n: p.grad for n, p in supernet.named_parameters()}, dict(supernet.named_buffers())))
    task.start_update(1)
    task(X, Y)
    assert count == len(graphs)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), export],
                         ids=['copy', 'pickle', 'export'])
@pytest.mark.parametrize('inside', [False, True], ids=['at rest', 'within the block'])
def test_copies(copied, inside):
    """They remember nothing, share nothing with the model, and an export has no hooks."""
    supernet = supernet_of()
    with supernet.shared_trunk() if inside else nullcontext():
        output = supernet(X)
        twin = copied(supernet)
    assert torch.equal(twin(X), output)
    if copied is export:
        assert not any(m._forward_hooks for m in twin.modules()) and not hasattr(twin, 'trunk')
        return
    assert isinstance(twin.netaug_trunk, SharedTrunk) and twin.netaug_trunk is not supernet.netaug_trunk and not twin.netaug_trunk.outputs
    assert twin.netaug_trunk.names == supernet.netaug_trunk.names
    assert_same(step(supernet_of()), step(supernet_of()))
    with twin.shared_trunk() as trunk:
        twin(X)
        assert set(trunk.outputs) == set(trunk.names) and not supernet.netaug_trunk.outputs
    assert not trunk.outputs


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), export],
                         ids=['copy', 'pickle', 'export'])
def test_copies_made_in_an_augmented_pass(copied):
    """They are the tiny network, and compute their trunk."""
    supernet = supernet_of().eval()
    want = supernet(3 * X)
    with supernet.shared_trunk():
        supernet(X)
        with supernet.sampled(generator()):
            twin = copied(supernet)
    assert torch.equal(twin.eval()(3 * X), want)
    assert not any('forward' in vars(m) for m in twin.modules())


def test_an_error_leaves_nothing_behind():
    supernet = supernet_of()
    with pytest.raises(KeyError):
        with supernet.shared_trunk():
            supernet(X)
            with supernet.sampled(generator()):
                assert 'forward' in vars(supernet.conv_stem)
                raise KeyError
    assert not any('forward' in vars(m) for m in supernet.modules()) and not supernet.netaug_trunk.outputs
    assert_same(step(supernet_of()), step(supernet_of()))


@pytest.mark.parametrize('from_stage, why', [
    (7, 'EfficientNet has the stages 0 to 6'),
    ('head', "'head' is not a module of EfficientNet. Name a module, such as 'blocks.0'"),
    ('conv_stem', 'no module lies before it. The nearest modules before which it can branch: '),
    ('blocks.2.1.conv_pwl', r"2 activations cross it .*nearest modules.*'blocks.2.2'"),
])
def test_refused_branches(from_stage, why):
    with pytest.raises(ValueError, match=f'from_stage.*{why}'):
        augment(make('netaug_mbv2_tiny'), NetAugConfig(from_stage=from_stage))


@pytest.mark.parametrize('from_stage', [-1, 1.5, '', True, None])
def test_refused_settings(from_stage):
    with pytest.raises(ValueError, match='NetAugConfig.from_stage must be the number of a stage'):
        NetAugConfig(from_stage=from_stage)


def test_a_network_without_stages():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 9, 3)
            self.norm, self.head = nn.BatchNorm2d(9), nn.Conv2d(9, 4, 1)

        def forward(self, x):
            return self.head(self.norm(self.out(self.body(self.stem(x)).relu())).relu())

    with pytest.raises(ValueError, match='Own has no stages. Give the name of a module'):
        augment(Own(), NetAugConfig(from_stage=1), example_input=images(2, 32))
    supernet = augment(Own(), NetAugConfig(from_stage='out'), example_input=images(2, 32))
    assert list(supernet.layout.channels) == ['out'] and supernet.netaug_trunk.names == ['stem', 'body']


def test_overwritten_activation_is_refused():
    """A branch whose activation the tail changes in place would hand the augmented pass another one."""
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.out, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 9, 3), nn.Conv2d(9, 4, 1)

        def forward(self, x):
            return self.head(self.out(self.stem(x).relu_()))

    with pytest.raises(ValueError, match="the output of 'stem' is overwritten after it"):
        augment(InPlace(), NetAugConfig(from_stage='out'), example_input=images(2, 32))


@pytest.mark.parametrize('name, stages', [
    ('netaug_mbv2_tiny', [f'blocks.{i}' for i in range(7)]), ('resnet18', [f'layer{i}' for i in range(1, 5)])])
def test_stages(name, stages):
    assert stage_names(make(name)) == stages


def test_initial_weights():
    """Those of a super-network's tiny network, with and without a trunk; the trunk is initialised, too."""
    starts = []
    for config in (NetAugConfig(), NetAugConfig(from_stage=3)):
        model, other = make('netaug_mbv2_tiny'), make('netaug_mbv2_tiny')
        torch.manual_seed(1)
        init_weights(model, config)
        torch.manual_seed(1)
        supernet = augment(other, config)
        supernet.init_weights()
        want = export(supernet).state_dict()
        assert all(torch.equal(model.state_dict()[k], v) for k, v in want.items())
        starts.append(want['blocks.1.0.conv_pw.weight'].std())
    assert starts[1] > 1.2 * starts[0]  # the fan-in of a trunk is not augmented
    trunk = augment(make('netaug_mbv2_tiny'), NetAugConfig(from_stage=3))
    before = trunk.conv_stem.weight.clone()
    trunk.init_weights()
    bound = (3 * 9) ** -0.5  # Kaiming-uniform, a = sqrt 5: 1 / sqrt(fan-in)
    assert not torch.equal(trunk.conv_stem.weight, before) and 0.9 * bound < trunk.conv_stem.weight.abs().max() <= bound


def test_script(few_digits, tmp_path):
    """A run that is resumed ends as one that was not, to the last bit; another branch is refused by name."""
    command = ['train.py', '--data-dir', few_digits, *SMALL_RUN, '-b', 60, '-j', 0, '--netaug', '--model-ema',
               '--netaug-from-stage', 2, '--epochs', 2, '--save-epochs', 1, '--output', tmp_path]
    done = run_python(*command, '--experiment', 'whole')
    assert 'NetAug from_stage: 2' in done.stderr
    first = tmp_path / 'whole/milestone-1.pth.tar'
    run_python(*command, '--experiment', 'resumed', '--resume', first, fork=False)
    whole, resumed = (torch.load(tmp_path / n / 'last.pth.tar', weights_only=False) for n in ('whole', 'resumed'))
    assert whole['state_dict'].keys() == timm.create_model('test_efficientnet', num_classes=10).state_dict().keys()
    for part in ('state_dict', 'state_dict_ema'):
        assert all(v.is_contiguous() for v in whole[part].values()), 'safetensors takes no other tensors'
        assert all(torch.equal(whole[part][k], v) for k, v in resumed[part].items())
    done = run_python(*command, '--netaug-from-stage', 1, '--experiment', 'other', '--resume', first, check=False)
    assert done.returncode == 1 and 'from_stage' in done.stderr and 'Traceback' not in done.stderr
    done = run_python(*command, '--netaug-from-stage', 9, '--experiment', 'none', check=False)
    assert done.returncode == 1 and '--netaug: from_stage=9: EfficientNet has the stages 0 to' in done.stderr


class Stem(nn.Module):
    """A stem that is written out, stages, and what a subclass does between them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        for i in (1, 2):
            setattr(self, f'layer{i}', self.stage())
        self.head = nn.Conv2d(8, 4, 1)

    def stage(self):
        return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, x):
        return self.head(self.second(self.layer1(nn.functional.relu(self.bn1(self.conv1(x))))))

    def second(self, x):
        return self.layer2(x)


class Tuple(Stem):
    class Two(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x.shape[0]

    def stage(self):
        return Tuple.Two(*super().stage())

    def second(self, x):
        return self.layer2(x[0])[0]


class Position(Stem):
    """A stage has an argument whose first dimension is not the batch."""
    class Shifted(nn.Sequential):
        def forward(self, x, shift=0):
            return super().forward(x + shift)

    def stage(self):
        return Position.Shifted(*super().stage())

    def forward(self, x):
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x, torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device).view(1, 1, 1, -1))
        return self.head(self.layer2(x))


class Overwritten(Stem):
    def second(self, x):
        x.flatten(2).mul_(2)
        return self.layer2(x)


class Identical(Stem):
    """One activation leaves the trunk through two modules."""

    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def second(self, x):
        return self.layer2(self.same(x)) + x


class Stashed(Stem):
    """An activation leaves the trunk from within a module."""
    class Keeps(nn.Sequential):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept * 2

    def stage(self):
        return Stashed.Keeps(*super().stage())

    def second(self, x):
        return self.layer2(x) + self.layer1.kept


def own(kind):
    torch.manual_seed(0)
    return randomise(kind())


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
@pytest.mark.parametrize('kind', [Stem, Tuple, Position])
def test_own_networks(kind, early):
    results = []
    for shared in (False, True):
        supernet = augment(own(kind), NetAugConfig(from_stage=1), example_input=images(2, 16))
        randomise(supernet, 1).double().train()
        if not shared:
            supernet.netaug_trunk.unwatch(supernet)
        task = NetAugTask(supernet, lambda o, _: o.square().mean(), verbose=False, early_backward=early and shared)
        result = task(X[..., :16, :16], None)
        result['loss'].backward()
        results.append((result, {n: p.grad for n, p in supernet.named_parameters()}, dict(supernet.named_buffers())))
    assert_same(*results)


@pytest.mark.parametrize('kind, why', [
    (Overwritten, "the output of 'layer1' is overwritten after it"),
    (Identical, r'1 activations cross it \(layer1, same\)'),
    (Stashed, r'2 activations cross it \(layer1, of modules within\)'),
])
def test_own_networks_that_cannot_branch(kind, why):
    with pytest.raises(ValueError, match=why):
        augment(own(kind), NetAugConfig(from_stage=1), example_input=images(2, 16))


@pytest.mark.parametrize('early', [False, True], ids=['one backward pass', 'early'])
def test_hooks_of_a_feature_extractor(early):
    """They see what the tiny pass goes on from; a feature map from within the trunk is refused."""
    results = []
    for shared in (False, True):
        model = make('tf_efficientnet_lite0', features_only=True, out_indices=(2, 3, 4), num_classes=None,
                     feature_cfg=dict(feature_cls='hook'))
        supernet = randomise(augment(model, NetAugConfig(from_stage=3, **CONFIG)), 1).double().train()
        if not shared:
            supernet.netaug_trunk.unwatch(supernet)
        task = NetAugTask(supernet, lambda o, _: sum(f.square().mean() for f in o), verbose=False,
                          early_backward=early and shared)
        result = task(X, None)
        result['loss'].backward()
        assert len(result.pop('output')) == 3
        results.append((result, {n: p.grad for n, p in supernet.named_parameters()}, dict(supernet.named_buffers())))
    assert_same(*results)
    inner = timm.create_model('tf_efficientnet_lite0', features_only=True, feature_location='expansion')
    with pytest.raises(ValueError, match='activations cross it .*of modules within'):
        augment(inner, NetAugConfig(from_stage=3))


def test_checkpointing_that_is_on_already():
    model = make('mobilenetv2_035')
    model.set_grad_checkpointing(True)
    supernet = augment(model, NetAugConfig(from_stage=3))
    assert supernet.netaug_trunk.names == ['conv_stem', 'bn1', 'blocks.0', 'blocks.1', 'blocks.2']
