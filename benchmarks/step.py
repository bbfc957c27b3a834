#!/usr/bin/env python3
"""Time a training step: plain, with NetAug, and with a teacher, in one run, as ratios to the plain step.

    python benchmarks/step.py --img-size 64 --batch-size 128 --output benchmarks/results/step-cpu-64
    python benchmarks/step.py --device cuda --amp --batch-size 128 --img-size 144 --models netaug_mbv2_tiny --profile

The contenders take turns, so that a machine that slows down slows them all; each NetAug step trains another one of a
fixed list of sub-networks, drawn as in training. Reported are medians over the list, their quartiles, the mean MACs of
the sub-networks, and the memory that a step adds at its peak. Writes OUTPUT.json and OUTPUT.png.
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, Dict, List, Optional
from unittest import mock

import timm
import torch
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask

import timm_netaug
from timm_netaug.cli.device import keep_memory
from timm_netaug.costs import operators
from timm_netaug.fused_bn_relu import FUSED
from timm_netaug.task import step_generator

TEACHER = 'mobilenetv2_100'


class Contender:
    """A task with its optimizer, and the layout of its tensors."""

    def __init__(
            self,
            args: argparse.Namespace,
            model: str,
            kind: str,
            channels_last: bool = True,
            early: bool = True,
            fused: bool = True,
            divisor: int = 1,
    ):
        torch.manual_seed(0)
        stock = timm.create_model(model, num_classes=1000)
        device = torch.device(args.device)
        common = dict(criterion_kwargs=dict(smoothing=0.1), device=device, verbose=False)
        if kind == 'netaug':
            network = timm_netaug.augment(stock, timm_netaug.NetAugConfig(divisor=divisor))
            network.init_weights()
            task = timm_netaug.NetAugTask(network.to(device), early_backward=early, **common)
        elif kind == 'distillation':
            network = stock
            teacher = DistillationTeacher(timm.create_model(TEACHER).to(device), device=device)
            task = LogitDistillationTask(network.to(device), teacher, **common)
        else:
            network = stock
            task = ClassificationTask(network.to(device), **common)
        format = torch.channels_last if channels_last else torch.contiguous_format
        self.task, self.kind, self.fused = task.to(memory_format=format), kind, fused
        network.train()
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        self.input = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
        self.input = self.input.contiguous(memory_format=format)
        self.target = torch.randint(1000, (args.batch_size,), device=device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    def step(self, number: int) -> None:
        with nullcontext() if self.fused else mock.patch.dict(FUSED, clear=True):
            self._step(number)

    def _step(self, number: int) -> None:
        if self.kind == 'netaug':
            self.task.start_update(number)
        with self.autocast:
            loss = self.task(self.input, self.target)['loss']
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


CONTENDERS = {  # what train.py does by default on a CPU: 'plain', and 'netaug'
    'plain': dict(kind='plain', channels_last=False),
    'plain, channels-last': dict(kind='plain'),
    'distillation, channels-last': dict(kind='distillation'),
    'netaug, as the layers of PyTorch have it': dict(kind='netaug', channels_last=False, early=False, fused=False),
    'netaug': dict(kind='netaug'),
    'netaug, divisor 8': dict(kind='netaug', divisor=8),
}


def seconds(step: Callable[[], None], device: str) -> float:
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _added_memory(args: argparse.Namespace, model: str, name: str, number: int, results) -> None:
    contender = Contender(args, model, **CONTENDERS[name])
    contender.step(number)  # what stays: momentum, and buffers of the libraries
    if args.device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step(number)
        results.send((torch.cuda.max_memory_allocated() - before) / 2 ** 20)
        return
    status = Path('/proc/self/status')
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    before = _kib(status.read_text(), 'VmRSS')
    contender.step(number)
    results.send((_kib(status.read_text(), 'VmHWM') - before) / 2 ** 10)


def _kib(status: str, field: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f'{field}:'))


def added_memory(args: argparse.Namespace, model: str, name: str, number: int) -> Optional[float]:
    """Return what a step adds to the memory in use at its peak, in MiB, measured in a process of its own; None where
    that cannot be told (on a CPU without Linux)."""
    if not args.device.startswith('cuda') and not os.path.exists('/proc/self/clear_refs'):
        return None
    # What is freed goes back to the system at once, so that the memory in use can be read off the process.
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    context = multiprocessing.get_context('spawn')
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_added_memory, args=(args, model, name, number, sending))
    process.start()
    added = receiving.recv()
    process.join()
    return added


def macs_ratios(model: str, samples: int, img_size: int) -> List[float]:
    """Return the MACs of the sub-networks of the steps, relative to the tiny model's."""
    with torch.device('meta'):
        supernet = timm_netaug.augment(timm.create_model(model, num_classes=1000)).eval()
    tiny = {f'{row["name"]}.weight': row['macs']
            for row in operators(timm_netaug.export(supernet), (3, img_size, img_size)) if row['macs']}
    ratios = []
    for number in range(samples):
        widths = supernet.sample_widths(step_generator(42, number))
        ratios.append(sum(
            macs * math.prod(widths[c.name] / c.base for c in supernet.layout.axes[name].values())
            for name, macs in tiny.items()) / sum(tiny.values()))
    return ratios


