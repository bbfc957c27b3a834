"""A run that is killed and resumed ends as one that was left alone: weights, metrics, files, to the last bit on CPU."""
import argparse
import os
import random
import re
import signal
import time

import pytest
import timm
import torch

from conftest import NETAUG, SMALL_RUN, Fork, run_python
from timm_netaug.cli import run_folder
from timm_netaug.errors import UserError
from timm_netaug.io.saver import AtomicSaver

# How many moments to kill at: they are random, so more of them are more thorough.
KILLS = int(os.environ.get('NETAUG_TEST_KILLS', 2))
# Everything with a state of its own: workers, momentum, EMA, erasing, mixup, dropout, a plateau, a short history.
PLAIN = [*SMALL_RUN, '-b', 30, '-j', 2, '--epochs', 5, '--model-ema', '--model-ema-decay', 0.5, '--reprob', 0.3,
         '--mixup', 0.2, '--mixup-off-epoch', 3, '--drop', 0.1, '--sched', 'plateau', '--patience-epochs', 0,
         '--checkpoint-hist', 2, '--save-epochs', 2, '--lr', 0.5]
FLAGS = [*PLAIN, *NETAUG]


def flat(value, name=''):
    """All tensors and numbers of a nested state, by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f'{name}.{key}').items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f'{name}.{i}').items()}
    return {name: value}


def assert_same_run(a, b):
    assert (a / 'summary.csv').read_text() == (b / 'summary.csv').read_text()
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    files = sorted(p.name for p in a.glob('*.pth.tar'))
    assert {'last.pth.tar', 'model_best.pth.tar'} < set(files) and len(files) in (4, 5)  # two of the history, milestone
    for name in files:
        one, two = (torch.load(d / name, weights_only=False) for d in (a, b))
        assert one['args'].run == two['args'].run
        one, two = ({k: v for k, v in flat(c).items() if not k.startswith('.args')} for c in (one, two))
        assert one.keys() == two.keys() and len(one) > (300 if name.startswith(('last', 'milestone')) else 80)
        for key in one:
            if torch.is_tensor(one[key]):
                assert torch.equal(one[key], two[key]), (name, key)
            else:
                assert one[key] == two[key], (name, key)


@pytest.fixture(scope='module')
def undisturbed(few_digits, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed')
    run_python('-c', '')  # so that the server of forks has started
    start = time.time()
    run_python('train.py', '--data-dir', few_digits, *FLAGS, '--output', out, '--experiment', 'run')
    return out / 'run', time.time() - start


def epochs_done(run):
    summary = run / 'summary.csv'
    return len(summary.read_text().splitlines()) - 1 if summary.exists() else 0


@pytest.mark.parametrize('kill', range(KILLS))
def test_killed_at_any_moment(kill, undisturbed, few_digits, tmp_path):
    want, seconds = undisturbed
    command = ['train.py', '--data-dir', few_digits, *FLAGS, '--output', tmp_path, '--experiment', 'run']
    run = tmp_path / 'run'
    last = run / 'last.pth.tar'
    for attempt in range(20):
        with Fork(*command) as process:
            # Killed in the first epoch now and then (it starts anew), and in a later one at any rate.
            epochs = random.randint(min(attempt, 3), 3)
            while epochs_done(run) < epochs and process.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0, seconds / 5))
            process.kill()
        if last.exists():
            break
    if process.returncode == 0:
        pytest.skip('the run was done before it could be killed')
    assert process.returncode == -signal.SIGKILL and last.exists()
    run_python(*command, '--resume', last, fork=kill > 0)  # the first one has hashes of its own
    for file in run.glob('*.tmp'):
        file.unlink()  # what a kill cut short is left there
    for name in ('tmp.pth.tar', 'recovery_tmp.pth.tar'):
        (run / name).unlink(missing_ok=True)
    assert_same_run(want, run)


def test_best_file_and_history_survive_a_kill_between_files(tmp_path, monkeypatch):
    """Killed between any two steps of a save: what is there is whole, and doing the epoch again mends the rest."""
    metrics = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0]

    def saver(folder):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        folder.mkdir(exist_ok=True)
        return AtomicSaver(model, optimizer, checkpoint_dir=str(folder), max_history=2)

    def state(folder):
        files = {p.name: torch.load(p, weights_only=True)['epoch'] for p in folder.glob('*.pth.tar')}
        return {k: v for k, v in files.items() if k != 'tmp.pth.tar'}

    whole = saver(tmp_path / 'whole')
    for epoch, metric in enumerate(metrics):
        whole.save_checkpoint(epoch, metric)
    want = state(tmp_path / 'whole')
    assert want == {'last.pth.tar': 6, 'model_best.pth.tar': 5, 'checkpoint-5.pth.tar': 5, 'checkpoint-4.pth.tar': 4}

    class Kill(BaseException):
        pass

    kills = 0
    for function in ('replace', 'link', 'remove', 'unlink'):
        for nth in range(1, 40):
            folder = tmp_path / f'{function}-{nth}'
            calls, real = [0], getattr(os, function)

            def dying(*args, **kwargs):
                calls[0] += 1
                if calls[0] == nth:
                    raise Kill
                return real(*args, **kwargs)

            epoch, one = 0, saver(folder)
            with monkeypatch.context() as patch:
                patch.setattr(os, function, dying)
                try:
                    while epoch < len(metrics):
                        one.save_checkpoint(epoch, metrics[epoch])
                        epoch += 1
                except Kill:
                    kills += 1
            one = saver(folder)
            last = folder / 'last.pth.tar'
            start = 0
            if last.exists():
                one.load_state_dict_from_checkpoint(str(last))
                start = torch.load(last, weights_only=True)['epoch'] + 1
            assert start in (epoch, epoch + 1)
            for again in range(start, len(metrics)):
                one.save_checkpoint(again, metrics[again])
            assert state(folder) == want, (function, nth)
            assert (one.best_metric, one.best_epoch) == (9.0, 5)
            if calls[0] < nth:
                break
    assert kills > 15


def test_resumed_history_of_a_plateau(undisturbed):
    """The schedule of the runs above did follow the metric, so that they tell something of it."""
    rows = (undisturbed[0] / 'summary.csv').read_text().splitlines()
    assert len({row.rsplit(',', 1)[1] for row in rows[1:]}) > 1


@pytest.mark.parametrize('argv, said', [
    (['--model', 'netaug_mcunet'], "architecture is 'test_efficientnet' there and 'netaug_mcunet' here"),
    (['--num-classes', 12], 'num_classes is 10 there and 12 here'),
    (['--netaug-divisor', 8], 'divisor is 1 there and 8 here'),
    (['--bn-eps', 0.1], 'bn_eps is None there and 0.1 here'),
    (['--opt', 'adamw'], 'was trained with --opt sgd'),
    (['--eval-metric', 'top5'], 'was trained with --eval-metric top1, which its best checkpoints and the plateau'),
])
def test_changed_model_is_refused_by_name(argv, said, undisturbed, few_digits, tmp_path):
    before = (undisturbed[0] / 'summary.csv').read_text()
    done = run_python('train.py', '--data-dir', few_digits, *FLAGS, '--epochs', 9, *argv, '--resume',
                      undisturbed[0] / 'last.pth.tar', '--output', tmp_path, check=False)
    assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir()) and (undisturbed[0] / 'summary.csv').read_text() == before


def test_other_training_is_refused_by_name(undisturbed, few_digits, tmp_path):
    """One without NetAug, and one of other classes."""
    last = undisturbed[0] / 'last.pth.tar'
    done = run_python('train.py', '--data-dir', few_digits, *PLAIN, '--resume', last, '--output', tmp_path, check=False)
    assert done.returncode == 1 and 'was trained with --netaug.' in done.stderr
    letters = tmp_path / 'letters'
    for folder in few_digits.glob('*/*'):
        (letters / folder.parent.name).mkdir(parents=True, exist_ok=True)
        name = 'nine' if folder.name == '9' else folder.name
        (letters / folder.parent.name / name).symlink_to(folder)
    done = run_python('train.py', '--data-dir', letters, *FLAGS, '--resume', last, '--output', tmp_path / 'out',
                      check=False)
    assert done.returncode == 1 and "'nine'" in done.stderr and 'classes is' in done.stderr
    assert not (tmp_path / 'out').exists()


def test_checkpoint_of_timms_own_script_is_refused(few_digits, tmp_path):
    """It has the fields that timm's saver writes, and no record of the run."""
    model = timm.create_model('test_efficientnet', num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = argparse.Namespace(model='test_efficientnet', num_classes=10, opt='sgd', epochs=5)
    timm.utils.CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(tmp_path)).save_checkpoint(1, 50.0)
    last = tmp_path / 'last.pth.tar'
    assert {'epoch', 'arch', 'state_dict', 'optimizer', 'args'} <= set(torch.load(last, weights_only=False))
    done = run_python('train.py', '--data-dir', few_digits, *FLAGS, '--resume', last, '--output', tmp_path / 'out',
                      check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and not (tmp_path / 'out').exists()
    assert re.search(r'--resume: \S+last.pth.tar is not a checkpoint of this train.py .*: start from its weights with'
                     r' --initial-checkpoint instead', done.stderr)


def test_two_runs_in_one_folder(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)  # as another run
    fcntl = pytest.importorskip('fcntl')
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='Another process trains in .*run: choose another --experiment.'):
        run_folder._lock(str(folder))
    os.close(handle)
    run_folder._lock(str(folder))
    run_folder._lock(str(folder))  # the next run of the same process
    child = os.fork()  # as a loader process, which does not keep the lock
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        handle = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run_folder.release_folder()
        end = time.monotonic() + 10
        while True:  # until the child has run
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < end
    finally:
        os.close(handle)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_resumed_with_the_flags_that_the_run_was_begun_with(undisturbed, few_digits, tmp_path):
    """Among them the weights that it was begun with, which the checkpoint replaces."""
    command = ['train.py', '--data-dir', few_digits, *SMALL_RUN, '-b', 60, '-j', 0, '--output', tmp_path,
               '--experiment', 'run', '--pretrained-path', undisturbed[0] / 'model_best.pth.tar']
    run_python(*command, '--epochs', 2, '--stop-epoch', 1)
    run_python(*command, '--epochs', 2, '--resume', tmp_path / 'run/last.pth.tar')
    assert epochs_done(tmp_path / 'run') == 2


