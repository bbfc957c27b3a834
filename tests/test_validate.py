"""validate.py: its flags against independent computations, in bulk, and what it refuses."""
import argparse
import csv
import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import reparameterize_model

from conftest import ROOT, SMALL_RUN, make, make_supernet, run_python
from timm_netaug import evaluate as evaluation
from timm_netaug.cli import export as export_command
from timm_netaug.cli import validate as script
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.flags import all_flags
from timm_netaug.cli.validate_flags import VALIDATE_FLAGS, check_validate_args, validate_parser
from timm_netaug.errors import UserError
from timm_netaug.io.data import DataSource
from timm_netaug.io.run import RunDescription
from timm_netaug.labels import LabelEvaluator

CONFIG = dict(input_size=(3, 32, 32), mean=(0.3,) * 3, std=(0.35,) * 3, interpolation='bicubic', crop_pct=1.0,
              crop_mode='center')
TIMM_COLUMNS = ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct',
                'interpolation']
LIKE_A_RUN = ['--img-size', 32, '--mean', 0.3, '--std', 0.35, '--crop-pct', 1.0, '--interpolation', 'bicubic']


def varied(model):
    """Make a model without training tell the images apart, so that every number below is of several classes."""
    with torch.no_grad():
        model.get_classifier().weight.mul_(30)
        model.get_classifier().bias.zero_()
    return model.eval()


def save_run(path, model, **changes):
    """Write a checkpoint as train.py does, of a model that was not trained."""
    run = RunDescription.from_model(model, CONFIG, [str(i) for i in range(10)])
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(run=run.to_dict()), **changes), path)
    return path


@pytest.fixture(scope='module')
def model():
    return varied(make('netaug_mbv2_tiny'))


@pytest.fixture(scope='module')
def data(digits):
    """The folder, its images as the model gets them, and their labels."""
    files = [(f, int(folder.name)) for folder in sorted((digits / 'validation').iterdir())
             for f in sorted(folder.iterdir())]
    pixels = np.stack([np.array(Image.open(f)) for f, _ in files])
    x = (torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - 0.3) / 0.35
    return SimpleNamespace(folder=digits, x=x, labels=np.array([label for _, label in files]), files=files)


@pytest.fixture(scope='module')
def logits(model, data):
    with torch.no_grad():
        logits = model(data.x).numpy()
    assert len(np.unique(logits.argmax(1))) > 3
    return logits


@pytest.fixture
def run(monkeypatch, capsys, data):
    """Call validate.py; returns what it prints."""
    def call(*argv):
        argv = ['validate.py', '--data-dir', data.folder, '-j', 0, '--device', 'cpu', *argv]
        monkeypatch.setattr(sys, 'argv', [str(a) for a in argv])
        monkeypatch.setattr(script, 'set_up_logging', lambda: None)  # a handler more with every call
        capsys.readouterr()
        script.validate()
        return json.loads(capsys.readouterr().out.removeprefix('--result\n'))
    return call


@pytest.fixture
def checkpoint(model, tmp_path):
    return save_run(tmp_path / 'model.pth.tar', model)


def share(hits):
    return pytest.approx(100 * np.mean(hits), abs=1e-3)


def hits_in(logits, labels, k):
    return (np.argsort(-logits, 1, 'stable')[:, :k] == np.asarray(labels)[:, None]).any(1)


def test_every_flag_is_read():
    """No flag is parsed and then forgotten."""
    code = ''.join((ROOT / 'timm_netaug/cli' / f'{name}.py').read_text()
                   for name in ('validate', 'evaluated_model', 'results', 'device', 'common_flags'))
    by_timm = {'input_size', 'img_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation'}
    by_timm |= {field.name for field in dataclasses.fields(DataSource)}  # by data_source
    dests = [a.dest for a in validate_parser()._actions if a.dest not in ('help', 'config', 'data')]
    assert len(dests) > 50
    assert {d for d in dests if not re.search(rf'args\.{d}\b', code)} <= by_timm
    assert not any(flag.refused for flag in all_flags(VALIDATE_FLAGS))


