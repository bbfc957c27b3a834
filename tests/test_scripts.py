"""train.py, validate.py and export as a user runs them."""
import copy
import csv
import dataclasses
import json
import math
import platform
import re
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import _registry
from timm.utils import NativeScaler, ParseKwargs, dispatch_clip_grad

import timm_netaug
from conftest import NETAUG, ROOT, SMALL_RUN, images, make, make_supernet, readme_block, run_python
from timm_netaug.cli import build
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.device import choose_device
from timm_netaug.cli.flags import all_flags
from timm_netaug.cli.train_flags import TRAIN_FLAGS, check_train_args, netaug_config, train_parser
from timm_netaug.cli.validate_flags import VALIDATE_FLAGS, validate_parser
from timm_netaug.errors import UserError
from timm_netaug.io.data import DataSource
from timm_netaug.io.folder import export_folder
from timm_netaug.io.run import RunDescription

SMALL = ['--num-classes', 10, '--img-size', 32, '-b', 120, '-j', 0, '--warmup-epochs', 0, '--crop-pct', 1.0]


@pytest.mark.parametrize('script, parser, table', [
    ('train', train_parser(), TRAIN_FLAGS), ('validate', validate_parser(), VALIDATE_FLAGS)])
def test_every_flag_of_timm(script, parser, table):
    """Same flags, defaults, types, choices and numbers of values; --help has all but those that are always refused."""
    flags = json.loads((ROOT / f'tests/data/{script}_flags.json').read_text())
    assert len(flags) > 50
    actions, text = {a.dest: a for a in parser._actions}, parser.format_help()
    for flag in flags:
        action = actions[flag['dest']]
        assert set(action.option_strings or [action.dest]) == set(flag['flags'])
        assert action.default == flag['default'] and action.nargs == flag['nargs'], flag['dest']
        if action.nargs != 0 and flag['type'] != 'ParseKwargs' and not isinstance(action, ParseKwargs):
            assert action.type.__name__ == (flag['type'] or 'str')
        assert isinstance(action, ParseKwargs) == ('ParseKwargs' in (flag['type'], flag['kind']))
        row = next(row for row in all_flags(table) if row.dest == flag['dest'])
        assert flag['choices'] in (None, list(row.choices))
        assert row.help and all((name in text) != bool(row.refused) for name in flag['flags'])


@pytest.mark.parametrize('argv, said', [
    (['--naflex-loader'], '--naflex-loader is not supported: NaFlex models are transformers'),
    (['--naflex-max-seq-len', '64'], '--naflex-max-seq-len is not supported'),
    (['--kd-temperature', '2'], '--kd-temperature does nothing without --kd-model-name or --netaug-distill'),
    (['--kd-model-name', 'x', '--kd-temperature', '0'], '--kd-temperature must be above 0'),
    (['--kd-model-name', 'x', '--kd-loss-type', 'mse'], '--kd-loss-type must be one of kl'),
    (['--kd-model-name', 'x', '--kd-token-distill-type', 'hard'], 'does nothing without --kd-distill-type token'),
    (['--kd-model-name', 'x', '--task-loss-weight', '-1'], '--task-loss-weight must be at least 0'),
    (['--kd-model-name', 'x', '--task-loss-weight', '2'], '--task-loss-weight above 1 needs --distill-loss-weight'),
    (['--netaug', '--kd-model-name', 'x', '--kd-distill-type', 'token'], 'does not go together with --netaug'),
    (['--distill-loss-weight', '1'], '--distill-loss-weight does nothing without --kd-model-name'),
    (['--train-img-sizes', '32', '64', '--train-batch-sizes', '8'], '--train-batch-sizes needs a value for each of'),
    (['--train-img-sizes', '0', '64'], '--train-img-sizes must be at least 1, got 0'),
    (['--train-batches-per-epoch', '3'], '--train-batches-per-epoch does nothing without --train-img-sizes'),
    (['--variable-batch-loss-scale', 'sqrt'], 'does nothing without --train-batch-sizes'),
    (['--netaug', '--torchscript'], '--torchscript does not go together with --netaug'),
    (['--netaug', '--split-bn', '--aug-splits', '2'], '--split-bn does not go together with --netaug'),
    (['--netaug', '--fuser', 'te'], '--fuser does not go together with --netaug'),
    (['--fuser', 'te'], '--fuser does nothing without --torchscript'),
    (['--torchscript', '--torchcompile'], '--torchscript and --torchcompile do not go together'),
    (['--netaug', '--netaug-every', '0'], '--netaug-every must be'),
    (['--netaug', '--netaug-distill', '-1'], '--netaug-distill must be'),
    (['--netaug', '--netaug-batch-fraction', '0'], '--netaug-batch-fraction must be a share'),
    (['--netaug', '--netaug-batch-fraction', '0.5', '--aug-splits', '2'], 'does not go together with --aug-splits'),
    (['--drop-path', '0.1', '--drop-connect', '0.1'], '--drop-connect is the old name'),
    (['--netaug', '--torchcompile', '--grad-checkpointing'], 'do not go together with --netaug: compiled code'),
    (['--netaug', '--fast-norm'], '--fast-norm does not go together with --netaug: it is for LayerNorm'),
    (['--netaug', '--netaug-batch-fraction', '0.5', '--resplit'], 'the first part of the batch is not erased'),
    (['--sync-bn', '--split-bn', '--aug-splits', '2'], '--sync-bn and --split-bn do not go together'),
    (['--torchscript', '--sync-bn'], '--torchscript and --sync-bn do not go together'),
    (['--torchscript', '--grad-checkpointing'], '--torchscript and --grad-checkpointing do not go together'),
    (['--torchscript', '--kd-model-name', 'x'], '--torchscript and --kd-model-name do not go together'),
    (['--netaug-alpha', '2'], 'do nothing without --netaug'),
    (['--netaug', '--netaug-divisor', '0'], '--netaug-divisor must be'),
    (['--netaug', '--netaug-from-stage', '-1'], '--netaug-from-stage must be the number of a stage'),
    (['--netaug-from-stage', '2'], 'do nothing without --netaug'),
    (['--netaug-init', '--netaug-alpha', '2'], '--netaug-alpha does nothing with --netaug-init'),
    (['--netaug-init', '--netaug'], '--netaug-init does nothing with --netaug'),
    (['--netaug-init', '--pretrained'], '--netaug-init is for a training from scratch'),
    (['--netaug', '--netaug-width-mults', '0.5'], '--netaug-width-mults must be'),
    (['--smoothing', '1'], '--smoothing must be at least 0 and below 1, got 1'),
    (['--hflip', '2'], '--hflip must be at least 0 and at most 1, got 2'),
    (['--mean', '0.5', '123', '0.5'], '--mean must be at least 0 and at most 1, got 123'),
    (['--std', '0', '0.5', '0.5'], '--std must be above 0 and at most 1, got 0'),
    (['--momentum', '2'], '--momentum must be'),
    (['--model-ema', '--model-ema-decay', '1.5'], '--model-ema-decay must be'),
    (['--clip-mode', 'nrom'], '--clip-mode must be one of norm, value, agc'),
    (['--batch-size', '0'], '--batch-size must be at least 1'),
    (['--bce-sum'], '--bce-sum does nothing without --loss bce'),
    (['--tta', '2'], '--tta is not supported: '),
    (['--model-ema-decay', '0.5'], '--model-ema-decay does nothing without --model-ema'),
    (['--scale', '0.5'], '--scale takes two numbers'),
    (['--interpolation', 'cubic'], '--interpolation must be one of'),
    (['--model-ema-warmup'], '--model-ema-warmup does nothing without --model-ema'),
])
def test_refused_by_name(argv, said):
    parser = train_parser()
    args = parse_args(parser, ['--data-dir', 'D', *argv])
    with pytest.raises(UserError, match=said):
        check_train_args(args)
        netaug_config(args)


