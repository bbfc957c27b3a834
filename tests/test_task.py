"""The task: the two losses, what it saves, and that its sub-network is a function of seed and step."""
import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import CheckpointSaver

import timm_netaug
from conftest import MODELS, OTHERS, generator, images, make, make_supernet
from timm_netaug import NetAugConfig, NetAugTask
from timm_netaug.task import distillation_loss, step_generator

NARROW = dict(width_mults=(1, 1.3, 1.6), expand_mults=(1, 1.4, 1.8))  # where nothing is about widths


def labels(batch=4):
    return torch.randint(10, (batch,), generator=generator())


def make_task(name='netaug_mbv2_tiny', config={}, **kwargs):
    shape = {k: v for k, v in config.items() if k in NetAugConfig.__dataclass_fields__}
    training = {k: v for k, v in config.items() if k not in shape}
    return NetAugTask(make_supernet(name, shape).train(), verbose=False, **training, **kwargs)


@pytest.mark.parametrize('name', MODELS)
def test_losses(name):
    task = make_task(name, dict(alpha=0.3, **NARROW), seed=5)
    x, y = images(), labels()
    task.start_update(17)
    tiny = timm_netaug.export(task.supernet).train()
    with task.supernet.sampled(step_generator(5, 17)) as widths:
        wide = timm_netaug.export(task.supernet, widths).train()
    result = task(x, y)
    assert torch.equal(result['output'], tiny(x))
    assert torch.equal(result['tiny_loss'], F.cross_entropy(tiny(x), y))
    assert torch.equal(result['aug_loss'], F.cross_entropy(wide(x), y))
    assert torch.equal(result['loss'], result['tiny_loss'] + 0.3 * result['aug_loss'])
    result['loss'].backward()
    assert all(p.grad is not None for p in task.supernet.parameters())
    assert torch.equal(task.supernet(x), timm_netaug.export(task.supernet).train()(x))  # the tiny network again


def sampled_widths(task, step):
    seen = []
    active = task.supernet.active

    def spy(widths):
        seen.append(widths)
        return active(widths)

    task.supernet.active = spy
    task.start_update(step)
    task(images(2, 32), labels(2))
    del task.supernet.__dict__['active']
    return seen[0]


def test_sampling_is_a_function_of_seed_and_step():
    one, two, other = make_task(seed=1), make_task(seed=1), make_task(seed=2)
    first = [sampled_widths(one, step) for step in range(6)]
    torch.manual_seed(99)
    assert [sampled_widths(two, step) for step in reversed(range(6))] == first[::-1]
    assert len({tuple(w.values()) for w in first}) == 6
    assert [sampled_widths(other, step) for step in range(6)] != first


def test_schedule():
    task = make_task(config=dict(stop_width_at=0.5))
    tiny = task.supernet.layout.tiny
    heads, orders = [], []
    sort = task.supernet.sort_channels
    task.supernet.sort_channels = lambda optimizer=None: orders.append(optimizer) or sort(optimizer)
    optimizer = torch.optim.SGD(task.supernet.parameters(), lr=0.1)
    for epoch in range(4):
        task.start_epoch(epoch, 4, optimizer)
        heads.append({sampled_widths(task, s)['conv_head'] for s in range(8)})
    assert [len(h) > 1 for h in heads] == [True, True, False, False]
    assert heads[3] == {tiny['conv_head']}
    assert orders == [optimizer]  # in epoch 1 alone; before epoch 0 there is nothing to rank
    for config in (dict(sort=False), dict(stop_width_at=0.0)):
        task = make_task(config=config)
        before = task.supernet.blocks[1][0].conv_pw.weight.clone()
        task.start_epoch(1, 4, optimizer)
        assert torch.equal(before, task.supernet.blocks[1][0].conv_pw.weight)