@pytest.mark.parametrize('argv, said', [
    (['--torchscript', '--torchcompile'], '--torchcompile and --torchscript do not go together'),
    (['--torchcompile', '--aot-autograd'], '--torchcompile and --aot-autograd do not go together'),
    (['--torchscript', '--aot-autograd'], '--torchscript and --aot-autograd do not go together'),
    (['--torchcompile-mode', 'max-autotune'], '--torchcompile-mode does nothing without --torchcompile'),
    (['--valid-labels', 'V', '--real-labels', 'R'], '--real-labels and --valid-labels do not go together'),
    (['--naflex-max-seq-len', '64'], '--naflex-max-seq-len does nothing without --naflex-loader'),
    (['--naflex-loader', '--test-pool'], '--naflex-loader and --test-pool do not go'),
    (['--naflex-loader', '--crop-pct', '1'], '--naflex-loader and --crop-pct do not go'),
    (['--amp-dtype', 'bfloat16'], '--amp-dtype does nothing without --amp'),
    (['--use-ema'], '--use-ema does nothing without --checkpoint'),
    (['--results-format', 'json'], '--results-format does nothing without --results-file'),
    (['--results-file', 'r', '--results-format', 'xml'], '--results-format must be one of csv, json'),
    (['--results-file', '/no/such/folder/r.csv'], '--results-file /no/such/folder/r.csv is no file name'),
    (['--results-file', '/tmp'], '--results-file /tmp is no file name'),
    (['--fuser', 'nvfuser'], 'PyTorch has no nvFuser'),
    (['--fuser', 'x'], '--fuser must be one of'),
    (['--crop-mode', 'x'], '--crop-mode must be one of'),
    (['-b', '0'], '--batch-size must be at least 1'),
    (['--num-gpu', '0'], '--num-gpu must be at least 1'),
    (['--aot-autograd', '--num-gpu', '2'], '--aot-autograd and --num-gpu do not go together'),
    (['--amp', '--model-dtype', 'bfloat16'], '--amp needs float32 weights'),
])
def test_refused_by_name(argv, said):
    parser = validate_parser()
    with pytest.raises(UserError, match=said):
        check_validate_args(parse_args(parser, ['--data-dir', 'D', *argv]))


@pytest.mark.parametrize('argv, said', [
    (['--metrics-avg', 'macro'], '--metrics-avg needs scikit-learn: pip install scikit-learn'),
    (['--tf-preprocessing'], '--tf-preprocessing needs tensorflow: pip install tensorflow'),
])
def test_missing_packages(argv, said, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    parser = validate_parser()
    with pytest.raises(UserError, match=said):
        check_validate_args(parse_args(parser, ['--data-dir', 'D', *argv]))


@pytest.mark.parametrize('format', ['csv', 'json'])
def test_results_file(format, run, checkpoint, tmp_path, logits, data):
    file = tmp_path / 'results'
    argv = [] if format == 'csv' else ['--results-format', 'json']
    got = run('--checkpoint', checkpoint, '--results-file', file, *argv)
    assert got['top1'] == share(hits_in(logits, data.labels, 1)) and got['images'] == len(data.labels)
    assert got['top5'] == share(hits_in(logits, data.labels, 5))
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(data.labels)).item()
    assert got['loss'] == pytest.approx(loss, rel=1e-4)
    text = file.read_text()
    row = json.loads(text) if format == 'json' else next(csv.DictReader(text.splitlines()))
    assert list(row) == [*TIMM_COLUMNS, 'checkpoint'] and row['model'] == 'netaug_mbv2_tiny'
    assert all(str(row[k]) == str(got[k]) for k in row)
    assert float(row['top1_err']) == pytest.approx(100 - got['top1'])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.pth.tar', 'results']


def test_valid_labels(run, checkpoint, tmp_path, data, logits):
    """Labels count the data set's own classes, predictions only those of the model that are listed."""
    part = [3, 7, 9]
    for name in part:
        (tmp_path / 'some' / str(name)).parent.mkdir(exist_ok=True)
        (tmp_path / 'some' / str(name)).symlink_to(data.folder / 'validation' / str(name))
    valid = tmp_path / 'valid.txt'

    def call(text):
        valid.write_text(text)
        return run('--checkpoint', checkpoint, '--data-dir', tmp_path / 'some', '--valid-labels', valid)

    rows = np.isin(data.labels, part)
    want = np.array(part)[logits[rows][:, part].argmax(1)] == data.labels[rows]
    assert call('3\n7\n9\n')['top1'] == share(want) and call('3\n7\n9\n')['top5'] == 100
    for text, said in (('3\n7\n', '2 lines, but the data set has 3 classes'),
                       ('3\n9\n7\n', 'in its order, which is 3, 7, 9'), ('3\n7\n10\n', 'from 0 to 9'),
                       ('3\n3\n9\n', 'must be distinct'), ('3\nx', 'class indices')):
        with pytest.raises(UserError, match=said):
            call(text)