def test_every_flag_is_read_or_refused():
    """No flag is parsed and then forgotten."""
    code = ''.join((ROOT / 'timm_netaug/cli' / p).read_text() for p in (
        'train.py', 'build.py', 'common_flags.py', 'device.py', 'loaders.py', 'run_folder.py'))
    refused = {flag.dest for flag in all_flags(TRAIN_FLAGS) if flag.refused}  # with --netaug alone is not enough
    by_timm = {  # read off the arguments by timm's helpers
        'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'layer_decay', 'layer_decay_min_scale',
        'layer_decay_no_opt_scale', 'lr_noise', 'lr_noise_pct', 'lr_noise_std', 'lr_cycle_mul', 'lr_cycle_decay',
        'lr_cycle_limit', 'lr_k_decay', 'warmup_lr', 'min_lr', 'decay_milestones', 'decay_epochs', 'warmup_epochs',
        'warmup_prefix', 'cooldown_epochs', 'patience_epochs', 'decay_rate', 'img_size', 'input_size', 'mean', 'std',
        'crop_pct', 'interpolation', 'epochs'}
    by_timm |= {'data', 'local_rank', 'loss', 'jsd_loss', 'bce_loss'}  # by parse_args, check_train_args, loss_of
    by_timm |= {field.name for field in dataclasses.fields(DataSource)}  # by data_source
    dests = [a.dest for a in train_parser()._actions if a.dest not in ('help', 'config')]
    unread = [d for d in dests if not re.search(rf'args\.{d}\b', code) and not d.startswith('netaug_')]
    assert len(dests) > 170 and set(unread) <= by_timm | refused, set(unread) - by_timm - refused


@pytest.mark.parametrize('text, said', [
    ('epoch: 3', "Unknown key 'epoch' .value 3.* nearest flag is --epochs"),
    ('lr: fast', "'lr' .*'fast'.*invalid float"),
    ('netaug: 1', "'netaug' .* takes true or false"),
    ('model: [a, b]', 'takes one value'),
    ('batch_size: 1.5', "'batch_size'.*invalid int"),
    ('input_size: [3, 32]', "'input_size'.*expected 3"),
    ('netaug_width_mults: []', "'netaug_width_mults'.*takes a list"),
    ('wandb_tags: ["--netaug"]', "'wandb_tags'.*takes a list"),
    ('- lr', 'must map flags to values'),
    ('lr: 0.1\nlr: 0.2', "'lr' stands there twice"),
    ('batch-size: 1\nbatch_size: 2', "'batch_size' stands there twice"),
    ('lr: [', 'Cannot read the config'),
])
def test_strict_yaml(text, said, tmp_path):
    file = tmp_path / 'config.yaml'
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        parse_args(train_parser(), ['-c', str(file)])


@pytest.mark.parametrize('argv, near', [
    (['--epohcs', '3'], '--epochs'), (['--netaug-width-mult=2'], '--netaug-width-mults'),
])
def test_misspelt_flag(argv, near):
    with pytest.raises(UserError, match=f'Unknown flag {argv[0]}; the nearest is {near}.'):
        parse_args(train_parser(), ['--data-dir', 'D', *argv])


def test_unknown_flag_without_a_near_one():
    with pytest.raises(UserError, match='Unknown flag --xyzzy; --help lists the flags.'):
        parse_args(train_parser(), ['--data-dir', 'D', '--xyzzy', '3'])


def test_yaml_says_what_flags_say(tmp_path):
    file = tmp_path / 'config.yaml'
    file.write_text('model: netaug_mcunet\nscale: [0.5, 1]\nnetaug: true\namp: false\nopt-kwargs: {nesterov: false}\n'
                    'lr: -1e-3\naa: ""\ndata_dir: D\nclip_grad: null\nseed: 1\n')
    got = parse_args(train_parser(), ['-c', str(file), '--seed', '2'])
    want = parse_args(train_parser(), [
        '--model', 'netaug_mcunet', '--scale', '0.5', '1', '--netaug', '--opt-kwargs', 'nesterov=False', '--lr=-1e-3',
        '--aa', '', '--data-dir', 'D', '--seed', '2'])
    want.config = got.config
    assert vars(got) == vars(want)
    assert got.opt_kwargs == {'nesterov': False}


@pytest.mark.parametrize('last', ['scale: [0.5, 1]', 'wandb_tags: [a]', 'opt_kwargs: {nesterov: false}'])
def test_data_folder_beside_yaml(last, tmp_path):
    """A list at the end of the file does not take the folder for one of its values."""
    file = tmp_path / 'config.yaml'
    file.write_text(f'data_dir: other\n{last}\n')
    alone = parse_args(train_parser(), ['-c', str(file)])
    for argv in (['DATA', '-c', str(file)], ['-c', str(file), 'DATA'], ['-c', str(file), '--data-dir', 'DATA']):
        args = parse_args(train_parser(), argv)
        assert args.data_dir == 'DATA'
        assert (args.scale, args.wandb_tags, args.opt_kwargs) == (alone.scale, alone.wandb_tags, alone.opt_kwargs)


