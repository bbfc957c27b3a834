"""Push, pull and convert: the true client of the Hub over HTTP, against a server on the loopback address."""
import copy
import hashlib
import json
import os
import re
import shlex
import shutil
import sys

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from conftest import FREE_FLAGS, MODELS, ROOT, SHARED, images, make, readme_block, run_python
from hub_server import serve
from test_deploy import REPORT
from test_reference import FILES, reference_names
from timm_netaug import card as card_module
from timm_netaug import hub as hub_module
from timm_netaug.__main__ import main as run_command
from timm_netaug.cli import convert as convert_command
from timm_netaug.cli import export as export_command
from timm_netaug.cli import hub as hub_command
from timm_netaug.cli import info as info_command
from timm_netaug.cli import validate as validate_command
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_flags import train_parser
from timm_netaug.cli.build import set_up_model, set_up_teacher
from timm_netaug.cli.training_record import training_record
from timm_netaug.deploy.pipeline import _weights_hash
from timm_netaug.errors import UserError
from timm_netaug.io.folder import export_folder
from timm_netaug.io.run import RunDescription

REPO = 'owner/tiny'
CONFIG = dict(input_size=(3, 32, 32), mean=(0.3,) * 3, std=(0.35,) * 3, interpolation='bicubic', crop_pct=1.0,
              crop_mode='center')
FLAGS = ['--data-dir', '/home/me/photos', '--model', 'netaug_mbv2_tiny', '--num-classes', '10', '--img-size', '32',
         '--netaug', '--netaug-width-mults', '1', '2', '--lr', '0.05', '--epochs', '3', '--val-split', 'validation',
         '--opt-kwargs', 'nesterov=False', '--pretrained-path', '/home/me/start.pth', '--output', '/home/me/runs',
         '--scale', '0.6', '1.0', '-j', '3', '--smoothing', '0']


@pytest.fixture(scope='module')
def model():
    model = make('netaug_mbv2_tiny')
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    return model.eval()


def logits(model, size=32):
    with torch.no_grad():
        return model.eval()(images(2, size))


def describe_run(model):
    return RunDescription.from_model(model, CONFIG, [str(i) for i in range(10)])


def save(path, model, **changes):
    """Write a checkpoint as train.py does, of a model that was not trained."""
    args = parse_args(train_parser(), FLAGS)
    args.run = describe_run(model).to_dict()
    torch.save(dict(state_dict=model.state_dict(), args=args, epoch=1, **changes), path)
    return path


@pytest.fixture
def checkpoint(model, tmp_path):
    return save(tmp_path / 'model.pth.tar', model)


@pytest.fixture
def folder(model, tmp_path):
    export_folder(model, tmp_path / 'exported', describe_run(model))
    return tmp_path / 'exported'


@pytest.fixture(scope='module', autouse=True)
def one_description():
    """Trace a model once: many pushes below are of the same one."""
    real, known = card_module.describe, {}

    def describe(model, size, **kwargs):
        key = model.pretrained_cfg['architecture'], model.num_classes, tuple(size)
        if key not in known:
            known[key] = real(model, size, **kwargs)
        return known[key]

    card_module.describe = describe
    yield
    card_module.describe = real


@pytest.fixture
def server():
    with serve() as server:
        yield server


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server, with this process's client pointed at it, logged in, and without the client's pauses."""
    for name, value in dict(
            ENDPOINT=server.url,
            HUGGINGFACE_CO_URL_TEMPLATE=server.url + '/{repo_id}/resolve/{revision}/{filename}',
            HF_HUB_CACHE=str(tmp_path / 'cache'),
            HF_TOKEN_PATH=str(tmp_path / 'no-token'),
            HF_HUB_DISABLE_XET=True,
    ).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    monkeypatch.setattr(validate_command, 'set_up_logging', lambda: None)
    return server


def run(*argv):
    hub_command.main([str(a) for a in argv])


def refusal(*argv, command=run):
    """Return the one sentence that a command ends with."""
    with pytest.raises(SystemExit) as said:
        command(*argv)
    text = str(said.value)
    assert ': error: ' in text and '\n' not in text and text.endswith('.'), text
    return text.partition(': error: ')[2]


LOAD = """
import sys, timm, torch, timm_netaug.cli.hub
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(timm.create_model('hf-hub:owner/tiny', pretrained=True).eval()(x), sys.argv[1])
if len(sys.argv) > 2:
    timm_netaug.cli.hub.main(['pull', 'owner/tiny', sys.argv[2]])
