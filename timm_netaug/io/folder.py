"""Write, check and read the folders that `timm.create_model('local-dir:...', pretrained=True)` and the Hub take."""
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm import create_model
from timm.models import is_model, save_for_hf
from timm.models._hub import load_model_config_from_path

from ..errors import UserError, first_line
from .atomic import atomic_write
from .checkpoint import load_weights, read_weights
from .run import RunDescription

__all__ = ['CONFIG', 'WEIGHTS', 'MAX_CONFIG', 'check_config', 'check_numbers', 'copy_files', 'export_folder',
           'load_folder', 'sample_fields']

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
MAX_CONFIG = 8 << 20  # the names and descriptions of ImageNet-21K's classes have 2 MiB
_MAX_NUMBER = dict(num_classes=1_000_000)
_MAX_OTHER = 8192  # for widths, depths and image sizes


def copy_files(folder: Union[str, Path], out_dir: Union[str, Path]) -> None:
    """Copy the files of a folder and of its sub-folders into another folder, each by an atomic write."""
    os.makedirs(out_dir, exist_ok=True)
    for file in Path(folder).iterdir():
        if file.is_dir():
            copy_files(file, Path(out_dir, file.name))
            continue
        with file.open('rb') as f, atomic_write(Path(out_dir, file.name), 'wb') as copy:
            shutil.copyfileobj(f, copy)


def _pool_size(model: nn.Module, input_size: Sequence[int]) -> Optional[Tuple[int, ...]]:
    """Return the size of the last feature map, None if the model's stride does not yield the registered size."""
    cfg, feature_info = model.pretrained_cfg, getattr(model, 'feature_info', None)
    if not feature_info or not cfg.get('pool_size'):
        return None

    def divided(size: Sequence[int]) -> Tuple[int, ...]:
        return tuple(math.ceil(side / feature_info[-1]['reduction']) for side in size[1:])

    return divided(input_size) if divided(cfg['input_size']) == tuple(cfg['pool_size']) else None


def export_folder(
        model: nn.Module,
        out_dir: Union[str, Path],
        run: RunDescription,
        facts: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write the folder that `timm.create_model('local-dir:...', pretrained=True)` and the Hub take.

    Args:
        model: A stock timm model.
        out_dir: Folder for `model.safetensors` and `config.json`, which are written atomically.
        run: Description of the model's training.
        facts: Facts for the model card, which the config keeps.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(
            model,
            folder,
            model_config=dict(
                label_names=run.class_names,
                **(dict(input_img_mode=run.input_img_mode) if run.input_img_mode else {}),
                **(dict(target=run.target) if run.target != 'class' else {}),
                # timm's config describes timm's pretrained weights, so these fields would be wrong here.
                pretrained_cfg=dict(tag=None, license=None, origin_url=None, paper_ids=None),
                **(dict(timm_netaug=dict(facts)) if facts else {}),
            ),
            model_args=run.model_args,
            data_config=run.data_config,
            safe_serialization=True,
        )
        config_file = Path(folder, CONFIG)
        config = json.loads(config_file.read_text(encoding='utf-8'))
        cfg = config['pretrained_cfg']
        if not cfg.get('pool_size'):  # timm clears it where the input size is not the registered one
            cfg['pool_size'] = _pool_size(model, cfg['input_size'])
            config_file.write_text(json.dumps(config, indent=2), encoding='utf-8')
        copy_files(folder, out_dir)


def sample_fields(folder: Union[str, Path]) -> Dict[str, str]:
    """Return the fields of a folder's config that describe samples, `input_img_mode` and `target`, as far as it has."""
    config = json.loads(Path(folder, CONFIG).read_text(encoding='utf-8'))
    return {key: config[key] for key in ('input_img_mode', 'target') if key in config}


def check_numbers(value: Any, place: str) -> None:
    """Refuse absurdly large numbers, at any depth of nesting."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_numbers(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_numbers(inner, place)
    elif isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER.get(place, _MAX_OTHER):
        raise ValueError(f'{place} is {value:.6g}')


def check_config(folder: Path, source: str) -> nn.Module:
    """Check a folder's config, and build its model on the meta device, without memory for the weights.

    Args:
        source: Name of the folder in messages.

    Raises:
        UserError: The config is broken, of an unknown architecture, or of a model of absurd size.
    """
    try:
        if os.path.getsize(folder / CONFIG) > MAX_CONFIG:
            raise ValueError(f'it has more than {MAX_CONFIG >> 20} MiB')
        cfg, architecture, model_args = load_model_config_from_path(folder)
        if not isinstance(architecture, str) or not is_model(architecture):
            raise ValueError(f'there is no architecture {str(architecture)[:100]!r} in timm or timm_netaug')
        built_with = {k: v for k, v in cfg.items() if k.endswith(('input_size', 'pool_size', 'num_classes'))}
        check_numbers([built_with, model_args], 'a number')
        if not all(0.1 <= cfg.get(key, 1) <= 10 for key in ('crop_pct', 'test_crop_pct')):
            raise ValueError('its crop_pct is out of range')
        if any(key.startswith('pretrained') for key in model_args):
            raise ValueError('its model_args must not say how weights are loaded')
        if model_args.get('num_classes', cfg.get('num_classes')) != cfg.get('num_classes'):
            raise ValueError('it has two numbers of classes')
        with torch.device('meta'):
            model = create_model(f'local-dir:{folder}')
    except FileNotFoundError as e:
        raise UserError(f'{source} has no {CONFIG}: it is not an exported folder.') from e
    except Exception as e:  # json, timm and a model's constructor may raise anything
        raise UserError(
            f'{source} cannot be used, its {CONFIG} is not one of a timm model: {first_line(e)[:300]}.') from e
    return model


def load_folder(folder: Union[str, Path], source: str, weights: str = WEIGHTS) -> nn.Module:
    """Build the model of a folder and load its weights, which must be exactly the model's tensors.

    Args:
        source: Name of the folder in messages.
        weights: Name of the file of weights. Only tensors are read from a pickle.

    Raises:
        UserError: The config or the weights are broken, do not belong together, or are of absurd size.
    """
    check_config(Path(folder), source)
    state_dict = read_weights(str(Path(folder, weights)))
    model = create_model(f'local-dir:{folder}')
    load_weights(model, state_dict, source)
    return model.eval()