def test_real_labels(run, checkpoint, tmp_path, data, logits):
    """Any of an image's labels is right, an image without one does not count; the names decide, not the order."""
    keep, rng = np.arange(0, len(data.labels), 7), np.random.default_rng(0)
    # Numbers against the order of the folders: sorted by name within a class, not over all of them.
    numbers = rng.permutation(len(keep))
    real = [None] * len(keep)
    for i, number in zip(keep, numbers):
        folder = tmp_path / 'data' / str(data.labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'ILSVRC2012_val_{number + 1:08d}.JPEG').symlink_to(data.files[i][0])
        real[number] = [int(c) for c in rng.choice(10, rng.integers(0, 4), replace=False)]
    file = tmp_path / 'real.json'
    file.write_text(json.dumps(real))
    argv = ['--checkpoint', checkpoint, '--data-dir', tmp_path / 'data', '--real-labels', file, '-b', 16]
    got = run(*argv)
    for k in (1, 5):
        order = np.argsort(-logits, 1, 'stable')[:, :k]
        want = [bool(set(order[i].tolist()) & set(real[n])) for i, n in zip(keep, numbers) if real[n]]
        assert 0 < len(want) < len(keep) and got[f'top{k}'] == share(want)
    for text, said in ((json.dumps(real[1:]), 'does not fit the'), ('{', 'takes the JSON'), ('3', 'takes the JSON')):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            run(*argv)
    file.write_text(json.dumps([[0]] * len(data.labels)))
    with pytest.raises(UserError, match='their names in ImageNet'):
        run('--checkpoint', checkpoint, '--real-labels', file)


@pytest.mark.parametrize('average', ['micro', 'macro', 'weighted'])
def test_metrics_avg(average, run, checkpoint, data, logits):
    got = run('--checkpoint', checkpoint, '--metrics-avg', average, '-b', 50)
    confusion = np.zeros((10, 10))
    np.add.at(confusion, (data.labels, logits.argmax(1)), 1)
    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    if average == 'micro':
        hits, support, predicted = ([v.sum()] for v in (hits, support, predicted))
    hits, support, predicted = map(np.asarray, (hits, support, predicted))
    precision, recall = hits / np.maximum(predicted, 1), hits / support
    f1 = 2 * hits / (support + predicted)
    weights = support / support.sum() if average == 'weighted' else np.full(len(hits), 1 / len(hits))
    for name, values in (('precision', precision), ('recall', recall), ('f1_score', f1)):
        assert got[f'{average}_{name}'] == pytest.approx(100 * (weights * values).sum(), abs=1e-3), name


def test_numbers_that_are_not_finite_have_no_accuracy(run, tmp_path):
    huge = make('netaug_mbv2_tiny')
    with torch.no_grad():
        huge.classifier.weight.fill_(3e38)
    with pytest.raises(UserError, match='The loss of netaug_mbv2_tiny is nan: the model computes numbers that are not'):
        run('--checkpoint', save_run(tmp_path / 'huge.pth.tar', huge))


def test_class_map_in_another_order_than_the_model(run, checkpoint, tmp_path):
    same, other = tmp_path / 'same.txt', tmp_path / 'other.txt'
    names = [str(i) for i in range(10)]
    same.write_text('\n'.join(names))
    other.write_text('\n'.join(names[1:] + names[:1]))
    assert run('--checkpoint', checkpoint, '--class-map', same) == run('--checkpoint', checkpoint)
    with pytest.raises(UserError, match='--class-map gives the class 1 another label than the model does'):
        run('--checkpoint', checkpoint, '--class-map', other)


def test_exported_folder_determines_its_model(run, checkpoint, tmp_path):
    folder = tmp_path / 'folder'
    export_command.main([str(checkpoint), str(folder)])
    with pytest.raises(UserError, match='--num-classes: the folder .* determines its model. Leave the flag out.'):
        run('--model', folder, '--num-classes', 9)
    with pytest.raises(UserError, match='--num-classes 9: the weights of local-dir:.* are for 10 classes'):
        run('--model', f'local-dir:{folder}', '--num-classes', 9)