@pytest.mark.parametrize('name', MODELS + OTHERS[:2])
def test_checkpoint_is_the_stock_tiny_model(name, tmp_path):
    task = make_task(name, dict(alpha=0.5, **NARROW))
    optimizer = torch.optim.SGD(task.supernet.parameters(), lr=0.1, momentum=0.9)
    task.setup_ema(decay=0.5)
    for epoch in range(2):
        task.start_epoch(epoch, 4, optimizer)
        task(images(), labels())['loss'].backward()
        optimizer.step()
        task.update_ema()
    saver = CheckpointSaver(task.supernet, optimizer, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    file = tmp_path / 'last.pth.tar'
    stock = timm.create_model(name, num_classes=10, checkpoint_path=str(file)).eval()
    x = images()
    assert torch.equal(stock(x), task.get_eval_model(ema=True).eval()(x))  # timm prefers the EMA where there is one
    saved = torch.load(file, weights_only=True)
    assert saved['task_state']['netaug'] == {
        **task.supernet.netaug_config.to_dict(), **task.training_config.to_dict()}
    assert saved['state_dict'].keys() == stock.state_dict().keys()

    other = make_task(name, dict(alpha=0.5, **NARROW))
    other.setup_ema(decay=0.5)
    timm.task.resume_task_checkpoint(other, str(file), log_info=False)
    timm.task.load_task_ema_checkpoint(other, str(file))
    for ema in (False, True):
        a, b = (unwrapped(t, ema).state_dict() for t in (task, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert other.supernet.batches_since_sort == task.supernet.batches_since_sort == 1


def unwrapped(task, ema):
    return timm.utils.unwrap_model(task.get_trainable_module(ema=ema))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match='augment'):
        NetAugTask(make('netaug_mcunet'))
    supernet = make_supernet('netaug_mcunet')
    for wrong, said in ((dict(temperature=0.), 'a temperature above 0'), (dict(seed=-1), 'a seed of at least 0'),
                        (dict(task_loss_weight=3.), 'needs distill_loss_weight'),
                        (dict(teacher=supernet), 'the teacher is the model itself')):
        with pytest.raises(ValueError, match=said):
            NetAugTask(supernet, verbose=False, **wrong)
    assert all(p.requires_grad for p in supernet.parameters())
    task = make_task()
    state = task.get_checkpoint_state()
    with pytest.raises(ValueError, match='no super-network.*--initial-checkpoint'):
        task.load_checkpoint_state(state['state_dict'])
    with pytest.raises(ValueError, match='divisor is 1 there and 8 here'):
        make_task(config=dict(divisor=8)).load_checkpoint_state(**state)


def make_teacher(**cfg):
    """A teacher of another architecture, with a normalisation of its own, that counts its forward passes."""
    model = make('test_resnet')
    model.pretrained_cfg.update(cfg)
    teacher = DistillationTeacher(model)
    teacher.calls = []
    model.register_forward_hook(lambda module, args, output: teacher.calls.append((args[0], output)))
    return teacher


@pytest.mark.parametrize('weights, want', [
    (dict(), (1, 1)), (dict(task_loss_weight=0.3), (0.3, 0.7)), (dict(distill_loss_weight=2.0), (1, 2)),
    (dict(task_loss_weight=0.5, distill_loss_weight=3.0), (0.5, 3)),
])
def test_teacher(weights, want):
    """Both sub-networks learn from one pass of the teacher; without the augmented one it is timm's own distillation."""
    x, y = images(), labels()
    teacher = make_teacher(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    task = make_task(config=dict(alpha=0.5), teacher=teacher, temperature=3.0, seed=5, **weights)
    with task.supernet.sampled(step_generator(5, 0)) as widths:
        wide = timm_netaug.export(task.supernet, widths).train()
    tiny = timm_netaug.export(task.supernet).train()
    assert (task.task_loss_weight, task.distill_loss_weight) == pytest.approx(want)
    result = task(x, y)
    assert len(teacher.calls) == 1
    seen, logits = teacher.calls[0]
    mean, std = (torch.tensor(tiny.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    torch.testing.assert_close(seen, (x * std + mean - teacher.mean_kd) / teacher.std_kd)
    for stock, loss in ((tiny, 'tiny_loss'), (wide, 'aug_loss')):
        own = LogitDistillationTask(
            stock, teacher, criterion=torch.nn.CrossEntropyLoss(), temperature=3.0, verbose=False, **weights)(x, y)
        assert torch.equal(result[loss], own['loss'].detach())
        if loss == 'tiny_loss':
            assert torch.equal(result['kd_loss'], own['kd_loss'].detach())
    assert torch.equal(result['loss'], result['tiny_loss'] + 0.5 * result['aug_loss'])
    result['loss'].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not task.train().teacher.model.training
    assert not any(k.startswith('teacher') for k in task.get_task_state()['supernet'])


def test_in_situ_distillation():
    """The augmented sub-network teaches the tiny one, and learns nothing from it; no further forward pass."""
    x, y = images(), labels()
    passes = []
    task = make_task(config=dict(distill=0.7), temperature=2.0, seed=5)
    task.supernet.register_forward_hook(lambda *args: passes.append(args[2]))
    result = task(x, y)
    assert len(passes) == 2
    tiny, wide = passes[0].detach(), passes[1].detach()
    want = F.kl_div((tiny / 2).log_softmax(1), (wide / 2).softmax(1), reduction='batchmean') * 4
    torch.testing.assert_close(result['distill_loss'], want)
    assert torch.equal(result['loss'], result['tiny_loss'] + result['aug_loss'] + 0.7 * result['distill_loss'])
    result['loss'].backward()
    got = [p.grad.clone() for p in task.supernet.parameters()]
    task.supernet.zero_grad()
    plain = make_task(seed=5)
    plain.supernet.register_forward_hook(lambda *args: passes.append(args[2]))
    passes.clear()
    loss = plain(x, y)['loss']
    log_p, log_q = ((logits / 2).log_softmax(1) for logits in (passes[0], wide))
    (loss + 0.7 * F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * 4).backward()
    for one, p in zip(got, plain.supernet.parameters()):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-6)


def test_part_of_the_batch():
    """The augmented sub-network sees the first images alone, the tiny one all of them."""
    x, y = images(6), labels(6)
    teacher = make_teacher()
    task = make_task(config=dict(batch_fraction=0.5, distill=1.0), teacher=teacher, seed=5)
    with task.supernet.sampled(step_generator(5, 0)) as widths:
        wide = timm_netaug.export(task.supernet, widths).train()
    tiny = timm_netaug.export(task.supernet).train()
    result = task(x, y)
    # The teacher has seen the whole batch; over half of it, some machines sum in another order.
    output, (_, logits) = wide(x[:3]), *teacher.calls
    own = F.cross_entropy(output, y[:3]) + distillation_loss(output, logits[:3], 4.0)
    assert torch.equal(result['output'], tiny(x))
    assert torch.equal(result['aug_loss'], own.detach())
    want = distillation_loss(result['output'][:3], output, 4.0)
    torch.testing.assert_close(result['distill_loss'], want.detach())
    seen = []
    task = make_task(config=dict(batch_fraction=0.01))
    task.supernet.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    task(x, y)
    assert seen == [6, 2]


@pytest.mark.parametrize('name', MODELS + OTHERS[:2])
def test_early_backward(name):
    """The tiny network's gradient, taken before the augmented pass, makes the same sums: to the last bit."""
    states = []
    for early in (False, True):
        task = make_task(name, NARROW, early_backward=early, seed=5)
        optimizer = torch.optim.SGD(task.supernet.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            loss = task(images(seed=step), labels())['loss']
            if step == 1:
                loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append({**task.supernet.state_dict(), 'loss': loss.detach()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize('steps', [3, 4])
def test_early_backward_scaled(steps):
    """A mean over accumulated steps: to the last bit for a power of two; else all gradients round otherwise, and those
    that are nothing but rounding (of a bias before another BatchNorm) differ by some last bits of the largest."""
    grads = []
    for early in (False, True):
        task = make_task(early_backward=early, seed=5)
        (task(images(), labels())['loss'] / steps).backward()
        grads.append([p.grad for p in task.supernet.parameters()])
    rtol, atol = (0, 0) if steps == 4 else (1e-4, 1e-6 * max(g.abs().max().item() for g in grads[0]))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_early_backward_with_hooks():
    """A parameter's hook sees one gradient in a step, whole."""
    task = make_task(early_backward=True)
    seen = []
    parameter = next(task.supernet.parameters())
    parameter.register_hook(lambda grad: seen.append(grad.clone()))
    task(images(), labels())['loss'].backward()
    assert len(seen) == 1 and torch.equal(seen[0], parameter.grad)


def test_early_backward_with_static_graph():
    """DistributedDataParallel counts on the same graph in every step, which a gradient taken ahead would cut in two."""
    task = make_task(early_backward=True)
    task.trainable_module.static_graph = True
    assert task(images(), labels())['output'].requires_grad
    loss = task(images(), labels())['loss']
    loss.backward()
    assert not any('KnownGradient' in type(f).__name__ for f, _ in loss.grad_fn.next_functions)


def test_early_backward_where_it_can_not_be():
    """Nothing is lost where the gradient is not to be taken ahead: by distillation, or of the second order."""
    grads = []
    for early in (False, True):
        task = make_task(config=dict(distill=1.0), early_backward=early, seed=5)
        task(images(), labels())['loss'].backward()
        grads.append([p.grad for p in task.supernet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    task = make_task(early_backward=True)
    with pytest.raises(RuntimeError, match='without early_backward'):
        task(images(), labels())['loss'].backward(create_graph=True)


def test_early_backward_frees_activations():
    """When the augmented pass begins, the tiny pass keeps nothing but its logits."""
    kept = {}
    for early in (False, True):
        task = make_task(early_backward=early)
        alive = weakref.WeakSet()
        task.supernet.bn1.register_forward_hook(lambda module, args, output: alive.add(output.untyped_storage()))
        active = task.supernet.active

        def spy(widths):
            gc.collect()
            kept[early] = len(alive)
            return active(widths)

        task.supernet.active = spy
        task(images(), labels())
    assert kept == {False: 1, True: 0}


def test_every_nth_step():
    """The mean gradient over n steps is that of training the augmented sub-network once with n-fold weight."""
    task = make_task(config=dict(every=3, alpha=0.5, distill=0.2), seed=5)
    passes = []
    task.supernet.register_forward_hook(lambda *args: passes.append(1))
    counts, results = [], []
    for step in range(6):
        task.start_update(step)
        passes.clear()
        results.append(task(images(), labels()))
        counts.append(len(passes))
    assert counts == [2, 1, 1, 2, 1, 1]
    assert [('aug_loss' in r, 'distill_loss' in r) for r in results] == [(c == 2, c == 2) for c in counts]
    r = results[0]
    torch.testing.assert_close(r['loss'], r['tiny_loss'] + 3 * (0.5 * r['aug_loss'] + 0.2 * r['distill_loss']))
    assert torch.equal(results[1]['loss'], results[1]['tiny_loss'])
    results[1]['loss'].backward()
    assert all(p.grad is not None for p in task.supernet.parameters())  # as DistributedDataParallel wants it


def test_compiled_tiny_pass():
    """What is static is compiled, once: widths and sorts bring nothing new to compile, and the numbers stay."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    tasks = [make_task('test_efficientnet', dict(stop_width_at=1.0), seed=5) for _ in range(2)]
    optimizers = [torch.optim.SGD(t.supernet.parameters(), lr=1e-5, momentum=0.9) for t in tasks]
    tasks[1].compile(backend=backend)
    compiled = []
    for epoch in range(2):
        for task, optimizer in zip(tasks, optimizers):
            task.start_epoch(epoch, 2, optimizer)
        for step in range(4 if epoch == 0 else 32):  # 19 steps after a sort count in another way
            for task, optimizer in zip(tasks, optimizers):
                task.start_update(step)
                optimizer.zero_grad()
                task(images(4, 32, seed=step), labels())['loss'].backward()
                optimizer.step()
            compiled.append(len(graphs))
    assert compiled[0] >= 1 and compiled[-1] == compiled[0]
    one, two = (t.supernet.state_dict() for t in tasks)
    assert all(torch.equal(one[k], two[k]) for k in one)
    stock = tasks[1].get_eval_model()
    assert type(stock) is timm.models.EfficientNet
    assert tasks[1].get_checkpoint_state()['state_dict'].keys() == stock.state_dict().keys()


def test_checkpoint_of_an_earlier_version(tmp_path):
    """A config field that a checkpoint does not know yet had its default."""
    task = make_task(config=dict(alpha=0.5))
    state = task.get_checkpoint_state()
    del state['task_state']['netaug']['every']
    make_task(config=dict(alpha=0.5)).load_checkpoint_state(**state)
    with pytest.raises(ValueError, match='every is 1 there and 2 here'):
        make_task(config=dict(alpha=0.5, every=2)).load_checkpoint_state(**state)


def test_ema_is_sorted_with_the_weights():
    """After a sort the average of every channel is that of the same channel."""
    task = make_task(config=dict(stop_width_at=1.0))
    task.setup_ema(decay=0.9)
    supernet, ema = task.supernet, unwrapped(task, True)
    with torch.no_grad():
        for p in supernet.parameters():
            p.add_(torch.randn(p.shape, generator=generator()))
    orders = {}
    sort = supernet.sort_channels
    supernet.sort_channels = lambda optimizer=None: orders.update(sort(optimizer)) or orders
    before = {k: t.clone() for k, t in ema.state_dict().items()}
    task.start_epoch(1, 4)
    moved = 0
    for name, axis in supernet.layout.axes.items():
        want = before[name]
        for dim, c in axis.items():
            if c.name in orders:
                want = want.index_select(dim, orders[c.name])
                moved += 1
        assert torch.equal(ema.state_dict()[name], want), name
    assert moved > 20


def test_second_order_through_checkpoints():
    """The repeated forward pass can be made more than once: for an optimizer of second order, say."""
    task = make_task()
    task.supernet.set_grad_checkpointing()
    loss = task(images(), labels())['loss']
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in task.supernet.parameters()]
    loss.backward()
    for first, p in zip(once, task.supernet.parameters()):
        torch.testing.assert_close(p.grad, 2 * first)
