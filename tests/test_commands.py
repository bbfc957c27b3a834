"""`python -m timm_netaug COMMAND`, what the modules below the command lines import, and the files that all write."""
import argparse
import ast
import dataclasses
import os
import sys
from importlib.machinery import PathFinder

import pytest
import torch

import timm_netaug
from conftest import ROOT, make, run_python
from timm_netaug.__main__ import main
from timm_netaug.io.atomic import atomic_write
from timm_netaug.io.checkpoint import read_checkpoint
from timm_netaug.io.run import RunDescription
from timm_netaug.load import load_model
from timm_netaug.bundled import bundled_cfgs

PACKAGE = ROOT / 'timm_netaug'
COMMANDS = ['export', 'convert', 'hub', 'deploy', 'info']
RUN = RunDescription('netaug_mcunet', dict(num_classes=10), dict(input_size=(3, 32, 32)), list('0123456789'))


@pytest.mark.parametrize('argv', [[], ['--help']], ids=['none', 'help'])
def test_commands_are_listed(argv, capsys):
    main(argv)
    out = capsys.readouterr().out
    assert all(f'  {name} ' in out for name in COMMANDS) and 'usage: python -m timm_netaug COMMAND' in out


def test_scripts_are_forked(digits, monkeypatch):
    """The other tests take several times as long where they are not; a changed environment needs a new process."""
    code = ['-c', 'import sys; print("timm_netaug.cli.train" in sys.modules)']
    assert run_python(*code).stdout == 'True\n'
    assert run_python(*code, fork=False).stdout == 'False\n'
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert run_python(*code).stdout == 'False\n'


def test_unknown_command():
    done = run_python('-m', 'timm_netaug', 'exprot', check=False)
    assert done.returncode == 1 and done.stderr.startswith('timm_netaug: error: There is no command exprot.\n')
    assert all(f'  {name} ' in done.stderr for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, '--help'])
    assert end.value.code == 0 and f'usage: python -m timm_netaug {name} ' in capsys.readouterr().out


@pytest.mark.parametrize('name, argv, said', [
    ('info', ['test_resnet', '--samples', '1', '--img-size', '32'], 'test_resnet, input 3 x 32 x 32'),
    ('convert', ['PTH', 'OUT', '--model', 'netaug_mcunet'], 'Converted.'),
    ('hub', ['push', 'netaug_mcunet.netaug_cifar10', 'OWNER/NAME', '--dry-run', 'OUT'], 'Nothing was pushed.'),
])
def test_old_forms(name, argv, said, tmp_path):
    """They do the same, and tell of the new form in one line."""
    torch.save(make('netaug_mcunet').state_dict(), tmp_path / 'PTH')
    old = run_python('-m', f'timm_netaug.{name}', *argv, cwd=tmp_path, fork=False)
    new = run_python('-m', 'timm_netaug', name, *argv, cwd=tmp_path)
    assert said in old.stdout and old.stdout == new.stdout
    assert old.stderr == f'`python -m timm_netaug.{name}` is now `python -m timm_netaug {name}`.\n' + new.stderr


def test_export_is_a_function_alone():
    assert type(timm_netaug.export) is type(make)
    # In this checkout, whatever other one the package is installed from.
    assert PathFinder.find_spec('timm_netaug.export', timm_netaug.__path__) is None


