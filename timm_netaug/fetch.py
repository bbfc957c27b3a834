"""Models of Hub repositories that nobody vouches for: fetched, checked before they are built, and never executed."""
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional, Union

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm import create_model
from timm.models import is_model, parse_model_name
from timm.models._hub import load_model_config_from_path

from .checkpoint import load_weights, read_weights
from .errors import UserError, first_line
from .reference import checkpoint_filter_fn

__all__ = ['CONFIG', 'WEIGHTS', 'PICKLE', 'check_config', 'fetch', 'hub_errors', 'load_folder', 'local_name']

CONFIG, WEIGHTS, PICKLE = 'config.json', 'model.safetensors', 'pytorch_model.bin'
_MAX_CONFIG = 8 << 20  # the names and descriptions of ImageNet-21K's classes have 2 MiB
_MAX_NUMBER = dict(num_classes=1_000_000)
_MAX_OTHER = 8192  # of widths, depths and pixels


def _sentence(error: BaseException, repo_id: str, revision: Optional[str]) -> Optional[str]:
    """Tell what the Hub, or the way to it, is wrong with; None for errors of another kind."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return f'{repo_id} is not the name of a repository, which is OWNER/NAME'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set, and this needs the Hub: unset it'
    if isinstance(error, GatedRepoError):
        return f'{repo_id} asks for an agreement first: give it on the page of the repository, and log in'
    if isinstance(error, RepositoryNotFoundError):
        return (f'There is no repository {repo_id} that you may see: check the name or, if it is private, log in with'
                f' `hf auth login` or HF_TOKEN')
    if isinstance(error, RevisionNotFoundError):
        return f'{repo_id} has no revision {revision or "main"}: name a branch that there is with --revision'
    if isinstance(error, LocalEntryNotFoundError):
        return f'{repo_id} can not be reached, and is not in the cache: try again with a connection to the Hub'
    if isinstance(error, EntryNotFoundError):
        return f'{repo_id} holds no model, a file is missing: {first_line(error.__cause__ or error)}'
    if status == 401:
        return 'The Hub does not accept your token: log in again with `hf auth login`, or set another HF_TOKEN'
    if status == 403:
        return f'You have no permission for {repo_id}: take a name of your own, or a token that may write'
    if status == 412:
        return f'{repo_id} has been changed by somebody else in the meantime: try again'
    if status is not None:
        return f'The Hub answers with status {status}: try again later'
    if isinstance(error, (HTTPError, ConnectionError)):
        return f'The connection to the Hub fails ({first_line(error)}): try again'
    # The client wraps what goes wrong with one file of several.
    return _sentence(error.__cause__, repo_id, revision) if error.__cause__ else None


@contextmanager
def hub_errors(repo_id: str, revision: Optional[str] = None) -> Iterator[None]:
    """Turn errors of the Hub and of the network into a sentence.

    Raises:
        UserError: One has happened.
    """
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError, EntryNotFoundError) as e:
        said = _sentence(e, repo_id, revision)
        if said is None:
            raise
        raise UserError(f'{said}.') from e


def _check_numbers(value: Any, place: str) -> None:
    """Refuse numbers that no model is built with, however deep they are nested."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_numbers(inner, place)
    elif isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER.get(place, _MAX_OTHER):
        raise ValueError(f'{place} is {value:.6g}')


