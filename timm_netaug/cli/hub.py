"""Push models to the Hugging Face Hub, and pull them.

    python -m timm_netaug hub push output/train/RUN/model_best.pth.tar OWNER/NAME --data-dir DATA
    python -m timm_netaug hub pull OWNER/NAME OUT_DIR
"""
import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch.nn as nn

from ..card import known_facts
from ..deploy.pipeline import read_deployment
from ..detection.folder import find_detector_folder, load_trained, read_config
from ..detection.hub import pull_detector, push_detector
from ..detection.metric import METRICS as DETECTION_METRICS
from ..errors import UserError, exit_on_user_error
from ..hub import pull, push
from ..io.checkpoint import read_checkpoint, read_weights
from ..io.folder import CONFIG
from ..load import LoadedModel, load_model
from ..reference import input_config
from ..bundled import bundled_cfgs, bundled_folder
from .flags import refuse_for_detector
from .training_record import baseline_metrics, detection_record, training_record

__all__ = ['main']


def _load(args: argparse.Namespace) -> LoadedModel:
    there = os.path.exists(args.checkpoint)
    source = os.path.abspath(args.checkpoint) if there else bundled_folder(args.checkpoint)
    if source is None:
        raise UserError(f'There is no checkpoint and no folder {args.checkpoint}, and the bundled weights are'
                        f' {", ".join(bundled_cfgs())}.')
    return load_model(str(source), args.model, args.use_ema)


def _facts(args: argparse.Namespace, loaded: LoadedModel) -> Dict[str, Any]:
    """Collect the known facts about a model's training."""
    if loaded.folder is not None:
        facts = known_facts(json.loads((loaded.folder / CONFIG).read_text(encoding='utf-8')))
    elif loaded.run is not None:
        facts = training_record(read_checkpoint(args.checkpoint), args.use_ema)
    else:
        older = bool(input_config(read_weights(args.checkpoint)))  # the releases before NetAug
        facts = dict(converted_from=os.path.basename(args.checkpoint), netaug=not older)
    return facts


def _push(args: argparse.Namespace) -> None:
    detector, run = load_trained(args.checkpoint, args.use_ema)
    if detector is not None:
        refuse_for_detector(args, 'model', 'baseline', 'baseline_about')
        facts = detection_record(read_checkpoint(args.checkpoint), args.use_ema) if run else known_facts(
            read_config(find_detector_folder(args.checkpoint), args.checkpoint)[1], DETECTION_METRICS)
        model, send = detector.dense, partial(push_detector, detector)
    else:
        if args.baseline_about and not args.baseline:
            raise UserError('--baseline-about does nothing without --baseline.')
        loaded = _load(args)
        facts, model, send = _facts(args, loaded), loaded.model, partial(push, loaded)
    facts.update({k: v for k in ('about', 'dataset', 'dataset_terms') if (v := getattr(args, k))})
    if args.baseline:
        facts['baseline'] = baseline_metrics(args.baseline, facts)
        if args.baseline_about:
            facts['baseline_about'] = args.baseline_about
    files = _deployed(args, model, facts)
    send(args.repo, facts, files=files, revision=args.revision, private=args.private, dry_run=args.dry_run,
         data_dir=args.data_dir, license=args.license)


def _deployed(args: argparse.Namespace, model: nn.Module, facts: Dict[str, Any]) -> List[Path]:
    """Put the report of --deployed among the facts, and return the files to push with the model."""
    facts.pop('deployed', None)  # of an earlier push, whose int8 file is not pushed again
    if not args.deployed:
        return []
    file, facts['deployed'] = read_deployment(args.deployed, model)
    return [file]


def _pull(args: argparse.Namespace) -> None:
    if not pull_detector(args.repo, args.out_dir, args.revision):
        pull(args.repo, args.out_dir, args.revision, args.allow_pickle)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug hub', description='Push a tiny model to the Hugging Face Hub, or pull one.')
    commands = parser.add_subparsers(required=True, metavar='push|pull')
    command = commands.add_parser('push', help='push weights, config and card as one commit')
    command.set_defaults(run=_push)
    command.add_argument('checkpoint', help='checkpoint of train.py, exported folder, .pth of the authors, or ARCH.TAG'
                                            ' of bundled weights')
    command.add_argument('repo', metavar='OWNER/NAME', help='repository; it is created if it does not exist')
    command.add_argument('--private', action='store_true', help='create the repository as a private one')
    command.add_argument('--revision', metavar='R', help='branch to push to (default: main)')
    command.add_argument('--dry-run', metavar='OUT_DIR', help='write the files to OUT_DIR, without network or push')
    command.add_argument('--model', metavar='NAME', help='architecture, for a file that does not contain it')
    command.add_argument('--use-ema', action='store_true', default=None,
                         help='push the moving average of the weights (default if the run validated it)')
    command.add_argument('--data-dir', metavar='DIR',
                         help='evaluate on this data set, and push only if the accuracy equals the recorded one')
    command.add_argument('--baseline', metavar='CHECKPOINT',
                         help='checkpoint of the same training without NetAug; the card shows its accuracy')
    command.add_argument('--baseline-about', metavar='TEXT', help='other differences of the baseline, for the card')
    command.add_argument('--deployed', metavar='DIR', help='folder that `python -m timm_netaug deploy` wrote of the'
                         ' model: push its int8 file, and put what was measured on the card')
    command.add_argument('--license', metavar='ID', help='license of the weights, for example apache-2.0')
    command.add_argument('--dataset-name', dest='dataset', metavar='NAME', help='data set of the training')
    command.add_argument('--dataset-terms', metavar='TEXT', help='terms of use of the data set')
    command.add_argument('--about', metavar='TEXT', help='sentences about the model, for the top of the card')
    command = commands.add_parser('pull', help='download a model, check it, and write it as a folder')
    command.set_defaults(run=_pull)
    command.add_argument('repo', metavar='OWNER/NAME', help='repository')
    command.add_argument('out_dir', help='folder for model.safetensors and config.json')
    command.add_argument('--revision', metavar='R', help='branch, tag or commit (default: main)')
    command.add_argument('--allow-pickle', action='store_true',
                         help='accept weights that exist only as a pickle; no code in it is run')
    args = parser.parse_args(argv)
    with exit_on_user_error('timm_netaug hub'):
        args.run(args)
