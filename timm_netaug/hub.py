"""Models to and from the Hugging Face Hub: `python -m timm_netaug.hub push|pull`.

    python -m timm_netaug.hub push output/train/RUN/model_best.pth.tar OWNER/NAME --data-dir DATA
    python -m timm_netaug.hub pull OWNER/NAME OUT_DIR
"""
import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file
from timm import create_model

from .card import facts_of_run, known_facts, model_card, without_netaug
from .checkpoint import aside, load_run, read_checkpoint
from .convert import convert
from .errors import UserError, told_plainly
from .export import export_folder
from .fetch import CONFIG, PICKLE, WEIGHTS, fetch, hub_errors, load_folder
from .scripts import validate
from .scripts.args import check_validate_args, parse_args, validate_parser
from .shipped import shipped_cfgs, shipped_folder

__all__ = ['main']

_CARD = 'README.md'
_TOLERANCE = 0.1  # points of accuracy, for kernels that sum in another order


def _say(text: str) -> None:
    print(text, flush=True)


def _check_out_dir(out_dir: str) -> None:
    others = set(os.listdir(out_dir)) - {WEIGHTS, CONFIG, _CARD} if os.path.isdir(out_dir) else ()
    if others:
        raise UserError(f'{out_dir} holds other files ({min(others)}): name an empty folder or a new one.')


def _move_files(folder: Path, out_dir: str) -> None:
    """Put the files into a folder, each of them complete at every moment."""
    os.makedirs(out_dir, exist_ok=True)
    for file in folder.iterdir():
        shutil.copyfile(file, Path(out_dir, f'.{file.name}.aside'))
        os.replace(Path(out_dir, f'.{file.name}.aside'), Path(out_dir, file.name))


def _write_folder(args: argparse.Namespace, folder: Path) -> Tuple[nn.Module, Dict[str, Any]]:
    """Write weights and config of what `push` names; returns its model and the facts that are known of it."""
    source = args.checkpoint if os.path.exists(args.checkpoint) else str(
        shipped_folder(args.checkpoint) or args.checkpoint)
    if os.path.isdir(source):
        if args.model or args.use_ema:
            raise UserError(f'{source} is an exported folder, which has one model: leave --model and --use-ema out.')
        model = load_folder(source, source)
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(Path(source, name), folder / name)
        return model, known_facts(json.loads((folder / CONFIG).read_text(encoding='utf-8')))
    if not os.path.isfile(source):
        shipped = ', '.join(shipped_cfgs())
        raise UserError(f'There is no checkpoint and no folder {source}, and the weights that ship are {shipped}.')
    try:
        checkpoint = read_checkpoint(source)
    except UserError:
        checkpoint = {}  # another format: reading the weights tells whether it holds any
    if getattr(checkpoint.get('args'), 'run', None) is not None:
        if args.model:
            raise UserError(f'{source} says itself which model it is of: leave --model out.')
        model, run, checkpoint = load_run(source, args.use_ema or None)
        export_folder(model, folder, run)
        return model, facts_of_run(checkpoint, args.use_ema or None)
    if args.use_ema:
        raise UserError('--use-ema is for checkpoints of train.py: leave it out.')
    if not args.model:
        raise UserError(f'{source} does not say which model it is of: name it with --model.')
    return convert(source, folder, args.model), dict(converted_from=os.path.basename(source))


def _write_config(folder: Path, facts: Dict[str, Any], license: Optional[str]) -> Dict[str, Any]:
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    if facts:
        config['timm_netaug'] = facts
    if license:
        config['pretrained_cfg']['license'] = license
    with aside(str(folder / CONFIG)) as f:
        json.dump(config, f, indent=2)
    return config


def _baseline(path: str, facts: Mapping[str, Any]) -> Dict[str, float]:
    """Return what a checkpoint of the same training without NetAug has reached.

    Raises:
        UserError: It is of another training, or its metric is not on record.
    """
    checkpoint = read_checkpoint(path)
    if getattr(checkpoint.get('args'), 'run', None) is None:
        raise UserError(f'--baseline: {path} is not a checkpoint of train.py.')
    baseline = facts_of_run(checkpoint)
    if baseline['command'] != without_netaug(facts.get('command', [])):
        raise UserError(f'--baseline: {path} is not of the same training without NetAug; it was trained with:'
                        f' {" ".join(baseline["command"])}')
    for key in ('processes', 'evaluated_with'):
        if baseline.get(key) != facts.get(key):
            raise UserError(f'--baseline: {path} is not of the same training without NetAug: {key} is'
                            f' {baseline.get(key)} there and {facts.get(key)} here.')
    if 'metrics' not in baseline:
        raise UserError(f'--baseline: {path} has no accuracy on record.')
    return baseline['metrics']


