"""Gradient checkpointing of a super-network: the activations of its blocks are recomputed in the backward pass."""
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Iterable

import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from .layers import PASS_STATE

__all__ = ['Mixed', 'mixed_with', 'set_recomputed', 'switch_off_checkpointing']


class Mixed:
    """Base of mixins whose subclasses are made at run time, one for each class of modules that they are mixed with."""
    mixin: type
    stock: type

    def __reduce_ex__(self, protocol: Any) -> tuple:  # copy and pickle cannot find a class that is made at run time
        return _blank, (self.mixin, self.stock), self.__dict__


@lru_cache(maxsize=None)
def mixed_with(mixin: type, stock: type) -> type:
    """Return the subclass of both classes, the same one for every call."""
    attributes = dict(mixin=mixin, stock=stock, __module__=mixin.__module__)
    return type(f'{stock.__name__}{mixin.__name__}', (mixin, stock), attributes)


def _blank(mixin: type, stock: type) -> nn.Module:
    kind = mixed_with(mixin, stock)
    return kind.__new__(kind)


class Recomputed(Mixed):
    """A block whose activations are recomputed, at the widths of the forward pass: the network may have other widths by
    then. The recomputation does not update the running statistics of BatchNorm."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(super().__call__, *args, use_reentrant=False,
                          context_fn=lambda: (nullcontext(), _Repeated(self)), **kwargs)


class _Repeated:
    """Context of a block's recomputation. It restores the state that the block has when the context is created."""

    def __init__(self, block: nn.Module):
        now = [(m, {k: getattr(m, k) for k in PASS_STATE if hasattr(m, k)}) for m in block.modules()]
        self.now = [(m, {**state, 'frozen': True} if 'augmented' in state else state) for m, state in now if state]

    def __enter__(self) -> None:
        self.before = [(m, {k: getattr(m, k) for k in state}) for m, state in self.now]
        for m, state in self.now:
            vars(m).update(state)

    def __exit__(self, *exc: Any) -> None:
        for m, state in self.before:
            vars(m).update(state)


def switch_off_checkpointing(module: nn.Module) -> bool:
    """Switch off timm's own gradient checkpointing, which ignores widths and calls blocks without their stages. Return
    whether it was on."""
    modules = [m for m in module.modules() if getattr(m, 'grad_checkpointing', False) is True]
    for m in modules:
        m.grad_checkpointing = False
    return bool(modules)


def set_recomputed(blocks: Iterable[nn.Module], enable: bool) -> None:
    """Switch gradient checkpointing of blocks on or off."""
    for block in blocks:
        is_on = isinstance(block, Recomputed)
        if enable and not is_on:
            block.__class__ = mixed_with(Recomputed, type(block))
        elif is_on and not enable:
            block.__class__ = block.stock
