"""Every row of docs/faults.md: what the user sees of a fault, and what is left after it."""
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import timm_netaug
from conftest import NETAUG, ROOT, SMALL_RUN, Fork, run_python, run_ranks
from test_resume import assert_same_run

PLAIN = ['train.py', *SMALL_RUN, '-b', 30, '-j', 0]
COMMAND = [*PLAIN, *NETAUG]


def wait_for(condition, process, seconds=240):
    """Wait until something has happened while a process runs."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.stdout + process.stderr
        time.sleep(0.01)


def epochs_done(run):
    summary = run / 'summary.csv'
    return len(summary.read_text().splitlines()) - 1 if summary.exists() else 0


def copy_images(few_digits, root):
    shutil.copytree(few_digits, root)
    return root, sorted((root / 'train').glob('*/*.png'))


def truncate(file):
    target = file.read_bytes()[:60]
    file.unlink()  # it may be a link
    file.write_bytes(target)


@pytest.fixture(scope='module')
def undisturbed(few_digits, tmp_path_factory):
    """Three epochs of a process that keeps a history of two checkpoints."""
    out = tmp_path_factory.mktemp('undisturbed')
    run_python(*COMMAND, '--data-dir', few_digits, '--epochs', 3, '--checkpoint-hist', 2, '--output', out,
               '--experiment', 'run')
    return out / 'run'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stop_signals(number, undisturbed, few_digits, tmp_path):
    """The process ends between two steps, says how to go on, and both ways work; one of them exactly."""
    command = [*COMMAND, '--data-dir', few_digits, '--epochs', 3, '--checkpoint-hist', 2, '--output', tmp_path,
               '--experiment', 'run']
    run = tmp_path / 'run'
    with Fork(*command, '-j', 2) as process:
        wait_for(lambda: epochs_done(run) >= 1, process)
        os.killpg(process.pid, number)  # the loader's processes get it, too, as from a terminal
        assert process.wait(60) == 128 + number
        said = process.stdout + process.stderr
    assert re.search(rf'Stopped by {number.name} in epoch \d. Go on with --resume \S+/last.pth.tar', said)
    assert 'Traceback' not in said and 'Error' not in said
    recovery = next(run.glob(f'recovery-*-{number.name}.pth.tar'))
    before = epochs_done(run)
    assert 1 <= before < 3
    skipping = ['--resume', recovery, '--output', tmp_path / 'skipping']
    done = run_python(*command, *skipping)
    assert 'Best top1' in done.stdout
    recovery.unlink()
    if number == signal.SIGTERM:
        run_python(*command, '-j', 2, '--resume', run / 'last.pth.tar')
        with_workers = tmp_path / 'with_workers'
        run_python(*command, '-j', 2, '--output', with_workers)
        assert_same_run(with_workers / 'run', run)


@pytest.mark.parametrize('first, second', [('SIGINT', 'SIGTERM'), ('SIGTERM', 'SIGTERM'), ('SIGTERM', 'SIGINT')])
def test_second_signal_ends_at_once(first, second):
    """In the middle of a step that does not end."""
    code = ('import time\nfrom timm_netaug.cli.signals import StopSignals\nwith StopSignals() as stop:\n'
            "    print('ready', flush=True)\n    while stop.number is None: time.sleep(0.01)\n"
            "    print('noted', flush=True)\n    time.sleep(100)")
    with Fork('-c', code) as process:
        wait_for(lambda: process.stdout == 'ready\n', process)
        os.kill(process.pid, signal.Signals[first])
        wait_for(lambda: process.stdout == 'ready\nnoted\n', process)
        os.kill(process.pid, signal.Signals[second])
        assert process.wait(30) == -signal.Signals[second]


def test_other_errors_are_told_though_a_signal_came(few_digits, tmp_path, monkeypatch):
    """A loss that is not finite is no reason to offer its weights for resuming."""
    from timm_netaug.errors import UserError
    from timm_netaug.cli import train

    forward = timm_netaug.NetAugTask.forward

    def diverging(self, input, target):
        os.kill(os.getpid(), signal.SIGTERM)
        result = forward(self, input, target)
        return {**result, 'loss': result['loss'] * float('inf')}

    monkeypatch.setattr(timm_netaug.NetAugTask, 'forward', diverging)
    argv = [*COMMAND, '--data-dir', few_digits, '--epochs', 1, '--output', tmp_path, '--experiment', 'run',
            '--log-interval', 1]
    monkeypatch.setattr(sys, 'argv', list(map(str, argv)))
    with pytest.raises(UserError, match='The loss is inf in epoch 0, step 0'):
        train.train()
    assert not list((tmp_path / 'run').glob('*.pth.tar'))


def test_full_disk(undisturbed, few_digits, tmp_path):
    """A file cannot grow as large as a checkpoint: the run ends, and goes on where there is room again."""
    command = [*COMMAND, '--data-dir', few_digits, '--epochs', 3, '--checkpoint-hist', 2, '--output', tmp_path,
               '--experiment', 'run']
    run = tmp_path / 'run'
    with Fork(*command) as process:
        wait_for(lambda: epochs_done(run) >= 1 and (run / 'last.pth.tar').exists(), process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert process.wait(120) == 1
        said = process.stdout + process.stderr
    assert re.search(r'train.py: error: \S+tmp.pth.tar cannot be written .*make room on the disk, and go on with'
                     r' --resume \S+last.pth.tar', said)
    assert 'Traceback' not in said and not (run / 'tmp.pth.tar').exists()
    assert torch.load(run / 'model_best.pth.tar', weights_only=False)['epoch'] >= 0
    run_python(*command, '--resume', run / 'last.pth.tar')
    assert_same_run(undisturbed, run)


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images(workers, few_digits, tmp_path):
    """A few are skipped and named once; too many are an error that names some of them."""
    data, files = copy_images(few_digits, tmp_path / 'data')
    command = [*COMMAND, '--data-dir', data, '-j', workers, '--output', tmp_path, '--epochs', 2]
    truncate(files[3])
    files[40].unlink()
    files[40].write_text('no image')
    png = bytearray(files[77].read_bytes())  # Pillow makes another kind of error of it
    png[12:16] = b'XXXX'
    files[77].unlink()
    files[77].write_bytes(png)
    broken = sorted((data / 'validation').glob('*/*.png'))[5]
    truncate(broken)
    done = run_python(*command, '--experiment', 'few')
    said = done.stdout + done.stderr
    for file in (files[3], files[40], files[77], broken):
        assert said.count(str(file)) == 1, said
    assert '3 of 240 images cannot be read so far' in said and epochs_done(tmp_path / 'few') == 2
    done = run_python('validate.py', '--data-dir', data, '--checkpoint', tmp_path / 'few/last.pth.tar', '-j', workers)
    assert f'1 of 71 images cannot be read so far, and the next image replaces each of them.' \
           f' Found since the last warning: {broken}' in done.stdout + done.stderr
    for file in files[100:111]:
        truncate(file)
    done = run_python(*command, '--experiment', 'many', check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert re.search(
        r'train.py: error: 1[1-4] of 240 images cannot be read \(.*png.*\): repair or remove them', done.stderr)
    for file in files:
        truncate(file)
    for folder in (data / 'train').iterdir():  # fewer than are tried in a row
        for file in sorted(folder.iterdir())[1:]:
            file.unlink()
    done = run_python(*command, '-b', 5, '--experiment', 'all', check=False)
    assert done.returncode == 1 and 'No image can be read (' in done.stderr and 'Traceback' not in done.stderr


def test_empty_class_folder(few_digits, tmp_path):
    data, _ = copy_images(few_digits, tmp_path / 'data')
    shutil.rmtree(data / 'train/3')
    (data / 'train/3').mkdir()
    done = run_python(*COMMAND, '--data-dir', data, '--output', tmp_path / 'out', check=False)
    assert done.returncode == 1 and not (tmp_path / 'out').exists()
    assert f'{data}/train/3 holds no images, so that class would be missing: fill the folder, or remove it.' in \
        done.stderr


def test_wrong_number_of_classes(few_digits, tmp_path):
    done = run_python(
        *COMMAND, '--data-dir', few_digits, '--num-classes', 5, '--output', tmp_path / 'out', check=False)
    assert done.returncode == 1 and not (tmp_path / 'out').exists()
    assert 'The data set has 10 classes, but the model has 5: add --num-classes 10.' in done.stderr


@pytest.mark.parametrize('netaug', [True, False])
def test_loss_that_is_not_a_number(netaug, few_digits, tmp_path):
    """The exact step is named, and the best checkpoint is as it was."""
    command = [*(COMMAND if netaug else PLAIN), '--data-dir', few_digits, '--output', tmp_path, '--experiment', 'run',
               '--epochs', 4, '--sched', 'multistep', '--decay-milestones', 1, '--decay-rate', 1e30, '--opt',
               'momentum']
    done = run_python(*command, check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    told = re.search(r'The loss is (?:nan|inf) in epoch (\d), step (\d+): try a lower', done.stderr)
    epoch, step = map(int, told.groups())
    assert epoch == 1 and 1 <= step <= 3  # of 0 to 7: the first step at that rate goes well
    best = torch.load(tmp_path / 'run/model_best.pth.tar', weights_only=False)
    assert best['epoch'] == 0 and all(t.isfinite().all() for t in best['state_dict'].values())


def test_other_versions_are_told(undisturbed, few_digits, tmp_path):
    """A checkpoint of another version of PyTorch goes on, with a warning."""
    checkpoint = torch.load(undisturbed / 'last.pth.tar', weights_only=False)
    checkpoint['args'].run['versions'].update(torch='2.0.0', of_a_later_release='7')
    torch.save(checkpoint, tmp_path / 'old.pth.tar')
    done = run_python(*COMMAND, '--data-dir', few_digits, '--epochs', 4, '--resume', tmp_path / 'old.pth.tar',
                      '--output', tmp_path, '--experiment', 'run')
    said = done.stdout + done.stderr
    assert f'was written with torch 2.0.0, not {torch.__version__}, of_a_later_release 7, not None: results' in said


def test_same_seed_same_summary(undisturbed, few_digits, tmp_path):
    """Two runs of one command are one run, and say beside their results what made them."""
    run_python(*COMMAND, '--data-dir', few_digits, '--epochs', 3, '--checkpoint-hist', 2, '--output', tmp_path,
               '--experiment', 'run')
    assert_same_run(undisturbed, tmp_path / 'run')
    versions = json.loads((tmp_path / 'run/versions.json').read_text())
    assert versions['torch'] == torch.__version__ and versions['timm'] and versions['timm_netaug']
    if (ROOT / '.git').exists():
        head = subprocess.run(['git', 'describe', '--always'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert head and versions['revision'].removesuffix('-dirty') == head
    other = tmp_path / 'other'
    run_python('train.py', '-c', tmp_path / 'run/args.yaml', '--output', other)
    assert (other / 'run/summary.csv').read_text() == (undisturbed / 'summary.csv').read_text()


def workers_of(process):
    """The training processes that a torchrun has started."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = stat.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='finds the processes in /proc')
