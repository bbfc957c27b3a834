"""What a model costs: `python -m timm_netaug.info NAME|CHECKPOINT`, or `describe(model)` for plain data.

Parameters and multiply-accumulates, what takes flash and activation memory on a microcontroller (`costs.py` states the
memory model), and what the model's super-network costs in training.
"""
import argparse
import copy
import json
import math
import os
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm import create_model
from timm.data import resolve_input_data_config
from timm.models import resolve_model_input_args

from .checkpoint import load_run
from .config import NetAugConfig
from .costs import MEMORY_MODEL, operators
from .errors import UserError, check_model_name, told_plainly
from .fetch import local_name
from .layout import trace
from .supernet import SuperNet, augment, slice_stock

__all__ = ['describe']


def _by(size: Sequence[int]) -> str:
    return ' x '.join(map(str, size))


def _augmented(model: nn.Module, config: NetAugConfig, rows: Sequence[Dict[str, Any]], samples: int) -> Dict[str, Any]:
    """Tell the size of a model's super-network, and what its samples cost. The model is on the meta device."""
    supernet = augment(model, config)
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
        `memory_model`, `netaug` (the super-network's `config`, `parameters`, `samples` and `mean_macs_ratio` to the
        tiny model; None where the model can not be augmented) and `netaug_refusal` (why not).

    Raises:
        UserError: The model can not be traced with such an input.
    """
    if isinstance(model, SuperNet):
        config = config or model.netaug_config
        model = slice_stock(model)
    if input_size is None:
        input_size = resolve_input_data_config(model, args={})['input_size']
    parameters = sum(p.numel() for p in model.parameters())
    model = copy.deepcopy(model).to('meta').eval()
    try:
        rows = operators(model, input_size)
    except Exception as e:  # whatever a model's code or torch.export find wrong
        raise UserError(f'{type(model).__name__} can not be traced with an input of {_by(input_size)}'
                        f' ({" ".join(str(e).split())[:200]}): try another size.') from e
    peak = max(rows, key=lambda row: row['live_bytes'])
    netaug = refusal = None
    try:
        trace(model)
    except ValueError as e:
        refusal = str(e)
    else:
        netaug = _augmented(model, config or NetAugConfig(), rows, samples)
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


def _load(args: argparse.Namespace) -> Tuple[nn.Module, Sequence[int], Dict[str, Any]]:
    """Build the model that a command line names; returns it with its input size and the fields of its NetAugConfig."""
    name = args.model
    if os.path.isfile(name) or name.endswith(('.tar', '.pth', '.pt')) or (os.sep in name and ':' not in name):
        if args.num_classes is not None:
            raise UserError('--num-classes: a checkpoint has its own number of classes. Leave the flag out.')
        model, run, _ = load_run(name)
        size, config = run['data_config']['input_size'], run.get('netaug') or {}
    else:
        check_model_name(name)
        source = local_name(name, weights=False)
        try:
            model = create_model(
                **resolve_model_input_args(source, dict(img_size=args.img_size), num_classes=args.num_classes))
        except Exception as e:  # whatever a constructor, a folder or the Hub find wrong
            raise UserError(f'{name} can not be built: {" ".join(str(e).split())[:300]}') from e
        size, config = resolve_input_data_config(model, args={})['input_size'], {}
    return model, size if args.img_size is None else (size[0], args.img_size, args.img_size), config


def _report(info: Dict[str, Any], layers: bool) -> str:
    flash, peak = info['flash_int8_bytes'], info['peak_activation_int8_bytes']
    lines = [
        f'{info["architecture"]}, input {_by(info["input_size"])}, {info["num_classes"]} classes',
        '',
        f'parameters         {info["parameters"]:,}',
        f'MACs               {info["macs"] / 1e6:,.2f} M (convolutions and linear layers)',
        'flash, int8        {0:,} bytes ({1:,.1f} KiB)'.format(flash, flash / 1024),
        'activations, int8  {0:,} bytes ({1:,.1f} KiB) at the peak, {2}'.format(peak, peak / 1024, info['peak_layer']),
    ]
    if info['netaug']:
        lines += ['super-network      {parameters:,} parameters; its samples have {mean_macs_ratio:.1f} x the MACs'
                  ' (mean of {samples})'.format(**info['netaug'])]
    if layers:
        table = '{:{width}}  {:>15}  {:>13}  {:>12}  {:>10}'.format
        width = max(len(row['name']) for row in info['layers'])
        lines += ['', table('operator', 'output', 'MACs', 'weight bytes', 'live bytes', width=width)]
        for row in info['layers']:
            numbers = [f'{row[k]:,}' for k in ('macs', 'weight_bytes', 'live_bytes')]
            mark = '  <- peak' if row['live_bytes'] == peak else ''
            lines += [table(row['name'], _by(row['shape']), *numbers, width=width) + mark]
    return '\n'.join([*lines, '', *([info['netaug_refusal']] if info['netaug_refusal'] else []), info['memory_model']])


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug.info',
        description='Tell what a model costs on a microcontroller, and what its super-network costs in training.')
    parser.add_argument('model', metavar='NAME|CHECKPOINT', help='timm model, or checkpoint of train.py')
    parser.add_argument('--img-size', type=int, metavar='N', help="height and width of the input; the model's own")
    parser.add_argument('--num-classes', type=int, metavar='N', help="classes; the model's own")
    parser.add_argument('--layers', action='store_true', help='list every operator')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--samples', type=int, default=200, metavar='N', help='augmented networks to average (200)')
    parser.add_argument('--netaug-width-mults', nargs='+', type=float, metavar='M', help='as for train.py')
    parser.add_argument('--netaug-expand-mults', nargs='+', type=float, metavar='M', help='as for train.py')
    parser.add_argument('--netaug-divisor', type=int, metavar='N', help='as for train.py')
    args = parser.parse_args(argv)
    with told_plainly('timm_netaug.info'):
        for flag in ('img_size', 'num_classes', 'samples'):
            value = getattr(args, flag)
            if value is not None and value < 1:
                raise UserError(f'--{flag.replace("_", "-")} must be at least 1, got {value}.')
        model, size, config = _load(args)
        fields = {k: getattr(args, f'netaug_{k}') for k in ('width_mults', 'expand_mults', 'divisor')}
        try:
            config = NetAugConfig.from_dict({**config, **{k: v for k, v in fields.items() if v is not None}})
        except ValueError as e:
            raise UserError(f'--netaug-*: {e}') from e
        info = describe(model, size, config, args.samples)
    if args.json:
        print(json.dumps({k: v for k, v in info.items() if k != 'layers' or args.layers}, indent=2))
    else:
        print(_report(info, args.layers))


if __name__ == '__main__':
    main()
