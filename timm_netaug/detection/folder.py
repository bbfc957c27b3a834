"""Trained detectors: out of checkpoints, and as folders that are exported, pushed to the Hub, and loaded again.

A folder has the weights of the dense part (`model.safetensors`), `config.json` with the fields of `DetectorConfig` and
what is known of the training, and `backbone/`, a folder of the backbone alone that timm takes as `local-dir:`.
"""
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from timm import create_model
from timm.models import is_model, parse_model_name

from ..errors import UserError, first_line, rewording
from ..fetch import check_size, fetch_config, hub_errors
from ..io.atomic import atomic_write
from ..io.checkpoint import load_weights, read_checkpoint, read_weights, run_weights
from ..io.folder import CONFIG, MAX_CONFIG, WEIGHTS, check_numbers, export_folder
from ..io.run import RunDescription
from ..load import read_run
from .detector import DenseDetector, Detector, DetectorConfig, build_detector, create_backbone, name_in_model

__all__ = ['BACKBONE', 'architecture_of', 'detector_run', 'export_detector', 'find_detector_folder', 'load_checkpoint',
           'load_dense_weights', 'load_detector_folder', 'load_trained', 'read_config', 'read_detector_run']

BACKBONE = 'backbone'
_KIND = 'timm_netaug.detection'  # of a `config.json`
_MAX_NUMBER = 8192  # of classes, channels and pixels


def detector_run(config: DetectorConfig, **fields: Any) -> RunDescription:
    """Describe the run of a detector. `fields` are further ones of `RunDescription`."""
    args = dict(config.backbone_args, num_classes=config.num_classes, channels=config.channels)
    names = list(config.class_names) if config.class_names else None
    return RunDescription(config.backbone, args, config.data_config, names, detector=config.to_dict(), **fields)


def read_detector_run(path: str) -> Tuple[Dict[str, Any], RunDescription]:
    """Read a checkpoint of `train_detection.py`, and what it says of its run.

    Raises:
        UserError: It is another kind of file.
    """
    checkpoint = read_checkpoint(path)
    run = RunDescription.from_checkpoint(checkpoint)
    if run is None or run.detector is None:
        kind = 'a file of weights' if run is None else 'a checkpoint of train.py, which is of a classifier'
        raise UserError(f'{path} is not a checkpoint of train_detection.py, it is {kind}.')
    return checkpoint, run


def load_checkpoint(path: str, use_ema: Optional[bool] = None) -> Tuple[Detector, RunDescription]:
    """Build the detector of a checkpoint of `train_detection.py`.

    Args:
        use_ema: Take the moving average of the weights; None: where the run's metric is that of the average.

    Raises:
        UserError: It is another kind of file, or broken.
    """
    checkpoint, run = read_detector_run(path)
    weights = run_weights(checkpoint, run, use_ema, path)
    detector = build_detector(DetectorConfig.from_dict(run.detector))
    load_weights(detector.dense, weights, path)
    return detector.eval(), run


def load_dense_weights(model: DenseDetector, path: str) -> None:
    """Start from the weights of a trained detector; the predictions of classes stay new where their number differs.

    Raises:
        UserError: The file is not of a detector like this one.
    """
    weights = read_weights(path)
    new = {k: t for k, t in model.state_dict().items() if k.startswith('classes.')}
    if any(k in weights and weights[k].shape != t.shape for k, t in new.items()):
        weights.update({k: t for k, t in new.items() if k in weights and weights[k].shape != t.shape})
    load_weights(model, weights, path)


def _backbone_run(config: DetectorConfig) -> RunDescription:
    return RunDescription(config.backbone, {**config.backbone_args, 'num_classes': 0}, config.data_config)