def test_run_with_netaug(run_dir):
    rows = list(csv.DictReader((run_dir / 'summary.csv').open()))
    assert list(rows[0]) == ['epoch', 'train_loss', 'train_tiny_loss', 'train_aug_loss', 'train_top1', 'eval_loss',
                             'eval_top1', 'eval_top5', 'lr']
    assert [r['epoch'] for r in rows] == ['0', '1']
    for r in rows:
        total = float(r['train_tiny_loss']) + float(r['train_aug_loss'])
        assert float(r['train_loss']) == pytest.approx(total, rel=1e-5)
    saved = torch.load(run_dir / 'last.pth.tar', weights_only=False)
    config, training = timm_netaug.NetAugConfig().resolve('netaug_mbv2_tiny'), timm_netaug.NetAugTraining()
    assert saved['task_state']['netaug'] == {**config.to_dict(), **training.to_dict()}
    run = saved['args'].run
    assert run['class_names'] == [str(i) for i in range(10)]
    assert run['data_config']['input_size'] == (3, 32, 32) and run['data_config']['crop_pct'] == 1.0
    assert set(p.name for p in run_dir.iterdir()) == {
        'args.yaml', 'versions.json', 'summary.csv', 'curves.png', 'last.pth.tar', 'model_best.pth.tar',
        'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'milestone-1.pth.tar'}
    picture = np.array(Image.open(run_dir / 'curves.png'))
    assert picture.shape[0] > 300 and picture.shape[1] > 1000 and len(np.unique(picture)) > 50
    again = parse_args(train_parser(), ['-c', str(run_dir / 'args.yaml')])  # a run's flags are a config for the next
    assert again.epochs == 2 and again.netaug and again.mean == [0.3]


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_freed_memory_is_kept():
    """After a few, a tensor of 64 MiB needs no pages from the system, which are 16,384 otherwise."""
    code = """if True:
        import resource, torch
        from timm_netaug.cli import train, train_flags
        args = train_flags.train_parser().parse_args(['--data-dir', 'x', '--device', 'cpu'])
        train.set_up_device(args)
        pages = []
        for _ in range(8):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(1 << 24)
            pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(*pages)"""
    first, *_, last = map(int, run_python('-c', code).stdout.split()[-8:])
    assert first > 10000 and last < 1000


def test_export_and_validate(run_dir, few_digits, tmp_path):
    best = run_dir / 'model_best.pth.tar'
    done = run_python('-m', 'timm_netaug', 'export', best, tmp_path / 'out')
    assert not done.stderr and f"timm.create_model('local-dir:{tmp_path}/out', pretrained=True)" in done.stdout
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert config['architecture'] == 'netaug_mbv2_tiny' and config['label_names'] == [str(i) for i in range(10)]
    cfg = config['pretrained_cfg']
    assert cfg['input_size'] == [3, 32, 32] and cfg['crop_pct'] == 1.0
    assert cfg['mean'] == [0.3, 0.3, 0.3] and cfg['std'] == [0.35, 0.35, 0.35]
    model = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()
    stock = timm.create_model('netaug_mbv2_tiny', num_classes=10, checkpoint_path=str(best)).eval()
    x = images(2, 32)
    assert torch.equal(model(x), stock(x))
    assert set(load_file(tmp_path / 'out/model.safetensors')) == set(stock.state_dict())

    rows = list(csv.DictReader((run_dir / 'summary.csv').open()))
    top1 = max(float(r['eval_top1']) for r in rows)
    for source in (['--checkpoint', best], ['--model', f'local-dir:{tmp_path}/out', '--pretrained']):
        done = run_python('validate.py', *source, '--data-dir', few_digits, '-j', 0)
        result = json.loads(done.stdout[done.stdout.index('{'):])
        assert result['top1'] == pytest.approx(top1, abs=1e-3) and result['img_size'] == 32


def test_reads_in_stock_timm(few_digits, tmp_path):
    """A checkpoint of any other model of the family opens where this package was never imported."""
    done = run_python('train.py', '--data-dir', few_digits, '--model', 'mobilenetv3_small_050', *NETAUG, *SMALL,
                      '-b', 100, '--epochs', 1, '--output', tmp_path, '--experiment', 'run')
    assert 'Each epoch leaves out 40 of 240 training images' in done.stderr  # two batches
    code = ('import sys, timm;'
            " m = timm.create_model('mobilenetv3_small_050', num_classes=10, checkpoint_path=sys.argv[1]);"
            " assert 'timm_netaug' not in sys.modules; print(sum(p.numel() for p in m.parameters()))")
    done = run_python('-c', code, tmp_path / 'run/last.pth.tar', cwd=tmp_path, fork=False)
    stock = timm.create_model('mobilenetv3_small_050', num_classes=10)
    assert int(done.stdout) == sum(p.numel() for p in stock.parameters())


def test_resume(run_dir, tmp_path):
    """The second epoch, run again from the first one's checkpoint, ends with the same weights."""
    args = ['train.py', '-c', run_dir / 'args.yaml', '--resume', run_dir / 'milestone-1.pth.tar', '--output', tmp_path]
    run_python(*args, '--experiment', 'resumed', fork=False)
    one, two = (torch.load(d / 'last.pth.tar', weights_only=False) for d in (run_dir, tmp_path / 'resumed'))
    assert one['epoch'] == two['epoch'] == 1
    for a, b in ((one['task_state']['supernet'], two['task_state']['supernet']),
                 (one['state_dict'], two['state_dict'])):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    done = run_python(*args, '--netaug-divisor', 8, check=False)
    assert done.returncode == 1 and 'divisor is 1 there and 8 here' in done.stderr and 'Traceback' not in done.stderr
    done = run_python(*args, '--model', 'netaug_mcunet', check=False)
    assert done.returncode == 1 and "architecture is 'netaug_mbv2_tiny' there and 'netaug_mcunet' here" in done.stderr


@pytest.mark.parametrize('netaug', [[], NETAUG], ids=['plain', 'netaug'])
def test_starts_from_given_weights(netaug, few_digits, tmp_path):
    """At a learning rate of zero the weights at the end are those given; the head stays where the classes agree."""
    given = make('netaug_mbv2_tiny')
    torch.save({'state_dict': given.state_dict()}, tmp_path / 'given.pth')
    still = ['--epochs', 1, '--lr', 0, '--warmup-lr', 0, '--weight-decay', 0, '--model', 'netaug_mbv2_tiny',
             '--data-dir', few_digits, '--output', tmp_path, *netaug, *SMALL]
    run_python('train.py', *still, '--pretrained-path', tmp_path / 'given.pth', '--experiment', 'a')
    got = torch.load(tmp_path / 'a/last.pth.tar', weights_only=False)['state_dict']
    for name, p in given.named_parameters():
        assert torch.equal(got[name], p), name
    other = make('netaug_mbv2_tiny', num_classes=3)
    torch.save({'state_dict': other.state_dict()}, tmp_path / 'other.pth')
    done = run_python('train.py', *still, '--pretrained-path', tmp_path / 'other.pth', '--experiment', 'b')
    assert 'The weights are for 3 classes, not 10: the classifier is a new one.' in done.stdout + done.stderr
    got = torch.load(tmp_path / 'b/last.pth.tar', weights_only=False)['state_dict']
    assert all(torch.equal(got[n], p) for n, p in other.named_parameters() if not n.startswith('classifier'))
    assert got['classifier.weight'].shape[0] == 10


def prepared(*flags):
    """The classifier of the stock model, and the model that train.py would train."""
    args = parse_args(train_parser(), ['--data-dir', 'D', *flags])
    args.rank = 0
    torch.manual_seed(0)
    model = build.set_up_model(args)
    head = copy.deepcopy(model.get_classifier())
    return head, build.prepare_for_training(args, model, netaug_config(args), torch.device('cpu'), torch.float32)


@pytest.mark.parametrize('flags, warned', [
    ('--pretrained --num-classes 2', True),
    ('--pretrained --num-classes 2 --netaug', True),
    ('--pretrained-path FILE --num-classes 2', True),
    ('--pretrained --num-classes 2 --head-init-scale 1', False),
    ('--pretrained --num-classes 2 --resume RUN', False),
    ('--pretrained --num-classes 10', False),  # the classifier of the weights
    ('--initial-checkpoint FILE --num-classes 10', False),
    ('--num-classes 2', False),
])
def test_new_classifier_behind_pretrained_weights(flags, warned, caplog, tmp_path):
    """The warning names a scale that gives weights of a standard deviation near 0.02."""
    torch.save(make('netaug_mbv2_tiny').state_dict(), tmp_path / 'given.pth')
    with caplog.at_level('WARNING', logger='train'):
        head, _ = prepared('--model', 'netaug_mbv2_tiny', *flags.replace('FILE', str(tmp_path / 'given.pth')).split())
    scales = [float(s) for s in re.findall(r'classes is new, .*: add --head-init-scale ([\d.]+)\.', caplog.text)]
    assert len(scales) == warned
    assert all(0.017 < head.weight.std() * scale < 0.023 for scale in scales)


def test_plain_training_from_the_weights_of_a_later_stage():
    """--netaug-init with --netaug-from-stage starts from the very weights of --netaug with it."""
    flags = ['--model', 'netaug_mbv2_tiny', '--netaug-from-stage', '3']
    _, plain = prepared(*flags, '--netaug-init')
    _, supernet = prepared(*flags, '--netaug')
    want = timm_netaug.export(supernet).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in plain.state_dict().items())
    _, other = prepared('--model', 'netaug_mbv2_tiny', '--netaug-init')
    assert not torch.equal(other.blocks[1][0].conv_pw.weight, want['blocks.1.0.conv_pw.weight'])


