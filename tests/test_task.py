"""The task: the two losses, what it saves, and that its sub-network is a function of seed and step."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import CheckpointSaver

import timm_netaug
from conftest import MODELS, OTHERS, generator, images, make, make_supernet
from timm_netaug import NetAugTask
from timm_netaug.task import step_generator


def labels(batch=4):
    return torch.randint(10, (batch,), generator=generator())


def make_task(name='netaug_mbv2_tiny', config={}, **kwargs):
    return NetAugTask(make_supernet(name, config).train(), verbose=False, **kwargs)


@pytest.mark.parametrize('name', MODELS)
def test_losses(name):
    task = make_task(name, dict(alpha=0.3), seed=5)
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
    task = make_task(name, dict(alpha=0.5))
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
    assert saved['task_state']['netaug'] == task.supernet.netaug_config.to_dict()
    assert saved['state_dict'].keys() == stock.state_dict().keys()

    other = make_task(name, dict(alpha=0.5))
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
    task = make_task()
    state = task.get_checkpoint_state()
    with pytest.raises(ValueError, match='no super-network.*--initial-checkpoint'):
        task.load_checkpoint_state(state['state_dict'])
    with pytest.raises(ValueError, match='divisor is 1 there and 8 here'):
        make_task(config=dict(divisor=8)).load_checkpoint_state(**state)
