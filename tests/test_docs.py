"""Every command and every piece of code of the documentation, as it stands there."""
import os
import re
import shlex
import subprocess
import sys

import pytest
import timm

import timm_netaug  # noqa: F401: registers the models

from conftest import ROOT, run_python

PAGES = {page: (ROOT / page).read_text()
         for page in (
             'README.md', 'docs/tutorial.md', 'docs/training.md', 'docs/hub.md', 'docs/library.md',
             'docs/architecture.md')}


def blocks(page, language):
    """Code blocks of a page, without those that a comment marks: CI or another test runs them."""
    text = re.sub(r'<!-- [^>]+ -->\s*```.*?```', '', PAGES[page], flags=re.S)
    return re.findall(rf'```{language}\n(.*?)```', text, re.S)


def run(command, cwd):
    """Run a command by bash; python with nothing but words and quotes, which `shlex` takes as bash does, in a fork."""
    unquoted = re.sub(r'"[^"$`]*"|\'[^\']*\'', '', command.replace('\\\n', ' '))
    if command.startswith('python ') and not re.search(r'[$`|&;<>*?~"\'\n]', unquoted.strip()):
        return run_python(*shlex.split(command.replace('\\\n', ' '))[1:], cwd=cwd, draw=True).stdout
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT),
           'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']}
    done = subprocess.run(['bash', '-euo', 'pipefail', '-c', command], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, f'{command}\n{done.stdout}{done.stderr}'
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    for name in ('train.py', 'validate.py', 'demo.py', 'hfconfigs'):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_tutorial(checkout):
    commands = blocks('docs/tutorial.md', 'bash')
    assert len(commands) == 7
    out = [run(commands[0], checkout)]
    for folder in (checkout / 'photos').glob('*/*'):  # a quarter of the digits is enough
        for file in sorted(folder.iterdir())[len(list(folder.iterdir())) // 4:]:
            file.unlink()
    out += [run(command, checkout) for command in commands[1:]]
    assert 'bytes' in out[1] and 'timm.create_model' in out[2] and '"top1"' in out[4]
    assert (checkout / 'runs/results.csv').read_text().count('\n') > 4
    code = blocks('docs/tutorial.md', 'python')
    assert len(code) == 2
    (checkout / 'code.py').write_text('\n'.join(code))
    label, *features = run('python code.py', checkout).splitlines()
    assert re.fullmatch(r'\d: \d+%', label)
    assert [f.split()[:2] for f in features] == [
        [str(c), str(s)] for c, s in zip((8, 8, 16, 32, 112), (2, 4, 8, 16, 32))]


def test_readme_commands(checkout, few_digits):
    """Those for which the reader puts in a folder of images, shortened to an epoch of small ones."""
    commands = [b for b in blocks('README.md', 'bash')]
    assert commands
    for command in commands:
        command = re.sub(r'\b(DATA|CIFAR10)\b', str(few_digits), command)
        run(re.sub(r'--epochs \d+', '--epochs 1 -b 60 --img-size 32', command), checkout)


def test_readme_prediction(few_digits, tmp_path):
    """The code that loads a model and predicts."""
    code, = blocks('README.md', 'python')
    (tmp_path / 'photo.jpg').symlink_to(next((few_digits / 'validation').glob('*/*.png')))
    (tmp_path / 'code.py').write_text(code)
    model = timm.create_model('netaug_mbv2_tiny', pretrained=True)
    assert run('python code.py', tmp_path).strip() in model.pretrained_cfg['label_names']


def test_benchmark(tmp_path):
    """The commands of docs/performance.md, with one model, fewer and smaller steps, and on the CPU."""
    text = (ROOT / 'docs/performance.md').read_text().replace('\\\n', '')
    commands = {re.sub(r' --(img-size|batch-size|samples|device|models|output) \S+| --(amp|paper-sizes)', '', command)
                for command in re.findall(r'^    python (benchmarks/step.py .*)$', text, re.M)}
    assert commands == {'benchmarks/step.py', 'benchmarks/step.py --profile'}
    few = ('--models netaug_mbv2_tiny --img-size 32 --batch-size 16 --samples 2 --warmup 1'
           ' --contenders "plain, channels-last" "stage 3, widths"')
    out = run(f'python {ROOT}/benchmarks/step.py {few} --output out', tmp_path)
    assert '| `netaug_mbv2_tiny`, 32 | stage 3, widths |' in out
    assert (tmp_path / 'out.json').exists() and (tmp_path / 'out.png').exists()
    assert 'convolution_backward' in run(f'python {ROOT}/benchmarks/step.py {few} --profile', tmp_path)


def test_other_benchmarks(few_digits, tmp_path):
    command = f'python {ROOT}/benchmarks/epoch.py --data-dir {few_digits} --num-classes 10 --img-size 32 -j 0 -b 60'
    out = run(f'{command} --batches 2 --repeats 1 --output out', tmp_path)
    assert '| stage 3, expansions |' in out and (tmp_path / 'out.json').exists()
    out = run(f'python {ROOT}/benchmarks/inference.py --img-size 32 --repeats 3', tmp_path)
    assert 'equal to the last bit: True' in out


def test_names_in_the_docs_are_real():
    """Files that the pages name are there, and so are the flags of the scripts."""
    from timm_netaug.cli.train_detection import train_detection_parser
    from timm_netaug.cli.train_flags import train_parser
    from timm_netaug.cli.validate_detection import validate_detection_parser
    from timm_netaug.cli.validate_flags import validate_parser
    parsers = (train_parser(), validate_parser(), train_detection_parser(), validate_detection_parser())
    known = {s for p in parsers for a in p._actions for s in a.option_strings}
    known |= set(re.findall(r"'(--[a-z-]+)'", (ROOT / 'timm_netaug/cli/hub.py').read_text()))
    others = {'--nnodes', '--nproc-per-node', '--rdzv-backend', '--rdzv-endpoint', '--rdzv-id', '--max-restarts',
              '--rdzv-conf', '--local-addr', '--layers', '--samples', '--fits', '--dist'}
    for page, text in PAGES.items():
        flags = set(re.findall(r'(?<![\w-])(--[a-z][a-z0-9-]+)', text)) - others
        assert flags <= known, (page, flags - known)
        files = set(re.findall(r'`((?:docs|tests|timm_netaug|hfconfigs)/[\w./]*)`', text))
        assert files and all((ROOT / f).exists() for f in files), (page, [f for f in files if not (ROOT / f).exists()])
