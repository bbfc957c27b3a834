"""Weights that come with the package: what `pretrained=True` loads, and what it leaves alone."""
import hashlib
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from conftest import MODELS, ROOT, images, run_python
from timm_netaug.cli import hub
from timm_netaug.bundled import bundled_cfgs, bundled_folder

BUNDLED = sorted(bundled_cfgs())
PAPER_SIZES = {'netaug_mbv2_tiny': 144, 'netaug_mcunet': 176}


def test_names():
    assert sorted(name.partition('.')[0] for name in BUNDLED) == sorted(MODELS)
    assert {name.partition('.')[2] for name in BUNDLED} <= {'netaug_cifar10', 'cifar10'}
    assert timm.list_models('netaug_*', pretrained=True) == BUNDLED
    assert all(bundled_folder(name) is None for name in ('netaug_mbv2_tiny', '../weights/a.b', '..'))


@pytest.mark.parametrize('name', BUNDLED)
def test_pretrained(name, caplog):
    """Without a tag it is the bundled weights, and the log says of which data set; with the tag, the same weights."""
    model = timm.create_model(name.split('.')[0], pretrained=True).eval()
    assert f'loading the weights {name}, trained on cifar10' in caplog.text
    caplog.clear()
    tagged = timm.create_model(name, pretrained=True).eval()
    assert not caplog.text
    weights = load_file(bundled_folder(name) / 'model.safetensors')
    for one in (model, tagged):
        assert one.num_classes == 10 and one.pretrained_cfg['input_size'] == bundled_cfgs()[name]['input_size']
        assert one.pretrained_cfg['label_names'][3] == 'cat' and one.pretrained_cfg['tag'] == name.partition('.')[2]
        assert all(torch.equal(t, weights[k]) for k, t in one.state_dict().items())
    x = images(2, 32)
    assert torch.equal(model(x), tagged(x))
    scripted = timm.create_model(pretrained=True, **timm.models.resolve_model_input_args(name.split('.')[0], {})).eval()
    assert torch.equal(model(x), scripted(x))
    assert scripted.pretrained_cfg['input_size'] == bundled_cfgs()[name]['input_size']


@pytest.mark.parametrize('name', MODELS)
def test_without_weights(name, caplog, tmp_path):
    """A bare model is the paper's, whatever weights there are; so is one with weights from elsewhere."""
    size = PAPER_SIZES.get(name, 160)
    model = timm.create_model(name)
    assert model.num_classes == 1000 and model.pretrained_cfg['input_size'] == (3, size, size)
    assert model.pretrained_cfg['architecture'] == name and not model.pretrained_cfg.get('label_names')
    arguments = timm.models.resolve_model_input_args(name, {})  # as timm's own scripts build it
    assert timm.create_model(**arguments).num_classes == 1000
    weights = timm.create_model(name, num_classes=10).state_dict()
    file = tmp_path / 'model.safetensors'
    save_file(weights, file)
    given = timm.create_model(
        name, pretrained=True, num_classes=10, pretrained_cfg_overlay=dict(file=str(file), num_classes=10))
    assert given.pretrained_cfg['input_size'] == (3, size, size) and not given.pretrained_cfg.get('label_names')
    assert all(torch.equal(t, weights[k]) for k, t in given.state_dict().items())
    assert not caplog.text


@pytest.mark.parametrize('name', BUNDLED)
def test_folder_in_hfconfigs(name):
    """What hfconfigs/ says is what is bundled, and a repository's file is small enough to live in it."""
    folder = bundled_folder(name)
    assert (folder / 'config.json').read_bytes() == (ROOT / 'hfconfigs' / name / 'config.json').read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert (folder / 'model.safetensors').stat().st_size < 8 * 2 ** 20
    config = json.loads((folder / 'config.json').read_text())
    cfg, facts = config['pretrained_cfg'], config['timm_netaug']
    size = config['timm_netaug']['command'][config['timm_netaug']['command'].index('--img-size') + 1]
    assert cfg['input_size'] == [3, int(size), int(size)] and cfg['pool_size'] == [int(size) // 32] * 2
    assert cfg['paper_ids'] == 'arXiv:2110.08890'
    assert cfg['origin_url'] is None  # no weights of somebody else
    with_netaug = '--netaug' in facts['command']
    twin = 'not run' if with_netaug else 'is itself without NetAug'
    if 'baseline' in facts:
        twin = f'{facts["baseline"]["top1"]:.2f} %'
    assert f'| `{name}` | {facts["metrics"]["top1"]:.2f} % | {twin} |\n' in (ROOT / 'docs/results.md').read_text()
    assert facts['images'] == 10000 and facts['metrics']['top1'] >= 75
    assert with_netaug == name.partition('.')[2].startswith('netaug') and facts['dataset_terms']


def test_clean_offline_machine(tmp_path):
    """No network, no cache, another folder: every socket is refused."""
    code = (
        'import socket\n'
        'def refuse(*args, **kwargs): raise AssertionError("a connection")\n'
        'socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n'
        'import timm, timm_netaug\n'
        'names = timm.list_models("netaug_*", pretrained=True)\n'
        'assert names\n'
        'for name in names: assert timm.create_model(name, pretrained=True).num_classes == 10\n')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'TORCH_', 'XDG_'))}
    env.update(HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, check=True)


def test_push(tmp_path):
    """The folder that the Hub gets of bundled weights, by their name."""
    name = 'netaug_mbv2_tiny.netaug_cifar10'
    run_python('-m', 'timm_netaug', 'hub', 'push', name, f'OWNER/{name}', '--dry-run', tmp_path / 'out')
    there = bundled_folder(name)
    digests = [hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
               for folder in (there, tmp_path / 'out')]
    assert digests[0] == digests[1]
    assert (tmp_path / 'out/README.md').read_text() == (ROOT / 'hfconfigs' / name / 'README.md').read_text()


def test_push_prefers_what_is_there(tmp_path, monkeypatch):
    """A folder of that name in the working directory is meant, not the bundled weights."""
    name = 'netaug_mbv2_tiny.netaug_cifar10'
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['hub', 'push', name, f'OWNER/{name}', '--dry-run', 'out'])
    with pytest.raises(SystemExit):
        hub.main()
    assert not (tmp_path / 'out').exists()


def test_new_head(tmp_path):
    """Fine-tuning from them: the classifier is a new one, and an exported model has no path of this package in it."""
    model = timm.create_model('netaug_mbv2_tiny', pretrained=True, num_classes=7)
    assert model.classifier.out_features == 7
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert str(ROOT) not in (tmp_path / 'config.json').read_text()
