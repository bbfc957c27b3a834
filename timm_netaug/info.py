"""What a model costs: `describe(model)`, which `python -m timm_netaug info NAME|CHECKPOINT` prints.

Parameters and multiply-accumulates, what it takes of a microcontroller's flash and RAM (`costs.py` states the memory
model), and what the model's super-network costs in training.
"""
import copy
import dataclasses
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from .config import NetAugConfig
from .costs import MEMORY_MODEL, Costs, costs
from .errors import UserError
from .supernet import SuperNet, augment, export
from .trunk import stage_names

__all__ = ['describe', 'estimate', 'stages']


# A training step is bound by the memory of activations more than by arithmetic. So its estimate weighs a layer by its
# share of all activations and by its share of all MACs; these weights fit the steps in docs/performance.md.
_OF_ACTIVATIONS, _OF_MACS = 0.8, 0.2


def _mean_cost(
        supernet: SuperNet,
        macs: Mapping[str, float],
        activations: Mapping[str, float],
        samples: int,
        expand_only: bool = False,
) -> float:
    """Return the mean cost of augmented sub-networks, of which nothing has to be run.

    Args:
        macs: What the tiny model's layers cost in proportion to all their widths, by the name of their weight.
        activations: What they cost in proportion to the channels that they write.
    """
    generator, axes, total = torch.Generator().manual_seed(0), supernet.layout.axes, 0.0
    for _ in range(samples):
        widths = supernet.sample_widths(generator, expand_only)
        wider = {name: widths[c.name] / c.base for name, c in supernet.layout.channels.items()}
        total += sum(m * math.prod(wider[c.name] for c in axes.get(n, {}).values()) for n, m in macs.items())
        total += sum(a * (wider[axes[n][0].name] if 0 in axes.get(n, {}) else 1) for n, a in activations.items())
    return total / samples


def _augmented(supernet: SuperNet, rows: Sequence[Dict[str, Any]], samples: int) -> Dict[str, Any]:
    """Tell the size of a super-network, and what its samples cost."""
    macs = {f'{row["name"]}.weight': row['macs'] for row in rows if row['macs']}
    return dict(
        config=supernet.netaug_config.to_dict(),
        parameters=sum(p.numel() for p in supernet.parameters()),
        fixed=supernet.layout.fixed,
        samples=samples,
        mean_macs_ratio=_mean_cost(supernet, macs, {}, samples) / sum(macs.values()),
    )


def stages(
        model: nn.Module,
        rows: Sequence[Dict[str, Any]],
        config: Optional[NetAugConfig] = None,
        samples: int = 50,
) -> List[Dict[str, Any]]:
    """Tell what a training costs from each stage on (`NetAugConfig.from_stage`), before it is begun.

    Args:
        model: A stock network, as for `augment`; it may be on the meta device.
        rows: What its operators cost (`describe`'s 'layers').

    Returns:
        For every stage that the network can branch before: `from_stage`, `trunk_macs` (the trunk's share of the tiny
        model's MACs), `parameters` (of the super-network), and the estimated time of a training step in plain steps,
        with augmented widths and expansions (`step`) and with expansions alone (`step_expand_only`).
    """
    config, found = config or NetAugConfig(), []
    macs = {f'{row["name"]}.weight': row['macs'] for row in rows if row['macs']}
    sizes = {f'{row["name"]}.weight': math.prod(row['shape']) for row in rows if row['macs']}
    total = sum(macs.values())
    for number in range(len(stage_names(model))):
        try:
            supernet = augment(model, dataclasses.replace(config, from_stage=number))
        except ValueError:  # more than one activation crosses this branch
            continue
        trunk = supernet.netaug_trunk.names
        behind = [n for n in macs if not any(n.startswith(f'{name}.') for name in trunk)]
        shares = {n: _OF_MACS * macs[n] / total for n in behind}, {
            n: _OF_ACTIVATIONS * sizes[n] / sum(sizes.values()) for n in behind}
        step, step_expand_only = (1 + _mean_cost(supernet, *shares, samples, alone) for alone in (False, True))
        found.append(dict(
            from_stage=number, trunk_macs=1 - sum(macs[n] for n in behind) / total,
            parameters=sum(p.numel() for p in supernet.parameters()), step=step, step_expand_only=step_expand_only))
    return found


def estimate(model: nn.Module, input_size: Sequence[int], same_kernels: bool = True) -> Costs:
    """Estimate what a stock model costs on a microcontroller; the model is left as it is. See `costs.costs`.

    Raises:
        UserError: The model cannot be traced with such an input.
    """
    try:
        return costs(copy.deepcopy(model).to('meta').eval(), input_size, same_kernels)
    except Exception as e:  # whatever a model's code or torch.export find wrong
        raise UserError(f'{type(model).__name__} cannot be traced with an input of {" x ".join(map(str, input_size))}'
                        f' ({" ".join(str(e).split())[:200]}): try another size.') from e


def describe(
        model: nn.Module,
        input_size: Optional[Sequence[int]] = None,
        config: Optional[NetAugConfig] = None,
        samples: int = 200,
        same_kernels: bool = True,
) -> Dict[str, Any]:
    """Tell what a model costs, as plain data. The model and the global generators are left as they are.

    Args:
        model: A timm model, or a super-network, which stands for its tiny model.
        input_size: Channels, height and width; None for the model's own.
        config: Of the super-network that is described; None for the model's defaults.
        samples: Number of augmented sub-networks to average.
        same_kernels: Estimate the file with the larger kernels that `deploy` writes by default.

    Returns:
        `architecture`, `input_size`, `num_classes`, `parameters`, `macs` (of convolutions and linear layers),
        `flash_int8_bytes`, `arena_bytes` (RAM), its parts `peak_activation_int8_bytes` and `persistent_bytes`,
        `peak_layer` (where most activations are in memory), `layers` (see `costs.Costs`), `memory_model`, `netaug`
        (the super-network's `config`, `parameters`, `fixed` (convolutions that keep their width, and why), `samples`
        and `mean_macs_ratio` to the tiny model; None where the model cannot be augmented) and `netaug_refusal` (why
        not).

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
    found = estimate(model, input_size, same_kernels)
    rows = found.layers
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
        flash_int8_bytes=found.flash_bytes,
        arena_bytes=found.activation_bytes + found.persistent_bytes,
        peak_activation_int8_bytes=found.activation_bytes,
        persistent_bytes=found.persistent_bytes,
        peak_layer=peak['name'],
        layers=rows,
        memory_model=MEMORY_MODEL,
        netaug=netaug,
        netaug_refusal=refusal,
    )


if __name__ == '__main__':
    from .__main__ import run_old_form
    run_old_form('info')
