#!/usr/bin/env python3
"""Write docs/models.md: which EfficientNet and MobileNet models of timm NetAug supports, and why not the others.

    python docs/models.py

`python -m timm_netaug info NAME` shows whether NetAug supports another network.
"""
import re
from pathlib import Path
from typing import Iterator, Optional, Tuple

import timm
import torch

import timm_netaug

PAGE = Path(__file__).with_suffix('.md')
MODULES = ('efficientnet', 'mobilenetv3')  # timm's model files
REASONS = {  # type of the unsupported module -> what it is; for other types, the page has the text of the error
    'CondConv2d': 'conditional convolutions',
    'EvoNorm2dS0': 'another norm than BatchNorm',
    'GlobalContext': 'another attention than squeeze-excite',
    'GroupNormAct': 'another norm than BatchNorm',
    'LayerNormAct2d': 'another norm than BatchNorm',
    'MixedConv2d': 'kernels of several sizes in a layer',
    'MultiQueryAttention2d': 'attention',
}


def names() -> list:
    return sorted(name for module in MODULES for name in timm.list_models(module=module))


def classify() -> Iterator[Tuple[str, torch.nn.Module, Optional[timm_netaug.SuperNet], str]]:
    """Yield every name of the families with its model, its super-network or None, and why there is none."""
    for name in names():
        with torch.device('meta'):
            model = timm.create_model(name)
        try:
            yield name, model, timm_netaug.augment(model), ''
        except ValueError as e:
            found = re.search(r"(?:module '(.+?)'|it is) of type (\w+), which (.+?)\. Supported", str(e))
            module, kind, why = found.groups() if found else ('', type(model).__name__, str(e))
            groups = kind == 'Conv2d' and 'groups=' in why
            reason = 'grouped convolutions' if groups else REASONS.get(kind, why)
            yield name, model, None, f'{reason} (`{module or name}`: `{kind}`)'


def millions(model: torch.nn.Module) -> str:
    return f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M'


def page(rows: list) -> str:
    """Return the text for the rows (name, parameters, parameters of the super-network or '', reason)."""
    taken, refused = [r for r in rows if r[2]], [r for r in rows if not r[2]]
    lines = [
        '# Models that can be trained with `--netaug`',
        '',
        f'Written by `python docs/models.py` from timm {timm.__version__}: the {len(rows)} models of its files',
        ' and '.join(f'`{m}.py`' for m in MODULES)
        + f', of which {len(taken)} are supported and {len(refused)} refused.',
        'Parameters are those with the default number of classes, super-networks those of the default multipliers.',
        'The five `netaug_*` models are supported, too.',
        '',
        f'## Supported ({len(taken)})',
        '',
        '| model | parameters | super-network |',
        '|---|---|---|',
        *(f'| `{name}` | {params} | {wide} |' for name, params, wide, _ in taken),
        '',
        f'## Refused ({len(refused)})',
        '',
        'NetAug refuses these models before it changes anything. The message names the first unsupported layer.',
        '',
        '| model | reason |',
        '|---|---|',
        *(f'| `{name}` | {why} |' for name, _, _, why in refused),
    ]
    return '\n'.join(lines) + '\n'


def main() -> None:
    rows = [(n, millions(m), millions(s) if s else '', why) for n, m, s, why in classify()]
    PAGE.write_text(page(rows))
    print(f'{PAGE}: {len(rows)} models, {sum(bool(r[2]) for r in rows)} supported.')


if __name__ == '__main__':
    main()
