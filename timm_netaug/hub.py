"""Push models to the Hugging Face Hub, and pull them: the code behind `python -m timm_netaug hub push|pull`."""
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from .card import METRICS, model_card
from .errors import UserError
from .evaluate import evaluate_model
from .fetch import PICKLE, fetch, hub_errors
from .io.data import DataSource
from .io.folder import CONFIG, WEIGHTS, copy_files, export_folder, load_folder
from .load import LoadedModel, load_model

__all__ = ['CARD', 'TOLERANCE', 'check_destination', 'check_out_dir', 'check_target', 'commit', 'pull', 'push']

CARD = 'README.md'
TFLITE = 'model.tflite'  # the int8 file that `push --deployed` adds
TOLERANCE = 0.1  # percentage points, because kernels may sum in another order


def _say(text: str) -> None:
    print(text, flush=True)


def check_out_dir(out_dir: str, *own: str) -> None:
    """Refuse a folder that holds files of something else.

    Args:
        own: Names that may be there besides weights, config and card.

    Raises:
        UserError: There is another file; the message names it.
    """
    known = {WEIGHTS, CONFIG, CARD, *own}
    others = set(os.listdir(out_dir)) - known if os.path.isdir(out_dir) else ()
    if others:
        raise UserError(f'{out_dir} holds other files ({min(others)}): name an empty folder or a new one.')


def check_destination(repo: str, dry_run: Optional[str], *own: str) -> None:
    """Refuse, before anything else is done, a push that cannot end well. See `push` and `check_out_dir`.

    Raises:
        UserError: The folder holds other files, nobody is logged in, or the repository's name has another form.
    """
    if dry_run:
        check_out_dir(dry_run, *own)
    elif not get_token():
        raise UserError('You are not logged in: run `hf auth login`, or set HF_TOKEN.')
    if repo.count('/') != 1:
        raise UserError(f'{repo} is not the name of a repository: names have the form OWNER/NAME.')


def _write_config(folder: Path, facts: Mapping[str, Any], license: Optional[str]) -> Dict[str, Any]:
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    if facts:
        config['timm_netaug'] = facts
    if license:
        config['pretrained_cfg']['license'] = license
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding='utf-8')
    return config


def _check_reload(model: nn.Module, reloaded: nn.Module, input_size: Sequence[int]) -> None:
    """Check that the model that timm loaded from the folder has the same logits to the last bit."""
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(images)
        if not logits.isfinite().all():
            raise UserError('The logits of the model are not finite numbers, so nothing is pushed: use an earlier'
                            ' checkpoint.')
        if not torch.equal(logits, reloaded(images)):
            raise UserError('The exported model and the checkpoint have different logits, so nothing is pushed.'
                            ' This is a bug of timm_netaug: please report it.')


def _measure(loaded: LoadedModel, data_dir: str, facts: Dict[str, Any]) -> None:
    """Evaluate a model as `validate.py` does, and write the metrics into its facts.

    Raises:
        UserError: The accuracy differs from the recorded one.
    """
    flags = facts.setdefault('evaluated_with', ['--split', 'validation'])
    fields = dict(zip((flag[2:].replace('-', '_') for flag in flags[::2]), flags[1::2]))
    target = fields.pop('target_format', 'indices') if fields.pop('task', '') == 'multilabel' else 'class'
    unknown = set(fields) - {'split', 'dataset', 'input_img_mode', 'input_key', 'target_key'}
    if unknown or len(flags) % 2:
        raise UserError(f'The config says that the model was evaluated with {" ".join(flags)}, which names no split'
                        f' of a data set: push without --data-dir.')
    split = fields.pop('split', 'validation')
    metrics = evaluate_model(
        loaded.model,
        DataSource(data_dir, **fields),
        split,
        loaded.data_config,
        loaded.model.num_classes,
        loaded.class_names,
        target=target,
        retry=True,
        device='cuda' if torch.cuda.is_available() else 'cpu',
        num_workers=min(os.cpu_count() or 1, 4),
    )
    for metric, recorded in facts.get('metrics', {}).items():
        if abs(metrics[metric] - recorded) > TOLERANCE:
            raise UserError(f'The {metric} on {data_dir} is {metrics[metric]:.2f}, but the checkpoint has'
                            f' {recorded:.2f} on record: name the data set that it was validated on. Nothing is'
                            f' pushed.')
    facts.update(metrics={k: round(metrics[k], 4) for k in METRICS if k in metrics}, images=metrics['images'])


def check_target(repo_id: str, revision: Optional[str], private: bool, architecture: str) -> Optional[str]:
    """Return the parent commit of the push, None if the repository has yet to be created.

    Raises:
        UserError: The Hub cannot be reached, or the repository is not one for this model.
    """
    with hub_errors(repo_id, revision):
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except RepositoryNotFoundError:
            if revision not in (None, 'main'):
                raise UserError(f'There is no repository {repo_id} that you may see, and so no revision {revision} of'
                                f' it: push without --revision first.') from None
            return None
        if private and info.private is False:
            raise UserError(f'{repo_id} exists already and is public: make it private in its settings, or leave'
                            f' --private out.')
        if any(file.rfilename == CONFIG for file in info.siblings or ()):
            try:
                config = json.loads(Path(hf_hub_download(repo_id, CONFIG, revision=info.sha)).read_text('utf-8'))
                there = config.get('architecture') or (config.get('pretrained_cfg') or {}).get('architecture')
            except (ValueError, AttributeError):
                there = None
            if there != architecture:
                raise UserError(f'{repo_id} holds another architecture ({there or "no timm model"}) than'
                                f' {architecture}: choose another name.')
        return info.sha


