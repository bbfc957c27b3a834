#!/usr/bin/env python3
"""Time a training step: plain, with NetAug, and with a teacher, in one run, in plain channels-last steps.

    python benchmarks/step.py --img-size 64 --batch-size 64 --output benchmarks/results/step-cpu-64
    python benchmarks/step.py --paper-sizes --batch-size 32 --output benchmarks/results/step-cpu-paper
    python benchmarks/step.py --redraw benchmarks/results/step-cpu-64.json
    python benchmarks/step.py --device cuda --amp --batch-size 128 --img-size 144 --models netaug_mbv2_tiny --profile

The contenders take turns, so that a machine that slows down slows them all; each NetAug step trains another one of a
fixed list of sub-networks, drawn as in training. Reported are the mean over the list and the quartiles, the operators
that a step dispatches, and the memory that it adds at its peak. Writes OUTPUT.json and OUTPUT.png.
"""
import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional
from unittest import mock

import timm
import torch
from timm.data import resolve_data_config
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask
from torch.utils._python_dispatch import TorchDispatchMode

import timm_netaug
from timm_netaug.cli.device import keep_memory
from timm_netaug.cli.style import BLACK, new_figure, style
from timm_netaug.fused_bn_relu import FUSED

sys.path.insert(0, str(Path(__file__).parents[1] / 'experiments'))
from methods import METHODS  # noqa: E402

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
            **config: Any,
    ):
        torch.manual_seed(0)
        stock = timm.create_model(model, num_classes=1000)
        device = torch.device(args.device)
        common = dict(criterion_kwargs=dict(smoothing=0.1), device=device, verbose=False)
        if kind == 'netaug':
            network = timm_netaug.augment(stock, timm_netaug.NetAugConfig(**config))
            network.init_weights()
            early = early and not network.netaug_trunk.names
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


UNIT = 'plain, channels-last'
CONTENDERS = {  # what train.py does by default on a CPU, but for those after the first nine
    UNIT: dict(kind='plain'),
    'distillation': dict(kind='distillation'),
    'stage 4, expansions': dict(kind='netaug', from_stage=4, width_mults=(1,)),
    'stage 3, expansions': dict(kind='netaug', from_stage=3, width_mults=(1,)),
    'stage 2, expansions': dict(kind='netaug', from_stage=2, width_mults=(1,)),
    'stage 3, widths': dict(kind='netaug', from_stage=3),
    'all, expansions': dict(kind='netaug', width_mults=(1,)),
    'all, widths': dict(kind='netaug'),
    'plain, contiguous': dict(kind='plain', channels_last=False),
    'all, widths, as the layers of PyTorch have it': dict(
        kind='netaug', channels_last=False, early=False, fused=False),
    'all, widths, divisor 8': dict(kind='netaug', divisor=8),
    'all, widths, divisor 16': dict(kind='netaug', divisor=16),
    'stage 3, expansions, divisor 16': dict(kind='netaug', from_stage=3, width_mults=(1,), divisor=16),
    'stage 3, widths, divisor 16': dict(kind='netaug', from_stage=3, divisor=16),
}
BY_DEFAULT = list(CONTENDERS)[:9]
NAMES = {  # contender -> its method, which has a colour in all pictures, and what pictures call it
    UNIT: ('plain', 'plain training, channels-last'),
    'distillation': ('teacher', 'plain training with a teacher'),
    'stage 4, expansions': ('stage', 'NetAug, expansions from stage 4'),
    'stage 3, expansions': ('stage', 'NetAug, expansions from stage 3'),
    'stage 2, expansions': ('stage', 'NetAug, expansions from stage 2'),
    'stage 3, widths': ('stage-widths', 'NetAug, widths and expansions from stage 3'),
    'all, expansions': ('expansions', 'NetAug, expansions alone'),
    'all, widths': ('widths', 'NetAug, widths and expansions'),
    'plain, contiguous': ('plain', 'plain training, contiguous'),
    'all, widths, as the layers of PyTorch have it': ('widths', "NetAug, widths and expansions, PyTorch's layers"),
    'all, widths, divisor 8': ('widths', 'NetAug, widths and expansions, divisor 8'),
    'all, widths, divisor 16': ('widths', 'NetAug, widths and expansions, divisor 16'),
    'stage 3, expansions, divisor 16': ('stage', 'NetAug, expansions from stage 3, divisor 16'),
    'stage 3, widths, divisor 16': ('stage-widths', 'NetAug, widths and expansions from stage 3, divisor 16'),
    # As earlier versions of this file called them.
    'plain': ('plain', 'plain training, contiguous'),
    'distillation, channels-last': ('teacher', 'plain training with a teacher'),
    'netaug, as the layers of PyTorch have it': ('widths', "NetAug, widths and expansions, PyTorch's layers"),
    'netaug': ('widths', 'NetAug, widths and expansions'),
    'netaug, divisor 8': ('widths', 'NetAug, widths and expansions, divisor 8'),
}


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, forward and backward, without those that only make a view."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        self.count += not returns or any(r.alias_info is None or r.alias_info.is_write for r in returns)
        return function(*args, **(kwargs or {}))


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
    sending.close()  # so that a process that fails is an EOFError here
    added = receiving.recv()
    process.join()
    return added


