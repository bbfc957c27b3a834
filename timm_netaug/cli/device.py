"""The device and the precision that `train.py` and `validate.py` compute with."""
import ctypes
import logging
import os
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Iterator

import torch
from timm.utils import init_distributed_device
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from ..errors import UserError

__all__ = ['choose_device', 'join_processes', 'keep_memory', 'mixed_precision', 'restarts', 'uses_channels_last']

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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


def keep_memory() -> None:
    """Let the C library keep freed memory for the next tensors of this process (on Linux with glibc, else nothing).

    By itself it hands tensors of 32 MiB and more back at once, and the system clears their pages anew for each
    (docs/performance.md has what that costs).
    """
    if sys.platform != 'linux':
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def restarts() -> int:
    """Return how often torchrun has started the processes anew."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def _meet_again(url: str, **kwargs: Any) -> Iterator[Any]:
    """Meet as ever, with names of this attempt: torchrun's store has the addresses of processes that are gone."""
    store, *numbers = next(rendezvous('env://', **kwargs))
    yield (torch.distributed.PrefixStore(f'attempt-{restarts()}', store), *numbers)


register_rendezvous_handler('again', _meet_again)


def join_processes(args: Any) -> torch.device:
    """Join the other processes, where there are any, and return this one's device."""
    if restarts():
        args.dist_url = 'again://'
    return init_distributed_device(args)


def uses_channels_last(args: Any) -> bool:
    """Return the memory format to train in: on a CPU, a NetAug step is always faster in channels-last."""
    return args.channels_last or (args.netaug and args.device.startswith('cpu'))


def mixed_precision(args: Any, device: torch.device) -> Callable:
    """Return the context of a forward pass."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