def test_scale_of_a_new_classifier():
    """With NetAug, the scale is that of the tiny network's classifier; what augments it has small weights already."""
    wide = ['--model', 'netaug_mbv2_035', '--pretrained', '--num-classes', '2', '--netaug']
    head, model = prepared(*wide, '--head-init-scale', '0.05')
    weight = model.classifier.weight
    assert weight.shape[1] > head.in_features
    assert torch.equal(weight[:, :head.in_features], 0.05 * head.weight)
    assert 0.017 < weight[:, head.in_features:].std() < 0.023
    _, model = prepared('--model', 'deit_tiny_distilled_patch16_224', '--num-classes', '2', '--head-init-bias', '-2')
    assert all(torch.equal(head.bias, torch.full((2,), -2.0)) for head in model.get_classifier())
    with pytest.raises(UserError, match='--head-init-scale: netaug_mbv2_tiny has no such parameters'):
        prepared('--model', 'netaug_mbv2_tiny', '--num-classes', '0', '--head-init-scale', '0.5')


def register_weights(monkeypatch, name, model, file):
    """Let a file be what timm loads for a registered name with pretrained=True, instead of a download."""
    torch.save(model.state_dict(), file)
    cfg = _registry._model_pretrained_cfgs[name]
    cfg = dataclasses.replace(cfg, file=str(file), url='', hf_hub_id=None, num_classes=model.num_classes)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)


@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('netaug', [[], NETAUG], ids=['plain', 'netaug'])
@pytest.mark.parametrize('flag, classes', [('--pretrained', 10), ('--pretrained', 3), ('--initial-checkpoint', 10)])
def test_starts_from_registered_weights_and_checkpoints(flag, classes, netaug, few_digits, tmp_path, monkeypatch):
    """As above, for the other two flags."""
    from timm_netaug.cli import train
    given, file = make('test_efficientnet', num_classes=classes), tmp_path / 'given.pth'
    register_weights(monkeypatch, 'test_efficientnet', given, file)
    argv = ['train.py', '--data-dir', few_digits, *SMALL_RUN, '-b', 60, '-j', 0, '--epochs', 1, '--lr', 0,
            '--weight-decay', 0, '--output', tmp_path, '--experiment', 'run', *netaug, flag]
    monkeypatch.setattr(sys, 'argv', [str(a) for a in argv + [file] * (flag != '--pretrained')])
    train.train()
    got = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)['state_dict']
    same = [n for n, _ in given.named_parameters() if classes == 10 or not n.startswith('classifier')]
    assert len(same) > 40 and all(torch.equal(got[n], given.get_parameter(n)) for n in same)
    assert got['classifier.weight'].shape[0] == 10


