"""One pass over a validation set, for `train.py` and `validate.py`."""
import logging
from contextlib import nullcontext
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn
from timm.task import ClassificationEvaluator
from tqdm import tqdm

from .data import watched

__all__ = ['evaluate', 'progress_bar']

_logger = logging.getLogger(__name__)


def progress_bar(loader, description: str, enabled: bool = True) -> tqdm:
    """Wrap a loader in a bar that shows in a terminal only; elsewhere `disable` is set, and the caller logs lines."""
    disable = None if enabled else True
    return tqdm(
        watched(loader), total=len(loader), desc=description, disable=disable, leave=False, dynamic_ncols=True)


def _to_device(
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
        device: torch.device,
        dtype: Optional[torch.dtype],
) -> Union[torch.Tensor, Dict[str, torch.Tensor]]:
    if isinstance(input, dict):  # of a NaFlex loader: patches, where in the image they are, and numbers
        return {k: t.to(device=device, dtype=dtype if t.is_floating_point() else None) if torch.is_tensor(t) else t
                for k, t in input.items()}
    return input.to(device=device, dtype=dtype)


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Any,
        evaluator: ClassificationEvaluator,
        device: torch.device,
        dtype: Optional[torch.dtype] = None,
        autocast: Callable = nullcontext,
        channels_last: bool = False,
        description: str = 'Validate',
        log_interval: int = 50,
        distributed: bool = False,
        primary: bool = True,
        after_batch: Callable = lambda: None,
) -> Dict[str, float]:
    """Evaluate a model over a whole loader.

    Args:
        dtype: Type that images are converted to.
        primary: Whether this process reports progress.
        after_batch: Is called after every batch, and may raise.

    Returns:
        The evaluator's metrics: 'loss', 'top1' and 'top5' (percent).
    """
    model.eval()
    bar = progress_bar(loader, description, primary)
    last = len(loader) - 1
    for i, (input, target) in enumerate(bar):
        input, target = _to_device(input, device, dtype), target.to(device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(input)
        if isinstance(output, (tuple, list)):
            output = output[0]
        evaluator.update(output, target)
        if primary and (i == last or i % log_interval == 0):
            line = '  '.join(f'{k} {v:.4g}' for k, v in evaluator.summary().items())
            if bar.disable:
                _logger.info(f'{description} [{i + 1}/{last + 1}]  so far: {line}')
            else:
                bar.set_postfix_str(line)
        after_batch()
    return evaluator.compute(distributed=distributed)
