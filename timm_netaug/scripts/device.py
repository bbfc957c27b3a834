"""The device and the precision that `train.py` and `validate.py` compute with."""
import logging
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable

import torch

from ..errors import UserError

__all__ = ['choose_device', 'mixed_precision']


def choose_device(args: Any, logger: logging.Logger) -> None:
    """Let the CPU stand in for a GPU that nobody asked for; set up what a GPU computes with.

    Raises:
        UserError: A GPU was asked for, and there is none.
    """
    if args.device == 'cuda' and not torch.cuda.is_available():
        if args.device_given:
            raise UserError('--device cuda was asked for, but PyTorch finds no GPU here: use --device cpu.')
        logger.info('No GPU found: computing on the CPU.')
        args.device = 'cpu'
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def mixed_precision(args: Any, device: torch.device) -> Callable:
    """Return the context of a forward pass."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
