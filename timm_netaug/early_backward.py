"""Gradients taken ahead of `backward()`, so that the activations of one pass at a time are in memory."""
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

__all__ = ['take_gradient', 'can_take_gradient']


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient has been computed already, and whose activations have been freed.

    Its backward pass hands every parameter its gradient, times the gradient of the loss. So a parameter's hooks
    (DistributedDataParallel has some) see the gradient arrive in `backward()`, as always. Only the slices of the tiny
    network are kept, because its gradients are zero elsewhere.
    """

    @staticmethod
    def forward(
            ctx: Any,
            loss: torch.Tensor,
            grads: List[Optional[torch.Tensor]],
            slices: List[tuple],
            *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.grads, ctx.slices = grads, slices
        ctx.layouts = [(p.shape, p.stride()) for p in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError('A gradient of second order needs a NetAugTask without early_backward.')
        full: List[Optional[torch.Tensor]] = []
        for known, slices, (shape, stride) in zip(ctx.grads, ctx.slices, ctx.layouts):
            if known is None or known.shape == shape:
                full.append(None if known is None else known * grad)
                continue
            full.append(known.new_empty_strided(shape, stride).zero_())
            full[-1][slices] = known * grad
        return (None, None, None, *full)


def can_take_gradient(module: nn.Module, others: Any) -> bool:
    """Tell whether the gradient of a loss may be computed ahead of `backward()`.

    It may not under float16 autocast, where the loss has to be scaled first; where other tensors than the module's
    parameters need a gradient; where DistributedDataParallel has a static graph or looks for unused parameters; nor
    where hooks on parameters would see two gradients.

    Args:
        module: The trained module, possibly inside DistributedDataParallel.
        others: What else goes into the loss: input, target, parameters of the criterion.
    """
    kind = next(module.parameters()).device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    needed = any(getattr(t, 'requires_grad', False) for t in tree_leaves(others))
    looks = getattr(module, 'static_graph', False) or getattr(module, 'find_unused_parameters', False)
    return (torch.is_grad_enabled() and not half and not needed and not looks
            and not any(p._backward_hooks for p in module.parameters()))


def take_gradient(
        loss: torch.Tensor,
        parameters: List[torch.Tensor],
        slices: Mapping[torch.Tensor, tuple],
        crossing: Sequence[Tuple[torch.Tensor, torch.Tensor]] = (),
) -> torch.Tensor:
    """Compute the gradient of a loss now, free the activations, and return the loss to call `backward()` on.

    Args:
        slices: For parameters that the network uses a part of: the index of that part.
        crossing: Activations that the loss depends on, and the copies without a graph that it was computed from. The
            returned loss has its gradient at the activations, whose graph is left as it is.
    """
    crossing = [(a, b) for a, b in crossing if b.requires_grad]
    indices = [slices.get(p, (slice(None),) * p.ndim) for p in parameters]
    grads = torch.autograd.grad(loss, [*parameters, *(b for _, b in crossing)], allow_unused=True)
    known = [None if g is None else g[i].clone() for g, i in zip(grads, indices)]
    indices += [()] * len(crossing)
    known += grads[len(parameters):]
    return _KnownGradient.apply(loss.detach(), known, indices, *parameters, *(a for a, _ in crossing))
