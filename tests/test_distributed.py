"""Two and three processes on gloo, against one process that does the same over the shards in turn; and torchrun."""
import copy
import csv
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from conftest import NETAUG, ROOT, SMALL_RUN, run_python, run_ranks
from distributed_worker import STEPS, setup, shards

# Two numbers have one sum; the sum of three depends on the order that they arrive in, by a rounding each.
TOLERANCE = {2: 0.0, 3: 1e-6}


def largest(a, b):
    """The largest difference between two dicts of tensors, relative to the largest value of each."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-3)).item() for k in a)


@pytest.mark.parametrize('processes, accum, early', [(2, 1, 0), (2, 1, 1), (3, 1, 1), (2, 2, 1)])
def test_step(processes, accum, early, tmp_path):
    run_ranks(processes, 'tests/distributed_worker.py', tmp_path, accum, early)
    ranks = [torch.load(tmp_path / f'{r}.pt', weights_only=True) for r in range(processes)]

    # One process: a copy of the first rank's network for every shard, stepped with the mean of the gradients.
    tasks = [copy.deepcopy(setup()) for _ in range(processes)]
    optimizers = [torch.optim.SGD(t.parameters(), lr=0.01, momentum=0.9) for t in tasks]
    worst = 0.0
    for step, micro in enumerate(shards(processes, accum)):
        for batches in micro:
            for task, batch in zip(tasks, batches):
                task.start_update(step)
                (task(*batch)['loss'] / accum).backward()
        means = {k: sum(t.supernet.get_parameter(k).grad for t in tasks) / processes for k in ranks[0]['grads'][step]}
        for rank in ranks:
            assert all(torch.equal(rank['grads'][step][k], ranks[0]['grads'][step][k]) for k in means)
        worst = max(worst, largest(ranks[0]['grads'][step], means))
        for task, optimizer in zip(tasks, optimizers):
            for k, p in task.supernet.named_parameters():
                p.grad = ranks[0]['grads'][step][k].clone()  # so that a rounding is not carried on
            optimizer.step()
            optimizer.zero_grad()
    assert worst <= TOLERANCE[processes], worst

    assert all(r['widths'] == ranks[0]['widths'] for r in ranks)
    assert len({tuple(w.values()) for w in ranks[0]['widths']}) == STEPS and len(ranks[0]['widths']) == STEPS * accum
    for rank, task in zip(ranks, tasks):  # every rank's own statistics are those of its shard
        own = dict(task.supernet.named_buffers())
        assert all(torch.equal(own[k], rank['own'][k]) for k in own)
        assert all(torch.equal(rank['state'][k], ranks[0]['state'][k]) for k in rank['state'])
    means = {k: sum(r['own'][k] for r in ranks) / processes for k in ranks[0]['own'] if 'running' in k}
    assert len(means) > 60
    assert largest({k: ranks[0]['state'][k] for k in means}, means) <= TOLERANCE[processes]


@pytest.mark.parametrize('processes', [2, 3])
def test_train(processes, few_digits, tmp_path):
    """The whole script: every validation image counts once, and the first process alone writes."""
    command = ['train.py', '--data-dir', few_digits, *SMALL_RUN, *NETAUG, '-b', 20, '-j', 0, '--epochs', 2,
               '--save-epochs', 1]
    done = run_ranks(processes, *command, '--output', tmp_path, '--experiment', 'run')
    assert done.stdout.count('Best top1') == 1
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    assert [r['epoch'] for r in rows] == ['0', '1'] and [p.name for p in tmp_path.iterdir()] == ['run']
    images = len(list((few_digits / 'validation').glob('*/*.png')))
    assert images % processes
    done = run_python('validate.py', '--checkpoint', tmp_path / 'run/last.pth.tar', '--data-dir', few_digits, '-j', 0)
    result = json.loads(done.stdout[done.stdout.index('{'):])
    if processes == 2:  # resumed from the first epoch, it ends with the same weights
        resume = ['--resume', tmp_path / 'run/milestone-1.pth.tar', '--output', tmp_path / 'again']
        run_ranks(processes, *command, *resume, '--experiment', 'run')
        one, two = (torch.load(d / 'run/last.pth.tar', weights_only=False)['task_state']['supernet']
                    for d in (tmp_path, tmp_path / 'again'))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        # What the first process alone can know ends both with its sentence.
        done = run_ranks(processes, *command, '--output', tmp_path, '--experiment', 'run', check=False)
        assert done.returncode and done.stderr.count('holds a run already') == 2
    assert result['top1'] == pytest.approx(float(rows[-1]['eval_top1']), abs=1e-4)
    assert result['loss'] == pytest.approx(float(rows[-1]['eval_loss']), abs=1e-5)


def test_wrong_input_ends_all_processes(few_digits, tmp_path):
    done = run_ranks(
        2, 'train.py', '--data-dir', few_digits, *SMALL_RUN, '--model', 'mixnet_s', '-b', 20, '--netaug',
        '--output', tmp_path, check=False)
    assert done.returncode and "module 'blocks.1.0.conv_pw' of type MixedConv2d" in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_machines(few_digits, tmp_path):
    """The command of the docs, started twice: the two of this machine meet at a port as those of two machines would."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nnodes', 2, '--nproc-per-node', 1, '--rdzv-backend', 'c10d',
        '--rdzv-endpoint', f'localhost:{port}', '--rdzv-id', 'run', 'train.py', '--data-dir', few_digits, *SMALL_RUN,
        '--netaug', '-b', 60, '-j', 0, '--epochs', 1, '--output', tmp_path, '--experiment', 'run']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    machines = [subprocess.Popen([str(c) for c in command], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [m.communicate(timeout=300)[0] for m in machines]
    assert all(m.returncode == 0 for m in machines), outputs
    assert sorted(o.count('Best top1') for o in outputs) == [0, 1]
    assert len((tmp_path / 'run/summary.csv').read_text().splitlines()) == 2
