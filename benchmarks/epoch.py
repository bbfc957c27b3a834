#!/usr/bin/env python3
"""Time a whole epoch of `train.py`, from JPEG files to the optimizer's step: plain and with NetAug, in turn.

    python benchmarks/epoch.py --data-dir DATA --num-classes 10 --img-size 32 -j 2
    python benchmarks/epoch.py --data-dir DATA --device cuda --amp --amp-dtype bfloat16 --channels-last -j 16

Loader, task, optimizer and loop are those that `train.py` builds of the same flags (further flags of it are passed on).
Reported are images per second, the share of the time in which the loop waits for data, and the time of each epoch over
that of the plain channels-last one beside it. Writes OUTPUT.json.
"""
import argparse
import json
import logging
import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List
from unittest import mock

import torch
from step import machine
from timm.data import resolve_input_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import random_seed

from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_flags import check_train_args, netaug_config, train_parser
from timm_netaug.cli.build import set_up_model, set_up_task, prepare_for_training
from timm_netaug.cli.device import mixed_precision
from timm_netaug.cli.loaders import open_splits, set_up_loaders
from timm_netaug.cli.train import set_up_device, set_up_lr, train_one_epoch
from timm_netaug.fused_bn_relu import FUSED

BEFORE = 'all, widths, as the layers of PyTorch have it'  # contiguous, one backward pass of the sum, as in step.py
UNIT = 'plain, channels-last'
CONTENDERS = {
    UNIT: ['--channels-last'],
    'plain, contiguous': [],
    'stage 3, expansions': ['--netaug', '--netaug-width-mults', '1', '--netaug-from-stage', '3'],
    'stage 3, widths': ['--netaug', '--netaug-from-stage', '3'],
    'all, expansions': ['--netaug', '--netaug-width-mults', '1'],
    'all, widths': ['--netaug'],
    BEFORE: ['--netaug'],
}


class Timed:
    """A loader that counts its images, and the seconds in which its user waits for the next batch."""

    def __init__(self, loader: Any, batches: int):
        self.loader, self.batches = loader, batches
        self.waited, self.images = 0.0, 0

    def __len__(self) -> int:
        return self.batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self):
        self.waited, self.images = 0.0, 0
        start = time.perf_counter()
        for i, (input, target) in enumerate(self.loader):
            self.waited += time.perf_counter() - start
            self.images += len(input)
            yield input, target
            if i + 1 == self.batches:
                return
            start = time.perf_counter()


class Contender:
    """What `train.py` trains, of a command line."""

    def __init__(self, flags: List[str], batches: int, before: bool):
        self.before = before
        with self.as_it_was():
            self._set_up(flags, batches)

    def as_it_was(self) -> ExitStack:
        stack = ExitStack()
        if self.before:
            stack.enter_context(mock.patch.dict(FUSED, clear=True))
            for module in ('build', 'train'):
                stack.enter_context(mock.patch(f'timm_netaug.cli.{module}.uses_channels_last', lambda args: False))
        return stack

    def _set_up(self, flags: List[str], batches: int) -> None:
        parser = train_parser()
        self.args = args = parse_args(parser, flags)
        check_train_args(args)
        self.device = set_up_device(args)
        random_seed(args.seed)
        splits = open_splits(args, 3)
        model, config = set_up_model(args), netaug_config(args)
        data_config = resolve_input_data_config(model, args=vars(args))
        loader, *_ = set_up_loaders(args, splits, data_config, self.device, torch.float32)
        self.loader = Timed(loader, min(batches, len(loader)))
        model = prepare_for_training(args, model, config, self.device, torch.float32)
        set_up_lr(args)
        self.task = set_up_task(args, model, None, data_config, self.device, torch.float32)
        self.optimizer = create_optimizer_v2(self.task.get_trainable_module(), **optimizer_kwargs(cfg=args))
        if config is not None:
            self.task.early_backward = not self.before and not self.task.supernet.netaug_trunk.names
            self.task.start_epoch(0, 100)

    def epoch(self, number: int) -> Dict[str, float]:
        start = time.perf_counter()
        with self.as_it_was():
            train_one_epoch(
                0, self.task, self.loader, self.optimizer, self.args, self.device,
                autocast=mixed_precision(self.args, self.device), updates_per_epoch=len(self.loader))
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return dict(seconds=seconds, images=self.loader.images, waited=self.loader.waited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, metavar='DIR')
    parser.add_argument('--model', default='netaug_mbv2_tiny')
    parser.add_argument('--batches', type=int, default=100, help='of an epoch; all that there are where they are fewer')
    parser.add_argument('--repeats', type=int, default=3, help='epochs of each contender, the contenders in turn')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--output', default='benchmarks/results/epoch', help='name without ending')
    args, flags = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    common = [
        '--data-dir', args.data_dir, '--model', args.model, '--device', args.device, '--log-interval', '1000000', *flags]
    contenders = {
        name: Contender([*common, *more], args.batches, name == BEFORE) for name, more in CONTENDERS.items()}
    rows: Dict[str, List[Dict[str, float]]] = {name: [] for name in contenders}
    for repeat in range(-1, args.repeats):  # the first ones warm up
        for name, contender in contenders.items():
            measured = contender.epoch(repeat)
            if repeat >= 0:
                rows[name].append(measured)
            print(f'{name}: {measured["images"] / measured["seconds"]:.0f} images/s', flush=True)
    os.makedirs(os.path.dirname(args.output) or '.', exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != 'data_dir'}
    facts = dict(machine=machine(args), args=settings, flags=flags, rows=rows)
    Path(f'{args.output}.json').write_text(json.dumps(facts, indent=2) + '\n')
    print(f'\n{args.model}; {machine(args)}; {" ".join(flags)}\n')
    print('| epoch | images/s | waiting for data | time, in plain channels-last epochs (lowest to highest) |\n|---|---|---|---|')
    for name, epochs in rows.items():
        speed = statistics.median(e['images'] / e['seconds'] for e in epochs)
        waiting = statistics.median(e['waited'] / e['seconds'] for e in epochs)
        ratios = sorted(e['seconds'] / plain['seconds'] for e, plain in zip(epochs, rows[UNIT]))
        print(f'| {name} | {speed:.0f} | {waiting:.0%} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to'
              f' {ratios[-1]:.2f}) |')


if __name__ == '__main__':
    main()
