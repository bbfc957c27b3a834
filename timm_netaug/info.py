"""What a model costs: `describe(model)`, which `python -m timm_netaug info NAME|CHECKPOINT` prints.

Parameters and multiply-accumulates, what takes flash and activation memory on a microcontroller (`costs.py` states the
memory model), and what the model's super-network costs in training.
"""
import copy
import math
from typing import Any, Dict, Optional, Sequence

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from .config import NetAugConfig
from .costs import MEMORY_MODEL, operators
from .errors import UserError
from .supernet import SuperNet, augment, export

__all__ = ['describe']


def _augmented(supernet: SuperNet, rows: Sequence[Dict[str, Any]], samples: int) -> Dict[str, Any]:
    """Tell the size of a super-network, and what its samples cost."""
    axes = supernet.layout.axes
    macs = {f'{row["name"]}.weight': row['macs'] for row in rows if row['macs']}
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(samples):
        widths = supernet.sample_widths(generator)  # a layer's MACs are proportional to them: nothing has to be run
        total += sum(m * math.prod(widths[c.name] / c.base for c in axes[name].values()) for name, m in macs.items())
    return dict(
        config=supernet.netaug_config.to_dict(),
        parameters=sum(p.numel() for p in supernet.parameters()),
        fixed=supernet.layout.fixed,
        samples=samples,
        mean_macs_ratio=total / samples / sum(macs.values()),
    )


def describe(
        model: nn.Module,
        input_size: Optional[Sequence[int]] = None,
        config: Optional[NetAugConfig] = None,
        samples: int = 200,
) -> Dict[str, Any]:
    """Tell what a model costs, as plain data. The model and the global generators are left as they are.

    Args:
        model: A timm model, or a super-network, which stands for its tiny model.
        input_size: Channels, height and width; None for the model's own.
        config: Of the super-network that is described; None for the model's defaults.
        samples: Number of augmented sub-networks to average.

    Returns:
        `architecture`, `input_size`, `num_classes`, `parameters`, `macs` (of convolutions and linear layers),
        `flash_int8_bytes`, `peak_activation_int8_bytes`, `peak_layer`, `layers` (see `costs.operators`),
        `memory_model`, `netaug` (the super-network's `config`, `parameters`, `fixed` (convolutions that
        keep their width, and why), `samples` and `mean_macs_ratio` to the
        tiny model; None where the model cannot be augmented) and `netaug_refusal` (why not).

    Raises:
        UserError: The model cannot be traced with such an input.
    """
    if isinstance(model, SuperNet):
        config = config or model.netaug_config
        model = export(model)
    if input_size is None:
        input_size = resolve_input_data_config(model, args={})['input_size']
    parameters = sum(p.numel() for p in model.parameters())
    model = copy.deepcopy(model).to('meta').eval()
    try:
        rows = operators(model, input_size)
    except Exception as e:  # whatever a model's code or torch.export find wrong
        raise UserError(f'{type(model).__name__} cannot be traced with an input of {" x ".join(map(str, input_size))}'
                        f' ({" ".join(str(e).split())[:200]}): try another size.') from e
    peak = max(rows, key=lambda row: row['live_bytes'])
    netaug = refusal = None
    try:
        netaug = _augmented(augment(model, config), rows, samples)
    except ValueError as e:
        refusal = str(e)
    return dict(
        architecture=getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__,
        input_size=list(input_size),
        num_classes=getattr(model, 'num_classes', None),
        parameters=parameters,
        macs=sum(row['macs'] for row in rows),
        flash_int8_bytes=sum(row['weight_bytes'] for row in rows),
        peak_activation_int8_bytes=peak['live_bytes'],
        peak_layer=peak['name'],
        layers=rows,
        memory_model=MEMORY_MODEL,
        netaug=netaug,
        netaug_refusal=refusal,
    )


if __name__ == '__main__':
    from .__main__ import run_old_form
    run_old_form('info')
