"""Weights rounded to int8 before the conversion, with biases that make up for the mean of the error."""
import copy
from typing import Any, Dict, List

import torch
import torch.nn as nn
from timm.layers import Conv2dSame, Linear

__all__ = ['with_rounded_weights']

# Not other subclasses, which may compute with other weights than they hold. timm's Linear is that of MobileNetV3.
_LAYERS = (nn.Conv2d, Conv2dSame, nn.Linear, Linear)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return weights as the quantizer rounds them: symmetrically, to 255 steps per output channel."""
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() * scale


def _mean(layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Return the mean of every output channel, in a shape that can be added to the output."""
    channel = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
    return output.mean([i for i in range(output.ndim) if i != channel], keepdim=True)


@torch.no_grad()
def with_rounded_weights(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return a copy with rounded weights and corrected biases.

    Rounding errors of the weights of a channel need not cancel: its outputs shift, on all images alike. This is the
    empirical bias correction of Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction
    (ICCV 2019, appendix D): layer by layer, behind layers that are corrected already, the mean of each output channel
    before its activation is set to what it was with the weights as they were.

    A BatchNorm behind a layer may be folded into it afterwards. It multiplies a channel and the scale of its weights by
    the same number, so that the quantizer finds the weights where they are.

    Args:
        model: In evaluation mode.
        x: Images for calibration, as the model takes them. They go through the model in one batch.

    Returns:
        The copy. Layers that are called more than once, such as the head of a detector, have rounded weights and the
        biases that they had.
    """
    model = copy.deepcopy(model)
    layers = [layer for layer in model.modules() if type(layer) in _LAYERS]
    means: Dict[nn.Module, List[torch.Tensor]] = {layer: [] for layer in layers}

    def record(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        means[layer].append(_mean(layer, output))

    def correct(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if len(means[layer]) > 1:  # the shift of one of its places is not that of the others
            return output
        shift = means[layer][0] - _mean(layer, output)
        layer.bias = nn.Parameter(shift.flatten() + (0 if layer.bias is None else layer.bias))
        return output + shift

    def run(hook: Any) -> None:
        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()

    run(record)
    for layer in layers:
        layer.weight.copy_(_rounded(layer.weight))
    run(correct)
    return model
