"""The weights of a model adjusted to int8 in PyTorch, before a converter sees them."""
from typing import Any, Mapping

import numpy as np
import torch.nn as nn

from .equalise import with_equal_channels
from .images import normalised
from .rounding import with_rounded_weights

__all__ = ['with_int8_weights']

_IMAGES, _PIXELS = 64, 64 * 224 ** 2  # at most; the activations of all of these images lie in memory together


def with_int8_weights(model: nn.Module, pixels: np.ndarray, data_config: Mapping[str, Any]) -> nn.Module:
    """Return a copy with equalised channels, weights that lie on the quantizer's grid, and corrected biases.

    Args:
        model: In evaluation mode.
        pixels: To calibrate with, uint8, N x H x W x C. Up to 64 of these images are used, fewer above 224 x 224.
        data_config: How the model's input is prepared, in timm's terms.
    """
    _, height, width = data_config['input_size']
    count = min(_IMAGES, max(8, _PIXELS // (height * width)), len(pixels))
    x = normalised(pixels[np.linspace(0, len(pixels) - 1, count).astype(int)], data_config)
    return with_rounded_weights(with_equal_channels(model, x), x)