"""


@pytest.mark.parametrize('xet', ['default', 'off'])
def test_two_machines(xet, server, checkpoint, model, tmp_path, monkeypatch):
    """Push in one process, load in another with a cache of its own, and once more without any request."""
    server.upload_mode = dict(default='regular', off='lfs')[xet]  # LFS means xet unless that is switched off
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.setenv('HF_HUB_DISABLE_XET', dict(default='0', off='1')[xet])
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'here'))
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    out = run_python('-m', 'timm_netaug', 'hub', 'push', checkpoint, REPO, '--private').stdout
    assert server.url in out and "timm.create_model('hf-hub:owner/tiny', pretrained=True)" in out
    assert sorted(server.files(REPO)) == ['README.md', 'config.json', 'model.safetensors']
    assert len(server.repos[REPO]['commits']) == 1 and server.repos[REPO]['private']
    assert any(r.startswith('PUT /blobs/') for r in server.requests) == (xet == 'off')
    (tmp_path / 'load.py').write_text(LOAD)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'there'))
    run_python(tmp_path / 'load.py', tmp_path / 'logits.pt')
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), logits(model))
    if xet == 'off':
        del server.requests[:]
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        run_python(tmp_path / 'load.py', tmp_path / 'offline.pt', tmp_path / 'pulled')
        assert torch.equal(torch.load(tmp_path / 'offline.pt'), logits(model))
        assert (tmp_path / 'pulled/model.safetensors').exists() and server.requests == []


def test_second_push(hub, checkpoint, model, folder):
    """It replaces weights and card, in one more commit, from whatever kind of source."""
    run('push', folder, REPO)
    assert 'Squirrels' not in hub.files(REPO)['README.md'].decode()
    other = make('netaug_mbv2_tiny', num_classes=10)
    save(checkpoint, other)
    run('push', checkpoint, REPO, '--dataset-name', 'Squirrels')
    assert len(hub.repos[REPO]['commits']) == 2 and 'Squirrels' in hub.files(REPO)['README.md'].decode()
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert torch.equal(logits(loaded), logits(other)) and not torch.equal(logits(loaded), logits(model))
    old = timm.create_model(f'hf-hub:{REPO}@{hub.sha(REPO, 0)}', pretrained=True)
    assert torch.equal(logits(old), logits(model))


def deployment(folder, model, **changes):
    """Write what a push reads of a deployment: an int8 file, which is not run, and its report."""
    folder.mkdir(exist_ok=True)
    (folder / 'model.tflite').write_bytes(b'int8')
    report = dict(REPORT, sha256=hashlib.sha256(b'int8').hexdigest(), weights_sha256=_weights_hash(model), **changes)
    (folder / 'report.json').write_text(json.dumps(report))
    return folder


def test_int8_file_belongs_to_the_weights(hub, checkpoint, model, tmp_path):
    """A push without --deployed removes the int8 file and the section of the card that an earlier push added."""
    deployed, out = deployment(tmp_path / 'deployed', model), tmp_path / 'out'
    for target in ((), ('--dry-run', out)):
        run('push', checkpoint, REPO, '--deployed', deployed, *target)
    assert hub.files(REPO)['model.tflite'] == (out / 'model.tflite').read_bytes() == b'int8'
    assert 'On a microcontroller' in hub.files(REPO)['README.md'].decode()
    shutil.copytree(out, tmp_path / 'pulled')
    for target in ((), ('--dry-run', out)):
        run('push', tmp_path / 'pulled', REPO, *target)
    assert sorted(hub.files(REPO)) == sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors']
    assert 'On a microcontroller' not in hub.files(REPO)['README.md'].decode() + (out / 'README.md').read_text()
    deployment(deployed, model, arena={})
    assert 'report.json is incomplete' in refusal('push', checkpoint, REPO, '--deployed', deployed)


def test_dry_run(server, checkpoint, model, tmp_path, monkeypatch):
    """The folder that would be pushed, without network or login; pushing that folder gives the same files."""
    out = tmp_path / 'out'
    monkeypatch.setattr('socket.socket', lambda *a, **k: pytest.fail('the network was touched'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    added = ['--license', 'mit', '--dataset-name', 'photos', '--about', 'For the door of the barn.']
    run('push', checkpoint, REPO, '--dry-run', out, *added)
    assert sorted(p.name for p in out.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert torch.equal(logits(timm.create_model(f'local-dir:{out}', pretrained=True)), logits(model))
    config = json.loads((out / 'config.json').read_text())
    assert config['label_names'] == [str(i) for i in range(10)]
    assert {k: config['pretrained_cfg'][k] for k in CONFIG} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in CONFIG.items()}
    assert config['pretrained_cfg']['license'] == 'mit'
    run('push', out, REPO, '--dry-run', tmp_path / 'again')
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / 'again' / file.name).read_bytes(), file.name
    monkeypatch.setattr(sys, 'argv', ['export', str(checkpoint), str(tmp_path / 'exported')])
    export_command.main()
    run('push', tmp_path / 'exported', REPO, '--dry-run', tmp_path / 'third', *added)
    assert '\n\nFor the door of the barn.\n\n## Use\n' in (out / 'README.md').read_text()
    assert (tmp_path / 'third/README.md').read_text() == (out / 'README.md').read_text()
    (out / 'notes.txt').write_text('mine')
    assert 'holds other files (notes.txt)' in refusal('push', checkpoint, REPO, '--dry-run', out)


def test_paths_are_not_on_the_card():
    flags = ['--loss-pos-weight', '/home/me/w.txt', '--loss-class-weight', '1,2', '--class-stats', '/home/me/s.json',
             '--pretrained-cfg-overlay', 'file=/home/me/w.pth', 'crop_pct=0.9', '--kd-model-name',
             'local-dir:/home/me/teacher']
    args = train_parser().parse_args(flags)
    command = training_record(dict(args=args))['command']
    want = train_parser().parse_args([f.replace('/home/me/', '') for f in flags])
    assert '/home/me' not in ' '.join(command) and vars(train_parser().parse_args(command)) == vars(want)


def test_card(hub, model, few_digits, tmp_path, capsys, monkeypatch):
    """What the card says is what the checkpoint, the model and validate.py say."""
    out, path = tmp_path / 'out', tmp_path / 'model.pth.tar'
    run('push', save(path, model), REPO, '--dry-run', out)
    card = ModelCard.load(out / 'README.md')
    assert card.data.library_name == 'timm' and card.data.pipeline_tag == 'image-classification'
    assert {'timm', 'netaug'} <= set(card.data.tags)
    for unknown in ('license:', 'datasets:', 'model-index', 'Metrics', 'None', '/home/me', '## Data'):
        assert unknown not in card.content, unknown
    info = info_command.describe(model, CONFIG['input_size'], samples=1)
    for text in ('import timm_netaug', "'hf-hub:owner/tiny'", f'{info["parameters"]:,}', '| MACs | 1.10 M |',
                 f'{info["flash_int8_bytes"] / 1024:,.0f} KiB', f'at `{info["peak_layer"]}`', 'cai2022netaug',
                 '2 of 3 epochs'):
        assert text in card.content, text
    # the command makes the run's flags again, where they are those of the training
    command = card.content.partition('train.py ')[2].partition('```')[0].replace('\\\n', ' ').split()
    got, want = (vars(parse_args(train_parser(), argv)) for argv in (command, FLAGS))
    assert got['pretrained_path'] == 'start.pth' and got['data_dir'] == 'DATA'
    free = (*FREE_FLAGS, 'workers')
    assert {k: v for k, v in got.items() if k not in free} == {
        **{k: v for k, v in want.items() if k not in free}, 'pretrained_path': 'start.pth'}

    # with a record and a data set: measured, compared, and reproduced by the card's own line
    def evaluate(*argv):
        argv = ['validate.py', *map(str, argv), '-j', '0', '--device', 'cpu']
        monkeypatch.setattr(sys, 'argv', argv)
        capsys.readouterr()
        validate_command.validate()
        return json.loads(capsys.readouterr().out.removeprefix('--result\n'))

    top1 = evaluate('--checkpoint', path, '--data-dir', few_digits)['top1']
    save(path, model, metric=top1 + 0.09)
    run('push', path, REPO, '--data-dir', few_digits, '--dataset-name', 'digits', '--dataset-terms', 'CC BY 4.0')
    content = hub.files(REPO)['README.md'].decode()
    data = yaml.safe_load(content.split('---')[1])
    results = data['model-index'][0]['results'][0]
    assert results['dataset'] == dict(name='digits', type='digits', split='validation')
    assert data['datasets'] == ['digits']
    metrics = {m['name']: m['value'] for m in results['metrics']}
    assert f'{top1:.2f} %' in content and 'digits: CC BY 4.0' in content and '71 images' in content
    line = content.partition('python validate.py ')[2].partition('```')[0].replace('\\\n', ' ')
    row = evaluate(*line.replace('DATA', str(few_digits)).split())
    assert metrics == {'Top-1 accuracy': row['top1'], 'Top-5 accuracy': row['top5']}
    # another accuracy than the one on record
    save(path, model, metric=top1 + 0.11)
    said = refusal('push', path, REPO, '--data-dir', few_digits)
    assert f'{top1 + 0.11:.2f} on record' in said and 'Nothing is pushed' in said
    assert len(hub.repos[REPO]['commits']) == 1


def test_recorded_metric_is_that_of_the_weights(model, tmp_path):
    """The record of the moving average is not told of the other weights."""
    path = tmp_path / 'model.pth.tar'
    save(path, model, metric=50.0, state_dict_ema=model.state_dict())
    run('push', path, REPO, '--dry-run', tmp_path / 'plain')
    run('push', path, REPO, '--dry-run', tmp_path / 'ema', '--use-ema')
    assert '50.00 %' in (tmp_path / 'plain/README.md').read_text()
    assert 'Metrics' not in (tmp_path / 'ema/README.md').read_text()


def test_a_folder_that_computes_something_else(hub, checkpoint, monkeypatch):
    real = hub_module.export_folder

    def other(model, out_dir, run):
        real(make('netaug_mbv2_tiny'), out_dir, run)

    monkeypatch.setattr(hub_module, 'export_folder', other)
    assert 'The exported model and the checkpoint have different logits' in refusal('push', checkpoint, REPO)
    assert REPO not in hub.repos


def test_push_refusals(hub, checkpoint, model, tmp_path, monkeypatch):
    """Each is a sentence, and leaves the Hub as it was."""
    hub.put('owner/other', config__json=b'{"architecture": "netaug_mcunet", "pretrained_cfg": {}}')
    hub.put('owner/bert', config__json=b'{"architectures": ["BertModel"]}')
    hub.put('owner/public', README__md=b'')
    before = json.dumps(hub.repos, default=str)
    pth = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), pth)
    for argv, said in (
            ((checkpoint, 'owner/other'), 'owner/other holds another architecture (netaug_mcunet) than'),
            ((checkpoint, 'owner/bert'), 'holds another architecture (no timm model) than'),
            ((checkpoint, 'owner/public', '--revision', 'v2'), 'owner/public has no revision v2'),
            ((checkpoint, 'owner/new', '--revision', 'v2'), 'push without --revision first'),
            ((checkpoint, 'owner/public', '--private'), 'exists already and is public'),
            ((checkpoint, 'tiny'), 'tiny is not the name of a repository: names have the form OWNER/NAME'),
            ((checkpoint, 'owner/ti ny'), 'owner/ti ny is not the name of a repository'),
            ((pth, REPO), 'does not say which model it belongs to: name the model with --model'),
            ((pth, REPO, '--model', 'netaug_mbv2_tinny'), 'the nearest name is netaug_mbv2_tiny'),
            ((pth, REPO, '--model', 'netaug_mcunet'), 'does not fit netaug_mcunet'),
            ((checkpoint, REPO, '--model', 'netaug_mcunet'), 'leave --model out'),
            (('/no/such', REPO), 'There is no checkpoint and no folder /no/such'),
            ((tmp_path, REPO), 'has no config.json'),
            ((checkpoint, REPO, '--use-ema'), 'it was trained without --model-ema'),
    ):
        assert said in refusal('push', *argv), argv
    monkeypatch.setenv('HF_TOKEN', 'hf_guest')
    assert 'You have no permission for owner/new' in refusal('push', checkpoint, 'owner/new')
    assert 'You have no permission for owner/public' in refusal('push', checkpoint, 'owner/public')
    monkeypatch.setenv('HF_TOKEN', 'hf_expired')
    assert 'does not accept your token' in refusal('push', checkpoint, REPO)
    monkeypatch.delenv('HF_TOKEN')
    assert 'You are not logged in: run `hf auth login`' in refusal('push', checkpoint, REPO)
    assert json.dumps(hub.repos, default=str) == before


def test_no_network(hub, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')
    assert 'The connection to the Hub fails' in refusal('push', checkpoint, REPO)
    assert 'cannot be reached, and is not in the cache' in refusal('pull', REPO, tmp_path / 'out')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE is set' in refusal('push', checkpoint, REPO)
    assert hub.requests == [] and not (tmp_path / 'out').exists()


def test_private_repository(hub, folder, monkeypatch, tmp_path):
    run('push', folder, REPO, '--private')
    for token in (None, 'hf_guest'):
        monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
        said = refusal('pull', REPO, tmp_path / 'out')
        assert said.startswith('There is no repository owner/tiny that you may see') and 'HF_TOKEN' in said
    assert not (tmp_path / 'out').exists()


def test_dropped_upload(hub, folder, model):
    hub.drop['upload'] = 100
    assert 'The connection to the Hub fails' in refusal('push', folder, REPO)
    assert hub.repos[REPO]['commits'] == [] and hub.blobs == {}
    hub.drop['upload'] = 1  # the client tries again by itself
    run('push', folder, REPO)
    assert len(hub.repos[REPO]['commits']) == 1 and not hub.drop['upload']
    assert torch.equal(logits(timm.create_model(f'hf-hub:{REPO}', pretrained=True)), logits(model))


def test_changed_in_the_meantime(hub, folder, monkeypatch):
    run('push', folder, REPO)
    monkeypatch.setattr(hub_module, '_check_reload', lambda *a: hub.put(REPO, notes__md=b'of somebody else'))
    assert 'changed by somebody else in the meantime' in refusal('push', folder, REPO)
    assert len(hub.repos[REPO]['commits']) == 2


def test_dropped_download(hub, folder, model, tmp_path):
    run('push', folder, REPO)
    hub.drop['download'] = 1000
    assert 'connection to the Hub fails' in refusal('pull', REPO, tmp_path / 'out')
    with pytest.raises(Exception):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    size = len(hub.files(REPO)['model.safetensors'])
    cached = [p for p in (tmp_path / 'cache').rglob('*') if p.is_file() and 'incomplete' not in p.name]
    assert not any(p.name == 'model.safetensors' for p in cached) and not (tmp_path / 'out').exists()
    assert all(p.stat().st_size < size // 4 for p in cached)  # neither a whole file nor half of one
    hub.drop['download'] = 1
    run('pull', REPO, tmp_path / 'out')
    assert not hub.drop['download']
    for name in (f'hf-hub:{REPO}', f'local-dir:{tmp_path / "out"}'):
        assert torch.equal(logits(timm.create_model(name, pretrained=True)), logits(model))


class Explosive:
    def __reduce__(self):
        return os.mkdir, ('exploded',)


def test_pickles(hub, folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = (folder / 'config.json').read_bytes()
    for name, content in (('good', model.state_dict()), ('bad', {**model.state_dict(), 'x': Explosive()})):
        torch.save(content, tmp_path / 'weights')
        hub.put(f'owner/{name}', config__json=config, pytorch_model__bin=(tmp_path / 'weights').read_bytes())
        said = refusal('pull', f'owner/{name}', 'out')
        assert 'as a pickle only' in said and f'pull owner/{name} OUT_DIR --allow-pickle' in said
    said = refusal('--model', 'hf-hub:owner/good', '--data-dir', '.', command=validate)
    assert 'as a pickle only' in said
    assert not any('GET' in r and r.endswith('pytorch_model.bin') for r in hub.requests)
    assert 'cannot be read as weights' in refusal('pull', 'owner/bad', 'out', '--allow-pickle')
    assert not (tmp_path / 'exploded').exists() and not (tmp_path / 'out').exists()
    run('pull', 'owner/good', 'out', '--allow-pickle')
    assert sorted(os.listdir('out')) == ['config.json', 'model.safetensors']
    assert torch.equal(logits(timm.create_model('local-dir:out', pretrained=True)), logits(model))
    hub.put('owner/empty', config__json=config)
    assert 'holds no weights, there is no model.safetensors' in refusal('pull', 'owner/empty', 'out')


def validate(*argv):
    sys.argv = ['validate.py', *argv, '-j', '0', '--device', 'cpu']
    validate_command.main()


def build(*argv):
    return set_up_model(parse_args(train_parser(), ['--data-dir', '.', *argv]))


def test_start_of_a_training(hub, folder, model, tmp_path):
    """`train.py --model hf-hub:...` checks what it fetches, like the other ways in."""
    config = json.loads((folder / 'config.json').read_text())
    weights = (folder / 'model.safetensors').read_bytes()
    torch.save(model.state_dict(), tmp_path / 'weights')
    hub.put('owner/pickle', config__json=json.dumps(config).encode(),
            pytorch_model__bin=(tmp_path / 'weights').read_bytes())
    hub.put(REPO, config__json=json.dumps(config).encode(), model__safetensors=weights)
    absurd = {**config, 'model_args': {**config['model_args'], 'stem_size': 10 ** 9}}
    hub.put('owner/absurd', config__json=json.dumps(absurd).encode(), model__safetensors=weights)
    for repo, said in (('owner/pickle', 'as a pickle only'), ('owner/absurd', 'stem_size is 1e.09'),
                       ('owner/none', 'There is no repository owner/none that you may see')):
        with pytest.raises(UserError, match=said):
            build('--model', f'hf-hub:{repo}', '--pretrained')
    assert torch.equal(logits(build('--model', f'hf-hub:{REPO}', '--pretrained')), logits(model))


def describe(*argv):
    info_command.main(list(argv))


CHANGES = {
    'unknown architecture': (lambda c: c.update(architecture='os.system'), "no architecture 'os.system'"),
    'no name': (lambda c: c.update(architecture=['netaug_mcunet']), 'there is no architecture'),
    'another architecture': (lambda c: c.update(architecture='netaug_mcunet'), 'does not fit netaug_mcunet'),
    'wrong shapes': (lambda c: c.update(num_classes=11, model_args={}), 'does not fit netaug_mbv2_tiny: classifier'),
    'two numbers of classes': (lambda c: c.update(num_classes=11), 'two numbers of classes'),
    'huge classifier': (lambda c: c.update(num_classes=10 ** 6, model_args={}), 'weights have'),
    'absurd classifier': (lambda c: c.update(num_classes=10 ** 12, model_args={}), 'num_classes is 1e+12'),
    'absurd width': (lambda c: c['model_args'].update(stem_size=10 ** 9), 'stem_size is 1e+09'),
    'absurd input': (lambda c: c['pretrained_cfg'].update(input_size=[3, 10 ** 6, 10 ** 6]), 'input_size is 1e+06'),
    'no number': (lambda c: c['pretrained_cfg'].update(input_size=[3, float('nan'), 32]), 'input_size is nan'),
    'absurd crop': (lambda c: c['pretrained_cfg'].update(crop_pct=1e-9), 'crop_pct is out of range'),
    'lax loading': (lambda c: c['model_args'].update(pretrained_strict=False), 'how weights are loaded'),
    'foreign argument': (lambda c: c['model_args'].update(exec='x'), 'is not one of a timm model'),
    'no arguments': (lambda c: c.update(model_args=[1]), 'is not one of a timm model'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_configs_of_strangers(change, hub, folder, tmp_path):
    config = json.loads((folder / 'config.json').read_text())
    CHANGES[change][0](config)
    hub.put(REPO, config__json=json.dumps(config).encode(),
            model__safetensors=(folder / 'model.safetensors').read_bytes())
    assert CHANGES[change][1] in refusal('pull', REPO, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    # The other ways in; with them, weights that do not fit are found by timm.
    if 'does not fit' not in CHANGES[change][1]:
        assert CHANGES[change][1] in refusal('--model', f'hf-hub:{REPO}', '--data-dir', '.', command=validate)
    if CHANGES[change][1] != 'weights have' and 'does not fit' not in CHANGES[change][1]:
        assert CHANGES[change][1] in refusal(f'hf-hub:{REPO}', command=describe)


@pytest.mark.parametrize('config, said', [
    (b'not json', 'is not one of a timm model'), (b'[]', 'is not one of a timm model'),
    (b'[' * 100_000, 'is not one of a timm model'), (b' ' * (9 << 20), 'has 9,437,184 bytes')], ids=range(4))
def test_broken_configs(config, said, hub, tmp_path):
    hub.put(REPO, config__json=config, model__safetensors=b'')
    assert said in refusal('pull', REPO, tmp_path / 'out')


def test_broken_weights(hub, folder, model, tmp_path):
    config, weights = ((folder / name).read_bytes() for name in ('config.json', 'model.safetensors'))
    hub.put(REPO, config__json=config, model__safetensors=weights[:len(weights) // 2])
    assert 'cannot be read as weights' in refusal('pull', REPO, tmp_path / 'out')
    broken = {k: t.clone() for k, t in model.state_dict().items()}
    broken['classifier.bias'][3] = float('nan')
    save_file(broken, folder / 'model.safetensors')
    hub.put(REPO, model__safetensors=(folder / 'model.safetensors').read_bytes())
    assert 'classifier.bias has NaN' in refusal('pull', REPO, tmp_path / 'out')
    assert 'has no revision v9' in refusal('pull', REPO, tmp_path / 'out', '--revision', 'v9')
    hub.put('owner/none', README__md=b'')
    assert 'owner/none holds no model' in refusal('pull', 'owner/none', tmp_path / 'out')


def test_teacher_of_the_hub(hub, folder, model):
    """train.py --kd-model-name hf-hub:..."""
    run('push', folder, REPO)
    args = parse_args(train_parser(), ['--num-classes', '10', '--kd-model-name', f'hf-hub:{REPO}'])
    teacher = set_up_teacher(
        args, dict(input_size=(3, 32, 32)), [str(i) for i in range(10)], torch.device('cpu'), torch.float32)
    assert torch.equal(logits(teacher), logits(model))
    torch.testing.assert_close(teacher.mean_kd.flatten(), torch.tensor(CONFIG['mean']))
    args.kd_model_name = 'hf-hub:owner/none'
    with pytest.raises(UserError, match='There is no repository owner/none'):
        set_up_teacher(args, dict(input_size=(3, 32, 32)), None, torch.device('cpu'), torch.float32)


def test_info_of_the_hub(hub, folder, capsys):
    """It needs the config alone."""
    run('push', folder, REPO)
    del hub.requests[:]
    describe(f'hf-hub:{REPO}')
    assert 'netaug_mbv2_tiny, input 3 x 32 x 32, 10 classes' in capsys.readouterr().out
    assert not any('safetensors' in r for r in hub.requests)


def convert(*argv):
    convert_command.main([str(a) for a in argv])


@pytest.mark.parametrize('name', ['netaug_mbv3_035'])
def test_convert(name, hub, tmp_path):
    source, file, out = make(name, num_classes=7), tmp_path / 'official.pth', tmp_path / 'out'
    names = reference_names(source)
    weights = {names[k]: t for k, t in source.state_dict().items()}
    for content in (weights, {'state_dict': weights}, source.state_dict()):
        torch.save(content, file)
        convert(file, out, '--model', name)
        assert torch.equal(logits(timm.create_model(f'local-dir:{out}', pretrained=True)), logits(source))
        shutil.rmtree(out)
    torch.save({'state_dict': weights}, file)
    run('push', file, REPO, '--model', name)
    assert torch.equal(logits(timm.create_model(f'hf-hub:{REPO}', pretrained=True)), logits(source))
    assert "the authors' file `official.pth`" in hub.files(REPO)['README.md'].decode()
    size = timm.create_model(name).pretrained_cfg['input_size']
    assert json.loads(hub.files(REPO)['config.json'])['pretrained_cfg']['input_size'] == list(size)
    # and what is not one of them
    said = refusal(file, out, '--model', 'netaug_mbv2_tiny', command=convert)
    assert 'does not fit netaug_mbv2_tiny: unmatched keys backbone.' in said
    torch.save({'a': torch.zeros(1)}, file)
    assert '1 tensors of the file are not in the model (a)' in refusal(file, out, '--model', name, command=convert)
    file.write_text('hello')
    assert 'cannot be read as weights' in refusal(file, out, '--model', name, command=convert)
    assert not out.exists()


@pytest.mark.skipif(not (SHARED / 'official_format').is_dir(), reason='the parity data is not part of the project')
@pytest.mark.parametrize('name', MODELS)
def test_official_files(name, hub, tmp_path):
    """Converted, pushed and pulled, they compute the reference implementation's logits."""
    folder = SHARED / 'official_format'
    convert(folder / f'{FILES[name]}.pth', tmp_path / 'converted', '--model', name)
    run('push', tmp_path / 'converted', REPO)
    run('pull', REPO, tmp_path / 'pulled')
    stored = load_file(folder / f'{FILES[name]}.io.safetensors')
    for place in (f'hf-hub:{REPO}', f'local-dir:{tmp_path / "pulled"}'):
        model = timm.create_model(place, pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(stored['input']), stored['logits'], rtol=0, atol=1e-6)