def imports_of_cli(file):
    """Return the lines of a module that import the command lines, at any depth."""
    package = ('timm_netaug', *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            names = ['.'.join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names]
        if any(f'{name}.'.startswith('timm_netaug.cli.') for name in names):
            yield node.lineno


def test_lower_modules_import_no_command_line():
    files = [f for f in PACKAGE.rglob('*.py') if f.parent.name != 'cli' and f.name != '__main__.py']
    assert len(files) > 20 and not any(map(list, map(imports_of_cli, files)))


@pytest.mark.parametrize('line, found', [
    ('from .cli import hub', True), ('from . import cli', True), ('import timm_netaug.cli.args as a', True),
    ('from timm_netaug.cli.args import x', True), ('from .client import cli', False), ('import cli', False)])
def test_the_scan_finds_imports(line, found, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'PACKAGE', tmp_path)
    (tmp_path / 'module.py').write_text(f'def f():\n    {line}\n')
    assert list(imports_of_cli(tmp_path / 'module.py')) == ([2] if found else [])


def checkpoint(**run):
    return dict(args=argparse.Namespace(run=run))


def test_run_description(tmp_path):
    run = dataclasses.replace(RUN, ema=True, netaug=dict(alpha=2.0), versions=dict(torch='2'), metrics=[None, 12.5])
    torch.save(checkpoint(**run.to_dict()), tmp_path / 'run.pth.tar')
    assert RunDescription.from_checkpoint(read_checkpoint(tmp_path / 'run.pth.tar')) == run
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.ema = False


def test_descriptions_of_other_versions():
    """An earlier version has fewer fields, a later one more; the checkpoints of other programs have none."""
    old = dict(architecture='netaug_mcunet', model_args=RUN.model_args, data_config=RUN.data_config,
               class_names=RUN.class_names)
    assert RunDescription.from_checkpoint(checkpoint(**old)) == RUN
    assert RunDescription.from_checkpoint(checkpoint(**old, of_a_later_version=1)) == RUN
    for other in ({}, dict(args=None), dict(args=dict(run=old)), dict(args=argparse.Namespace(run='run-7')),
                  dict(args=argparse.Namespace())):
        assert RunDescription.from_checkpoint(other) is None


def test_checkpoint_of_an_earlier_version(tmp_path):
    """It has the dict that versions without `RunDescription` wrote."""
    model = make('netaug_mcunet').eval()
    run = dict(architecture='netaug_mcunet', model_args=dict(num_classes=10), class_names=None, ema=False,
               data_config=dict(input_size=(3, 32, 32)), versions={})
    torch.save(dict(state_dict=model.state_dict(), **checkpoint(**run)), tmp_path / 'old.pth.tar')
    loaded = load_model(str(tmp_path / 'old.pth.tar'))
    assert loaded.run.netaug is None and loaded.run.metrics == []
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in loaded.model.state_dict().items())


def test_description_of_a_model():
    run = RunDescription.from_model(make('netaug_mcunet', drop_rate=0.25), dict(input_size=(3, 32, 32)), ema=True)
    assert run == RunDescription(
        'netaug_mcunet', dict(drop_rate=0.25, num_classes=10), dict(input_size=(3, 32, 32)), None, True)


def test_whatever_a_user_names(tmp_path, monkeypatch):
    """The same weights from a checkpoint, a file, a folder in two spellings; and the weights of the package."""
    monkeypatch.chdir(tmp_path)
    model = make('netaug_mcunet').eval()
    torch.save(dict(state_dict=model.state_dict(), **checkpoint(**RUN.to_dict())), 'run.pth.tar')
    torch.save(model.state_dict(), 'weights.pth')
    main(['convert', 'weights.pth', 'folder', '--model', 'netaug_mcunet'])
    x = torch.zeros(1, 3, 32, 32)
    for source, name in (('run.pth.tar', None), ('weights.pth', 'netaug_mcunet'), ('folder', None),
                         ('local-dir:folder', None)):
        loaded = load_model(source, name)
        assert not loaded.model.training and torch.equal(loaded.model(x), model(x)), source
        assert (loaded.run is not None) == (source == 'run.pth.tar')
        assert (loaded.folder is not None) == (source == 'folder')
        assert loaded.data_config['input_size'] == ((3, 32, 32) if loaded.run else (3, 176, 176))
    name = 'netaug_mbv2_tiny.netaug_cifar10'
    assert list(load_model(name).class_names) == list(bundled_cfgs()[name]['label_names'])
    assert load_model('netaug_mbv2_tiny', pretrained=False).class_names is None


@pytest.mark.parametrize('mode', ['w', 'wb'])
def test_atomic_write(mode, tmp_path):
    """The old file is there until the new one is whole, and stays after an error."""
    file = tmp_path / 'file'
    old, new = ('old', 'new') if mode == 'w' else (b'old', b'new')
    with atomic_write(file, mode) as f:
        f.write(old)
        assert not file.exists()
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(file, mode) as f:
            f.write(new)
            raise error
        assert file.read_text() == 'old' and os.listdir(tmp_path) == ['file']
    with atomic_write(str(file), mode) as f:
        f.write(new)
        f.flush()
        assert file.read_text() == 'old'
    assert file.read_text() == 'new' and os.listdir(tmp_path) == ['file']
