"""The folders in hfconfigs/: what train.py makes of their recipes, that these say what the paper's training was, and
that configs and cards are what the code makes of them today."""
import importlib.util
import json
import math
import re
import shlex

import pytest
import torch
import yaml
from timm.data import create_transform, resolve_input_data_config
from timm.models import is_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from conftest import FREE_FLAGS, MODELS, ROOT
from timm_netaug import NetAugConfig
from timm_netaug.card import model_card
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_flags import check_train_args, netaug_config, train_parser
from timm_netaug.cli.build import set_up_model
from timm_netaug.io.folder import check_config
from timm_netaug.bundled import bundled_cfgs

FOLDER = ROOT / 'hfconfigs'
RECIPES = sorted(p.parent.name for p in FOLDER.glob('*/train.yaml'))
CONFIGS = sorted(p.parent.name for p in FOLDER.glob('*/config.json'))
OURS = ('.netaug_digits', '.netaug_cifar10', '.cifar10', '.in1k_ft_flowers89', '.in1k_ft_vww1000')
PAPER = [r for r in RECIPES if not r.endswith(OURS)]
UPDATES = 8  # in an epoch
SIZES = {'netaug_mbv2_tiny': 144, 'netaug_mcunet': 176}
CLASSES = {'in1k': 1000, 'in21kp': 10450, 'food101': 101, 'flowers102': 102, 'cars': 196, 'cub200': 200, 'pets': 37}
# Dropout / rate of a GPU, as published.
TRANSFER = '''
netaug_mbv2_tiny        0.1/0.06 0/0.08   0.2/0.14 0.5/0.04 0.1/0.06
netaug_mbv2_035         0.2/0.10 0.3/0.08 0.5/0.18 0.7/0.02 0.4/0.01
netaug_mbv3_035         0.2/0.20 0.6/0.05 0.7/0.10 0.8/0.02 0.8/0.01
netaug_proxylessnas_035 0.2/0.10 0.2/0.06 0.2/0.20 0.7/0.04 0.8/0.01
netaug_mcunet           0.1/0.04 0.4/0.05 0.1/0.25 0.6/0.08 0.6/0.01'''


def parse(recipe, *argv):
    return parse_args(train_parser(), ['-c', str(FOLDER / recipe / 'train.yaml'), *argv])


def published(recipe):
    """Images of an update, peak rate, dropout, and epochs with their warm-up."""
    model, tag = recipe.split('.')
    if '_ft_' not in tag:
        return 2048, 1.6 if model == 'netaug_mbv3_035' else 0.4, 0, 25 if 'in21kp' in tag else 155
    row = dict(line.split(maxsplit=1) for line in TRANSFER.strip().splitlines())[model].split()
    drop, rate = row[list(CLASSES).index(tag.split('_ft_')[1]) - 2].split('/')
    return 256, 4 * float(rate), float(drop), 55


def test_all_are_there():
    want = {f'{m}.{t}' for m in MODELS for t in ('in1k', 'netaug_in1k', 'in21kp', 'netaug_in21kp')}
    want |= {f'{m}.netaug_in1k_ft_{d}' for m in MODELS for d in list(CLASSES)[2:]}
    assert len(PAPER) == 45 and set(PAPER) == want and len(RECIPES) == 48 + len(bundled_cfgs())


