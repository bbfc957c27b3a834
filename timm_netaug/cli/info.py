"""What a model costs: `python -m timm_netaug info NAME|CHECKPOINT`."""
import argparse
import json
from typing import Any, Dict, Optional, Sequence

from ..config import NetAugConfig, split_fields
from ..detection.detector import Detector
from ..detection.fcos import STRIDES
from ..detection.folder import load_trained
from ..errors import UserError, exit_on_user_error, rewording
from ..fits import check_fits, parse_board
from ..info import describe, stages
from ..io.run import RunDescription
from ..load import LoadedModel, load_model
from .flags import check_at_least, refuse_for_detector

__all__ = ['main']


def _by(size: Sequence[int]) -> str:
    return ' x '.join(map(str, size))


def _size(count: int) -> str:
    return f'{count:,} bytes ({count / 1024:,.1f} KiB)'


def _report(info: Dict[str, Any], layers: bool) -> str:
    peak = max(row['live_bytes'] for row in info['layers'])
    lines = [
        f'{info["architecture"]}, input {_by(info["input_size"])}, {info["num_classes"]} classes',
        '',
        f'parameters         {info["parameters"]:,}',
        f'MACs               {info["macs"] / 1e6:,.2f} M (convolutions and linear layers)',
        f'flash, int8        {_size(info["flash_int8_bytes"])} estimated',
        f'RAM, int8          {_size(info["arena_bytes"])} estimated:',
        f'  activations      {_size(info["peak_activation_int8_bytes"])}, most at {info["peak_layer"]}',
        f'  persistent       {_size(info["persistent_bytes"])}, with 64-bit pointers',
    ]
    if info['netaug']:
        lines += ['super-network      {parameters:,} parameters; its samples have {mean_macs_ratio:.1f} x the MACs'
                  ' (mean of {samples})'.format(**info['netaug'])]
        if info['netaug']['fixed']:
            name, why = next(iter(info['netaug']['fixed'].items()))
            lines += [f'not augmented      {len(info["netaug"]["fixed"])} convolutions; {name}: {why}']
        if info['netaug']['stages']:
            lines += ['', 'Time of a training step with --netaug-from-stage, estimated, in steps without NetAug:',
                      'from stage  trunk, % of MACs  super-network  widths and expansions  expansions alone']
        lines += [f'{row["from_stage"]:>10}  {100 * row["trunk_macs"]:>16.0f}  {row["parameters"]:>13,}'
                  f'  {row["step"]:>21.1f}  {row["step_expand_only"]:>16.1f}' for row in info['netaug']['stages']]
    if layers:
        table = '{:{width}}  {:>15}  {:>13}  {:>12}  {:>10}'.format
        width = max(len(row['name']) for row in info['layers'])
        lines += ['', table('operator', 'output', 'MACs', 'weight bytes', 'live bytes', width=width)]
        for row in info['layers']:
            numbers = [f'{row[k]:,}' for k in ('macs', 'weight_bytes', 'live_bytes')]
            mark = '  <- peak' if row['live_bytes'] == peak else ''
            lines += [table(row['name'], _by(row['shape']), *numbers, width=width) + mark]
    return '\n'.join([*lines, '', *([info['netaug_refusal']] if info['netaug_refusal'] else []), info['memory_model']])


def _dense(detector: Detector, run: Optional[RunDescription], img_size: Optional[int]) -> LoadedModel:
    """Return the dense part of a detector, which is what costs, with the run of its checkpoint."""
    size = (img_size,) * 2 if img_size else detector.config.img_size
    return LoadedModel(detector.dense, f'detector on {detector.config.backbone}', dict(input_size=(3, *size)),
                       run=run)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_netaug info',
        description='Tell what a model costs on a microcontroller, and what its super-network costs in training.')
    parser.add_argument('source', metavar='NAME|CHECKPOINT', help='timm model, checkpoint or exported folder')
    parser.add_argument('--model', metavar='NAME', help='architecture of a file that does not say it')
    parser.add_argument('--img-size', type=int, metavar='N', help="height and width of the input; the model's own")
    parser.add_argument('--num-classes', type=int, metavar='N', help="classes; the model's own")
    parser.add_argument('--no-same-kernels', action='store_true', help='as for deploy: without its larger kernels')
    parser.add_argument('--fits', nargs=2, metavar=('SRAM', 'FLASH'), help='exit with an error if the model needs more,'
                        ' as in --fits 320K 1M')
    parser.add_argument('--layers', action='store_true', help='list every operator')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--samples', type=int, default=200, metavar='N', help='augmented networks to average (200)')
    parser.add_argument('--netaug-width-mults', nargs='+', type=float, metavar='M', help='as for train.py')
    parser.add_argument('--netaug-expand-mults', nargs='+', type=float, metavar='M', help='as for train.py')
    parser.add_argument('--netaug-divisor', type=int, metavar='N', help='as for train.py')
    args = parser.parse_args(argv)
    with exit_on_user_error('timm_netaug info'):
        check_at_least(args, img_size=1, num_classes=1, samples=1)
        board = parse_board(args.fits) if args.fits else None
        detector, run = load_trained(args.source)
        if detector is not None:
            refuse_for_detector(args, 'model')
            loaded = _dense(detector, run, args.img_size)
        else:
            loaded = load_model(args.source, args.model, pretrained=False, flags=dict(img_size=args.img_size),
                                num_classes=args.num_classes)
        if (detector or loaded.run) and args.num_classes is not None:
            raise UserError('--num-classes: a checkpoint has its own number of classes. Leave the flag out.')
        config = split_fields((loaded.run and loaded.run.netaug) or {})[0].to_dict()
        fields = {k: getattr(args, f'netaug_{k}') for k in ('width_mults', 'expand_mults', 'divisor')}
        with rewording('--netaug-*', ValueError, whole=True):
            config = NetAugConfig.from_dict({**config, **{k: v for k, v in fields.items() if v is not None}})
        info = describe(loaded.model, loaded.data_config['input_size'], config, args.samples,
                        not args.no_same_kernels)
        if info['netaug']:
            info['netaug']['stages'] = stages(loaded.model, info['layers'], config, min(args.samples, 50))
        if args.json:
            print(json.dumps({k: v for k, v in info.items() if k != 'layers' or args.layers}, indent=2))
        else:
            print(_report(info, args.layers))
        if board:
            step = dict(step=STRIDES[-1]) if detector is not None else {}
            check_fits(loaded.model, info, board, same_kernels=not args.no_same_kernels, **step)
