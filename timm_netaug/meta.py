"""Copies of models, also on PyTorch's meta device, which need no memory, and a key for models that compute the same."""
import copy
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['FastMeta', 'copy_with', 'fingerprint', 'shapes', 'to_meta']


class FastMeta(TorchDispatchMode):
    """Spares models on the meta device the operators that PyTorch composes in Python there, a millisecond a call."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.hardtanh_.default and args[0].is_floating_point():
            return args[0]
        if function is torch.ops.aten.native_batch_norm.default and len(args) == 8:
            x, *of_channels, training, _, _ = args
            if not training and x.ndim > 1 and all(t is None or t.shape == x.shape[1:2] for t in of_channels):
                return x.new_empty_strided(x.shape, x.stride()), x.new_empty(0), x.new_empty(0)
        return function(*args, **(kwargs or {}))


def copy_with(model: nn.Module, others: Mapping[int, Any]) -> nn.Module:
    """Copy a model, with others in place of some of its objects, which are given by their `id`."""
    memo = dict(others)
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict, set) and not value:  # a dozen in a module; deepcopy is slow with them
                memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)


def to_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, in evaluation mode. The tensors of the copy need no memory."""
    memo: Dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        # `empty_like` of a tensor that is on the meta device itself takes a hundred times as long.
        empty = (torch.empty(tensor.shape, dtype=tensor.dtype, device='meta') if tensor.is_contiguous()
                 else torch.empty_like(tensor, device='meta'))
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy_with(model, memo).eval()


def shapes(model: nn.Module, inputs: Tuple[Any, ...]) -> List[Any]:
    """Return, for every call of a module within a model on the meta device, the shapes that it reads and writes."""
    calls: List[Any] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls.append((name, [tuple(t.shape) for t in tree_leaves((args, output)) if isinstance(t, torch.Tensor)]))

    handles = [m.register_forward_hook(partial(record, name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad(), FastMeta():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def fingerprint(model: nn.Module, inputs: Any) -> Optional[Tuple[Any, ...]]:
    """Return a key that is equal for two models only if they compute the same function of their weights, for inputs of
    these shapes. Return None if a model has attributes that do not show what it computes."""
    parts: List[Any] = [(t.dtype, tuple(t.shape)) if isinstance(t, torch.Tensor) else t for t in tree_leaves(inputs)]
    hidden = ('_parameters', '_buffers', '_modules', 'training', '_model_args')  # the last one is timm's record
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if k not in hidden}
        if not _is_plain(attributes):
            return None
        parts += [name, type(module), type(module).forward, repr(attributes)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts += [name, tensor.dtype, tuple(tensor.shape)]
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    """Return whether `repr(value)` describes a value completely."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
