"""Fixtures: the five models, small images, and the scripts run as a user runs them."""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch

import timm_netaug

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / 'shared'  # parity data and image sets, where the project is developed
MODELS = sorted(timm.list_models('netaug_*'))
assert len(MODELS) == 5
# Other names of the families, with every supported kind of block and head among them.
OTHERS = ['mobilenetv2_035', 'mobilenetv3_small_050', 'mnasnet_small', 'lcnet_035', 'tinynet_e', 'fbnetc_100']

# Flags of a run of a few seconds an epoch.
SMALL_RUN = ['--model', 'test_efficientnet', '--num-classes', 10, '--img-size', 32, '--warmup-epochs', 0, '--lr', 0.05]

# Files that take longest. They are started first, so that no process is left with one of them while the others are done.
LONG = ['test_flags.py', 'test_faults.py', 'test_supernet.py', 'test_docs.py', 'test_scripts.py', 'test_wheel.py',
        'test_resume.py', 'test_distributed.py', 'test_hub.py', 'test_validate.py', 'test_family.py']

torch.set_num_threads(1)  # the tensors are small, and CI machines are shared


def pytest_configure(config):
    if hasattr(config.option, 'loadscopereorder'):
        config.option.loadscopereorder = False  # pytest-xdist's own order starts the files with most tests first


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def images(batch: int = 4, size: int = 64, seed: int = 0, **kwargs) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and statistic of a model values that differ from their neighbours'."""
    g = generator(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith('running_var') or (t.ndim == 1 and name.endswith('weight')):
                t.copy_(torch.rand(t.shape, generator=g) + 0.5)
            elif t.ndim == 1:
                t.copy_(torch.randn(t.shape, generator=g) * 0.1)
    return model


def make(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{'num_classes': 10, **kwargs}))


def make_supernet(name: str = 'netaug_mbv2_tiny', config: dict = {}, **kwargs) -> timm_netaug.SuperNet:
    return randomise(timm_netaug.augment(make(name, **kwargs), timm_netaug.NetAugConfig(**config)), 1)


_ENV = dict(os.environ)
_server = None  # of fork_server.py


def run_python(*command, check: bool = True, cwd=ROOT, fork: bool = True) -> subprocess.CompletedProcess:
    """Run python on a command line; a test that expects success shows the whole output where there is none.

    The scripts run in a fork of a process that has imported what they import, unless a test has changed the environment
    that the imports depend on, or fork is False (so that a run has hashes of its own).
    """
    command = [*map(str, command)]
    scripts = ('train.py', 'validate.py', 'train_detection.py', 'validate_detection.py', 'experiments/variants.py')
    known = command[0] in scripts or command[:2] == ['-m', 'timm_netaug']
    same = {k: v for k, v in os.environ.items() if k != 'PYTEST_CURRENT_TEST'} == {
        k: v for k, v in _ENV.items() if k != 'PYTEST_CURRENT_TEST'}
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    if fork and known and same and hasattr(os, 'fork'):
        done = _run_in_fork(command, cwd, env)
    else:
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def _run_in_fork(command, cwd, env) -> subprocess.CompletedProcess:
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests/fork_server.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=env, text=True)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ('stdout', 'stderr')]
        request = dict(argv=command, cwd=str(cwd), stdout=str(files[0]), stderr=str(files[1]))
        _server.stdin.write(json.dumps(request) + '\n')
        _server.stdin.flush()
        answer = _server.stdout.readline()
        assert answer, 'The fork server has ended.'
        status = int(answer)
        return subprocess.CompletedProcess(command, status, *(f.read_text() for f in files))


def readme_block(marker: str) -> str:
    """Return the code block of the README that follows an HTML comment."""
    text = (ROOT / 'README.md').read_text()
    return re.search(rf'<!-- {re.escape(marker)} -->\s*```\w*\n(.*?)```', text, re.S)[1]


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits as an image folder of 32 x 32 pixels."""
    sys.path.insert(0, str(ROOT))
    import demo
    root = tmp_path_factory.mktemp('digits')
    demo.write_digits(root)
    return root


@pytest.fixture(scope='session')
def few_digits(digits, tmp_path_factory) -> Path:
    """A few of them: 24 of every class to train on, 71 in all to validate on, which no number of processes divides."""
    root = tmp_path_factory.mktemp('few')
    for split, count in (('train', 24), ('validation', 7)):
        for folder in (digits / split).iterdir():
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count + (count == 7 and folder.name == '3')]:
                (root / split / folder.name / file.name).symlink_to(file)
    return root


@pytest.fixture(scope='session')
def run_dir(digits, tmp_path_factory) -> Path:
    """A short run of train.py with NetAug: two epochs of the digits, the first one with augmented widths."""
    out = tmp_path_factory.mktemp('runs')
    run_python(
        'train.py', '--data-dir', digits, '--num-classes', 10, '--model', 'netaug_mbv2_tiny', '--img-size', 32,
        '--netaug', '-b', 128, '--epochs', 2, '--warmup-epochs', 0, '--lr', 0.05, '-j', 0, '--crop-pct', 1.0,
        '--mean', 0.3, '--std', 0.35, '--output', out, '--experiment', 'netaug')
    return out / 'netaug'