@pytest.mark.usefixtures('undrawn')
def test_average_of_the_weights(few_digits, tmp_path, capsys, monkeypatch):
    """With NetAug: it is what is evaluated, and what --use-ema takes, also of a run that did not evaluate it."""
    from timm_netaug.cli import export as export_command
    from timm_netaug.cli import hub, train, validate

    def call(main, *argv):
        monkeypatch.setattr(sys, 'argv', ['command', *map(str, argv)])
        main()

    for name, flags in (('a', []), ('b', ['--model-ema-force-cpu'])):
        call(train.train, '--data-dir', few_digits, *SMALL_RUN, *NETAUG, '-b', 60, '-j', 0, '--epochs', 2, '--lr',
             0.5, '--model-ema', '--model-ema-decay', 0.8, '--output', tmp_path, '--experiment', name, *flags)
        run = tmp_path / name
        saved = torch.load(run / 'last.pth.tar', weights_only=False)
        average = saved['state_dict_ema']
        assert not torch.equal(average['conv_stem.weight'], saved['state_dict']['conv_stem.weight'])
        losses = {}
        for use in ([], ['--use-ema']):
            capsys.readouterr()
            call(validate.validate, '--checkpoint', run / 'last.pth.tar', '--data-dir', few_digits, '-j', 0, *use)
            losses[bool(use)] = json.loads(capsys.readouterr().out.removeprefix('--result\n'))['loss']
        row = list(csv.DictReader((run / 'summary.csv').open()))[-1]
        assert losses[not flags] == pytest.approx(float(row['eval_loss']), abs=1e-4)
        assert abs(losses[True] - losses[False]) > 0.01
        call(export_command.main, run / 'last.pth.tar', run / 'export', '--use-ema')
        call(hub.main, 'push', run / 'last.pth.tar', 'owner/name', '--dry-run', run / 'push', '--use-ema')
        for folder in ('export', 'push'):
            weights = load_file(run / folder / 'model.safetensors')
            assert all(torch.equal(weights[k], average[k]) for k in average), folder


class Batches(list):
    """Images and labels in memory, as a loader."""
    dataset = None


@pytest.mark.parametrize('clip', [None, 'norm', 'value', 'agc'])
@pytest.mark.parametrize('scaled', [False, True], ids=['plain', 'scaler'])
def test_gradient_of_a_step(scaled, clip):
    """It is the mean of the batches', which train one sub-network, then clipped; the scaler of float16 leaves no trace.

    The scaler is the one that a GPU gets. Five batches in twos: the last one is alone.
    """
    from timm_netaug.cli.train import train_one_epoch
    limit = 0.01
    clipping = ['--clip-grad', str(limit), '--clip-mode', clip] if clip else []
    args = parse_args(train_parser(), ['--data-dir', 'D', '--netaug', '--grad-accum-steps', '2', *clipping])
    args.world_size, args.rank, args.distributed, args.device = 1, 0, False, 'cpu'
    config = dict(width_mults=(1, 1.4), expand_mults=(1, 1.6))
    task = timm_netaug.NetAugTask(make_supernet(config=config).train(), seed=3, verbose=False)
    parameters = list(task.supernet.parameters())
    batches = Batches((images(4, 32, seed=i).to(memory_format=torch.channels_last), torch.arange(4)) for i in range(5))
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    grads, widths, active = [], [], task.supernet.active
    optimizer.register_step_pre_hook(lambda *_: grads.append([p.grad.clone() for p in parameters]))
    task.supernet.active = lambda w: widths.append(tuple(w.values())) or active(w)
    train_one_epoch(2, task, batches, optimizer, args, torch.device('cpu'), updates_per_epoch=3,
                    loss_scaler=NativeScaler(device='cpu') if scaled else None)
    assert len(grads) == 3 and widths[0] == widths[1] and widths[2] == widths[3] and len(set(widths)) == 3
    for i, part in enumerate(([0, 1], [2, 3], [4])):
        task.start_update(2 * 3 + i)
        each = [torch.autograd.grad(task(*batches[b])['loss'], parameters) for b in part]
        for j, p in enumerate(parameters):
            p.grad = sum(g[j] for g in each) / len(part)
        if clip:
            dispatch_clip_grad(parameters[:-2] if clip == 'agc' else parameters, limit, mode=clip)
        for got, p in zip(grads[i], parameters):
            torch.testing.assert_close(got, p.grad, rtol=1e-5, atol=1e-6)
    assert widths[5:] == widths[:5]


def test_everything_at_once_still_trains(few_digits, tmp_path):
    """Flags that meet in one step: accumulation over an uneven epoch, clipping, EMA, mixup, bfloat16, channels-last."""
    run_python('train.py', '--data-dir', few_digits, '--model', 'netaug_mbv3_035', *NETAUG, *SMALL, '-b', 128,
               '--epochs', 1, '--grad-accum-steps', 4, '--clip-grad', 1.0, '--model-ema', '--mixup', 0.2,
               '--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--opt', 'adamw', '--lr', 1e-3, '--drop', 0.1,
               '--drop-path', 0.1, '--output', tmp_path, '--experiment', 'run')
    run_python('-m', 'timm_netaug', 'export', tmp_path / 'run/last.pth.tar', tmp_path / 'out', '--use-ema')
    assert timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).num_classes == 10


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    """Exported models of random weights, to be taken for teachers."""
    root = tmp_path_factory.mktemp('teachers')
    for name, architecture, classes in (
            ('same', 'test_resnet', '0123456789'), ('3', 'test_resnet', '012'),
            ('vit', 'vit_tiny_patch16_224', '0123456789'), ('letters', 'test_resnet', 'abcdefghij'),
            ('vit32', 'vit_tiny_patch16_224', '0123456789'), ('8', 'test_resnet', '01234567')):
        model = make(architecture, num_classes=len(classes), **dict(img_size=32) if name == 'vit32' else {})
        size = dict(input_size=(3, 32, 32)) if name == 'vit32' else {}
        config = timm.data.resolve_data_config(size, model=model)
        export_folder(model, root / name, RunDescription.from_model(model, config, list(classes)))
    return root


def test_distillation_through_the_script(few_digits, teachers, tmp_path):
    """With and without NetAug; the teacher gets the images of the run at its own normalisation, not the registry's."""
    common = ['train.py', '--data-dir', few_digits, *SMALL, '--model', 'netaug_mbv2_tiny', '--epochs', 1, '--mean', 0.3,
              '--std', 0.35, '--output', tmp_path, '--kd-model-name', f'local-dir:{teachers}/same']
    for flags, columns in (([], ['loss', 'task_loss', 'kd_loss', 'top1']),
                           (NETAUG, ['loss', 'tiny_loss', 'kd_loss', 'aug_loss', 'top1'])):
        run_python(*common, *flags, '--experiment', 'a' if flags else 'b')
        rows = list(csv.DictReader((tmp_path / ('a' if flags else 'b') / 'summary.csv').open()))
        assert [c for c in rows[0] if c.startswith('train_')] == [f'train_{c}' for c in columns]
        assert all(float(rows[0][f'train_{c}']) > 0 for c in columns)
    flags = ['train.py', '--data-dir', str(few_digits), '--num-classes', '10', '--mean', '0.3', '--std', '0.35', '--netaug',
             '--kd-model-name', f'local-dir:{teachers}/same', '--img-size', '32', '--model', 'netaug_mbv2_tiny']
    args = parse_args(train_parser(), flags[1:])
    model = build.set_up_model(args)
    data_config = timm.data.resolve_input_data_config(model, args=vars(args))
    teacher = build.set_up_teacher(args, data_config, None, torch.device('cpu'), torch.float32)
    for netaug in (True, False):
        args.netaug = netaug
        task = build.set_up_task(args, timm_netaug.augment(model) if netaug else model, teacher, data_config,
                                 torch.device('cpu'), torch.float32)
        seen = []
        hook = teacher.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        x = images(2, 32)
        task(x, torch.tensor([0, 1]))
        hook.remove()
        torch.testing.assert_close(seen[0], (x * 0.35 + 0.3 - teacher.mean_kd) / teacher.std_kd)
        assert len(seen) == 1


