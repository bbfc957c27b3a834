"""BatchNorm and ReLU as one autograd function, which saves one tensor less and makes no copy."""
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['FUSED', 'batch_norm_relu']

# Exact types of the activations whose output shows where their gradient is zero -> their upper limit.
FUSED: Dict[type, Optional[float]] = {nn.ReLU: None, nn.ReLU6: 6.0}


def _relu_backward(grad: Tensor, output: Tensor, limit: Optional[float]) -> Tensor:
    if limit is None:
        return torch.ops.aten.threshold_backward(grad, output, 0)
    return torch.ops.aten.hardtanh_backward(grad, output, 0, limit)


class _BatchNormReLU(torch.autograd.Function):
    """The function calls the kernels of PyTorch's own functions, so values and gradients equal theirs to the last bit.

    It saves less for the backward pass. PyTorch's in-place ReLU6 clones its input to know where the gradient is zero.
    The output shows that as well, and the next convolution saves the output anyway.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, mean, var, momentum, eps, limit) -> Tensor:
        output, *saved, kernel = torch.ops.aten._batch_norm_impl_index(
            x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled)
        if limit is None:
            output.relu_()
        else:
            output.clamp_(0, limit)
        ctx.save_for_backward(x, weight, bias, output, *saved)
        ctx.running, ctx.kernel, ctx.eps, ctx.limit = (mean, var), kernel, eps, limit
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, bias, output, save_mean, save_var, reserve = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second-order optimizer differentiates this backward pass, too
            normalised = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
            activated = F.relu(normalised) if ctx.limit is None else F.hardtanh(normalised, 0.0, ctx.limit)
            grads = torch.autograd.grad(activated, (x, weight, bias), grad, create_graph=True)
        else:
            grads = torch.ops.aten._batch_norm_impl_index_backward(
                ctx.kernel, x, _relu_backward(grad, output, ctx.limit), weight, *ctx.running, save_mean, save_var, True,
                ctx.eps, list(ctx.needs_input_grad[:3]), reserve)
        return (*grads, None, None, None, None, None)


def batch_norm_relu(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Optional[Tensor],
        var: Optional[Tensor],
        momentum: float,
        eps: float,
        limit: Optional[float],
) -> Tensor:
    """Normalise a training batch and clip it.

    Args:
        x: Images (B, C, H, W).
        mean: Running mean (C,), which is updated; None if there is none.
        var: Running variance (C,), in the same way.
        limit: 6 for ReLU6, None for ReLU.

    Raises:
        ValueError: The batch has one value per channel, which has no variance.
    """
    if x.numel() == x.shape[1]:  # PyTorch's own check, with its message
        raise ValueError(f'Expected more than 1 value per channel when training, got input size {x.size()}')
    return _BatchNormReLU.apply(x, weight, bias, mean, var, momentum, eps, limit)
