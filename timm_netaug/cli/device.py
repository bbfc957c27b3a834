"""The device and the precision of `train.py` and `validate.py`."""
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

from ..errors import UserError, rewording

__all__ = ['check_device', 'choose_device', 'join_processes', 'keep_memory', 'mixed_precision', 'restarts',
           'uses_channels_last']

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(args: Any, logger: logging.Logger) -> None:
    """Use the CPU if there is no GPU and none was requested. Set PyTorch's options for a GPU.

    Raises:
        UserError: A GPU was requested, but there is none.
    """
    if args.device == 'cuda' and not torch.cuda.is_available():
        if args.device_given:
            raise UserError('--device cuda was asked for, but PyTorch finds no GPU here: use --device cpu.')
        logger.info('No GPU found: computing on the CPU.')
        args.device = 'cpu'
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = True
        # The search for the fastest convolution costs time for each new shape. NetAug has many, so it is off.
        torch.backends.cudnn.benchmark = not getattr(args, 'netaug', False)


def check_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        UserError: PyTorch does not know the device, or cannot make a tensor on it here.
    """
    with rewording(f'--device {name}', ImportError, RuntimeError, AssertionError):
        return torch.empty(0, device=name).device


def keep_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, on Linux with glibc; nothing elsewhere.

    By itself, the C library gives memory of 32 MiB and more back at once, and the system clears its pages again for the
    next tensor. docs/performance.md has what that costs.
    """
    if sys.platform != 'linux':
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def restarts() -> int:
    """Return how often torchrun has restarted the processes."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def _rendezvous_of_this_attempt(url: str, **kwargs: Any) -> Iterator[Any]:
    """Let the processes of this attempt find each other under their own prefix in torchrun's store.

    The store still holds the addresses of the processes of the previous attempt.
    """
    store, *numbers = next(rendezvous('env://', **kwargs))
    yield (torch.distributed.PrefixStore(f'attempt-{restarts()}', store), *numbers)


register_rendezvous_handler('attempt', _rendezvous_of_this_attempt)


def join_processes(args: Any) -> torch.device:
    """Join the other processes of a distributed run, if it is one, and return the device of this process."""
    if restarts():
        args.dist_url = 'attempt://'
    return init_distributed_device(args)


def uses_channels_last(args: Any) -> bool:
    """Return whether to train in channels-last. NetAug always does so on a CPU, where its steps are faster then."""
    return args.channels_last or (args.netaug and args.device.startswith('cpu'))


def mixed_precision(args: Any, device: torch.device) -> Callable:
    """Return a function that makes the context manager for a forward pass."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