def check_config(folder: Path, source: str) -> nn.Module:
    """Build, without memory for its weights, the model that a folder's config describes.

    Args:
        source: Name of the folder in messages.

    Raises:
        UserError: The config is broken, of an unknown architecture, or of a model of absurd size.
    """
    try:
        if os.path.getsize(folder / CONFIG) > _MAX_CONFIG:
            raise ValueError(f'it has more than {_MAX_CONFIG >> 20} MiB')
        cfg, architecture, model_args = load_model_config_from_path(folder)
        if not isinstance(architecture, str) or not is_model(architecture):
            raise ValueError(f'there is no architecture {str(architecture)[:100]!r} in timm or timm_netaug')
        built_with = {k: v for k, v in cfg.items() if k.endswith(('input_size', 'pool_size', 'num_classes'))}
        _check_numbers([built_with, model_args], 'a number')
        if not all(0.1 <= cfg.get(key, 1) <= 10 for key in ('crop_pct', 'test_crop_pct')):
            raise ValueError('its crop_pct is out of range')
        if any(key.startswith('pretrained') for key in model_args):
            raise ValueError('its model_args say how weights are loaded, which they may not')
        if model_args.get('num_classes', cfg.get('num_classes')) != cfg.get('num_classes'):
            raise ValueError('it has two numbers of classes')
        with torch.device('meta'):
            model = create_model(f'local-dir:{folder}')
    except FileNotFoundError as e:
        raise UserError(f'{source} has no {CONFIG}: it is not a folder of the export.') from e
    except Exception as e:  # whatever json, timm or a model's constructor find wrong
        raise UserError(
            f'{source} can not be used, its {CONFIG} is not one of a timm model: {first_line(e)[:300]}.') from e
    return model


def load_folder(folder: Union[str, Path], source: str, weights: str = WEIGHTS) -> nn.Module:
    """Build the model of a folder and load its weights, which must be all of the model's and no others.

    Args:
        source: Name of the folder in messages.
        weights: File of the weights; of a pickle, nothing but tensors is read.

    Raises:
        UserError: The folder is not of one model, or of one of absurd size.
    """
    check_config(Path(folder), source)
    state_dict = read_weights(str(Path(folder, weights)))
    model = create_model(f'local-dir:{folder}')
    try:
        state_dict = checkpoint_filter_fn(state_dict, model)
    except ValueError as e:
        raise UserError(f'{source}: {e}') from e
    load_weights(model, state_dict, source)
    return model.eval()


def fetch(name: str, allow_pickle: bool = False, weights: bool = True) -> Path:
    """Fetch a model into the client's cache, weights last: their size has to be that of the model.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION.
        allow_pickle: Take weights that are there as a pickle only.
        weights: Fetch the weights too.

    Returns:
        The folder, which `timm.create_model('local-dir:...')` takes.

    Raises:
        UserError: It can not be fetched, or is not fit to be built.
    """
    repo_id, _, revision = name.partition('@')
    revision = revision or None
    with hub_errors(repo_id, revision):
        size = hf_hub_download(repo_id, CONFIG, revision=revision, dry_run=True).file_size
        if size > _MAX_CONFIG:
            raise UserError(f'{name} can not be used, its {CONFIG} has {size:,} bytes.')
        folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision)).parent
        model = check_config(folder, name)
        if not weights:
            return folder
        commit = folder.name  # what has been checked, whatever the revision points to by now
        try:
            file, size = WEIGHTS, hf_hub_download(repo_id, WEIGHTS, revision=commit, dry_run=True).file_size
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as e:
            try:
                file, size = PICKLE, hf_hub_download(repo_id, PICKLE, revision=commit, dry_run=True).file_size
            except EntryNotFoundError:
                raise UserError(f'{name} holds no weights, there is no {WEIGHTS}.') from e
            if not allow_pickle:
                raise UserError(
                    f'{name} holds its weights as a pickle only ({PICKLE}), a format that can carry code: if you trust'
                    f' it, fetch its tensors with `python -m timm_netaug.hub pull {name} OUT_DIR --allow-pickle`.'
                ) from e
        needed = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        if not needed / 8 <= size <= 4 * needed + (1 << 20):
            raise UserError(f'{name} can not be used, its weights have {size:,} bytes, and the model that its {CONFIG}'
                            f' describes needs {needed:,}.')
        hf_hub_download(repo_id, file, revision=commit)
    return folder


def local_name(name: str, weights: bool = True) -> str:
    """Return a model's name as it is, or of one of the Hub's, the name of the folder that it has been fetched to.

    Raises:
        UserError: See `fetch`.
    """
    try:
        source, model_id = parse_model_name(name)
    except ValueError as e:
        raise UserError(f'{name} can not be built: {first_line(e)}.') from e
    return f'local-dir:{fetch(model_id, weights=weights)}' if source == 'hf-hub' else name
