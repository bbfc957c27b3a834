"""Copies of models on PyTorch's meta device, which need no memory, and a key for models that compute the same."""
import copy
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

__all__ = ['fingerprint', 'shapes', 'to_meta']


def to_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, in evaluation mode. The tensors of the copy need no memory."""
    memo: Dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).eval()


def shapes(model: nn.Module, inputs: Tuple[Any, ...]) -> List[Any]:
    """Return, for every call of a module within a model on the meta device, the shapes that it reads and writes."""
    calls: List[Any] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls.append((name, [tuple(t.shape) for t in tree_leaves((args, output)) if isinstance(t, torch.Tensor)]))

    handles = [m.register_forward_hook(partial(record, name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def fingerprint(model: nn.Module, inputs: Any) -> Optional[Tuple[Any, ...]]:
    """Return a key that is equal for two models only if they compute the same function of their weights, for inputs of
    these shapes. Return None if a model has attributes that do not show what it computes."""
    parts: List[Any] = [(t.dtype, tuple(t.shape)) if isinstance(t, torch.Tensor) else t for t in tree_leaves(inputs)]
    hidden = ('_parameters', '_buffers', '_modules', 'training')
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