@pytest.mark.parametrize('flags, said', [
    (['--num-samples', 3], '--num-samples is for iterable data sets alone'),
    (['--crop-pct', 95], '--crop-pct must be at least 0.05 and at most 2, got 95'),
    (['--img-size', 10 ** 6], '--img-size must be at least 1 and at most 8192'),
    (['--input-img-mode', 'XYZ'], '--input-img-mode must be one of L, LA, RGB'),
])
def test_flags_out_of_range(run, checkpoint, flags, said):
    with pytest.raises(UserError, match=said):
        run('--checkpoint', checkpoint, *flags)


def test_labels_out_of_range_do_not_reach_the_loss():
    with pytest.raises(UserError, match='labels from 0 to 3, but only 3 classes are evaluated'):
        LabelEvaluator(torch.device('cpu')).update(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_folder_of_checkpoints(run, model, tmp_path, logits, data, monkeypatch):
    """Every file in natural order, with its own architecture; one broken file costs none of the other results."""
    folder = tmp_path / 'run'
    folder.mkdir()
    other = varied(make('netaug_mcunet'))
    save_run(folder / 'checkpoint-10.pth.tar', model)
    save_run(folder / 'checkpoint-2.pth.tar', other)
    torch.save(other.state_dict(), folder / 'foreign.pth')
    save_file(other.state_dict(), folder / 'foreign.safetensors')
    (folder / 'broken-3.pth.tar').write_bytes((folder / 'checkpoint-10.pth.tar').read_bytes()[:5000])
    (folder / 'summary.csv').write_text('not a checkpoint')
    results = tmp_path / 'results.csv'
    with pytest.raises(UserError, match='3 of 5 models failed'):
        run('--checkpoint', folder, '--results-file', results)
    rows = list(csv.DictReader(results.open()))
    assert list(rows[0]) == [*TIMM_COLUMNS, 'checkpoint', 'error']
    by_name = {r['checkpoint'].rpartition('/')[2]: r for r in rows}
    assert len(by_name) == 5 and float(by_name['checkpoint-10.pth.tar']['top1']) == share(
        hits_in(logits, data.labels, 1))
    assert by_name['checkpoint-2.pth.tar']['model'] == 'netaug_mcunet'
    assert 'truncated' in by_name['broken-3.pth.tar']['error']
    assert all('name the model with --model' in by_name[f'foreign.{s}']['error'] for s in ('pth', 'safetensors'))
    top1 = [float(r['top1'] or -1) for r in rows]
    assert top1 == sorted(top1, reverse=True) and [bool(r['error']) for r in rows] == [False, False, True, True, True]

    for path in (folder / 'broken-3.pth.tar', folder / 'checkpoint-10.pth.tar'):
        path.unlink()
    got = run('--checkpoint', folder, '--model', 'netaug_mcunet', *LIKE_A_RUN, '--results-file', results)
    assert len(got) == 3 and len({r['loss'] for r in got}) == 1
    assert list(csv.DictReader(results.open()).fieldnames) == [*TIMM_COLUMNS, 'checkpoint']

    done = []

    def interrupted(entry, *args, **kwargs):
        if done:
            assert len(results.read_text().splitlines()) == 2  # the first one's row is there already
            raise KeyboardInterrupt
        done.append(entry.checkpoint)
        return dict(model='m', top1=1.0)

    monkeypatch.setattr(script, 'validate_one', interrupted)
    with pytest.raises(UserError, match='Interrupted after 1 of 3'):
        run('--checkpoint', folder, '--results-file', results)
    assert done == [str(folder / 'checkpoint-2.pth.tar')] and 'm,1.0' in results.read_text()


def test_names(run, model, checkpoint, tmp_path, capsys, monkeypatch):
    """A text file, a wildcard, 'all'."""
    monkeypatch.setattr(sys, 'argv', ['export', str(checkpoint), str(tmp_path / 'out')])
    export_command.main()
    names = tmp_path / 'names.txt'
    names.write_text(f'no_such_model\n\nlocal-dir:{tmp_path}/out\n')
    results = tmp_path / 'results.json'
    with pytest.raises(UserError, match='1 of 2 models failed'):
        run('--model', names, '--results-file', results, '--results-format', 'json')
    good, bad = json.loads(results.read_text())
    assert good['top1'] == run('--checkpoint', checkpoint)['top1'] and 'error' not in good
    assert bad == dict(model='no_such_model', error=bad['error']) and 'timm.list_models()' in bad['error']
    with pytest.raises(UserError, match='3 of 3 models failed'):
        run('--model', 'netaug_*_035')
    rows = json.loads(capsys.readouterr().out.removeprefix('--result\n'))
    assert len({r['model'] for r in rows}) == 3 and all('does not know: 0, 1' in r['error'] for r in rows)
    overlay = {'file': str(tmp_path / 'weights.pth'), 'num_classes': 10, 'label_names': None}
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    got = run('--model', 'netaug_mbv2_t*', '--num-classes', 10, '--model-kwargs', f'pretrained_cfg_overlay={overlay}')
    assert [r['model'] for r in got] == ['netaug_mbv2_tiny.netaug_cifar10']
    everything = script.bulk_entries('all', '')
    assert len(everything) > 1000 and ('resnet18.a1_in1k', '') in everything
    assert not any(n.startswith('vit_small_patch14_dinov2') for n, _ in everything)  # no classifier
    (tmp_path / 'empty').mkdir()
    for argv, said in ((['--model', 'netaug_x*'], 'there is no such model'), (['--model', 'netaug_x'], 'Unknown model'),
                       (['--model', 'netaug_*', '--checkpoint', checkpoint], 'needs a single model'),
                       (['--checkpoint', tmp_path / 'out', '--model', names], 'needs a single model'),
                       (['--checkpoint', tmp_path / 'empty'], 'There is no checkpoint .* in the folder'),
                       (['--model', checkpoint], 'pass a checkpoint with --checkpoint')):
        with pytest.raises(UserError, match=said):
            run(*argv)


def test_retry(run, checkpoint, monkeypatch):
    """Smaller batches help against little memory only; the metrics start anew."""
    want, evaluate, sizes = run('--checkpoint', checkpoint), evaluation.evaluate, []

    def short(model, loader, *args, error='CUDA out of memory.', **kwargs):
        sizes.append(loader.loader.batch_size)
        if sizes[-1] > 48:
            evaluate(model, loader, *args, **kwargs)
            raise RuntimeError(error)
        return evaluate(model, loader, *args, **kwargs)

    monkeypatch.setattr(evaluation, 'evaluate', short)
    got = run('--checkpoint', checkpoint, '-b', 128, '--retry')
    assert sizes == [128, 96, 64, 48] and {**got, 'loss': 0} == {**want, 'loss': 0}
    assert got['loss'] == pytest.approx(want['loss'], rel=1e-4)
    with pytest.raises(UserError, match='batches of 128: use a smaller --batch-size or --retry'):
        run('--checkpoint', checkpoint, '-b', 128)
    monkeypatch.setattr(evaluation, 'evaluate', lambda *a, **k: short(*a, **k, error='shapes differ'))
    del sizes[:]
    with pytest.raises(RuntimeError, match='shapes differ'):
        run('--checkpoint', checkpoint, '-b', 128, '--retry')
    assert sizes == [128]
    monkeypatch.setattr(evaluation, 'evaluate', lambda *a, **k: (_ for _ in ()).throw(RuntimeError('out of memory')))
    with pytest.raises(UserError, match='batches of 1: use a smaller --batch-size'):
        run('--checkpoint', checkpoint, '-b', 4, '--retry')


def test_pool(run, checkpoint, data, model, tmp_path):
    """Larger images are pooled with the training's window, then by the mean of average and maximum."""
    got = run('--checkpoint', checkpoint, '--test-pool', '--img-size', 96, '--crop-pct', 0.5)
    assert got['crop_pct'] == 1.0 and got['param_count'] == run('--checkpoint', checkpoint)['param_count']
    pixels = np.stack([np.array(Image.open(f).resize((96, 96), Image.Resampling.BICUBIC)) for f, _ in data.files])
    with torch.no_grad():
        # Trained at 32 pixels, the window is a single position.
        maps = model.forward_features((torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - 0.3) / 0.35)
        out = torch.einsum('oc,nchw->nohw', model.classifier.weight, maps) + model.classifier.bias[:, None, None]
        out = (out.mean((2, 3)) + out.amax((2, 3))) / 2
    assert got['top1'] == share(hits_in(out.numpy(), data.labels, 1))
    assert got['top5'] == share(hits_in(out.numpy(), data.labels, 5))
    assert run('--checkpoint', checkpoint, '--test-pool')['loss'] == run('--checkpoint', checkpoint)['loss']
    v3 = save_run(tmp_path / 'v3.pth.tar', make('netaug_mbv3_035'))
    with pytest.raises(UserError, match='--test-pool does not work with a MobileNetV3'):
        run('--checkpoint', v3, '--test-pool', '--img-size', 64)


def test_reparam(run, tmp_path):
    branched = varied(make('repghostnet_050'))
    torch.save(branched.state_dict(), tmp_path / 'model.pth')
    argv = ['--model', 'repghostnet_050', '--checkpoint', tmp_path / 'model.pth', *LIKE_A_RUN]
    plain, fused = run(*argv), run(*argv, '--reparam')
    count = sum(p.numel() for p in reparameterize_model(branched).parameters())
    assert fused['param_count'] == round(count / 1e6, 2) and fused['loss'] == pytest.approx(plain['loss'], rel=1e-3)
    assert count < sum(p.numel() for p in branched.parameters())


@pytest.fixture
def small(tmp_path):
    """A model that compiles fast, in a file that does not say which one it is."""
    torch.save(varied(make('test_resnet')).state_dict(), tmp_path / 'small.pth')
    return ['--model', 'test_resnet', '--checkpoint', tmp_path / 'small.pth', *LIKE_A_RUN]


@pytest.mark.parametrize('argv', [['--torchscript'], ['--torchcompile', 'eager'], ['--aot-autograd']], ids=str)
@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated', 'ignore:The TorchScript type system')
def test_compiled(argv, run, small, monkeypatch):
    """Compiled models compute the same, for a last batch of another size too."""
    calls = []
    for place, name in ((torch.jit, 'script'), (torch, 'compile')):
        real = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *a, real=real, name=name, **k: calls.append((name, k)) or real(*a, **k))
    got = run(*small, *argv, '-b', 200)
    assert got['loss'] == pytest.approx(run(*small)['loss'], rel=1e-4)
    assert [k for n, k in calls if n == 'compile'] == ([dict(backend='eager', mode=None)] if 'eager' in argv else [])
    assert argv != ['--torchscript'] or calls[0][0] == 'script'


