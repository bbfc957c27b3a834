"""Without `--netaug`, train.py trains as timm's own script does, given the same batches.

The other side is a loop of this file, after what timm's script does in what order (read in its public repository):
model, optimizer and schedule from timm's factories, accumulation, clipping, EMA, validation. It is fed with the batches
that train.py was fed with, so that the weights are equal to the last bit; what the batches hold is checked by itself.
"""
import csv
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from timm import create_model
from timm.data import resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed

from timm_netaug.cli import train
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_flags import train_parser

EPOCHS, BATCHES = 4, 3


def split(folder, data_config):
    """A split as one batch: what the evaluation transform makes of images that have the input's size already."""
    files = [(f, int(f.parent.name)) for f in sorted(folder.glob('*/*.png'))]
    x = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f, _ in files]).float()
    mean, std = (torch.tensor(data_config[k])[:, None, None] * 255 for k in ('mean', 'std'))
    return (x - mean) / std, torch.tensor([label for _, label in files])


def reference(args, data, batches):
    random_seed(args.seed, 0)
    model = create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop)
    data_config = resolve_data_config(vars(args), model=model)
    accum, per_epoch = args.grad_accum_steps, BATCHES
    if args.lr is None:
        root = args.lr_base_scale == 'sqrt' or (not args.lr_base_scale and ('ada' in args.opt or 'lamb' in args.opt))
        args.lr = args.lr_base * (args.batch_size * accum / args.lr_base_size) ** (0.5 if root else 1)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    x, y = split(data / 'validation', data_config)
    loss_fn = nn.CrossEntropyLoss()
    if args.bce_loss:
        loss_fn = BinaryCrossEntropy(smoothing=args.smoothing, target_threshold=args.bce_target_thresh)
    elif args.smoothing:
        loss_fn = LabelSmoothingCrossEntropy(args.smoothing)
    updates = -(-per_epoch // accum)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'), updates_per_epoch=updates)
    rows = []
    for epoch in range(epochs):
        model.train()
        optimizer.zero_grad()
        losses, update = [], epoch * updates
        for i in range(per_epoch):
            last = i + 1 == per_epoch
            share = accum if i < per_epoch - per_epoch % accum else per_epoch % accum
            images, labels = batches.pop(0)
            loss = loss_fn(model(images), labels)
            losses.append(loss.item())
            (loss / share).backward()
            if not last and (i + 1) % accum:
                continue
            if args.clip_grad is not None:
                parameters = list(model.parameters())
                dispatch_clip_grad(parameters[:-2] if args.clip_mode == 'agc' else parameters, args.clip_grad,
                                   mode=args.clip_mode)
            optimizer.step()
            optimizer.zero_grad()
            update += 1
            if ema is not None:
                ema.update(model, step=update)
            scheduler.step_update(num_updates=update, metric=np.mean(losses))
        if hasattr(optimizer, 'sync_lookahead'):
            optimizer.sync_lookahead()
        with torch.no_grad():
            output = (model if ema is None else ema.module).eval()(x)
        top1 = (output.argmax(1) == y).float().mean().item() * 100
        metrics = dict(loss=nn.functional.cross_entropy(output, y).item(), top1=top1)
        lrs = [group['lr'] for group in optimizer.param_groups]
        rows.append(dict(train_loss=np.mean(losses), eval_loss=metrics['loss'], eval_top1=top1, lr=np.mean(lrs)))
        scheduler.step(epoch + 1, metrics[args.eval_metric])
    assert not batches
    return rows, model, ema


@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('model', ['test_efficientnet', 'test_resnet'])
@pytest.mark.parametrize('argv', [
    ['--warmup-epochs', 0, '--smoothing', 0],
    ['--opt', 'adamw', '--lr', 1e-3, '--weight-decay', 0.05, '--warmup-epochs', 2, '--model-ema',
     '--model-ema-decay', 0.7, '--grad-accum-steps', 2],
    ['--opt', 'rmsproptf', '--sched', 'step', '--decay-epochs', 2, '--lr', 1e-3, '--opt-eps', 1e-3,
     '--warmup-epochs', 1, '--model-ema', '--model-ema-decay', 0.9, '--model-ema-warmup'],
    ['--opt', 'lamb', '--sched', 'multistep', '--decay-milestones', 1, 3, '--warmup-epochs', 0, '--bce-loss',
     '--bce-target-thresh', 0.2],
    ['--sched', 'plateau', '--patience-epochs', 0, '--eval-metric', 'loss', '--warmup-epochs', 0, '--lr', 0.3],
    ['--opt', 'lookahead_adam', '--sched', 'poly', '--sched-on-updates', '--warmup-prefix', '--warmup-epochs', 1,
     '--clip-grad', 0.5, '--layer-decay', 0.9],
    ['--opt', 'momentum', '--sched', 'tanh', '--clip-grad', 0.02, '--clip-mode', 'agc', '--warmup-epochs', 0,
     '--lr-noise', 0.4, 0.9, '--opt-kwargs', 'dampening=0.1'],
], ids=['sgd', 'adamw', 'rmsprop', 'lamb', 'plateau', 'lookahead', 'agc'])
def test_same_training(model, argv, few_digits, tmp_path, monkeypatch):
    argv = [str(a) for a in [
        '--data-dir', few_digits, '--model', model, '--num-classes', 10, '--img-size', 32, '--crop-pct', 1.0,
        '--no-aug', '-j', 0, '-b', 80, '-vb', 71, '--epochs', EPOCHS, '--output', tmp_path, '--experiment', 'run',
        *argv]]
    batches, forward = [], ClassificationTask.forward

    def spy(task, input, target):
        batches.append((input.clone(), target.clone()))
        return forward(task, input, target)

    monkeypatch.setattr(ClassificationTask, 'forward', spy)
    monkeypatch.setattr(sys, 'argv', ['train.py', *argv])
    train.train()
    args = parse_args(train_parser(), argv)
    x, y = split(few_digits / 'train', resolve_data_config(vars(args), model=create_model(model)))
    for start in range(0, len(batches), BATCHES):  # every image once in an epoch, with its label
        seen, labels = (torch.cat(parts) for parts in zip(*batches[start:start + BATCHES]))
        for label in range(10):
            mine, theirs = (t.sum((1, 2, 3)).sort().values for t in (seen[labels == label], x[y == label]))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)
    got = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    want, stock, ema = reference(args, few_digits, batches)
    assert len(got) == len(want) >= EPOCHS
    for a, b in zip(got, want):
        assert float(a['lr']) == pytest.approx(b['lr'], rel=1e-12)
        for column in ('train_loss', 'eval_loss', 'eval_top1'):
            assert float(a[column]) == pytest.approx(b[column], rel=1e-5), column
    saved = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)
    for key, net in (('state_dict', stock), ('state_dict_ema', ema and ema.module)):
        assert (key in saved) == (net is not None)
        for name, t in (net.state_dict() if net is not None else {}).items():
            assert torch.equal(saved[key][name], t), name
