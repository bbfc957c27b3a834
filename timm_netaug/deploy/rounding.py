"""Weights rounded to int8 before the conversion, so that the errors of a layer's weights make up for each other."""
import copy
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, Linear, pad_same

__all__ = ['with_rounded_weights']

# Not other subclasses, which may compute with other weights than they hold. timm's Linear is that of MobileNetV3.
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_LAYERS = (*_CONVOLUTIONS, nn.Linear, Linear)

_IMAGES, _PLACES = 24, 400  # images (up to twice as many), and places in each, for the moments of a layer's inputs
_LARGEST_MOMENTS = 2048  # inputs of an output channel; the time grows with their third power
_DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ


def _moments(layer: nn.Module, x: torch.Tensor) -> Optional[torch.Tensor]:
    """Return the second moments of what each group of a layer multiplies its weights with.

    Args:
        layer: With K inputs per output channel (for a convolution: channels of a group, times the size of the kernel).
        x: Input of the layer, of N x C x H x W, or N x ... x C for a linear layer.

    Returns:
        Moments of groups x K x K, None for a layer whose patches are not known here or too many.
    """
    if type(layer) not in _CONVOLUTIONS:
        inputs = x.reshape(-1, x.shape[-1]).double()
        return (inputs.T @ inputs)[None] / len(inputs) if layer.in_features <= _LARGEST_MOMENTS else None
    if isinstance(layer.padding, str) or layer.padding_mode != 'zeros' or layer.weight[0].numel() > _LARGEST_MOMENTS:
        return None
    if type(layer) is Conv2dSame:
        x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
    generator, total, count = torch.Generator().manual_seed(0), 0, 0
    for image in x[::max(1, len(x) // _IMAGES)]:
        patches = F.unfold(image[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0]
        patches = patches[:, torch.randperm(patches.shape[1], generator=generator)[:_PLACES]]
        patches = patches.reshape(layer.groups, -1, patches.shape[1]).double()
        total, count = total + patches @ patches.transpose(1, 2), count + patches.shape[2]
    return total / count


def _rounded(weight: torch.Tensor, moments: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Round weights as the quantizer does, symmetrically, to 255 steps per output channel.

    With moments, the error of a weight is passed on to the weights of the same output channel that are not rounded yet,
    so that the layer's output changes least: Frantar et al., GPTQ (ICLR 2023, algorithm 1). Zeros stay, and so does the
    largest weight, from which the quantizer takes its step.
    """
    groups = 1 if moments is None else len(moments)
    rows = weight.reshape(groups, weight.shape[0] // groups, -1).double()
    size = rows.abs()
    step = size.amax(-1, keepdim=True).clamp(min=1e-30) / 127
    if moments is None:
        return ((rows / step).round() * step).to(weight.dtype).view_as(weight)
    free = (size > 0) & (size < size.amax(-1, keepdim=True))
    count = rows.shape[-1]
    damping = _DAMPING * moments.diagonal(dim1=1, dim2=2).mean(1) + 1e-9
    moments = moments + damping[:, None, None] * torch.eye(count, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    for i in range(count):
        wanted = rows[..., i].clone()
        rows[..., i] = (wanted / step[..., 0]).round().clamp(-127, 127) * step[..., 0]
        error = (wanted - rows[..., i]) / factor[:, i, i, None]
        rows[..., i + 1:] -= error[..., None] * factor[:, i, None, i + 1:] * free[..., i + 1:]
    return rows.to(weight.dtype).view_as(weight)


def _mean(layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Return the mean of every output channel, in a shape that can be added to the output."""
    channel = 1 if type(layer) in _CONVOLUTIONS else output.ndim - 1
    return output.mean([i for i in range(output.ndim) if i != channel], keepdim=True)


@torch.no_grad()
def with_rounded_weights(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return a copy with rounded weights and corrected biases.

    Layer by layer, behind layers that are rounded already, the weights are rounded (`_rounded`), and the mean of each
    output channel before its activation is set to what it was with the weights as they were. The latter is the
    empirical bias correction of Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction
    (ICCV 2019, appendix D).

    A BatchNorm behind a layer may be folded into it afterwards. It multiplies a channel and the scale of its weights by
    the same number, so that the quantizer finds the weights where they are.

    Args:
        model: In evaluation mode.
        x: Images for calibration, as the model takes them. They go through the model in one batch.

    Returns:
        The copy. In layers that are called more than once, such as the head of a detector, each weight is rounded to
        the nearest step, and the biases are as they were.
    """
    model = copy.deepcopy(model)
    layers = [layer for layer in model.modules() if type(layer) in _LAYERS]
    means: Dict[nn.Module, List[torch.Tensor]] = {layer: [] for layer in layers}

    def record(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        means[layer].append(_mean(layer, output))

    def round_weight(layer: nn.Module, args: Any) -> None:
        layer.weight.copy_(_rounded(layer.weight, _moments(layer, args[0]) if args else None))

    def correct_bias(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        shift = means[layer][0] - _mean(layer, output)
        layer.bias = nn.Parameter(shift.flatten() + (0 if layer.bias is None else layer.bias))
        return output + shift

    handles = [layer.register_forward_hook(record) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    handles = []
    for layer in layers:
        if len(means[layer]) == 1:
            handles += [layer.register_forward_pre_hook(round_weight), layer.register_forward_hook(correct_bias)]
        else:  # the errors at one of its places are not those of the others
            layer.weight.copy_(_rounded(layer.weight))
    model(x)
    for handle in handles:
        handle.remove()
    return model