def test_compile_options(run, small, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'compile', lambda model, **k: calls.append(k) or model)
    run(*small, '--torchcompile', '--torchcompile-mode', 'max-autotune')
    assert calls == [dict(backend='inductor', mode='max-autotune')]


def test_compile_fails_plainly(run, small):
    for argv in (['--torchcompile', 'no-such-backend'], ['--torchcompile', '--torchcompile-mode', 'no-such-mode']):
        with pytest.raises(UserError, match='cannot be compiled.*no-such'):
            run(*small, *argv)


def test_devices(run, checkpoint, monkeypatch):
    fusers = []
    monkeypatch.setattr(script, 'set_jit_fuser', fusers.append)
    run('--checkpoint', checkpoint, '--fuser', 'te')
    assert fusers == ['te']
    for argv, said in ((['--num-gpu', 2], '--num-gpu 2: there are 0 GPUs'),
                       (['--device', 'abacus'], '--device abacus: Expected one of'),
                       (['--device', 'cuda:99'], '--device cuda:99: '), (['--device', 'hpu'], '--device hpu: ')):
        with pytest.raises(UserError, match=said):
            run('--checkpoint', checkpoint, *argv)


def test_naflex(run, tmp_path, data, checkpoint):
    """Patches of the images as they are: with four of 16 pixels nothing is resized."""
    small = dict(embed_dim=32, depth=1, num_heads=2)
    naflex = varied(make('naflexvit_base_patch16_gap', **small))
    torch.save(naflex.state_dict(), tmp_path / 'naflex.pth')
    argv = ['--model', 'naflexvit_base_patch16_gap', '--checkpoint', tmp_path / 'naflex.pth', '--naflex-loader',
            '--mean', 0.3, '--std', 0.35, '--model-kwargs', *(f'{k}={v}' for k, v in small.items())]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(naflex(data.x), torch.tensor(data.labels)).item()
    got = [run(*argv, '--naflex-max-seq-len', 4, *more) for more in ([], ['--no-prefetcher'])]
    assert [r['loss'] for r in got] == [pytest.approx(loss, rel=1e-3)] * 2
    assert run(*argv, '--naflex-max-seq-len', 9)['loss'] != pytest.approx(loss, rel=1e-3)
    with pytest.raises(UserError, match='--naflex-loader needs a NaFlex model'):
        run('--checkpoint', checkpoint, '--naflex-loader')