def test_pages(hub, model, few_digits, tmp_path, capsys, monkeypatch):
    """Every command of docs/hub.md, and that of the README, as it stands there."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / 'run.pth.tar', model)
    torch.save({reference_names(model)[k]: t for k, t in model.state_dict().items()}, 'official.pth')
    page = (ROOT / 'docs/hub.md').read_text()
    commands = re.findall(r'```bash\n(.*?)```', page, re.S) + [readme_block('hub command')]
    lines = [line for block in commands for line in block.strip().splitlines()]
    assert len(lines) == 8
    names = {'output/train/RUN/model_best.pth.tar': 'run.pth.tar', 'DATA': str(few_digits), 'OWNER/NAME': REPO}
    for line in lines:
        for name, value in names.items():
            line = line.replace(name, value)
        offline, _, line = line.rpartition('python ')
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', bool(offline))
        del hub.requests[:]
        program, *argv = shlex.split(line.removeprefix('-m '))
        {'validate.py': validate, 'timm_netaug': lambda *argv: run_command(argv)}[program](*argv)
        assert not (offline and hub.requests)
        if 'OUT_DIR' in argv:
            timm.create_model('local-dir:OUT_DIR', pretrained=True)
            shutil.rmtree('OUT_DIR')
    assert len(hub.repos[REPO]['commits']) == 2 and os.listdir('to-be-pushed')
    code, = re.findall(r'```python\n(.*?)```', page, re.S)
    exec(code.replace('OWNER/NAME', REPO), scope := {})
    assert torch.equal(logits(scope['model']), logits(model))


def test_baseline(run_dir, tmp_path):
    """The accuracy of the same training without NetAug is on the card; that of another training is refused."""
    twin = torch.load(run_dir / 'last.pth.tar', weights_only=False)
    twin['args'].netaug, twin['metric'] = False, 12.5
    twin['args'].netaug_init = twin['args'].amp = True  # the same start, and another precision
    push = ['-m', 'timm_netaug', 'hub', 'push', run_dir / 'last.pth.tar', 'OWNER/x',
            '--baseline', tmp_path / 'twin.pth.tar', '--baseline-about', 'of another start']
    torch.save(twin, tmp_path / 'twin.pth.tar')
    run_python(*push, '--dry-run', tmp_path / 'out')
    assert 'of the same training without NetAug (of another start), of one seed | 12.50 % |' in (tmp_path / 'out/README.md').read_text()
    done = run_python(*push[:6], '--baseline-about', 'of another start', '--dry-run', tmp_path / 'other', check=False)
    assert done.returncode == 1 and '--baseline-about does nothing without --baseline' in done.stderr
    for key, value in (('lr', 0.5), ('netaug', True)):
        other = copy.deepcopy(twin)
        setattr(other['args'], key, value)
        torch.save(other, tmp_path / 'twin.pth.tar')
        done = run_python(*push, '--dry-run', tmp_path / 'other', check=False)
        assert done.returncode == 1 and 'is not of the same training without NetAug' in done.stderr
        assert not (tmp_path / 'other').exists()


def test_baseline_of_more_processes(run_dir, tmp_path):
    twin = torch.load(run_dir / 'last.pth.tar', weights_only=False)
    twin['args'].netaug, twin['metric'], twin['args'].world_size = False, 12.5, 2
    torch.save(twin, tmp_path / 'twin.pth.tar')
    done = run_python('-m', 'timm_netaug', 'hub', 'push', run_dir / 'last.pth.tar', 'OWNER/x', '--baseline',
                      tmp_path / 'twin.pth.tar', '--dry-run', tmp_path / 'out', check=False)
    assert done.returncode == 1 and 'processes is 2 there and 1 here' in done.stderr


def test_logits_that_are_not_finite(hub, tmp_path):
    huge = make('netaug_mcunet')
    with torch.no_grad():
        huge.classifier.weight.fill_(3e38)
    export_folder(huge, tmp_path / 'huge', describe_run(huge))
    assert 'The logits of the model are not finite numbers, so nothing is pushed' in refusal(
        'push', tmp_path / 'huge', REPO)
