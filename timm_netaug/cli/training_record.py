"""Facts about a run for the model card, from a checkpoint of `train.py`: its command line and its metrics."""
import argparse
import math
from typing import Any, Dict, List, Mapping, Optional

from timm.utils import ParseKwargs

from ..card import METRICS
from ..errors import UserError
from ..io.checkpoint import read_checkpoint
from ..io.run import RunDescription
from .train_detection import train_detection_parser
from .train_flags import FREE_FLAGS, train_parser

__all__ = ['baseline_metrics', 'detection_record', 'training_record']

# Flags whose values may be paths. The location of these files is of no use to others.
_PATHS = ('pretrained_path', 'initial_checkpoint', 'class_map', 'class_stats', 'loss_pos_weight', 'loss_class_weight')
# Flags that the evaluation needs, too.
_DATASET = ('dataset', 'input_img_mode', 'input_key', 'target_key', 'task', 'target_format')


def _flags(
        args: argparse.Namespace,
        only: Optional[tuple] = None,
        parser: Optional[argparse.ArgumentParser] = None,
) -> List[str]:
    """Return the command line with all flags that differ from the defaults of `train.py`, or of another parser."""
    parser, argv = parser or train_parser(), []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in ('help', *FREE_FLAGS) or (only and action.dest not in only):
            continue
        if value == action.default:
            continue
        if action.dest in _PATHS:
            value = _file_name(value)
        if str(value).startswith('local-dir:'):
            value = f'local-dir:{_file_name(value)}'
        argv.append(max(action.option_strings, key=len))
        if isinstance(action, ParseKwargs):
            argv += [f'{k}={_file_name(v) if k == "file" else v!r}' for k, v in value.items()]
        elif not isinstance(action, argparse._StoreTrueAction):
            argv += map(str, value if isinstance(value, (list, tuple)) else [value])
    return argv


def _file_name(path: Any) -> str:
    return str(path).replace('\\', '/').rpartition('/')[2]


def _comparable(command: List[str]) -> List[str]:
    """Return the flags that a baseline must share: all but NetAug's and those of the precision."""
    words, skip = [], False
    for word in command:
        if word.startswith('--'):
            skip = word.startswith(('--netaug', '--amp'))
        if not skip:
            words.append(word)
    return words


def training_record(checkpoint: Mapping[str, Any], use_ema: Optional[bool] = None) -> Dict[str, Any]:
    """Collect the facts about a training from a checkpoint of `train.py`, as plain data.

    Args:
        use_ema: Whether the weights are the moving average. None: they are the weights that the run validated.
    """
    args = train_parser().parse_args([])  # defaults for flags that an earlier version did not have
    vars(args).update(vars(checkpoint['args']))
    facts = dict(
        command=_flags(args),
        processes=getattr(args, 'world_size', 1),
        evaluated_with=[*_flags(args, _DATASET), '--split', args.val_split],
    )
    if 'epoch' in checkpoint:
        facts.update(epoch=checkpoint['epoch'] + 1, epochs=args.epochs)
    metric = checkpoint.get('metric')
    if (args.eval_metric in METRICS and metric is not None and math.isfinite(metric)
            and _of_these_weights(checkpoint, use_ema)):
        facts['metrics'] = {args.eval_metric: metric}
    if '/' in args.dataset:
        facts['dataset'] = args.dataset.partition('/')[2]
    return facts


def _of_these_weights(checkpoint: Mapping[str, Any], use_ema: Optional[bool]) -> bool:
    """Return whether the metric of a checkpoint is that of the weights that are taken from it."""
    return use_ema is None or use_ema == RunDescription.from_checkpoint(checkpoint).ema


def detection_record(checkpoint: Mapping[str, Any], use_ema: Optional[bool] = None) -> Dict[str, Any]:
    """Collect the facts about a training from a checkpoint of `train_detection.py`, as plain data.

    Args:
        use_ema: Whether the weights are the moving average. None: they are the weights that the run validated.
    """
    parser = train_detection_parser()
    args = parser.parse_args([])
    vars(args).update(vars(checkpoint['args']))
    facts = dict(command=_flags(args, parser=parser), processes=getattr(args, 'world_size', 1), split=args.val_split)
    if 'epoch' in checkpoint:
        facts.update(epoch=checkpoint['epoch'] + 1, epochs=args.epochs)
    metric = checkpoint.get('metric')
    if (args.eval_metric != 'loss' and metric is not None and math.isfinite(metric)
            and _of_these_weights(checkpoint, use_ema)):
        facts['metrics'] = {args.eval_metric: metric}
    return facts


def baseline_metrics(path: str, facts: Mapping[str, Any]) -> Dict[str, float]:
    """Return the metrics of a checkpoint of the same training without NetAug.

    Raises:
        UserError: The checkpoint is from another training, or has no metric on record.
    """
    checkpoint = read_checkpoint(path)
    if RunDescription.from_checkpoint(checkpoint) is None:
        raise UserError(f'--baseline: {path} is not a checkpoint of train.py.')
    baseline = training_record(checkpoint)
    if '--netaug' in baseline['command'] or _comparable(baseline['command']) != _comparable(facts.get('command', [])):
        raise UserError(f'--baseline: {path} is not of the same training without NetAug; it was trained with:'
                        f' {" ".join(baseline["command"])}')
    for key in ('processes', 'evaluated_with'):
        if baseline.get(key) != facts.get(key):
            raise UserError(f'--baseline: {path} is not of the same training without NetAug: {key} is'
                            f' {baseline.get(key)} there and {facts.get(key)} here.')
    if 'metrics' not in baseline:
        raise UserError(f'--baseline: {path} has no accuracy on record.')
    return baseline['metrics']