def measure(args: argparse.Namespace, model: str) -> Dict[str, dict]:
    """Time all contenders in turn, over the list of sub-networks."""
    contenders = {name: Contender(args, model, **CONTENDERS[name]) for name in args.contenders}
    times: Dict[str, List[float]] = {name: [] for name in contenders}
    for number in range(-args.warmup, args.samples):
        for name, contender in contenders.items():
            elapsed = seconds(lambda: contender.step(max(number, 0)), args.device)
            if number >= 0:
                times[name].append(elapsed)
        print(f'{model}: step {number + 1} of {args.samples}', flush=True)
    del contenders
    ratios = macs_ratios(model, args.samples, args.img_size)
    widest = ratios.index(max(ratios))
    unit = statistics.median(times['plain'])
    rows = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows[name] = dict(
            seconds=median, ratio=median / unit, ratio_low=low / unit, ratio_high=high / unit,
            mean_ratio=statistics.mean(values) / statistics.mean(times['plain']),
            added_mib=added_memory(args, model, name, widest))
    return dict(rows=rows, mean_macs_ratio=1 + statistics.mean(ratios))


def profile(args: argparse.Namespace, model: str) -> None:
    """Print where the time of each contender's steps goes."""
    on_gpu = args.device.startswith('cuda')
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    for name in args.contenders:
        contender = Contender(args, model, **CONTENDERS[name])
        for number in range(args.warmup):
            contender.step(number)
        with torch.profiler.profile(activities=activities) as profiler:
            for number in range(args.samples):
                contender.step(number)
        print(f'\n{model}, {name}, {args.samples} steps\n' + profiler.key_averages().table(
            sort_by=f'self_{"cuda" if on_gpu else "cpu"}_time_total', row_limit=20, max_name_column_width=50))


def table(results: Dict[str, dict]) -> str:
    lines = ['| model | contender | median step | plain steps (quartiles) | mean | MACs | memory added |',
             '|---|---|---|---|---|---|---|']
    for model, result in results.items():
        plain = result['rows']['plain']
        for name, row in result['rows'].items():
            macs = f'{result["mean_macs_ratio"]:.1f} x' if name.startswith('netaug') and 'divisor' not in name else ''
            memory = '' if row['added_mib'] is None else (
                f'{row["added_mib"]:,.0f} MiB, {row["added_mib"] / plain["added_mib"]:.1f} x')
            lines.append(f'| `{model}` | {name} | {1000 * row["seconds"]:,.0f} ms | {row["ratio"]:.2f}'
                         f' ({row["ratio_low"]:.2f} to {row["ratio_high"]:.2f}) | {row["mean_ratio"]:.2f} | {macs} |'
                         f' {memory} |')
    return '\n'.join(lines)


def machine(args: argparse.Namespace) -> str:
    if args.device.startswith('cuda'):
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path('/proc/cpuinfo')
        found = [line.split(':')[1].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith('model name')] if cpuinfo.exists() else []
        name = f'{found[0] if found else platform.processor()}, {torch.get_num_threads()} thread(s)'
    return f'{name}; PyTorch {torch.__version__}, timm {timm.__version__}'


def picture(results: Dict[str, dict], title: str, path: str) -> None:
    from matplotlib.figure import Figure
    names = list(next(iter(results.values()))['rows'])
    figure = Figure(figsize=(9, 1 + 0.9 * len(results)), layout='constrained')
    axes = figure.subplots()
    for i, name in enumerate(names):
        rows = [r['rows'][name] for r in results.values()]
        spread = [[r['ratio'] - r['ratio_low'] for r in rows], [r['ratio_high'] - r['ratio'] for r in rows]]
        axes.barh([j + 0.8 * i / len(names) for j in range(len(rows))], [r['ratio'] for r in rows], 0.75 / len(names),
                  xerr=spread, label=name)
    axes.set_yticks([j + 0.35 for j in range(len(results))], list(results))
    axes.invert_yaxis()
    axes.set_xlabel('time of a step, in plain steps of the same model (median, quartiles)')
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=sorted(timm.list_models('netaug_*')))
    parser.add_argument('--contenders', nargs='+', default=list(CONTENDERS), choices=list(CONTENDERS), metavar='NAME')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--samples', type=int, default=12, help='sub-networks, and steps of each contender')
    parser.add_argument('--warmup', type=int, default=2, help='steps before')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--profile', action='store_true', help='print where the time goes instead')
    parser.add_argument('--no-keep-memory', action='store_true', help='malloc as it is without train.py')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    parser.add_argument('--output', default='benchmarks/results/step', help='name without ending')
    args = parser.parse_args()
    if 'plain' not in args.contenders:
        parser.error('the unit is the plain step: add plain to --contenders')
    torch.set_num_threads(args.threads)
    if args.device == 'cpu' and not args.no_keep_memory:
        keep_memory()
    if args.profile:
        for model in args.models:
            profile(args, model)
        return
    results = {model: measure(args, model) for model in args.models}
    os.makedirs(os.path.dirname(args.output) or '.', exist_ok=True)
    title = f'{args.img_size} px, batch {args.batch_size}; {machine(args)}'
    Path(f'{args.output}.json').write_text(
        json.dumps(dict(machine=machine(args), args=vars(args), results=results), indent=2) + '\n')
    picture(results, title, f'{args.output}.png')
    print(f'\n{title}\n\n{table(results)}')


if __name__ == '__main__':
    main()