def test_changed_flags_are_told(undisturbed, few_digits, tmp_path):
    done = run_python(
        'train.py', '--data-dir', few_digits, *FLAGS, '--epochs', 6, '--sched', 'step', '--lr', 1e-3, '--weight-decay',
        0.25, '--resume', undisturbed[0] / 'last.pth.tar', '--output', tmp_path, '--experiment', 'run')
    for said in ('lr was 0.5, is 0.001', 'epochs was 5, is 6', 'weight_decay was 2e-05, is 0.25',
                 'best metric and summary start anew'):
        assert said in done.stderr
    assert 'seed was' not in done.stderr
    # ... and hold
    assert (tmp_path / 'run/summary.csv').read_text().splitlines()[1].rsplit(',', 1)[1] == '0.001'
    saved = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)['optimizer']['param_groups']
    assert {g['weight_decay'] for g in saved} == {0, 0.25}


def test_going_back_needs_another_folder(undisturbed, few_digits):
    folder = undisturbed[0]
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    done = run_python('train.py', '--data-dir', few_digits, *FLAGS, '--resume', folder / 'milestone-2.pth.tar',
                      '--output', folder.parent, '--experiment', folder.name, check=False)
    assert done.returncode == 1 and 'choose another --experiment to train these epochs again' in done.stderr
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_optimizer_that_can_not_be_sorted_is_refused_at_once(few_digits, tmp_path):
    argv = ['train.py', '--data-dir', few_digits, *SMALL_RUN, '--netaug', '--opt', 'adafactor', '-b', 60, '-j', 0,
            '--epochs', 2, '--output', tmp_path]
    done = run_python(*argv, check=False)
    assert done.returncode == 1 and '--netaug-no-sort' in done.stderr and 'Traceback' not in done.stderr
    assert not list(tmp_path.glob('*/*.pth.tar')) and 'Epoch 0 [4/4]' not in done.stderr
