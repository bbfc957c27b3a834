"""Gradients computed before `backward()` is called, so that only one pass at a time has its activations in memory."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

__all__ = ['can_take_gradient', 'leading', 'replaced', 'take_gradient']

_LARGE = 2 ** 14  # with this many elements, filling a tensor costs more than an autograd function in Python
_taken: Optional[Dict[torch.Tensor, torch.Tensor]] = None  # gradients of slices by parameter, in `take_gradient` only


class _Leading(torch.autograd.Function):
    """The leading slice of a large parameter. The parameter's gradient is zero outside the slice. In `take_gradient`,
    only the gradient of the slice is kept: full tensors for all weights would slow a step down by some percent."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, index: tuple) -> torch.Tensor:
        ctx.parameter, ctx.index = parameter, index
        return parameter[index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], None]:
        parameter, index = ctx.parameter, ctx.index
        if _taken is not None:
            _taken[parameter] = _taken[parameter] + grad if parameter in _taken else grad
            return None, None
        full = grad.new_empty_strided(parameter.shape, parameter.stride()).zero_()
        full[index] = grad
        return full, None


def leading(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Return the leading slice of a parameter of a layer.

    Args:
        sizes: Sizes of the slice in the first dimensions. The slice has all of the other dimensions.
    """
    if tensor.shape[:len(sizes)] == sizes:
        return tensor
    index = tuple(map(slice, sizes))
    if tensor.numel() < _LARGE or torch.compiler.is_compiling() or not (
            tensor.requires_grad and torch.is_grad_enabled()):
        return tensor[index]
    return _Leading.apply(tensor, index)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient has been computed already, and whose activations have been freed.

    Its backward pass returns every parameter's known gradient, multiplied by the gradient of the loss. So hooks of
    parameters, such as those of DistributedDataParallel, see the gradient in `backward()` as usual. Only the slices of
    the tiny network are stored, because the gradients are zero outside them. The augmented pass uses stand-ins for
    large weights. The known gradient is added to the gradient of the stand-in, which saves a tensor filled with zeros.
    """

    @staticmethod
    def forward(
            ctx: Any,
            loss: torch.Tensor,
            grads: List[Optional[torch.Tensor]],
            slices: List[tuple],
            large: List[int],
            *parameters: torch.Tensor,
    ) -> Tuple[torch.Tensor, ...]:
        ctx.grads, ctx.slices, ctx.large = grads, slices, large
        ctx.layouts = [(p.shape, p.stride()) for p in parameters]
        ctx.set_materialize_grads(False)
        return loss.clone(), *(parameters[i].view_as(parameters[i]) for i in large)

    @staticmethod
    def backward(
            ctx: Any,
            grad: torch.Tensor,
            *of_stand_ins: Optional[torch.Tensor],
    ) -> Tuple[Optional[torch.Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError('A gradient of second order needs a NetAugTask without early_backward.')
        full: List[Optional[torch.Tensor]] = [None] * len(ctx.grads)
        for i, other in zip(ctx.large, of_stand_ins):
            full[i] = other
        for i, (known, slices, (shape, stride)) in enumerate(zip(ctx.grads, ctx.slices, ctx.layouts)):
            if known is None:
                continue
            if full[i] is not None:
                # Writing in place is safe: stand-ins are used as slices or by convolutions, and the gradients of both
                # are new tensors.
                full[i][slices].addcmul_(known, grad)
            elif known.shape == shape:
                full[i] = known * grad
            else:
                full[i] = known.new_empty_strided(shape, stride).zero_()
                torch.mul(known, grad, out=full[i][slices])
        return (None, None, None, None, *full)


def can_take_gradient(module: nn.Module, others: Any) -> bool:
    """Return whether the gradient of a loss may be computed before `backward()` is called.

    It may not under float16 autocast, because the loss has to be scaled first; if other tensors than the module's
    parameters need a gradient; if DistributedDataParallel has a static graph or looks for unused parameters; or if
    parameters have hooks, because these would see two gradients.

    Args:
        module: The trained module, possibly inside DistributedDataParallel.
        others: All else that the loss depends on: input, target, parameters of the criterion.
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
) -> Tuple[torch.Tensor, Dict[torch.Tensor, torch.Tensor]]:
    """Compute the gradient of a loss now, and free the activations.

    Args:
        slices: For parameters of which the network uses only a part, the index of that part.
        crossing: Pairs of an activation and its detached copy, from which the loss was computed. The returned loss
            passes its gradient on to the activations, whose graph is kept.

    Returns:
        The loss to call `backward()` on, and stand-ins for large parameters. The rest of the loss must be computed with
        these stand-ins (see `replaced`).
    """
    global _taken
    crossing = [(a, b) for a, b in crossing if b.requires_grad]
    indices = [slices.get(p, ()) for p in parameters]
    _taken = {}
    try:
        grads = torch.autograd.grad(loss, [*parameters, *(b for _, b in crossing)], allow_unused=True)
        of_slices = _taken
    finally:
        _taken = None
    known = [None if g is None else g[i].clone() for g, i in zip(grads, indices)]
    for i, p in enumerate(parameters):
        if p in of_slices:
            known[i] = of_slices[p] if known[i] is None else known[i] + of_slices[p]
    large = [i for i, p in enumerate(parameters) if p in of_slices]
    known += grads[len(parameters):]
    indices += [()] * len(crossing)
    loss, *stand_ins = _KnownGradient.apply(
        loss.detach(), known, indices, large, *parameters, *(a for a, _ in crossing))
    return loss, {parameters[i]: s for i, s in zip(large, stand_ins)}


@contextmanager
def replaced(module: nn.Module, stand_ins: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Let a module compute with stand-ins for its parameters within the block."""
    places = [(m, key, stand_ins[p]) for m in module.modules() for key, p in m._parameters.items() if p in stand_ins]
    try:
        for m, key, stand_in in places:
            vars(m)[key] = stand_in  # attribute access finds it before the entry of `_parameters`
        yield
    finally:
        for m, key, _ in places:
            vars(m).pop(key, None)