def export_detector(
        detector: Detector,
        out_dir: Union[str, Path],
        facts: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write the folder of a detector.

    Args:
        out_dir: Gets `model.safetensors`, `config.json` and `backbone/`.
        facts: What is known of its training: 'command', 'metrics' (AP in percent), and so on.

    Raises:
        UserError: The backbone has tensors that timm's model of this name does not have.
    """
    config, out_dir = detector.config, Path(out_dir)
    state = {k: t.detach().cpu().contiguous() for k, t in detector.dense.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # layers behind the last feature are new, the same ones each time
            whole = create_model(config.backbone, **{**config.backbone_args, 'num_classes': 0})
        names = whole.state_dict()
        own = {k: name_in_model(k, names) for k in detector.dense.backbone.state_dict()}
        unknown = [k for k, name in own.items() if name is None]
        if unknown:
            raise UserError(f'The backbone {config.backbone} cannot be exported as a model of its own:'
                            f' {len(unknown)} of its tensors are not in timm\'s model ({", ".join(unknown[:2])}).')
        whole.load_state_dict({name: state[f'backbone.{k}'] for k, name in own.items()}, strict=False)
        export_folder(whole, folder, _backbone_run(config))
        os.makedirs(out_dir / BACKBONE, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            _copy(Path(folder, name), out_dir / BACKBONE / name)
        save_file(state, Path(folder, 'detector'))
        _copy(Path(folder, 'detector'), out_dir / WEIGHTS)
    fields = dict(kind=_KIND, architecture=architecture_of(config), **config.to_dict())
    with atomic_write(out_dir / CONFIG) as f:
        json.dump({**fields, **(dict(timm_netaug=dict(facts)) if facts else {})}, f, indent=2)
        f.write('\n')


def architecture_of(config: DetectorConfig) -> str:
    """Return what the config of a detector calls itself: no name of timm's, which cannot build it."""
    return f'detector:{config.backbone}'


def _copy(file: Path, out: Path) -> None:
    with file.open('rb') as f, atomic_write(out, 'wb') as copy:
        shutil.copyfileobj(f, copy)


def read_config(folder: Path, source: str) -> Tuple[DetectorConfig, Dict[str, Any]]:
    """Read the config of a detector's folder, and all that its `config.json` has.

    Raises:
        UserError: It is broken, or of a detector of absurd size.
    """
    try:
        if os.path.getsize(folder / CONFIG) > MAX_CONFIG:
            raise ValueError(f'it has more than {MAX_CONFIG >> 20} MiB')
        fields = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        config = DetectorConfig.from_dict(fields)
        if not isinstance(config.backbone, str) or not is_model(config.backbone):
            raise ValueError(f'there is no architecture {str(config.backbone)[:100]!r} in timm or timm_netaug')
        if max(config.num_classes, config.channels, *config.img_size) > _MAX_NUMBER or not 0 < config.scale < 100:
            raise ValueError('it has numbers that no detector is built with')
        if not isinstance(config.backbone_args, dict):
            raise ValueError('its backbone_args are not a dictionary')
        check_numbers(config.backbone_args, 'a number')
        if any(k.startswith('pretrained') or k in ('checkpoint_path', 'features_cls') for k in config.backbone_args):
            raise ValueError('its backbone_args say how weights are loaded, which they may not')
        fixed = sorted({'name', 'model_name', 'features_only', 'out_indices'} & set(config.backbone_args))
        if fixed:
            raise ValueError(f'its backbone_args have {", ".join(fixed)}, which a detector sets itself')
        for name in ('mean', 'std'):
            if not all(type(v) in (int, float) and math.isfinite(v) for v in getattr(config, name)):
                raise ValueError(f'its {name} has values that are not finite numbers')
        if not all(config.std):
            raise ValueError('its std has a zero')
        names = fields.get('class_names')
        if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise ValueError('its class_names are not a list of strings')
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as e:
        told = first_line(e)[:300]
        raise UserError(f'{source} cannot be used, its {CONFIG} is not one of a detector: {told}.') from e
    return config, fields


def _check_size(config: DetectorConfig, size: int, source: str) -> None:
    """Compare the size of a file of weights with the detector of a config, which is built without memory for weights.

    Args:
        size: Bytes of the file.

    Raises:
        UserError: The detector cannot be built, or needs weights of another size.
    """
    # A backbone of another kind may have features of any shape.
    with rewording(f'{source} cannot be used, its detector cannot be built'), torch.device('meta'):
        dense = DenseDetector(create_backbone(config.backbone, **config.backbone_args), config)
    check_size(dense, size, source, 'detector')


def _is_detector(folder: Path) -> bool:
    try:
        if os.path.getsize(folder / CONFIG) > MAX_CONFIG:
            return False
        return json.loads((folder / CONFIG).read_text(encoding='utf-8')).get('kind') == _KIND
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def find_detector_folder(name: str, weights: bool = True) -> Optional[Path]:
    """Return the folder of a trained detector that a name means: a path, `local-dir:DIR` or `hf-hub:OWNER/NAME`, which
    is fetched. None for the names of other things.

    Args:
        weights: Fetch the weights, too.

    Raises:
        UserError: A repository cannot be fetched, its config is broken, or its weights have another size than the
            detector of the config needs.
    """
    prefix, _, rest = name.partition(':')
    if prefix == 'local-dir' or os.path.isdir(name):
        folder = Path(rest if prefix == 'local-dir' else name)
        return folder if _is_detector(folder) else None
    if prefix not in ('hf-hub', 'hf_hub'):
        return None
    repo_id, _, revision = parse_model_name(name)[1].partition('@')
    revision = revision or None
    with hub_errors(repo_id, revision):
        folder = fetch_config(repo_id, revision, name)
        if not _is_detector(folder):
            return None
        config, _ = read_config(folder, name)
        if weights:
            try:
                size = hf_hub_download(repo_id, WEIGHTS, revision=folder.name, dry_run=True).file_size
            except LocalEntryNotFoundError:  # of a connection that fails, not of the repository
                raise
            except EntryNotFoundError as e:
                raise UserError(f'{name} holds no weights, there is no {WEIGHTS}.') from e
            _check_size(config, size, name)
            hf_hub_download(repo_id, WEIGHTS, revision=folder.name)
    return folder


def load_detector_folder(folder: Union[str, Path], source: Optional[str] = None) -> Detector:
    """Build the detector of a folder with its weights, which must be all of the detector's and no others.

    Args:
        source: Name of the folder in messages.

    Raises:
        UserError: The folder is broken, or not of a detector.
    """
    source = source or str(folder)
    config, _ = read_config(Path(folder), source)
    if os.path.isfile(Path(folder, WEIGHTS)):  # where there is no such file, reading it says so
        _check_size(config, os.path.getsize(Path(folder, WEIGHTS)), source)
    weights = read_weights(str(Path(folder, WEIGHTS)))
    detector = build_detector(config)
    load_weights(detector.dense, weights, source)
    return detector.eval()


def load_trained(source: str, use_ema: Optional[bool] = None) -> Tuple[Optional[Detector], Optional[RunDescription]]:
    """Build the trained detector that a user names, with the run of a checkpoint; None, None for other things.

    Args:
        source: A checkpoint of `train_detection.py`, the folder of a detector, `local-dir:DIR` or `hf-hub:OWNER/NAME`.
        use_ema: See `load_checkpoint`.

    Raises:
        UserError: The detector is broken, cannot be fetched, or a folder is to have a moving average.
    """
    if os.path.isdir(source) or source.partition(':')[0] in ('local-dir', 'hf-hub', 'hf_hub'):
        folder = find_detector_folder(source)
        if folder is not None and use_ema:
            raise UserError(f'{source} is the folder of a detector, which holds one set of weights: leave --use-ema'
                            f' out.')
        return (None if folder is None else load_detector_folder(folder, source)), None
    run = read_run(source) if os.path.isfile(source) else None
    return load_checkpoint(source, use_ema) if run is not None and run.detector else (None, None)
