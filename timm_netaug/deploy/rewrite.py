"""A PyTorch model rewritten so that its int8 file needs less memory and takes the camera's pixels as they are.

Both rewrites leave the function of the model as it was. They are made before the conversion, where convolutions are
still convolutions.
"""
import copy
from typing import Any, Dict, Mapping, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['on_pixels', 'with_same_kernels']


def on_pixels(model: nn.Module, data_config: Mapping[str, Any]) -> nn.Module:
    """Put the normalisation of the input in front of a model, as a depthwise convolution with 1 x 1 kernels.

    The normalisation cannot be folded into the first convolution: that one pads its input with zeros, which stand for
    the mean colour behind the normalisation and for black before it.

    Args:
        model: Takes normalised images, of N x C x H x W.
        data_config: With `mean` and `std` of the channels, in timm's terms.

    Returns:
        A model that takes pixels divided by 255.
    """
    mean, std = (torch.tensor(data_config[key], dtype=torch.float32) for key in ('mean', 'std'))
    normalise = nn.Conv2d(len(mean), len(mean), 1, groups=len(mean))
    with torch.no_grad():
        normalise.weight.copy_((1 / std).reshape(-1, 1, 1, 1))
        normalise.bias.copy_(-mean / std)
    return nn.Sequential(normalise, model).eval()


def _input_sizes(model: nn.Module, input_size: Sequence[int]) -> Dict[nn.Conv2d, Tuple[int, int]]:
    """Return height and width of the input of every convolution that a forward pass calls."""
    sizes: Dict[nn.Conv2d, Tuple[int, int]] = {}

    def record(module: nn.Conv2d, args: Any, output: torch.Tensor) -> None:
        sizes[module] = tuple(args[0].shape[-2:])

    handles = [m.register_forward_hook(record) for m in model.modules() if type(m) is nn.Conv2d]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_size))
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def with_same_kernels(model: nn.Module, input_size: Sequence[int]) -> nn.Module:
    """Return a copy whose convolutions of stride 2 need no padded copy of their input on a microcontroller.

    TensorFlow Lite knows two kinds of padding: none, and SAME, which on an even side adds one pixel less at the front
    than PyTorch's symmetric padding of k // 2. So a converter writes the padding as an operator of its own, whose
    output lies in memory beside its input. A kernel of k + 1 whose last row and column are zero computes the same, and
    its SAME padding is k // 2 at both ends. On an odd side PyTorch's padding is SAME as it is.

    Args:
        model: In evaluation mode.
        input_size: Channels, height and width.
    """
    model = copy.deepcopy(model)
    for conv, sides in _input_sizes(model, input_size).items():
        symmetric = conv.padding == tuple(k // 2 for k in conv.kernel_size) and conv.padding_mode == 'zeros'
        odd = all(k % 2 for k in conv.kernel_size)
        if conv.padding == (0, 0) or not symmetric or not odd or conv.stride != (2, 2) or conv.dilation != (1, 1):
            continue
        rows, columns = (int(side % 2 == 0) for side in sides)
        conv.weight = nn.Parameter(F.pad(conv.weight.detach(), (0, columns, 0, rows)))
        conv.kernel_size = tuple(conv.weight.shape[-2:])
    return model
