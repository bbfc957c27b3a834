"""Installed from a wheel, without a checkout: both commands, and a training."""
import os
import subprocess
import sys
import sysconfig
import zipfile

from conftest import ROOT, SMALL_RUN


def run(*command, cwd):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**env, 'OMP_NUM_THREADS': '1'}, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel(few_digits, tmp_path):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-w', tmp_path, ROOT, cwd=tmp_path)
    wheel, = tmp_path.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split('/')[0] for n in names if not n.split('/')[0].endswith('.dist-info')} == {'timm_netaug'}
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'env', cwd=tmp_path)
    python = tmp_path / 'env/bin/python'
    # The dependencies are those of this environment, which CI installs from nothing: PyTorch alone has 5 GB.
    site = run(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    with open(os.path.join(site, 'dependencies.pth'), 'w') as f:
        f.write(sysconfig.get_path('purelib') + '\n')
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', wheel, cwd=tmp_path)
    find = "import importlib.util; print(importlib.util.find_spec('timm_netaug').origin)"
    where = run(python, '-c', find, cwd=tmp_path).strip()
    assert where.startswith(site)
    out = run(tmp_path / 'env/bin/timm-netaug-train', '--data-dir', few_digits, *SMALL_RUN, '--netaug', '-b', 60, '-j',
              0, '--epochs', 1, '--output', tmp_path / 'runs', '--experiment', 'run', cwd=tmp_path)
    assert 'Best top1' in out
    out = run(tmp_path / 'env/bin/timm-netaug-validate', '--data-dir', few_digits, '-j', 0, '--checkpoint',
              tmp_path / 'runs/run/last.pth.tar', cwd=tmp_path)
    assert '"images": 71' in out
