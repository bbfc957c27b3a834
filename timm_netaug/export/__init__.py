"""From a super-network or a checkpoint back to a stock timm model, in memory or as a folder."""
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

import torch.nn as nn
from timm.models import save_for_hf

from ..supernet import SuperNet, slice_stock

__all__ = ['export', 'export_folder']


def export(supernet: SuperNet, widths: Optional[Mapping[str, int]] = None) -> nn.Module:
    """Copy the tiny model, or any sub-network, out of a super-network.

    Args:
        supernet: Made by `augment`. It is left as it is.
        widths: Of the sub-network, as `sampled` yields them; None for the tiny model.

    Returns:
        A stock timm model with the super-network's memory format, dtype, device and training mode.

    Raises:
        ValueError: It is no super-network, or the widths are not of it.
    """
    return slice_stock(supernet, widths)


def _pool_size(model: nn.Module, input_size: Sequence[int]) -> Optional[Tuple[int, ...]]:
    """Return the size of the last feature map, None where the stride does not explain the registered size either."""
    cfg, feature_info = model.pretrained_cfg, getattr(model, 'feature_info', None)
    if not feature_info or not cfg.get('pool_size'):
        return None

    def divided(size: Sequence[int]) -> Tuple[int, ...]:
        return tuple(math.ceil(side / feature_info[-1]['reduction']) for side in size[1:])

    return divided(input_size) if divided(cfg['input_size']) == tuple(cfg['pool_size']) else None


def export_folder(
        model: nn.Module,
        out_dir: Union[str, Path],
        run: Mapping[str, Any],
        facts: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write the folder that `timm.create_model('local-dir:...', pretrained=True)` and the Hub take.

    Args:
        model: A stock timm model.
        out_dir: Gets `model.safetensors` and `config.json`; each is written aside and then renamed.
        run: Description of the model's training (see `checkpoint.describe_run`).
        facts: What the config keeps for the model's card (see `card.facts_of_run`).
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix='.export-') as aside:
        save_for_hf(
            model,
            aside,
            model_config=dict(
                label_names=run['class_names'],
                # What timm's config says of the pretrained weights it knows is not true of these.
                pretrained_cfg=dict(tag=None, license=None, origin_url=None, paper_ids=None),
                **(dict(timm_netaug=dict(facts)) if facts else {}),
            ),
            model_args=run['model_args'],
            data_config=run['data_config'],
            safe_serialization=True,
        )
        config_file = Path(aside, 'config.json')
        config = json.loads(config_file.read_text(encoding='utf-8'))
        cfg = config['pretrained_cfg']
        if not cfg.get('pool_size'):  # timm clears it where the input size is not the registered one
            cfg['pool_size'] = _pool_size(model, cfg['input_size'])
            config_file.write_text(json.dumps(config, indent=2), encoding='utf-8')
        for file in Path(aside).iterdir():
            os.replace(file, out_dir / file.name)