def _check_reload(model: nn.Module, folder: Path, input_size: Sequence[int]) -> None:
    """Refuse a folder that timm does not make the same model of, to the last bit."""
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
        if not torch.equal(model.eval()(images), logits):
            raise UserError('The exported model does not compute what the checkpoint does, nothing is pushed.'
                            ' That is a fault of this program: report it.')


def _measure(folder: Path, data_dir: str, facts: Dict[str, Any]) -> None:
    """Evaluate a folder, as `validate.py` does, into its facts.

    Raises:
        UserError: The accuracy is not the one on record.
    """
    parser = validate_parser()
    flags = facts.setdefault('evaluated_with', ['--split', parser.get_default('split')])
    flags = ['--data-dir', data_dir, '--model', f'local-dir:{folder}', '-j', str(min(os.cpu_count() or 1, 4)), *flags]
    args = parse_args(parser, flags)
    check_validate_args(parser, args)
    validate.set_up_device(args)
    row = validate.validate_one(args, parser, retry=True)
    for metric, recorded in facts.get('metrics', {}).items():
        if abs(row[metric] - recorded) > _TOLERANCE:
            raise UserError(f'The {metric} on {data_dir} is {row[metric]:.2f}, the checkpoint has {recorded:.2f} on'
                            f' record: name the data set that it was validated on. Nothing is pushed.')
    facts.update(metrics={k: row[k] for k in ('top1', 'top5')}, images=row['images'])


def _check_target(args: argparse.Namespace, architecture: str) -> Optional[str]:
    """Return the commit that the push goes on from, None where the repository is still to be created.

    Raises:
        UserError: The Hub can not be reached, or the repository is not one for this model.
    """
    repo_id, revision = args.repo, args.revision
    with hub_errors(repo_id, revision):
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except RepositoryNotFoundError:
            if revision not in (None, 'main'):
                raise UserError(f'There is no repository {repo_id} that you may see, and so no revision {revision} of'
                                f' it: push without --revision first.') from None
            return None
        if args.private and info.private is False:
            raise UserError(f'{repo_id} is there already and public: make it private in its settings, or leave'
                            f' --private out.')
        if any(file.rfilename == CONFIG for file in info.siblings or ()):
            try:
                config = json.loads(Path(hf_hub_download(repo_id, CONFIG, revision=info.sha)).read_text('utf-8'))
                there = config.get('architecture') or (config.get('pretrained_cfg') or {}).get('architecture')
            except (ValueError, AttributeError):
                there = None
            if there != architecture:
                raise UserError(f'{repo_id} holds another architecture, {there or "of no timm model"}, and this is'
                                f' {architecture}: take another name.')
        return info.sha


def _commit(args: argparse.Namespace, folder: Path, parent: Optional[str]) -> str:
    """Upload the folder's files as one commit, and return its address."""
    api = HfApi(library_name='timm_netaug')
    files = [CommitOperationAdd(file.name, str(file)) for file in sorted(folder.iterdir())]
    with hub_errors(args.repo, args.revision):
        if parent is None:
            api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        return api.create_commit(
            args.repo,
            files,
            commit_message='Model, config and card',
            revision=args.revision,
            parent_commit=parent,
        ).commit_url