@pytest.mark.parametrize('argv, said', [
    (['--model', 'mixnet_s', '--netaug'], "module 'blocks.1.0.conv_pw' of type MixedConv2d, which applies split"),
    (['--model', 'netaug_mcunet', '--num-classes', 5], 'has 10 classes, but the model has 5: add --num-classes 10'),
    (['--model', 'no_such_model'], 'Unknown model no_such_model; timm.list_models'),
    (['--model', 'netaug_mcunet', '--data-dir', '/no/such'], 'there is no folder /no/such'),
    (['--model', 'mobilenetv2_035', '--pretrained'], 'No pretrained weights exist'),
    (['--model', 'netaug_mcunet', '--pretrained-path', '/no/such.pth'], 'there is no file /no/such.pth'),
    (['--model', 'netaug_mcunet', '--drop-block', 0.1], 'drop_block_rate'),
    (['--model', 'netaug_mcunet.no_tag', '--pretrained'], 'Invalid pretrained tag'),
    (['--model', 'netaug_mcunet', '--resume', '/no/such.pth'], 'There is no checkpoint /no/such.pth'),
    (['--model', 'netaug_mcunet', '-b', 5000], 'fewer images than a batch'),
    (['--model', 'netaug_mcunet', '--epoch-repeats', 2], '--epoch-repeats is for iterable data sets alone'),
    (['--model', 'netaug_mcunet', '--netaug', '--netaug-every', 13], 'at most the 12 updates of an epoch here'),
    (['--model', 'netaug_mcunet', '--opt', 'sgdd'], '--opt sgdd cannot be built: Optimizer sgdd not found'),
    (['--model', 'netaug_mcunet', '--sched', 'cosin'], "--sched cosin cannot be built: Unknown scheduler 'cosin'"),
    (['--model', 'netaug_mcunet', '--aa', 'v1'], '--aa v1 is not a policy of timm, .*Unknown AA policy v1'),
    (['--model', 'netaug_mcunet', '--aa', 'randx-m9'], '--aa randx-m9 is not a policy of timm'),
    (['--model', 'netaug_mcunet', '--torchcompile', 'foo'], "--torchcompile foo cannot be carried out: .*'foo'"),
    (['--model', 'netaug_mcunet', '--sync-bn'], '--sync-bn: PyTorch synchronises BatchNorm on CUDA only'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'resnet999'], 'Unknown model resnet999; the nearest name is'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'mobilenetv2_035'], 'cannot be loaded: No pretrained weights'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:/no/such'], 'local-dir:/no/such cannot be loaded'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/3'], 'is for 3 classes, but the student'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/vit'], 'does not take images of 3 x 32 x 32'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/letters'], 'has other classes .*a, here 0'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/same', '--kd-distill-type', 'feature',
      '--kd-teacher-feature-dim', 7], 'the teacher has 96 features, but .* projected to 7'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/same', '--kd-distill-type', 'feature',
      '--kd-student-feature-dim', 7], '--kd-student-feature-dim 7 is not the number of features'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/8'], 'is for 8 classes'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/same', '--in-chans', 1],
     'has a normalisation for 3 channels, but the images have 1'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/vit32', '--train-img-sizes', 16, 32],
     'does not take images of 3 x 16 x 16'),
    (['--model', 'netaug_mcunet', '--kd-model-name', 'local-dir:TEACHER/same', '--kd-distill-type', 'token'],
     "does not have 'set_distilled_training'"),
    (['--model', 'netaug_mcunet', '--device', 'cuda'], 'use --device cpu'),
    (['--cutmix-minmax', 0.2, 0.21], 'are the same number of pixels of an image of 32 x 32'),
    (['--opt-kwargs', 'foo'], '--opt-kwargs takes KEY=VALUE, got foo'),
])
def test_wrong_input_gets_one_sentence(argv, said, digits, teachers, tmp_path, capsys, monkeypatch):
    if 'cuda' in argv and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    from timm_netaug.cli import train
    base = ['train.py', '--data-dir', digits, *SMALL, '--epochs', 1, '--output', tmp_path / 'out', *argv]
    monkeypatch.setattr(sys, 'argv', [str(a).replace('TEACHER', str(teachers)) for a in base])
    with pytest.raises(UserError, match=said) as e:
        train.train()
    assert '\n' not in str(e.value) and not (tmp_path / 'out').exists()


def test_class_that_is_only_in_validation(few_digits, tmp_path):
    """A training from scratch would never learn it; pretrained weights may know it."""
    from timm_netaug.cli.common_flags import data_source
    from timm_netaug.cli.loaders import open_splits
    from timm_netaug.cli.train_flags import train_parser
    for split in ('train', 'validation'):
        (tmp_path / split).mkdir()
        for folder in (few_digits / split).iterdir():
            if (split, folder.name) != ('train', '3'):
                (tmp_path / split / folder.name).symlink_to(folder)
    (tmp_path / 'classes.txt').write_text('\n'.join(map(str, range(10))))
    args = train_parser().parse_args(['--data-dir', str(tmp_path), '--class-map', str(tmp_path / 'classes.txt')])
    args.rank = 0
    assert data_source(args).class_map
    with pytest.raises(UserError, match='The class 3 has images in validation and none in train'):
        open_splits(args, 3)
    args.pretrained = True
    assert open_splits(args, 3).class_names == list('0123456789')