def operators(contender: Contender) -> int:
    """Count the operators of a step, without the optimizer's."""
    with Operators() as operators, mock.patch.object(contender.optimizer, 'step'):
        contender.step(0)
    return operators.count


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
    counts = {name: operators(contender) for name, contender in contenders.items()}
    del contenders
    unit = statistics.mean(times[UNIT])
    rows = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        rows[name] = dict(
            seconds=statistics.mean(values), ratio=statistics.mean(values) / unit, ratio_low=low / unit,
            ratio_high=high / unit, operators=counts[name],
            added_mib=None if args.no_memory else max(
                filter(None, (added_memory(args, model, name, number) for number in range(2))), default=None))
    return dict(rows=rows, img_size=args.img_size)


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
    lines = ['| model, size | contender | mean step | plain steps (quartiles) | operators | memory added |',
             '|---|---|---|---|---|---|']
    for model, result in results.items():
        unit = result['rows'][UNIT]
        for name, row in result['rows'].items():
            memory = '' if row['added_mib'] is None else (
                f'{row["added_mib"]:,.0f} MiB, {row["added_mib"] / unit["added_mib"]:.2f} x')
            lines.append(f'| `{model}`, {result["img_size"]} | {name} | {1000 * row["seconds"]:,.0f} ms |'
                         f' {row["ratio"]:.2f} ({row["ratio_low"]:.2f} to {row["ratio_high"]:.2f}) |'
                         f' {row["operators"]:,} | {memory} |')
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
    """Draw one panel for each model, with the length of every bar written behind it."""
    from matplotlib.patheffects import withStroke
    names = list(next(iter(results.values()))['rows'])
    unit = next(name for name in names if all(r['rows'][name]['ratio'] == 1 for r in results.values()))
    longest = max(row['ratio_high'] for r in results.values() for row in r['rows'].values())
    with style():
        figure = new_figure(10, 1.4 + (0.6 + 0.26 * len(names)) * len(results))
        figure.suptitle('Time of a training step', x=0.02, ha='left')
        for axes, (model, result) in zip(figure.subplots(len(results), squeeze=False)[:, 0], results.items()):
            for i, name in enumerate(names):
                row, colour = result['rows'][name], METHODS[NAMES[name][0]].colour
                ratio, low, high = row.get('mean_ratio', row['ratio']), row['ratio_low'], row['ratio_high']
                axes.barh(i, ratio, 0.75, color=colour)
                quartiles, = axes.plot([low, high], [i, i], color=BLACK, linewidth=1.5)
                quartiles.set_path_effects([withStroke(linewidth=4, foreground='white')])  # seen on a dark bar, too
                axes.text(max(ratio, high) + 0.012 * longest, i, f'{ratio:.2f}', va='center')
            axes.set_yticks(range(len(names)), [NAMES[name][1] for name in names])
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(axis='y', length=0)
            axes.set_xlim(0, 1.08 * longest)
            axes.set_title(f'{model}, {result["img_size"]} pixels')
            axes.grid(False)
        axes.set_xlabel(f'1: a step of {NAMES[unit][1]} (bars: mean, lines: quartiles)', loc='left')
        figure.supxlabel(title, x=0.02, ha='left', fontsize=9)
        figure.savefig(path, dpi=120)


def redraw(path: str) -> None:
    """Draw the picture of a JSON file that an earlier measurement has written."""
    content = json.loads(Path(path).read_text())
    for result in content['results'].values():
        result.setdefault('img_size', content['args']['img_size'])  # files of earlier versions
    title = f'Batch {content["args"]["batch_size"]}; {content["machine"]}'
    picture(content['results'], title, str(Path(path).with_suffix('.png')))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=sorted(timm.list_models('netaug_*')))
    parser.add_argument('--contenders', nargs='+', default=BY_DEFAULT, choices=list(CONTENDERS), metavar='NAME')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--paper-sizes', action='store_true', help="the models' own sizes, as in the paper")
    parser.add_argument('--no-memory', action='store_true', help='measure no memory')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--samples', type=int, default=12, help='sub-networks, and steps of each contender')
    parser.add_argument('--warmup', type=int, default=2, help='steps before')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--profile', action='store_true', help='print where the time goes instead')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    parser.add_argument('--output', default='benchmarks/results/step', help='name without ending')
    parser.add_argument('--redraw', nargs='+', metavar='JSON', help='only draw the pictures of these files again')
    args = parser.parse_args()
    if args.redraw:
        for path in args.redraw:
            redraw(path)
        return
    if UNIT not in args.contenders:
        parser.error(f'the unit is the plain step: add "{UNIT}" to --contenders')
    torch.set_num_threads(args.threads)
    if args.device == 'cpu':
        keep_memory()  # as train.py does
    if args.profile:
        for model in args.models:
            profile(args, model)
        return
    results = {}
    for model in args.models:
        if args.paper_sizes:
            args.img_size = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())['input_size'][-1]
        results[model] = measure(args, model)
    os.makedirs(os.path.dirname(args.output) or '.', exist_ok=True)
    title = f'Batch {args.batch_size}; {machine(args)}'
    Path(f'{args.output}.json').write_text(
        json.dumps(dict(machine=machine(args), args=vars(args), results=results), indent=2) + '\n')
    picture(results, title, f'{args.output}.png')
    print(f'\n{title}\n\n{table(results)}')


if __name__ == '__main__':
    main()
