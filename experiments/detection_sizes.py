#!/usr/bin/env python3
"""AP50 of detectors against their MACs, over input sizes: a table and a picture.

    python experiments/detection_sizes.py A.pth.tar B.pth.tar --labels plain NetAug --data-dir DATA --split test \
        --sizes 96x128 128x160 160x192 --output sizes

Each checkpoint (or exported folder) is evaluated at every size as it is; it is not trained again. OUTPUT.json keeps the
numbers, OUTPUT.md is the table, OUTPUT.png the picture.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from timm_netaug.costs import costs  # noqa: E402
from timm_netaug.detection.annotations import read_split  # noqa: E402
from timm_netaug.detection.evaluate import evaluate_detector  # noqa: E402
from timm_netaug.detection.folder import load_trained  # noqa: E402
from timm_netaug.errors import UserError, exit_on_user_error  # noqa: E402
from timm_netaug.io.atomic import atomic_write  # noqa: E402

STYLES = (('#0072B2', 'o', '-'), ('#D55E00', 's', '--'), ('#009E73', '^', '-.'), ('#CC79A7', 'D', ':'))


def parse_size(text: str) -> Tuple[int, int]:
    """Read HEIGHTxWIDTH, or one number for both."""
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(s.isdigit() and int(s) >= 32 and int(s) % 32 == 0 for s in sides):
        raise UserError(f'--sizes takes HEIGHTxWIDTH in multiples of 32, got {text}.')
    return int(sides[0]), int(sides[-1])


def measure(source: str, data_dir: str, split: str, sizes: List[Tuple[int, int]]) -> List[Dict[str, Any]]:
    """Evaluate a detector at every size."""
    detector, _ = load_trained(source)
    if detector is None:
        raise UserError(f'{source} is neither a checkpoint of train_detection.py nor the folder of a detector.')
    images, rows = read_split(data_dir, split), []
    for size in sizes:
        macs = sum(row['macs'] for row in costs(detector.dense, (3, *size)).layers)
        metrics, _, _ = evaluate_detector(detector, images, size)
        rows.append(dict(size=list(size), macs=macs, **{k: metrics[k] for k in ('AP', 'AP50')}))
        print(f'{source} at {size[0]} x {size[1]}: {macs / 1e6:.1f} M MACs, AP50 {metrics["AP50"]:.2f}', flush=True)
    return rows


def table(results: Dict[str, List[Dict[str, Any]]]) -> str:
    """Return the results as a Markdown table."""
    lines = ['| detector | input | MACs | AP50 | AP |', '|---|---|---|---|---|']
    for label, rows in results.items():
        lines += [f'| {label} | {r["size"][0]} x {r["size"][1]} | {r["macs"] / 1e6:.1f} M | {r["AP50"]:.1f} |'
                  f' {r["AP"]:.1f} |' for r in rows]
    return '\n'.join(lines) + '\n'


def draw(results: Dict[str, List[Dict[str, Any]]], out: str, title: str) -> None:
    """Plot AP50 against MACs, a line for each detector."""
    figure = Figure(figsize=(6.5, 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (label, rows) in enumerate(results.items()):
        color, marker, line = STYLES[i % len(STYLES)]
        rows = sorted(rows, key=lambda row: row['macs'])
        axes.plot([r['macs'] / 1e6 for r in rows], [r['AP50'] for r in rows], line, color=color, marker=marker,
                  label=label)
    for row in next(iter(results.values())):
        axes.axvline(row['macs'] / 1e6, color='0.85', linewidth=0.8, zorder=0)
        axes.annotate(
            f'{row["size"][0]} x {row["size"][1]}', (row['macs'] / 1e6, 1.01), xycoords=('data', 'axes fraction'),
            fontsize=7, rotation=40, color='0.3')
    figure.suptitle(title, fontsize=11)
    axes.set(xlabel='multiply-accumulates (millions)', ylabel='AP50 (%)')
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(out, 'wb') as f:
        figure.savefig(f, format='png', dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sources', nargs='+', metavar='CHECKPOINT', help='checkpoint or exported folder')
    parser.add_argument('--labels', nargs='+', metavar='TEXT', help='names in table and picture; the paths by default')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='root of the data set')
    parser.add_argument('--split', default='val', metavar='NAME', help='split to evaluate on')
    parser.add_argument('--sizes', nargs='+', required=True, metavar='HxW', help='input sizes, multiples of 32')
    parser.add_argument('--output', required=True, metavar='NAME', help='writes NAME.json, NAME.md and NAME.png')
    args = parser.parse_args()
    with exit_on_user_error('detection_sizes.py'):
        labels = args.labels or args.sources
        if len(labels) != len(args.sources):
            raise UserError(f'--labels needs a name for each of the {len(args.sources)} detectors, got {len(labels)}.')
        sizes = [parse_size(text) for text in args.sizes]
        results = {label: measure(source, args.data_dir, args.split, sizes)
                   for label, source in zip(labels, args.sources)}
        with atomic_write(f'{args.output}.json') as f:
            json.dump(results, f, indent=2)
            f.write('\n')
        with atomic_write(f'{args.output}.md') as f:
            f.write(table(results))
        draw(results, f'{args.output}.png', f'AP50 by input size, split {args.split}')
    print(table(results), end='')


if __name__ == '__main__':
    main()