def test_restart_after_a_lost_process(few_digits, tmp_path):
    """A rank is killed in mid-epoch: torchrun starts all anew, and the result is that of an undisturbed run."""
    command = [*COMMAND, '--data-dir', few_digits, '-b', 15, '--epochs', 3, '--checkpoint-hist', 2]
    run_ranks(2, *command, '--output', tmp_path / 'whole', '--experiment', 'run')
    run = tmp_path / 'torn/run'
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '--max-restarts', 2]
    with Fork(*torchrun, *command, '--output', tmp_path / 'torn', '--experiment', 'run') as process:
        wait_for(lambda: epochs_done(run) >= 1, process)
        time.sleep(0.2)
        os.kill(workers_of(process)[-1], signal.SIGKILL)
        status = process.wait(240)
        said = process.stdout + process.stderr
    assert status == 0, said
    starts = [int(n) for n in re.findall(r'Epochs (\d) to 2', said)]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 1
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    assert [r['epoch'] for r in rows] == ['0', '1', '2']
    for left in ('tmp.pth.tar', 'recovery_tmp.pth.tar'):
        (run / left).unlink(missing_ok=True)
    for file in [*run.glob('*.tmp'), *run.glob('recovery-*')]:
        file.unlink()
    assert_same_run(tmp_path / 'whole/run', run)
    # What torchrun tells its processes, told to one alone.
    for argv, env, said in (
            ([], dict(), 'torchrun --max-restarts needs --experiment'),
            (['--experiment', 'run'], dict(GROUP_WORLD_SIZE='2'), 'torchrun --max-restarts works on one machine')):
        done = run_ranks(
            1, *command, *argv, '--output', tmp_path / 'no', check=False, TORCHELASTIC_MAX_RESTARTS='1', **env)
        assert done.returncode and said in done.stderr


def test_every_row_is_tested():
    page = (ROOT / 'docs/faults.md').read_text()
    named = re.findall(r'`(test_\w+)`', page)
    here = [n for n in globals() if n.startswith('test_') and n != 'test_every_row_is_tested']
    assert len(named) >= 12 and set(here) <= set(named)
    tests = ''.join(p.read_text() for p in (ROOT / 'tests').glob('test_*.py'))
    assert all(f'def {name}(' in tests for name in named)