def test_tf_preprocessing(run, checkpoint, tmp_path, data, logits):
    """TensorFlow's decoding and resizing are close to PIL's, where it is installed."""
    pytest.importorskip('tensorflow')
    with pytest.raises(UserError, match='--tf-preprocessing reads only JPEG images'):
        run('--checkpoint', checkpoint, '--tf-preprocessing')
    for file, label in data.files[::5]:
        folder = tmp_path / 'jpeg' / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((64, 64)).save(folder / f'{file.stem}.jpg', quality=95)
    argv = ['--checkpoint', checkpoint, '--data-dir', tmp_path / 'jpeg']
    got, want = run(*argv, '--tf-preprocessing'), run(*argv, '--crop-pct', 0.5)
    assert got['images'] == want['images'] and got['loss'] == pytest.approx(want['loss'], rel=0.5)


def test_use_ema(run, model, tmp_path):
    other = varied(make('netaug_mbv2_tiny'))
    with torch.no_grad():
        other.classifier.weight.neg_()
    both = save_run(tmp_path / 'both.pth.tar', model, state_dict_ema=other.state_dict())
    want = run('--checkpoint', save_run(tmp_path / 'other.pth.tar', other))['loss']
    assert run('--checkpoint', both, '--use-ema')['loss'] == want != run('--checkpoint', both)['loss']
    torch.save(dict(state_dict=model.state_dict(), model_ema=other.state_dict()), tmp_path / 'foreign.pth')
    argv = ['--model', 'netaug_mbv2_tiny', *LIKE_A_RUN]
    assert run('--checkpoint', tmp_path / 'foreign.pth', '--use-ema', *argv)['loss'] == want
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    for file, said in (('other.pth.tar', 'has no state_dict_ema'), ('plain.pth', 'has no moving average')):
        with pytest.raises(UserError, match=said):
            run('--checkpoint', tmp_path / file, '--use-ema', *(argv if 'plain' in file else ()))