def push(args: argparse.Namespace) -> None:
    """Push what the command line names, or write what would be pushed.

    Raises:
        UserError: It does not work, the message says why; nothing has been pushed.
    """
    if args.dry_run:
        _check_out_dir(args.dry_run)
    elif not get_token():
        raise UserError('You are not logged in: `hf auth login`, or set HF_TOKEN.')
    if args.repo.count('/') != 1:
        raise UserError(f'{args.repo} is not the name of a repository, which is OWNER/NAME.')
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, facts = _write_folder(args, folder)
        facts.update({k: v for k in ('dataset', 'dataset_terms') if (v := getattr(args, k))})
        if args.baseline:
            facts['baseline'] = _baseline(args.baseline, facts)
            if args.baseline_about:
                facts['baseline_about'] = args.baseline_about
        config = _write_config(folder, facts, args.license)
        parent = None if args.dry_run else _check_target(args, config['architecture'])
        _check_reload(model, folder, config['pretrained_cfg']['input_size'])
        _say('Reloaded with timm: the logits are bit-equal.')
        if args.data_dir:
            _measure(folder, args.data_dir, facts)
            _say('Evaluated: ' + ', '.join(f'{k} {v:.2f}' for k, v in facts['metrics'].items()) + '.')
            config = _write_config(folder, facts, args.license)
        repo = f'{args.repo}@{args.revision}' if args.revision not in (None, 'main') else args.repo
        (folder / _CARD).write_text(model_card(model, config, repo), encoding='utf-8')
        if args.dry_run:
            _move_files(folder, args.dry_run)
            _say(f'Written to {args.dry_run}, nothing pushed.')
            return
        _say(f'Pushing {", ".join(sorted(os.listdir(folder)))} to {args.repo}.')
        url = _commit(args, folder, parent)
    _say(f"Pushed: {url}\nLoad it with:\n\n    import timm, timm_netaug\n"
         f"    model = timm.create_model('hf-hub:{repo}', pretrained=True)")


def pull(args: argparse.Namespace) -> None:
    """Fetch a model that nobody vouches for, and write it when it has been found to be one.

    Raises:
        UserError: It can not be fetched, or is not fit for use.
    """
    _check_out_dir(args.out_dir)
    name = f'{args.repo}@{args.revision}' if args.revision else args.repo
    there = fetch(name, args.allow_pickle)
    model = load_folder(there, name, WEIGHTS if (there / WEIGHTS).exists() else PICKLE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({k: t.contiguous() for k, t in model.state_dict().items()}, folder / WEIGHTS)
        shutil.copyfile(there / CONFIG, folder / CONFIG)
        _move_files(folder, args.out_dir)
    _say(f"Pulled. Load it with:\n\n    import timm, timm_netaug\n"
         f"    model = timm.create_model('local-dir:{args.out_dir}', pretrained=True)")


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug.hub', description='Push a tiny model to the Hugging Face Hub, or pull one.')
    commands = parser.add_subparsers(required=True, metavar='push|pull')
    command = commands.add_parser('push', help='push weights, config and card as one commit')
    command.set_defaults(run=push)
    command.add_argument('checkpoint', help='checkpoint of train.py, exported folder, .pth of the authors, or ARCH.TAG'
                                            ' of shipped weights')
    command.add_argument('repo', metavar='OWNER/NAME', help='repository; it is created where there is none')
    command.add_argument('--private', action='store_true', help='create it as a private one')
    command.add_argument('--revision', metavar='R', help='branch to push to (main)')
    command.add_argument('--dry-run', metavar='OUT_DIR', help='write what would be pushed; needs no network')
    command.add_argument('--model', metavar='NAME', help='architecture of a file that does not say it')
    command.add_argument('--use-ema', action='store_true', help='the moving average (default where it was validated)')
    command.add_argument('--data-dir', metavar='DIR', help='evaluate, and push if the accuracy is the recorded one')
    command.add_argument('--baseline', metavar='CHECKPOINT', help='of the same training without NetAug, for the card')
    command.add_argument('--baseline-about', metavar='TEXT', help='how else it differs, for the card')
    command.add_argument('--license', metavar='ID', help='of the weights, as in apache-2.0')
    command.add_argument('--dataset-name', dest='dataset', metavar='NAME', help='data set of the training')
    command.add_argument('--dataset-terms', metavar='TEXT', help='its terms of use')
    command = commands.add_parser('pull', help='fetch a model, check it, and write it as a folder')
    command.set_defaults(run=pull)
    command.add_argument('repo', metavar='OWNER/NAME', help='repository')
    command.add_argument('out_dir', help='folder for model.safetensors and config.json')
    command.add_argument('--revision', metavar='R', help='branch, tag or commit (main)')
    command.add_argument('--allow-pickle', action='store_true',
                         help='take weights that are there as a pickle only; no code in it is run')
    args = parser.parse_args(argv)
    with told_plainly('timm_netaug.hub'):
        args.run(args)


if __name__ == '__main__':
    main()
