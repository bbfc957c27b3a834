"""Adjust a model's weights to int8 in PyTorch, before the conversion."""
from typing import Any, Mapping

import numpy as np
import torch.nn as nn

from .equalise import with_equal_channels
from .images import normalised
from .rounding import with_rounded_weights

__all__ = ['with_int8_weights']

# The activations of all of these images lie in memory together.
_LEAST_IMAGES, _MOST_IMAGES, _PIXELS = 8, 64, 64 * 224 ** 2


def with_int8_weights(model: nn.Module, pixels: np.ndarray, data_config: Mapping[str, Any]) -> nn.Module:
    """Return a copy with equalised channels, weights that lie on the quantizer's grid, and corrected biases.

    Args:
        model: In evaluation mode.
        pixels: To calibrate with, uint8, N x H x W x C. Up to 64 of these images are used; above 224 x 224 pixels,
            fewer, but at least 8.
        data_config: How the model's input is prepared, in timm's terms.
    """
    _, height, width = data_config['input_size']
    count = min(_MOST_IMAGES, max(_LEAST_IMAGES, _PIXELS // (height * width)), len(pixels))
    x = normalised(pixels[np.linspace(0, len(pixels) - 1, count).astype(int)], data_config)
    return with_rounded_weights(with_equal_channels(model, x), x)
