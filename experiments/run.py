#!/usr/bin/env python3
"""Run experiments: lists of `train.py` command lines, with seeds. What is done is skipped, what is not is resumed.

    python experiments/run.py experiments/cifar10_20k.yaml --data-dir CIFAR10
    python experiments/run.py experiments/cifar10_20k.yaml --list

A run has one thread: to have several side by side, start this command several times. Runs and checkpoints go to
experiments/runs/. When a run is complete, its `summary.csv` and what it cost are copied to experiments/results/, which
is committed; `experiments/report.py` makes tables and pictures of them.
"""
import argparse
import csv
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Dict, List, Optional

import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results'


@dataclasses.dataclass(frozen=True)
class Run:
    """A training: one row of an experiment with one seed."""
    experiment: str
    row: str
    seed: int
    flags: Dict[str, Any]
    variant: Optional[str] = None  # of experiments/variants.py
    images_per_class: Optional[int] = None

    @property
    def name(self) -> str:
        return f'{self.row}-s{self.seed}'

    @property
    def result(self) -> Path:
        return RESULTS / self.experiment / f'{self.name}.csv'

    @property
    def epochs(self) -> int:
        return self.flags['epochs']


def read_experiment(path: str) -> List[Run]:
    """Return the runs of an experiment in the order of its file."""
    content = yaml.safe_load(Path(path).read_text())
    runs = []
    for row, fields in content['rows'].items():
        unknown = set(fields) - {'about', 'detail', 'flags', 'seeds', 'variant', 'images_per_class', 'unit'}
        if unknown:
            sys.exit(f'{path}: the row {row} has unknown fields: {", ".join(sorted(unknown))}.')
        for seed in fields.get('seeds', [0]):
            runs.append(Run(
                Path(path).stem, row, seed, {**content.get('flags', {}), **fields.get('flags', {})},
                *(fields.get(key, content.get(key)) for key in ('variant', 'images_per_class'))))
    return runs


def flag_words(flags: Dict[str, Any]) -> List[str]:
    words = []
    for key, value in flags.items():
        if value is False or value is None:
            continue
        words.append(f'--{key.replace("_", "-")}')
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def command(run: Run, data_dir: str, output: str) -> List[str]:
    """Return the command line of a run."""
    program = ['train.py'] if run.variant is None else ['experiments/variants.py', run.variant]
    return ['python', *program, '--data-dir', data_dir, *flag_words(run.flags), '--seed', str(run.seed),
            '--output', output, '--experiment', run.name]


def subset(data_dir: str, images_per_class: Optional[int]) -> str:
    """Return a data set with the first images of every class, by name, in train, and the whole validation split."""
    if images_per_class is None:
        return data_dir
    source = Path(data_dir).resolve()
    root = HERE / 'runs' / 'data' / f'{source.name}-{images_per_class}'
    if not root.exists():
        temporary = Path(f'{root}.{os.getpid()}')
        for folder in sorted((source / 'train').iterdir()):
            (temporary / 'train' / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:images_per_class]:
                (temporary / 'train' / folder.name / image.name).symlink_to(image.resolve())
        (temporary / 'validation').symlink_to(source / 'validation')
        try:
            temporary.rename(root)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    if (root / 'validation').resolve() != (source / 'validation').resolve():
        sys.exit(f'{root} was made from {(root / "validation").resolve().parent}: delete it to use {source}.')
    return str(root)


def done(run: Run) -> bool:
    """Return whether the result of a run is there; one of another command line ends the program."""
    if not run.result.exists():
        return False
    facts = json.loads(run.result.with_suffix('.json').read_text())
    now = shlex.join(command(run, 'DATA', f'experiments/runs/{run.experiment}'))
    if (facts['command'], facts['images_per_class']) != (now, run.images_per_class):
        sys.exit(f'{run.result} is of another command line than its row now has: delete it, or restore the row.')
    return True


def take(run: Run) -> Optional[IO]:
    """Return a lock on a run, None where another process works at it or has just completed it."""
    folder = HERE / 'runs' / run.experiment / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / 'lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    if done(run):
        lock.close()
        return None
    return lock


