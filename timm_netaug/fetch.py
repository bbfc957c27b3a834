"""Download models from untrusted Hub repositories. They are checked before they are built; no code of them is run."""
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional

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
from timm.models import parse_model_name

from .errors import UserError, first_line, rewording
from .io.folder import CONFIG, MAX_CONFIG, WEIGHTS, check_config

__all__ = ['PICKLE', 'check_size', 'fetch', 'fetch_config', 'hub_errors', 'local_name']

PICKLE = 'pytorch_model.bin'  # the older name of a file of weights


def _sentence(error: BaseException, repo_id: str, revision: Optional[str]) -> Optional[str]:
    """Return a sentence about an error of the Hub or of the connection to it, None for other errors."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return f'{repo_id} is not the name of a repository: names have the form OWNER/NAME'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set, but this command needs the Hub: unset it'
    if isinstance(error, GatedRepoError):
        return f'{repo_id} is a gated repository: accept its terms on its page, and log in'
    if isinstance(error, RepositoryNotFoundError):
        return (f'There is no repository {repo_id} that you may see: check the name or, if it is private, log in with'
                f' `hf auth login` or HF_TOKEN')
    if isinstance(error, RevisionNotFoundError):
        return f'{repo_id} has no revision {revision or "main"}: name an existing branch with --revision'
    if isinstance(error, LocalEntryNotFoundError):
        return (f'{repo_id} cannot be reached, and is not in the cache: try again with a connection to the Hub, and'
                f' without HF_HUB_OFFLINE')
    if isinstance(error, EntryNotFoundError):
        return f'{repo_id} holds no model, a file is missing: {first_line(error.__cause__ or error)}'
    if status == 401:
        return 'The Hub does not accept your token: log in again with `hf auth login`, or set another HF_TOKEN'
    if status == 403:
        return f'You have no permission for {repo_id}: use a repository of your own, or a token with write access'
    if status == 412:
        return f'{repo_id} has been changed by somebody else in the meantime: try again'
    if status is not None:
        return f'The Hub answers with status {status}: try again later'
    if isinstance(error, (HTTPError, ConnectionError)):
        return f'The connection to the Hub fails ({first_line(error)}): try again'
    # If one file of several fails, the client wraps its error.
    return _sentence(error.__cause__, repo_id, revision) if error.__cause__ else None


@contextmanager
def hub_errors(repo_id: str, revision: Optional[str] = None) -> Iterator[None]:
    """Turn errors of the Hub and of the network into a sentence.

    Raises:
        UserError: Such an error was raised.
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


def fetch_config(repo_id: str, revision: Optional[str], name: str) -> Path:
    """Download the config of a repository if it is not too large; returns its folder, whose name is the commit.

    Args:
        name: Name of the repository in messages.

    Raises:
        UserError: The config is too large.
    """
    size = hf_hub_download(repo_id, CONFIG, revision=revision, dry_run=True).file_size
    if size > MAX_CONFIG:
        raise UserError(f'{name} cannot be used, its {CONFIG} has {size:,} bytes.')
    return Path(hf_hub_download(repo_id, CONFIG, revision=revision)).parent


def check_size(module: nn.Module, size: int, name: str, kind: str = 'model') -> None:
    """Refuse a file of weights that is much smaller or larger than the weights of a module.

    Args:
        module: May be on the meta device.
        size: Bytes of the file.
        name: Name of the repository or folder in messages.
        kind: What messages call the module.

    Raises:
        UserError: The sizes do not fit.
    """
    needed = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if not needed / 8 <= size <= 4 * needed + (1 << 20):
        raise UserError(f'{name} cannot be used, its weights have {size:,} bytes, and the {kind} that its {CONFIG}'
                        f' describes needs {needed:,}.')


def fetch(name: str, allow_pickle: bool = False, weights: bool = True) -> Path:
    """Download a model into the Hub client's cache. The weights come last, if their size fits the model.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION.
        allow_pickle: Accept weights that exist only as a pickle.
        weights: Download the weights, too.

    Returns:
        The folder, which `timm.create_model('local-dir:...')` takes.

    Raises:
        UserError: The model cannot be downloaded, or does not pass the checks.
    """
    repo_id, _, revision = name.partition('@')
    revision = revision or None
    with hub_errors(repo_id, revision):
        folder = fetch_config(repo_id, revision, name)
        model = check_config(folder, name)
        if not weights:
            return folder
        commit = folder.name  # the revision may point to another commit by now, whose config has not been checked
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
                    f' it, fetch its tensors with `python -m timm_netaug hub pull {name} OUT_DIR --allow-pickle`.'
                ) from e
        check_size(model, size, name)
        hf_hub_download(repo_id, file, revision=commit)
    return folder


def local_name(name: str, weights: bool = True) -> str:
    """Download a model of the Hub and return its folder as `local-dir:FOLDER`. Return other names unchanged.

    Raises:
        UserError: See `fetch`.
    """
    with rewording(f'{name} cannot be built', ValueError):
        source, model_id = parse_model_name(name)
    return f'local-dir:{fetch(model_id, weights=weights)}' if source == 'hf-hub' else name
