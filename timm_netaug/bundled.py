"""Trained weights that come with the package: a folder `weights/ARCH.TAG/` for each, as `export_folder` writes it."""
import json
from pathlib import Path
from typing import Any, Dict, Optional

__all__ = ['bundled_cfgs', 'bundled_folder']

_WEIGHTS = Path(__file__).parent / 'weights'


def bundled_folder(name: str) -> Optional[Path]:
    """Return the folder of the bundled weights with the name ARCH.TAG, None if there are none of this name."""
    return next((file.parent for file in _WEIGHTS.glob('*/config.json') if file.parent.name == name), None)


def bundled_cfgs() -> Dict[str, Dict[str, Any]]:
    """Return timm's pretrained configs of the bundled weights by ARCH.TAG, as their `config.json` has them."""
    cfgs = {}
    for file in sorted(_WEIGHTS.glob('*/config.json')):
        config = json.loads(file.read_text(encoding='utf-8'))
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in config['pretrained_cfg'].items() if k != 'tag'}
        cfgs[file.parent.name] = dict(
            cfg,
            file=str(file.with_name('model.safetensors')),
            label_names=config['label_names'],
            description=config['timm_netaug']['dataset'],
        )
    return cfgs