def execute(run: Run, data_dir: str, lock: IO) -> bool:
    """Run or resume a training to its end, and copy its results; returns whether that worked."""
    output = HERE / 'runs' / run.experiment
    folder = output / run.name
    words = command(run, data_dir, str(output))
    started = folder / 'command.txt'
    if (folder / 'last.pth.tar').exists():
        if started.exists() and started.read_text() != shlex.join(words):
            print(f'{run.experiment}/{run.name} was begun with another command line: delete {folder} to begin anew.')
            return False
        words += ['--resume', str(folder / 'last.pth.tar')]
    else:
        started.write_text(shlex.join(words))
    cost_file = folder / 'cost.jsonl'  # a line for every start, unknown while it runs and where this program was killed
    costs = [json.loads(line) for line in cost_file.read_text().splitlines()] if cost_file.exists() else []
    costs.append(dict(cpu_seconds=None, seconds=None))
    cost_file.write_text(''.join(json.dumps(c) + '\n' for c in costs))
    start = time.time()
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    with open(folder / 'log.txt', 'a') as log:
        process = subprocess.Popen(  # it holds the lock, too: it may outlive this program
            [sys.executable, *words[1:]], cwd=HERE.parent, stdout=log, stderr=log, pass_fds=(lock.fileno(),),
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path})
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:  # the training has had it, too, and saves
            _, status, usage = os.wait4(process.pid, 0)
    costs[-1] = dict(cpu_seconds=usage.ru_utime + usage.ru_stime, seconds=time.time() - start)
    cost_file.write_text(''.join(json.dumps(c) + '\n' for c in costs))
    if os.waitstatus_to_exitcode(status) in (-signal.SIGINT, 128 + signal.SIGINT):
        sys.exit(130)
    summary = folder / 'summary.csv'
    epochs = len(list(csv.DictReader(summary.open()))) if summary.exists() else 0
    if os.waitstatus_to_exitcode(status) or epochs < run.epochs:
        print(f'{run.experiment}/{run.name} ended after {epochs} of {run.epochs} epochs: see {folder / "log.txt"}')
        return False
    run.result.parent.mkdir(parents=True, exist_ok=True)
    versions = json.loads((folder / 'versions.json').read_text())
    facts = dict(
        command=shlex.join(command(run, 'DATA', f'experiments/runs/{run.experiment}')),
        images_per_class=run.images_per_class,
        starts=len(costs),
        **{k: None if any(c[k] is None for c in costs) else round(sum(c[k] for c in costs), 1) for k in costs[0]},
        versions={k: v for k, v in versions.items() if k != 'command'},
    )
    run.result.with_suffix('.json').write_text(json.dumps(facts, indent=2) + '\n')
    temporary = run.result.with_suffix('.tmp')
    shutil.copyfile(summary, temporary)
    temporary.rename(run.result)
    print(f'{run.experiment}/{run.name}: {costs[-1]["seconds"]:.0f} s', flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('experiments', nargs='+', metavar='YAML')
    parser.add_argument('--data-dir', metavar='DIR', help='folder with train/CLASS/ and validation/CLASS/')
    parser.add_argument('--rows', nargs='+', metavar='ROW', help='these alone')
    parser.add_argument('--list', action='store_true', help='print the command lines that are left, and run nothing')
    args = parser.parse_args()

    def chosen() -> List[Run]:
        runs = [run for path in args.experiments for run in read_experiment(path)]
        unknown = set(args.rows or ()) - {run.row for run in runs}
        if unknown:
            parser.error(f'there are no rows {", ".join(sorted(unknown))}')
        return [run for run in runs if not args.rows or run.row in args.rows]

    todo = [run for run in chosen() if not done(run)]
    print(f'{len(todo)} of {len(chosen())} runs are left.', file=sys.stderr, flush=True)
    if args.list:
        print('\n'.join(shlex.join(command(run, 'DATA', f'experiments/runs/{run.experiment}')) for run in todo))
        return
    if not args.data_dir:
        parser.error('--data-dir is missing')
    failed: List[Run] = []
    while True:  # the files are read anew for each run, so that rows can be added meanwhile
        todo = (run for run in chosen() if not done(run) and run not in failed)
        run, lock = next(((run, lock) for run in todo for lock in [take(run)] if lock), (None, None))
        if run is None:
            break
        with lock:
            if not execute(run, subset(args.data_dir, run.images_per_class), lock):
                failed.append(run)
    if failed:
        sys.exit(f'{len(failed)} runs are not complete: {", ".join(run.name for run in failed)}')


if __name__ == '__main__':
    main()
