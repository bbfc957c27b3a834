#!/usr/bin/env python3
"""Time training steps on a CPU with and without freed memory being kept for the next tensors.

    python benchmarks/memory.py --output benchmarks/results/memory-cpu-144.json

Every measurement is a process of its own, as the setting of the C library holds for a whole process; the settings take
turns. Reported are medians and quartiles over the processes of the mean time of a step, in milliseconds.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import timm_netaug
from step import CONTENDERS, Contender, machine
from timm_netaug.cli.device import keep_memory

VARIANTS = ('plain, channels-last', 'stage 3, expansions', 'all, widths')
SETTINGS = ('as it is', 'kept')


def measure(args: argparse.Namespace) -> None:
    """Print the mean time of a step in milliseconds, over the same sub-networks in every process."""
    if args.setting == 'kept':
        keep_memory()
    torch.set_num_threads(1)
    contender = Contender(args, args.model, **CONTENDERS[args.variant])
    for number in range(args.warmup + args.steps):
        if number == args.warmup:
            start = time.perf_counter()
        contender.step(number)
    print(1000 * (time.perf_counter() - start) / args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag('--model', default='netaug_mbv2_tiny')
    flag('--img-size', type=int, default=144)
    flag('--batch-size', type=int, default=32)
    flag('--warmup', type=int, default=3, help='steps that are not timed')
    flag('--steps', type=int, default=12)
    flag('--rounds', type=int, default=5, help='processes of each variant and setting')
    flag('--output', metavar='FILE', help='JSON file for the results')
    flag('--variant', choices=VARIANTS, help=argparse.SUPPRESS)  # what a process measures
    flag('--setting', choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device, args.amp = 'cpu', False
    if args.variant:
        measure(args)
        return
    times = {(variant, setting): [] for variant in VARIANTS for setting in SETTINGS}
    for _ in range(args.rounds):
        for (variant, setting), found in times.items():
            command = [sys.executable, __file__, *sys.argv[1:], '--variant', variant, '--setting', setting]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    rows = [dict(variant=variant, setting=setting, median=statistics.median(found), times=found,
                 quartiles=statistics.quantiles(found, n=4)[::2]) for (variant, setting), found in times.items()]
    print('| variant | freed memory | ms (quartiles) |\n|---|---|---|')
    for row in rows:
        low, high = row['quartiles']
        print(f'| {row["variant"]} | {row["setting"]} | {row["median"]:.0f} ({low:.0f} to {high:.0f}) |')
    if args.output:
        torch.set_num_threads(1)  # as in the processes
        about = dict(model=args.model, img_size=args.img_size, batch_size=args.batch_size, machine=machine(args),
                     timm_netaug=timm_netaug.__version__)
        Path(args.output).write_text(json.dumps(dict(about, rows=rows), indent=2) + '\n')


if __name__ == '__main__':
    main()
