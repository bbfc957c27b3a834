#!/usr/bin/env python3
"""From nothing to a tiny model trained with NetAug, exported and validated, on images that need no download.

The images are scikit-learn's handwritten digits, 1,797 real scans of 8 x 8 pixels. Every step is a command that you
can type yourself; each is shown before it runs.
"""
import argparse
import itertools
import subprocess
import sys
from pathlib import Path

RECIPE = 'hfconfigs/netaug_mbv2_tiny.netaug_digits/train.yaml'


def write_digits(root: Path, size: int = 32) -> None:
    """Write the digits as an image folder, every fifth image of a class for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for pixels, label in zip(digits.images, digits.target):
        split = 'validation' if seen[label] % 5 == 4 else 'train'
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype('uint8'))  # 16 levels of grey
        image.resize((size, size), Image.Resampling.BILINEAR).convert('RGB').save(folder / f'{seen[label]:03d}.png')
        seen[label] += 1


def run(*command: str) -> None:
    print('\n$ python ' + ' '.join(command), flush=True)
    status = subprocess.run([sys.executable, *command], cwd=Path(__file__).parent).returncode
    if status:
        sys.exit(f'demo.py: error: the command above failed with status {status}.')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', default='output/demo', help='folder for data and results')
    parser.add_argument('--epochs', type=int, default=None, help="epochs, where not the recipe's")
    args = parser.parse_args()
    output = Path(args.output).resolve()
    try:
        write_digits(output / 'digits')
    except ImportError:
        sys.exit("demo.py: error: the digits come with scikit-learn: pip install -e '.[demo]'.")
    data = ['--data-dir', str(output / 'digits')]
    epochs = ['--epochs', str(args.epochs)] if args.epochs else []
    name = next(n for n in (f'run-{i}' for i in itertools.count(1)) if not (output / n).exists())
    run('train.py', '-c', RECIPE, *data, '--output', str(output), '--experiment', name, *epochs)
    best = str(output / name / 'model_best.pth.tar')
    run('-m', 'timm_netaug', 'export', best, str(output / 'model'))
    run('validate.py', '--model', f'local-dir:{output / "model"}', '--pretrained', *data, '-j', '0')


if __name__ == '__main__':
    main()