def refused(run, capsys, monkeypatch, path, *argv):
    """Return the one sentence of validate.py, and check that the export command has one too and writes nothing."""
    with pytest.raises(UserError) as said:
        run('--checkpoint', path, *argv)
    out = path.parent / 'exported'
    monkeypatch.setattr(sys, 'argv', ['export', str(path), str(out)])
    with pytest.raises(SystemExit, match='^timm_netaug export: error: ') as export_said:
        export_command.main()
    assert not out.exists() and '\n' not in str(said.value) + str(export_said.value)
    return str(said.value), str(export_said.value).removeprefix('timm_netaug export: error: ')


@pytest.mark.parametrize('value', [float('nan'), float('-inf')])
def test_weights_that_are_no_numbers(value, run, model, tmp_path, capsys, monkeypatch):
    weights = {k: t.clone() for k, t in model.state_dict().items()}
    weights['bn1.running_var'][3] = value
    run_file = tmp_path / 'run.pth.tar'
    save_run(run_file, model)
    saved = torch.load(run_file, weights_only=False)
    torch.save({**saved, 'state_dict': weights}, run_file)
    said = refused(run, capsys, monkeypatch, run_file)
    assert said[0] == said[1] and 'bn1.running_var has NaN or infinite values' in said[0]
    save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match='bn1.running_var has NaN'):
        run('--checkpoint', tmp_path / 'model.safetensors', '--model', 'netaug_mbv2_tiny')
    with pytest.raises(UserError, match='bn1.running_var has NaN'):
        overlay = {'file': str(tmp_path / 'model.safetensors'), 'num_classes': 10}
        run('--model', 'netaug_mbv2_tiny', '--num-classes', 10, '--model-kwargs', f'pretrained_cfg_overlay={overlay}')


