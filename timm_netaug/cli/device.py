"""The device and the precision that `train.py` and `validate.py` compute with."""
import logging
import os
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Iterator

import torch
from timm.utils import init_distributed_device
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from ..errors import UserError

__all__ = ['choose_device', 'join_processes', 'mixed_precision', 'restarts', 'uses_channels_last']


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


def restarts() -> int:
    """Return how often torchrun has started the processes anew."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def _rendezvous_of_this_attempt(url: str, **kwargs: Any) -> Iterator[Any]:
    """Let the processes find each other under a prefix of this attempt.

    The store of torchrun still has the addresses of the processes of the attempt before.
    """
    store, *numbers = next(rendezvous('env://', **kwargs))
    yield (torch.distributed.PrefixStore(f'attempt-{restarts()}', store), *numbers)


register_rendezvous_handler('attempt', _rendezvous_of_this_attempt)


def join_processes(args: Any) -> torch.device:
    """Join the other processes, where there are any, and return this one's device."""
    if restarts():
        args.dist_url = 'attempt://'
    return init_distributed_device(args)


def uses_channels_last(args: Any) -> bool:
    """Return the memory format to train in: on a CPU, a NetAug step is always faster in channels-last."""
    return args.channels_last or (args.netaug and args.device.startswith('cpu'))


def mixed_precision(args: Any, device: torch.device) -> Callable:
    """Return the context of a forward pass."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
