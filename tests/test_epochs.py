"""Where a run ends, what it keeps, and how it is continued: --stop-epoch, --save-epochs, --resume auto."""
import csv
import os
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from conftest import run_python
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.progress import Progress
from timm_netaug.cli.train_flags import check_train_args, loss_of, train_parser

FLAGS = ['--model', 'test_efficientnet', '--img-size', 32, '-b', 60, '-j', 0, '--epochs', 3, '--warmup-epochs', 0,
         '--netaug', '--experiment', 'run', '--device', 'cpu', '--checkpoint-hist', 1]


@pytest.fixture(scope='module')
def runs(few_digits, tmp_path_factory) -> Path:
    """A run of three epochs, and the same one that stops after two of them and is continued."""
    root = tmp_path_factory.mktemp('epochs')

    def train(name, *flags):
        return run_python('train.py', '--data-dir', few_digits, *FLAGS, '--output', root / name, *flags)

    train('whole', '--save-epochs', 1)
    train('stopped', '--stop-epoch', 2, '--resume', 'auto')
    (root / 'stopped.csv').write_text((root / 'stopped/run/summary.csv').read_text())
    train('stopped', '--resume', 'auto')
    return root


def test_a_stopped_run_goes_on_to_the_last_bit(runs):
    """The schedule is that of all epochs, also up to the stop."""
    assert len(list(csv.DictReader((runs / 'stopped.csv').open()))) == 2
    whole, stopped = (torch.load(runs / f'{name}/run/last.pth.tar', weights_only=False) for name in ('whole', 'stopped'))
    assert whole['epoch'] == stopped['epoch'] == 2
    for a, b in zip(whole['task_state']['supernet'].values(), stopped['task_state']['supernet'].values()):
        assert torch.equal(a, b)
    assert (runs / 'whole/run/summary.csv').read_text() == (runs / 'stopped/run/summary.csv').read_text()


def test_classes_are_counted(runs):
    """Without --num-classes, the classifier has as many outputs as there are folders."""
    checkpoint = torch.load(runs / 'whole/run/model_best.pth.tar', weights_only=False)
    assert checkpoint['args'].num_classes == 10 and len(checkpoint['state_dict']['classifier.bias']) == 10


def test_best_and_numbered_files_hold_the_weights_alone(runs, few_digits):
    """They are small, and stock; `last` and milestones have what a run is continued with."""
    folder = runs / 'whole/run'
    numbered, = folder.glob('checkpoint-*')
    for name in ('model_best.pth.tar', numbered.name):
        checkpoint = torch.load(folder / name, weights_only=False)
        assert not {'optimizer', 'task_state', 'saver'} & set(checkpoint)
        size = sum(t.nbytes for t in checkpoint['state_dict'].values())
        assert os.path.getsize(folder / name) < size + 200_000 < os.path.getsize(folder / 'last.pth.tar')
        done = run_python('train.py', '--data-dir', few_digits, *FLAGS, '--output', runs / 'other', '--resume',
                          folder / name, check=False)
        assert done.returncode == 1 and 'holds only the weights of the model' in done.stderr
        assert str(folder / 'last.pth.tar') in done.stderr and not (runs / 'other').exists()
    milestone = torch.load(folder / 'milestone-1.pth.tar', weights_only=False)
    assert milestone['epoch'] == 0 and {'optimizer', 'task_state'} <= set(milestone)


def test_auto_needs_a_name(few_digits):
    flags = [flag for flag in FLAGS if flag not in ('--experiment', 'run')]
    done = run_python('train.py', '--data-dir', few_digits, *flags, '--resume', 'auto', check=False)
    assert done.returncode == 1 and '--resume auto needs --experiment' in done.stderr


def test_args_of_a_run_are_a_config(few_digits, tmp_path):
    """args.yaml says the loss as it was given, and a run's end is not part of it."""
    run_python('train.py', '--data-dir', few_digits, *FLAGS, '--bce-loss', '--stop-epoch', 1, '--output', tmp_path)
    args = yaml.safe_load((tmp_path / 'run/args.yaml').read_text())
    assert args['bce_loss'] is True and 'loss' not in args and 'stop_epoch' not in args
    again = parse_args(train_parser(), ['-c', str(tmp_path / 'run/args.yaml')])
    check_train_args(again)
    assert loss_of(again) == 'bce'


def test_time_left(monkeypatch):
    """From the mean of all batches so far, over all epochs: one of four took an hour, so three are left."""
    now = [0.0]
    monkeypatch.setattr('time.time', lambda: now[0])
    progress = Progress(2, 6)
    batches = progress.batches(2, DataLoader(range(10)))
    next(batches)
    now[0] = 3600.0
    assert progress.title(2) == 'Epoch 2 (3 of 6)'
    assert progress.time_left(9) == '3 h 00 min' and progress.time_left(4) == '7 h 00 min'
    now[0] = 60.0
    assert progress.time_left(9) == '3 min'
    now[0] = 1.0
    assert progress.time_left(9) == 'under 1 min'