def test_as_generated():
    spec = importlib.util.spec_from_file_location('make_recipes', FOLDER / 'make_recipes.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {r: (FOLDER / r / 'train.yaml').read_text() for r in PAPER} == module.recipes()


@pytest.mark.parametrize('recipe, experiment, row', [
    ('netaug_mcunet.in1k_ft_flowers89', 'flowers', 'weights'),
    ('netaug_mcunet.in1k_ft_vww1000', 'vww', 'weights-lr0.005')])
def test_fine_tuning_is_what_was_run(recipe, experiment, row):
    header = ''.join(line[2:] for line in (FOLDER / recipe / 'train.yaml').open() if line.startswith('# '))
    assert f'The row {row} of experiments/{experiment}.yaml' in header
    run = yaml.safe_load((ROOT / f'experiments/{experiment}.yaml').read_text())
    flags = {**run['flags'], **run['rows'][row]['flags'], 'experiment': recipe, 'seed': 0}
    del flags['checkpoint_hist']  # how many files are kept
    assert yaml.safe_load((FOLDER / recipe / 'train.yaml').read_text()) == flags


@pytest.mark.parametrize('recipe', RECIPES)
def test_accepted(recipe):
    """As it is, with nothing but the data set's folder; every key is a flag, by its own name."""
    parser = train_parser()
    text = (FOLDER / recipe / 'train.yaml').read_text()
    assert set(yaml.safe_load(text)) <= {a.dest for a in parser._actions}
    assert all(len(line) <= 120 for line in text.splitlines())
    args = parse(recipe, '--data-dir', 'D')
    check_train_args(args)
    netaug_config(args)
    assert is_model(args.model) and args.model == recipe.split('.')[0]
    assert args.netaug == bool(re.search(r'\.netaug_(?!in1k_ft)', recipe))


@pytest.mark.parametrize('recipe', PAPER)
def test_header(recipe, monkeypatch):
    """The commands in it are those that reach the images of an update, and parse."""
    monkeypatch.chdir(ROOT)
    args = parse(recipe, '--data-dir', 'D')
    header = ''.join(line[2:] for line in (FOLDER / recipe / 'train.yaml').open() if line.startswith('# '))
    assert 'not yet run here' in header and "The paper's figure: " in header and '--color-jitter is one' in header
    commands = re.findall(r'^  ((?:python|torchrun) .*\\\n.*)$', header, re.M)
    assert [c.split()[0] for c in commands] == ['python', 'torchrun']
    for command in (shlex.split(c.replace('\\\n', '')) for c in commands):
        given = parse_args(train_parser(), command[command.index('train.py') + 1:])
        assert given.config == f'hfconfigs/{recipe}/train.yaml' and given.data_dir == 'DATA'
        numbers = dict(zip(command, command[1:]))
        processes = int(numbers.get('--nnodes', 1)) * int(numbers.get('--nproc-per-node', 1))
        assert given.batch_size * given.grad_accum_steps * processes == published(recipe)[0]
        assert given.lr == args.lr


@pytest.mark.parametrize('recipe', PAPER)
def test_model_and_input(recipe):
    args = parse(recipe, '--data-dir', 'D')
    if '_ft_' in recipe:
        start = f'{args.model}.netaug_in1k'
        assert args.pretrained_path == f'output/train/{parse(start).experiment}/model_best.pth.tar' and start in PAPER
        args.pretrained_path = None  # no weights on the meta device
    else:
        assert not args.pretrained_path
    with torch.device('meta'):
        model = set_up_model(args)
    assert model.num_classes == model.get_classifier().out_features == CLASSES[recipe.split('_')[-1].split('.')[-1]]
    assert model.drop_rate == published(recipe)[2]
    size = SIZES.get(args.model, 160)
    data_config = resolve_input_data_config(model, args=vars(args))
    resize, crop = create_transform(**data_config, is_training=False).transforms[:2]
    assert data_config['input_size'] == (3, size, size) and tuple(crop.size) == (size, size)
    assert resize.size == math.ceil(size / 0.875) and resize.interpolation.value == 'bilinear'
    train = str(create_transform(
        **{**data_config, 'interpolation': args.train_interpolation}, is_training=True, scale=args.scale,
        ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter))
    assert 'scale=(0.08, 1.0)' in train and 'interpolation=bilinear' in train and 'p=0.5' in train
    if args.netaug:
        config, training = netaug_config(args)
        config, default = config.resolve(args.model), NetAugConfig().resolve(args.model)
        assert config.width_mults == default.width_mults and config.expand_mults == default.expand_mults
        epochs = args.epochs + args.warmup_epochs
        widths = sum(epoch < training.stop_width_at * epochs for epoch in range(epochs))
        assert epochs - widths == args.epochs // 2  # as the reference counts, from the end


@pytest.mark.parametrize('recipe', PAPER)
def test_optimizer_and_schedule(recipe):
    args = parse(recipe, '--data-dir', 'D')
    images, peak, _, epochs = published(recipe)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD
    assert all(g['nesterov'] and g['momentum'] == 0.9 for g in optimizer.param_groups)
    decay = 3e-5 if args.model == 'netaug_mbv3_035' else 4e-5
    assert {(g['weight_decay'], len(g['params'])) for g in optimizer.param_groups} == {(0, 3), (decay, 1)}
    assert args.smoothing == 0.1 and not args.amp

    schedule, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=UPDATES)
    assert num_epochs == epochs
    rates = []
    for update in range(num_epochs * UPDATES):
        rates.append(optimizer.param_groups[0]['lr'])
        schedule.step_update(update + 1)
    warmup, cosine = 5 * UPDATES, (epochs - 5) * UPDATES
    base = peak * args.batch_size / images  # the rate of one GPU
    want = [base + (peak - base) * i / warmup for i in range(warmup)]
    want += [peak * (1 + math.cos(math.pi * i / cosine)) / 2 for i in range(cosine)]
    assert rates == pytest.approx(want) and max(rates) == pytest.approx(peak)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_and_card(name):
    """A published model's config builds, is of the folder's architecture and of its recipe, and makes its card."""
    config = json.loads((FOLDER / name / 'config.json').read_text(encoding='utf-8'))
    model = check_config(FOLDER / name, name)
    assert name in RECIPES and config['architecture'] == name.split('.')[0]
    assert model.num_classes == config['num_classes'] == len(config['label_names'])
    trained_with = parse_args(train_parser(), ['--data-dir', 'D', *config['timm_netaug']['command']])
    recipe = parse(name, '--data-dir', 'D')
    assert {k for k, v in vars(recipe).items() if getattr(trained_with, k) != v} <= {*FREE_FLAGS}
    assert (FOLDER / name / 'README.md').read_text(encoding='utf-8') == model_card(model, config, f'OWNER/{name}')


def test_cards_are_there():
    assert len(CONFIGS) == 1 + len(bundled_cfgs()) and CONFIGS == sorted(p.parent.name for p in FOLDER.glob('*/README.md'))