def commit(folder: Path, repo: str, revision: Optional[str], private: bool, parent: Optional[str]) -> str:
    """Upload the folder's files as one commit, and return its address.

    The commit deletes the int8 file of an earlier push where the folder has none: that file has other weights.
    """
    api = HfApi(library_name='timm_netaug')
    files = [CommitOperationAdd(file.relative_to(folder).as_posix(), str(file))
             for file in sorted(folder.rglob('*')) if file.is_file()]
    with hub_errors(repo, revision):
        if parent is None:
            api.create_repo(repo, private=private or None, exist_ok=True)
        elif not (folder / TFLITE).exists() and api.file_exists(repo, TFLITE, revision=parent):
            files.append(CommitOperationDelete(TFLITE))
        return api.create_commit(
            repo,
            files,
            commit_message='Model, config and card',
            revision=revision,
            parent_commit=parent,
        ).commit_url


def write_dry_run(folder: Path, out_dir: str) -> None:
    """Write what would be pushed."""
    copy_files(folder, out_dir)
    if not (folder / TFLITE).exists():
        Path(out_dir, TFLITE).unlink(missing_ok=True)  # of an earlier dry run, with other weights
    _say(f'Written to {out_dir}. Nothing was pushed.')


def push(
        loaded: LoadedModel,
        repo: str,
        facts: Mapping[str, Any],
        *,
        revision: Optional[str] = None,
        private: bool = False,
        dry_run: Optional[str] = None,
        data_dir: Optional[str] = None,
        license: Optional[str] = None,
        files: Sequence[Path] = (),
) -> None:
    """Push a model with its config and card as one commit, or write what would be pushed.

    Args:
        repo: OWNER/NAME. It is created if it does not exist.
        facts: Known facts about the model's training, for the card.
        revision: Branch to push to.
        private: Create the repository as a private one.
        dry_run: Folder to write the files to, instead of pushing them.
        data_dir: Data set to evaluate the model on. The accuracy must equal the recorded one in the facts.
        license: License of the weights, for example apache-2.0.
        files: Further files to push.

    Raises:
        UserError: A check or the upload failed. Nothing has been pushed.
    """
    check_destination(repo, dry_run, TFLITE)
    facts = dict(facts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if loaded.folder is None:
            export_folder(loaded.model, folder, loaded.describe())
        else:
            for name in (WEIGHTS, CONFIG):
                shutil.copyfile(loaded.folder / name, folder / name)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        config = _write_config(folder, facts, license)
        parent = None if dry_run else check_target(repo, revision, private, config['architecture'])
        reloaded = load_model(f'local-dir:{folder}', use_test_size=True)
        _check_reload(loaded.model, reloaded.model, config['pretrained_cfg']['input_size'])
        _say('Reloaded with timm: the logits are bit-equal.')
        if data_dir:
            _measure(reloaded, data_dir, facts)
            _say('Evaluated: ' + ', '.join(f'{k} {v:.2f}' for k, v in facts['metrics'].items()) + '.')
            config = _write_config(folder, facts, license)
        name = f'{repo}@{revision}' if revision not in (None, 'main') else repo
        (folder / CARD).write_text(model_card(loaded.model, config, name), encoding='utf-8')
        if dry_run:
            write_dry_run(folder, dry_run)
            return
        _say(f'Pushing {", ".join(sorted(os.listdir(folder)))} to {repo}.')
        url = commit(folder, repo, revision, private, parent)
    _say(f"Pushed: {url}\nLoad it with:\n\n    import timm, timm_netaug\n"
         f"    model = timm.create_model('hf-hub:{name}', pretrained=True)")


def pull(repo: str, out_dir: str, revision: Optional[str] = None, allow_pickle: bool = False) -> None:
    """Download an untrusted model, check it, and write it as a folder.

    Args:
        repo: OWNER/NAME.
        out_dir: Folder for `model.safetensors` and `config.json`.
        revision: Branch, tag or commit.
        allow_pickle: Accept weights that exist only as a pickle.

    Raises:
        UserError: The model cannot be downloaded, or does not pass the checks.
    """
    check_out_dir(out_dir, TFLITE)
    name = f'{repo}@{revision}' if revision else repo
    there = fetch(name, allow_pickle)
    model = load_folder(there, name, WEIGHTS if (there / WEIGHTS).exists() else PICKLE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({k: t.contiguous() for k, t in model.state_dict().items()}, folder / WEIGHTS)
        shutil.copyfile(there / CONFIG, folder / CONFIG)
        copy_files(folder, out_dir)
    _say(f"Pulled. Load it with:\n\n    import timm, timm_netaug\n"
         f"    model = timm.create_model('local-dir:{out_dir}', pretrained=True)")


if __name__ == '__main__':
    from .__main__ import run_old_form
    run_old_form('hub')
