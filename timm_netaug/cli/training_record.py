"""Facts about a run for the model card, from a checkpoint of `train.py`: its command line and its metrics."""
import argparse
import math
from typing import Any, Callable, Container, Dict, List, Mapping, Optional, Sequence

from timm.utils import ParseKwargs

from ..card import METRICS
from ..detection.metric import METRICS as DETECTION_METRICS
from ..errors import UserError
from ..io.checkpoint import read_checkpoint
from ..io.run import RunDescription
from .detection_flags import with_defaults
from .flags import Group, all_flags
from .train_detection import DETECTION_FLAGS
from .train_flags import TRAIN_FLAGS

__all__ = ['baseline_metrics', 'detection_record', 'training_record']

# Flags whose values may be paths. The location of these files is of no use to others.
_PATHS = ('pretrained_path', 'initial_checkpoint', 'class_map', 'class_stats', 'loss_pos_weight', 'loss_class_weight')
# Flags that the evaluation needs, too.
_DATASET = ('dataset', 'input_img_mode', 'input_key', 'target_key', 'task', 'target_format')


def _flags(args: argparse.Namespace, groups: Sequence[Group], only: Optional[Sequence[str]] = None) -> List[str]:
    """Return the command line with all flags of a table that differ from their defaults."""
    argv = []
    for flag in all_flags(groups):
        value = getattr(args, flag.dest)
        if flag.free or value == flag.default or (only and flag.dest not in only):
            continue
        if flag.dest in _PATHS:
            value = _file_name(value)
        if str(value).startswith('local-dir:'):
            value = f'local-dir:{_file_name(value)}'
        argv.append(flag.name)
        if flag.type is ParseKwargs:
            argv += [f'{k}={_file_name(v) if k == "file" else v!r}' for k, v in value.items()]
        elif flag.type is not None:
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


def _record(
        checkpoint: Mapping[str, Any],
        use_ema: Optional[bool],
        groups: Sequence[Group],
        metrics: Container[str],
        evaluation: Callable[[argparse.Namespace], Dict[str, Any]],
) -> Dict[str, Any]:
    args = argparse.Namespace(**vars(checkpoint['args']))
    with_defaults(groups, args)  # of flags that an earlier version did not have
    facts = dict(command=_flags(args, groups), processes=getattr(args, 'world_size', 1), **evaluation(args))
    if 'epoch' in checkpoint:
        facts.update(epoch=checkpoint['epoch'] + 1, epochs=args.epochs)
    metric = checkpoint.get('metric')
    of_these_weights = use_ema is None or use_ema == RunDescription.from_checkpoint(checkpoint).ema
    if args.eval_metric in metrics and metric is not None and math.isfinite(metric) and of_these_weights:
        facts['metrics'] = {args.eval_metric: metric}
    return facts


def training_record(checkpoint: Mapping[str, Any], use_ema: Optional[bool] = None) -> Dict[str, Any]:
    """Collect the facts about a training from a checkpoint of `train.py`, as plain data.

    Args:
        use_ema: Whether the weights are the moving average. None: they are the weights that the run validated.
    """
    facts = _record(
        checkpoint, use_ema, TRAIN_FLAGS, METRICS,
        lambda args: dict(evaluated_with=[*_flags(args, TRAIN_FLAGS, _DATASET), '--split', args.val_split]))
    name = getattr(checkpoint['args'], 'dataset', '').partition('/')[2]
    return {**facts, 'dataset': name} if name else facts


def detection_record(checkpoint: Mapping[str, Any], use_ema: Optional[bool] = None) -> Dict[str, Any]:
    """Collect the facts about a training from a checkpoint of `train_detection.py`, as plain data.

    Args:
        use_ema: As in `training_record`.
    """
    return _record(
        checkpoint, use_ema, DETECTION_FLAGS, DETECTION_METRICS, lambda args: dict(split=args.val_split))


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
