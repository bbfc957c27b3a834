"""Fixtures: the five models, small images, and the scripts run as a user runs them."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import timm
import torch

import timm_netaug
from timm_netaug.cli.flags import all_flags
from timm_netaug.cli.train_flags import TRAIN_FLAGS

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / 'shared'  # parity data and image sets, where the project is developed
MODELS = sorted(timm.list_models('netaug_*'))
assert len(MODELS) == 5
# Other names of the families, with every supported kind of block and head among them.
OTHERS = ['mobilenetv2_035', 'mobilenetv3_small_050', 'mnasnet_small', 'lcnet_035', 'tinynet_e', 'fbnetc_100']

# What may change from a run to the one that continues it: where the run is made and what it reports.
FREE_FLAGS = ('config', *(flag.dest for flag in all_flags(TRAIN_FLAGS) if flag.free))

# Flags of a run of a few seconds an epoch.
SMALL_RUN = ['--model', 'test_efficientnet', '--num-classes', 10, '--img-size', 32, '--warmup-epochs', 0, '--lr', 0.05]

# NetAug with narrower super-networks than by default, for runs of which nothing depends on their widths.
NETAUG = ['--netaug', '--netaug-width-mults', 1, 1.4, '--netaug-expand-mults', 1, 1.6]

# Files that take longest. They are started first, so that no process is left with one of them while the others are done.
LONG = ['test_family.py', 'test_flags.py', 'test_detection.py', 'test_info.py', 'test_task.py', 'test_same_as_timm.py',
        'test_trunk.py', 'test_models.py', 'test_hub.py', 'test_scripts.py', 'test_docs.py', 'test_faults.py',
        'test_supernet.py', 'test_wheel.py', 'test_recipes.py', 'test_graph.py', 'test_experiments.py', 'test_resume.py',
        'test_commands.py', 'test_distributed.py', 'test_deploy.py', 'test_validate.py']

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


def environment() -> dict:
    """Return the variables that a test can have changed: without those that pytest and scikit-learn set."""
    later = ('PYTEST_CURRENT_TEST', 'KMP_DUPLICATE_LIB_OK', 'KMP_INIT_AT_FORK')
    return {k: v for k, v in os.environ.items() if k not in later}


_ENV = environment()
_server = None  # of fork_server.py


def run_python(*command, check: bool = True, cwd=ROOT, fork: bool = True, draw: bool = False
               ) -> subprocess.CompletedProcess:
    """Run python on a command line; a test that expects success shows the whole output where there is none.

    Args:
        fork: Whether to run in a fork of a process that has imported what the scripts import, where the test has not
            changed the environment that the imports depend on. False is for a run with hashes of its own.
        draw: Whether a run in a fork draws `curves.png`, which is an empty file otherwise.
    """
    command = [*map(str, command)]
    if fork and environment() == _ENV and hasattr(os, 'fork'):
        with Fork(*command, cwd=cwd, draw=draw) as process:
            status = process.wait(600)
            done = subprocess.CompletedProcess(command, status, process.stdout, process.stderr)
    else:
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_ranks(processes: int, *command, check: bool = True, **env) -> subprocess.CompletedProcess:
    """Run python on a command line in as many processes as torchrun would start, with the variables that it sets."""
    with socket.socket() as s, ExitStack() as stack:
        s.bind(('localhost', 0))
        env = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(s.getsockname()[1]), 'WORLD_SIZE': str(processes), **env}
        s.close()
        ranks = [stack.enter_context(Fork(*command, RANK=str(r), LOCAL_RANK=str(r), **env)) for r in range(processes)]
        status = max(abs(rank.wait(600)) for rank in ranks)
        done = subprocess.CompletedProcess(
            command, status, ''.join(r.stdout for r in ranks), ''.join(r.stderr for r in ranks))
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


class Fork:
    """Python on a command line in a fork of `fork_server.py`, at the head of a process group of its own.

    Args:
        env: Variables to add to the environment.
    """

    def __init__(self, *command, cwd=ROOT, draw: bool = False, **env):
        global _server
        if _server is None:
            _server = subprocess.Popen(
                [sys.executable, str(ROOT / 'tests/fork_server.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, text=True)
        self.folder = Path(tempfile.mkdtemp())
        self.returncode = None
        files = {name: str(self.folder / name) for name in ('stdout', 'stderr')}
        for file in files.values():
            Path(file).touch()
        self.pid = self.ask(argv=[*map(str, command)], cwd=str(cwd), draw=draw, env=env, **files)

    @staticmethod
    def ask(**request):
        _server.stdin.write(json.dumps(request) + '\n')
        _server.stdin.flush()
        answer = _server.stdout.readline()
        assert answer, 'The fork server has ended.'
        return json.loads(answer)

    @property
    def stdout(self) -> str:
        return (self.folder / 'stdout').read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / 'stderr').read_text()

    def poll(self):
        """Return the exit status, or None while the process runs."""
        if self.returncode is None:
            self.returncode = self.ask(wait=self.pid, block=False)
        return self.returncode

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), seconds)
            time.sleep(0.005)
        return self.returncode

    def kill(self) -> None:
        """Kill the process and those that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.kill()
        shutil.rmtree(self.folder)


def readme_block(marker: str, page: str = 'README.md') -> str:
    """Return the code block of the README, or of another page, that follows an HTML comment."""
    text = (ROOT / page).read_text()
    return re.search(rf'<!-- {re.escape(marker)} -->\s*```\w*\n(.*?)```', text, re.S)[1]


@pytest.fixture
def undrawn(monkeypatch):
    """Leave `curves.png` out: of few images, drawing it takes longer than an epoch."""
    monkeypatch.setattr('timm_netaug.cli.train.write_curves', lambda *args: None)


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
def run_dir(few_digits, tmp_path_factory) -> Path:
    """A short run of train.py with NetAug: two epochs of a few digits, the first one with augmented widths."""
    out = tmp_path_factory.mktemp('runs')
    run_python(
        'train.py', '--data-dir', few_digits, '--num-classes', 10, '--model', 'netaug_mbv2_tiny', '--img-size', 32,
        '--netaug', '-b', 60, '--epochs', 2, '--warmup-epochs', 0, '--lr', 0.05, '-j', 0, '--crop-pct', 1.0,
        '--mean', 0.3, '--std', 0.35, '--save-epochs', 1, '--output', out, '--experiment', 'netaug', draw=True)
    return out / 'netaug'