@pytest.mark.parametrize('flag, content, said', [
    ('--initial-checkpoint', 'truncated.safetensors', 'truncated.safetensors cannot be read as weights'),
    ('--initial-checkpoint', 'truncated.pth', 'truncated.pth cannot be read as weights'),
    ('--initial-checkpoint', 'resnet.pth', 'Missing key'),
    ('--pretrained-path', 'truncated.safetensors', 'truncated.safetensors cannot be read as weights'),
    ('--pretrained-path', 'resnet.pth', 'size mismatch for bn1.weight'),
    ('--pretrained-path', 'vit.pth', 'is of another model than test_efficientnet: 47 of the 47 tensors'),
    ('--pretrained-path', 'shallow.pth', r'is of another model than test_efficientnet: \d+ of the 47 tensors'),
    ('--kd-model-name', 'broken', 'broken cannot be loaded'),
    ('--initial-checkpoint', 'nan.pth', 'nan.pth is broken, .* has NaN or infinite values'),
    ('--pretrained-path', 'nan.pth', 'nan.pth is broken, .* has NaN or infinite values'),
])
def test_weights_to_start_from_that_are_wrong(flag, content, said, few_digits, teachers, tmp_path, monkeypatch):
    """Told before anything is trained; timm itself would start such a --pretrained-path from scratch."""
    from timm_netaug.cli import train
    whole = teachers / 'same/model.safetensors'
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken/config.json').write_bytes((teachers / 'same/config.json').read_bytes())
    for name in ('truncated.safetensors', 'broken/model.safetensors'):
        (tmp_path / name).write_bytes(whole.read_bytes()[:3000])
    torch.save(load_file(whole), tmp_path / 'resnet.pth')
    torch.save({k: t * math.nan for k, t in load_file(whole).items()}, tmp_path / 'nan.pth')
    torch.save(load_file(teachers / 'vit/model.safetensors'), tmp_path / 'vit.pth')
    (tmp_path / 'truncated.pth').write_bytes((tmp_path / 'resnet.pth').read_bytes()[:20000])
    weights = make('test_efficientnet', num_classes=3).state_dict()
    torch.save({k: t for k, t in weights.items() if not k.startswith('blocks.3')}, tmp_path / 'shallow.pth')
    value = f'local-dir:{tmp_path}/{content}' if flag == '--kd-model-name' else tmp_path / content
    argv = ['train.py', '--data-dir', few_digits, *SMALL_RUN, '--netaug', '-b', 60, '-j', 0, '--epochs', 1, '--output',
            tmp_path / 'out', flag, value]
    monkeypatch.setattr(sys, 'argv', list(map(str, argv)))
    with pytest.raises(UserError, match=said) as e:
        train.train()
    assert '\n' not in str(e.value) and not (tmp_path / 'out').exists()


