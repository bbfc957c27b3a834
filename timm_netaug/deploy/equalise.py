"""Channels in front of depthwise convolutions scaled towards each other, so that int8 has more steps for small ones."""
import copy
from collections import Counter
from typing import Any, List, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ['with_equal_channels']

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6)  # scaling before them is scaling behind them, up to the value that ReLU6 clips at
_LARGEST_FACTOR = 3.0
_TOLERANCE = 1e-3  # of the largest output: rounding errors of float32 are far below, a wrong pair is far above

_Pair = Tuple[BatchNormAct2d, nn.Conv2d, torch.Tensor]


def _run(model: nn.Module, x: torch.Tensor) -> Tuple[List[torch.Tensor], List[_Pair]]:
    """Return the outputs of a model, and each BatchNorm whose output is the input of a depthwise convolution, with that
    convolution and the largest value of each channel between them."""
    made_by = WeakIdKeyDictionary()  # tensor -> BatchNorm; lets go of tensors that the model has let go of
    pairs: List[_Pair] = []
    uses: Counter = Counter()

    def before(conv: nn.Module, args: Any) -> None:
        norm = made_by.get(args[0]) if args else None
        uses[conv] += 1
        if norm is not None and conv.groups == conv.in_channels == conv.out_channels:
            pairs.append((norm, conv, args[0].amax((0, 2, 3))))

    def after(norm: nn.Module, args: Any, output: torch.Tensor) -> None:
        uses[norm] += 1
        made_by[output] = norm

    handles = []
    for module in model.modules():
        if type(module) in _CONVOLUTIONS:
            handles.append(module.register_forward_pre_hook(before))
        elif type(module) is BatchNormAct2d and type(module.act) in _ACTIVATIONS:
            handles.append(module.register_forward_hook(after))
    try:
        outputs = model(x)
    finally:
        for handle in handles:
            handle.remove()
    pairs = [(norm, conv, top) for norm, conv, top in pairs if uses[norm] == uses[conv] == 1]
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs], pairs


@torch.no_grad()
def with_equal_channels(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return a copy with more equal channels in front of its depthwise convolutions, and the same outputs for `x`.

    int8 activations have one scale for all channels, that of the channel with the largest values. A channel with small
    values has few steps. So each channel is multiplied by the square root of (the largest value of all channels / the
    largest value of this channel), by 3 at most, and the weights of the depthwise convolution behind it are divided by
    that factor. This is the equalisation of Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
    Correction (ICCV 2019, section 4.1), of activations instead of weights, which have a scale per channel here. ReLU6
    clips a scaled channel at 6 / factor of its old values. The square root leaves room up to there above the largest
    value of `x`.

    Args:
        model: In evaluation mode.
        x: Images for calibration, as the model takes them. They go through the model in one batch.

    Returns:
        The copy. Channels of a BatchNorm whose output goes to another place, too, are as they were.
    """
    model = copy.deepcopy(model)
    expected, pairs = _run(model, x)

    def scale(pairs: Sequence[_Pair]) -> bool:
        """Scale the channels of all pairs if the outputs stay the same, else none."""
        tensors = [tensor for norm, conv, _ in pairs for tensor in (norm.weight, norm.bias, conv.weight)]
        before = [tensor.clone() for tensor in tensors]
        for norm, conv, top in pairs:
            factor = torch.where(top > 0, top.max() / top.clamp(min=1e-30), 1.0).sqrt().clamp(max=_LARGEST_FACTOR)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            conv.weight.div_(factor[:, None, None, None])
        same = all(torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE * wanted.abs().max().item())
                   for found, wanted in zip(_run(model, x)[0], expected))
        if not same:
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
        return same

    if not scale(pairs):
        for pair in pairs:
            scale([pair])
    return model
