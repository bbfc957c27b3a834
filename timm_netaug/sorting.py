"""Sorting: the most important expansion channels of every block come to the front (section 3.3 of the paper)."""
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn

from .layers import ElasticBatchNorm
from .layout import Layout

__all__ = ['importance_orders', 'permute_channels', 'to_permute']


@torch.no_grad()
def importance_orders(model: nn.Module, layout: Layout) -> Dict[str, torch.Tensor]:
    """Rank the channels of every 'expand' and 'squeeze' set.

    The importance of a channel is the L1 norm of the weights that read it: those of the next convolution of the block,
    and in squeeze-excite those of the convolution that computes the gate. The convolution that squeezes reads
    expansion channels too, but does not rank them.

    Returns:
        For every channel set, by name: the old positions of its channels, in the new order.
    """
    orders = {}
    for c in layout.channels.values():
        if c.kind != 'width':
            weights = [model.get_submodule(name).weight for name in c.readers]
            importance = sum(w.abs().sum([d for d in range(w.ndim) if d != 1]) for w in weights)
            orders[c.name] = importance.argsort(descending=True, stable=True)
    return orders


@torch.no_grad()
def permute_channels(
        model: nn.Module,
        layout: Layout,
        orders: Mapping[str, torch.Tensor],
        optimizer: Optional[torch.optim.Optimizer] = None,
) -> None:
    """Reorder channels in all tensors that they run along, in their gradients, and in their state in the optimizer.

    Raises:
        ValueError: The optimizer keeps a state that cannot be permuted. Nothing has been changed.
    """
    for tensor, dims in to_permute(model, layout, orders, optimizer):
        for dim, order in dims.items():
            tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
    for module in model.modules():
        if isinstance(module, ElasticBatchNorm):
            module.since_sort = 0  # the statistics start anew, because the tiny network computes another function now


def _check_optimizer(tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer without the super-network's parameters, or with a state that spans parameters (L-BFGS)."""
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    if not any(id(t) in held for t in tensors.values()):
        raise ValueError(f"{type(optimizer).__name__} holds none of the super-network's parameters, so that its state"
                         f' cannot be sorted with them. Give the optimizer that trains the super-network.')
    for name, tensor in tensors.items():
        for key, state in optimizer.state.get(tensor, {}).items():
            if isinstance(state, (list, tuple, dict)) or torch.is_tensor(state) and state.numel() > tensor.numel():
                raise ValueError(f"{type(optimizer).__name__} keeps a '{key}' for '{name}' that belongs to other"
                                 f' parameters, too, and cannot be sorted. Use another optimizer or'
                                 f' NetAugTask(sort=False).')


def to_permute(
        model: nn.Module,
        layout: Layout,
        orders: Mapping[str, Any],
        optimizer: Optional[torch.optim.Optimizer],
) -> List[Tuple[torch.Tensor, Dict[int, Any]]]:
    """List all tensors that channel sets run along, with the orders of their axes.

    Raises:
        ValueError: The optimizer keeps a state that cannot be permuted, or none of the parameters.
    """
    while hasattr(optimizer, '_base_optimizer'):  # timm's Lookahead
        optimizer = optimizer._base_optimizer
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if optimizer is not None:
        _check_optimizer(tensors, optimizer)
    todo = []
    for name, axes in layout.axes.items():
        dims = {dim: orders[c.name] for dim, c in axes.items() if c.name in orders}
        if not dims:
            continue
        tensor = tensors[name]
        todo.append((tensor, dims))
        if tensor.grad is not None:
            todo.append((tensor.grad, dims))
        for key, state in (optimizer.state.get(tensor, {}) if optimizer is not None else {}).items():
            if state is None or isinstance(state, (int, float)) or (torch.is_tensor(state) and state.numel() == 1):
                continue
            if not torch.is_tensor(state) or state.shape != tensor.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a '{key}' for '{name}' that does not have its shape"
                    f' {tuple(tensor.shape)} and cannot be sorted with it. Use another optimizer or'
                    f' NetAugTask(sort=False).')
            todo.append((state, dims))
    return todo