@pytest.mark.usefixtures('undrawn')
def test_validation_loss_that_is_not_a_number(few_digits, tmp_path, monkeypatch):
    """The run ends with a sentence, and the files of the epochs before are as they were."""
    from timm_netaug.cli import train

    evaluate, run, before = train.evaluate, tmp_path / 'run', {}

    def files():
        return {p.name: p.read_bytes() for p in run.iterdir()}

    def evaluated(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        if not run.joinpath('last.pth.tar').exists():  # epoch 0
            return metrics
        before.update(files())
        return {**metrics, 'loss': float('nan')}

    monkeypatch.setattr(train, 'evaluate', evaluated)
    argv = ['train.py', '--data-dir', few_digits, *SMALL_RUN, *NETAUG, '-b', 60, '-j', 0, '--epochs', 3, '--output',
            tmp_path, '--experiment', 'run']
    monkeypatch.setattr(sys, 'argv', list(map(str, argv)))
    with pytest.raises(SystemExit, match='^train.py: error: The validation loss is nan: try a lower rate. The'
                                         ' checkpoints of the epochs before are untouched.$'):
        train.main()
    assert {'last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar'} <= set(before) and files() == before
    assert [row['epoch'] for row in csv.DictReader((run / 'summary.csv').open())] == ['0']


def test_one_class_where_more_are_asked_for(few_digits, tmp_path):
    """Images that lie in one folder are no data set of ten classes, neither to train on nor to validate on."""
    for split in ('train', 'validation'):
        (tmp_path / 'data' / split).mkdir(parents=True)
        (tmp_path / 'data' / split / '7').symlink_to(few_digits / split / '7')
    said = 'put the images of each class into a folder of their own'
    done = run_python('train.py', '--data-dir', tmp_path / 'data', *SMALL_RUN, '-b', 12, '-j', 0, '--output',
                      tmp_path / 'out', check=False)
    assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr
    assert 'The data set has one class, 7, and a classifier needs at least two' in done.stderr
    assert not (tmp_path / 'out').exists()
    torch.save(make('test_efficientnet').state_dict(), tmp_path / 'weights.pth')
    done = run_python('validate.py', '--data-dir', tmp_path / 'data', '--model', 'test_efficientnet', '--num-classes',
                      10, '--img-size', 32, '--checkpoint', tmp_path / 'weights.pth', '-j', 0, check=False)
    assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr
    assert 'The data set has one class, 7, but the model has 10' in done.stderr
    assert '--result' not in done.stdout


def test_validate_reference_checkpoint(few_digits, tmp_path):
    from test_reference import reference_names
    model = make('netaug_mbv3_035')
    names = reference_names(model)
    torch.save({'state_dict': {names[k]: v for k, v in model.state_dict().items()}}, tmp_path / 'official.pth')
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    results = []
    for file in ('official.pth', 'own.pth'):
        done = run_python('validate.py', '--model', 'netaug_mbv3_035', '--checkpoint', tmp_path / file, '--data-dir',
                          few_digits, '--num-classes', 10, '--img-size', 32, '-j', 0)
        results.append(json.loads(done.stdout[done.stdout.index('{'):])['loss'])
    assert results[0] == results[1]
    done = run_python('validate.py', '--model', 'netaug_mcunet', '--checkpoint', tmp_path / 'official.pth',
                      '--data-dir', few_digits, '--num-classes', 10, check=False)
    assert done.returncode == 1 and 'does not fit netaug_mcunet' in done.stderr and 'Traceback' not in done.stderr


def test_readme_loop():
    """The README's training loop, as it stands there."""
    scope = dict(
        loader=[(images(4, 32, seed=i), torch.randint(10, (4,))) for i in range(3)], epochs=2)
    exec(readme_block('library', 'docs/library.md'), scope)
    tiny = scope['tiny']
    assert type(tiny) is timm.models.EfficientNet and tiny.eval()(images(1, 64)).shape == (1, 10)


def test_readme_network():
    """The network of one's own in docs/library.md, as it stands there."""
    scope = dict()
    exec(readme_block('own network', 'docs/library.md'), scope)
    assert [c.base for c in scope['supernet'].layout.channels.values()] == [16, 24]


def test_epochs_without_validation(few_digits, tmp_path):
    """The columns of summary.csv stay in place, and a schedule by metric goes on with the last one measured; the curves
    have none of them."""
    run_python('train.py', '--data-dir', few_digits, '--model', 'test_efficientnet', *SMALL, '--epochs', 3,
               '--val-interval', 2, '--sched', 'plateau', '--lr', 0.01, '--output', tmp_path, '--experiment', 'run',
               draw=True)
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    assert [bool(r['eval_top1']) for r in rows] == [False, True, True]
    assert all(float(r['lr']) == 0.01 and float(r['train_loss']) > 0 for r in rows)


def test_nothing_is_lost(run_dir, digits, tmp_path):
    """A finished run is not written over, a folder without splits is not validated on its own training images."""
    before = (run_dir / 'summary.csv').read_text()
    again = ['train.py', '-c', run_dir / 'args.yaml', '--output', run_dir.parent, '--experiment', run_dir.name]
    done = run_python(*again, check=False)
    assert done.returncode == 1 and 'holds a run already' in done.stderr
    done = run_python(*again, '--resume', run_dir / 'last.pth.tar')  # it was killed after its last checkpoint, perhaps
    assert 'All 2 epochs of' in done.stderr
    done = run_python(*again, '--start-epoch', 3, check=False)
    assert done.returncode == 1 and 'There is nothing to train' in done.stderr
    assert (run_dir / 'summary.csv').read_text() == before
    done = run_python('train.py', '--data-dir', digits / 'train', '--model', 'netaug_mcunet', *SMALL, check=False)
    assert done.returncode == 1 and f'There is no folder {digits / "train" / "train"}' in done.stderr


def test_validate_knows_the_run(run_dir, digits, tmp_path):
    """A subset of the classes keeps its labels; unknown classes and flags against the checkpoint are refused."""
    for folder, names in (('some', '379'), ('odd', '3x')):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            (tmp_path / folder / name).symlink_to(digits / 'validation' / (name if name != 'x' else '4'))
    source = ['validate.py', '--checkpoint', run_dir / 'last.pth.tar', '-j', 0, '--data-dir']
    done = run_python(*source, tmp_path / 'some')
    got = json.loads(done.stdout[done.stdout.index('{'):])
    model = timm.create_model('netaug_mbv2_tiny', num_classes=10, checkpoint_path=str(run_dir / 'last.pth.tar')).eval()
    files = [(f, int(n)) for n in '379' for f in sorted((digits / 'validation' / n).glob('*.png'))]
    with torch.no_grad():
        x = torch.stack([torch.tensor(np.array(Image.open(f))).permute(2, 0, 1) for f, _ in files])
        top1 = (model((x / 255 - 0.3) / 0.35).argmax(1) == torch.tensor([n for _, n in files])).float().mean().item()
    assert got['images'] == len(files) and got['top1'] == pytest.approx(100 * top1, abs=1e-3)
    for argv, said in (([tmp_path / 'odd'], 'does not know: x'), ([digits, '--num-classes', 5], '--num-classes: the'),
                       ([digits, '--split', 'none'], 'There is no folder')):
        done = run_python(*source, *argv, check=False)
        assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr


def test_printed_line_loads_the_model(few_digits, tmp_path):
    """With every argument of the constructor that the run was given, and the weights that were validated."""
    done = run_python(
        'train.py', '--data-dir', few_digits, '--model', 'netaug_mcunet', *SMALL, '--epochs', 1, '--bn-eps', 0.1,
        '--model-ema', '--output', tmp_path, '--experiment', 'run')
    scope = {}
    exec('\n'.join(line.strip() for line in done.stdout.split('\n\n')[1].splitlines()), scope)
    from timm_netaug.load import load_model
    loaded = load_model(str(tmp_path / 'run/model_best.pth.tar'))
    assert loaded.run.ema and torch.equal(scope['model'].eval()(images(2, 32)), loaded.model(images(2, 32)))
    assert scope['model'].bn1.eps == 0.1


def test_resume_with_another_training(run_dir, digits):
    args = ['train.py', '--data-dir', digits, '--model', 'netaug_mbv2_tiny', *SMALL,
            '--resume', run_dir / 'last.pth.tar']
    for argv, said in (([], 'was trained with --netaug'),
                       (['--netaug', '--opt', 'adamw'], 'was trained with --opt sgd')):
        done = run_python(*args, '--epochs', 3, '--drop', 0.0, *argv, check=False)
        assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr


def test_summary_keeps_its_columns(few_digits, tmp_path):
    """Three updates in an epoch: the first one of the second epoch has no augmented pass."""
    run_python('train.py', '--data-dir', few_digits, *SMALL, '-b', 80, '--model', 'test_efficientnet', *NETAUG,
               '--netaug-every', 2, '--netaug-distill', 0.1, '--epochs', 3, '--output', tmp_path, '--experiment', 'run')
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    assert list(rows[0]) == ['epoch', 'train_loss', 'train_tiny_loss', 'train_aug_loss', 'train_distill_loss',
                             'train_top1', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    for r in rows:
        assert float(r['train_top1']) > 5
        assert 1 < float(r['train_aug_loss']) < 3.5 and 0 < float(r['train_distill_loss']) < 2


def test_teacher_of_the_registry(tmp_path, monkeypatch):
    """By its name alone: the weights are those that timm has for it."""
    given = make('test_resnet')
    register_weights(monkeypatch, 'test_resnet', given, tmp_path / 'given.pth')
    args = parse_args(train_parser(), ['--num-classes', '10', '--kd-model-name', 'test_resnet'])
    teacher = build.set_up_teacher(args, dict(input_size=(3, 32, 32)), None, torch.device('cpu'), torch.float32)
    x = images(2, 32)
    assert torch.equal(teacher(x), given.eval()(x))


def test_names_of_a_teacher_with_fewer_classes(digits, teachers):
    """The same names as far as they go are not the same classes."""
    args = parse_args(train_parser(), ['--data-dir', str(digits), '--num-classes', '10', '--kd-model-name',
                                       f'local-dir:{teachers}/same'])
    with pytest.raises(UserError, match='10 names, here 8'):
        build.set_up_teacher(args, dict(input_size=(3, 32, 32)), list('01234567'), torch.device('cpu'), torch.float32)


@pytest.mark.parametrize('flags, search', [(dict(netaug=True), False), (dict(netaug=False), True), ({}, True)])
def test_search_for_convolutions_on_a_gpu(flags, search, monkeypatch):
    """NetAug has many shapes, for which cuDNN's search does not pay; validate.py has no such flag."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    try:
        choose_device(types.SimpleNamespace(device='cuda', **flags), None)
        assert torch.backends.cudnn.benchmark == search
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = before