@pytest.mark.parametrize('name', ['model.pth.tar', 'model.pth', 'legacy.pth', 'model.safetensors'])
def test_truncated(name, run, model, tmp_path, capsys, monkeypatch):
    file = tmp_path / name
    if name == 'model.pth.tar':
        save_run(file, model)
    elif name == 'model.safetensors':
        save_file(model.state_dict(), file)
    else:
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=name == 'model.pth')
    whole = file.read_bytes()
    for length in (0, 1, 9, 100, 4096, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        said = refused(run, capsys, monkeypatch, file, '--model', 'netaug_mbv2_tiny')
        assert 'truncated' in said[0], length
        assert re.search('truncated|not a checkpoint of train.py', said[1]), length


@pytest.mark.parametrize('content', [[1, 2], {'a': 1}, {'state_dict': 3}, 'text', {'state_dict': {}}], ids=str)
def test_no_checkpoint(content, run, tmp_path, capsys, monkeypatch):
    file = tmp_path / 'model.pth'
    torch.save(content, file) if content != 'text' else file.write_text('hello')
    said = refused(run, capsys, monkeypatch, file, '--model', 'netaug_mbv2_tiny')
    assert re.search('holds no weights|cannot be read as weights', said[0])
    assert re.search('not a checkpoint', said[1])


def test_weights_of_another_network(run, model, tmp_path, capsys, monkeypatch):
    file = tmp_path / 'model.pth'
    name = ['--model', 'netaug_mbv2_tiny']
    torch.save({'state_dict': make_supernet('netaug_mbv2_tiny').state_dict()}, file)
    said = refused(run, capsys, monkeypatch, file, *name)
    assert 'wider' in said[0] and '`python -m timm_netaug export` cuts the tiny model out' in said[0]
    assert 'is not a checkpoint of train.py' in said[1]
    torch.save(make('netaug_mcunet').state_dict(), file)
    assert re.search(r'does not fit netaug_mbv2_tiny: .*of another architecture.*--model',
                     refused(run, capsys, monkeypatch, file, *name)[0])
    torch.save(model.state_dict(), file)
    assert 'set --num-classes to the number in the file' in refused(
        run, capsys, monkeypatch, file, *name, '--num-classes', 7)[0]
    assert '--in-chans' in refused(run, capsys, monkeypatch, file, *name, '--in-chans', 1)[0]
    assert 'name the model with --model' in refused(run, capsys, monkeypatch, file)[0]
    with pytest.raises(UserError, match='There is no checkpoint /no/such.pth'):
        run('--checkpoint', '/no/such.pth')
    # A super-network in the place of a run's tiny model: both commands say the same.
    saved = torch.load(save_run(tmp_path / 'run.pth.tar', model), weights_only=False)
    torch.save({**saved, 'state_dict': make_supernet().state_dict()}, tmp_path / 'run.pth.tar')
    said = refused(run, capsys, monkeypatch, tmp_path / 'run.pth.tar')
    assert said[0] == said[1] and 'wider' in said[0]


def test_input_that_the_model_does_not_take(run, tmp_path):
    vit = make('vit_tiny_patch16_224', img_size=32)
    path = save_run(tmp_path / 'vit.pth.tar', vit)
    assert run('--checkpoint', path)['img_size'] == 32
    with pytest.raises(UserError, match='vit_tiny_patch16_224 does not take such an input'):
        run('--checkpoint', path, '--img-size', 64)
    grey = make('netaug_mbv2_tiny', in_chans=1)
    run_grey = RunDescription.from_model(grey, {**CONFIG, 'input_size': (1, 32, 32), 'mean': (0.3,), 'std': (0.35,)})
    torch.save(dict(state_dict=grey.state_dict(), args=argparse.Namespace(run=run_grey.to_dict())), path)
    assert run('--checkpoint', path, '--img-size', 64)['img_size'] == 64


def test_image_mode_travels_with_the_model(few_digits, tmp_path):
    """What the network was trained on is what it is validated on: from the checkpoint, and from the exported folder."""
    command = ['train.py', '--data-dir', few_digits, *SMALL_RUN, '-b', 60, '-j', 0, '--epochs', 1, '--output', tmp_path]
    run_python(*command, '--input-img-mode', 'HSV', '--experiment', 'run')
    best = tmp_path / 'run/model_best.pth.tar'
    run_python('-m', 'timm_netaug', 'export', best, tmp_path / 'out')
    row = next(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    for source in (['--checkpoint', best], ['--model', f'local-dir:{tmp_path / "out"}'], ['--model', tmp_path / 'out']):
        done = run_python('validate.py', *source, '--data-dir', few_digits, '-j', 0)
        got = json.loads(done.stdout[done.stdout.index('{'):])
        assert got['loss'] == pytest.approx(float(row['eval_loss']), rel=1e-4)
    done = run_python('validate.py', '--checkpoint', best, '--data-dir', few_digits, '-j', 0, '--input-img-mode', 'RGB')
    assert json.loads(done.stdout[done.stdout.index('{'):])['loss'] != got['loss']
