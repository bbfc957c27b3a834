"""A PyTorch model as an int8 TensorFlow Lite file: conversion by litert-torch, quantisation by ai-edge-quantizer."""
import tempfile
from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch
import torch.nn as nn

from ..errors import UserError, first_line
from .images import with_black_and_white
from .int8_weights import with_int8_weights
from .output import captured
from .packages import require
from .repair import check_all_int8, repair
from .rewrite import on_pixels, with_same_kernels

__all__ = ['to_tflite']

_SIGNATURE = 'serving_default'  # of a file of litert-torch that says no other


def _to_float(model: nn.Module, input_size: Any, name: str) -> bytes:
    """Convert a model with the input 1 x C x H x W to a float file with the input 1 x H x W x C. Outputs that are maps
    of features become channels-last, too."""
    litert_torch = require('litert_torch')
    channels, height, width = input_size
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'float.tflite')
        try:
            with captured():
                with torch.no_grad():
                    outputs = model(torch.zeros(1, *input_size))
                outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
                maps = [i for i, t in enumerate(outputs) if t.ndim == 4]
                litert_torch.convert(
                    litert_torch.to_channel_last_io(model, args=[0], outputs=maps or None).eval(),
                    (torch.zeros(1, height, width, channels),),
                ).export(str(file))
        except Exception as e:  # whatever torch.export or the converter find wrong with an operator
            raise UserError(f'{name} cannot be converted to TensorFlow Lite, litert-torch stops with'
                            f' {type(e).__name__} ({first_line(e)[:200]}): deploy a model of convolutions, such as the'
                            f' netaug_* models.') from e
        return file.read_bytes()


def _quantise(float_file: bytes, images: np.ndarray, name: str) -> bytes:
    """Quantise weights (per channel) and activations to int8.

    The ranges of the activations are their minima and maxima over the calibration images. The quantizer's convenience
    function takes a moving average instead, whose ranges are those of the last images.

    Args:
        images: Pixels divided by 255, of N x H x W x C.
    """
    calibrator = require('ai_edge_quantizer.calibrator')
    quantizer = require('ai_edge_quantizer.quantizer')
    recipe = require('ai_edge_quantizer.recipe').static_wi8_ai8()
    recipes = require('ai_edge_quantizer.recipe_manager').RecipeManager()
    recipes.load_quantization_recipe(recipe)
    min_max_update = require('ai_edge_quantizer.utils.qsv_utils').min_max_update
    try:
        with captured():
            calibration = calibrator.Calibrator(float_file, num_threads=1, qsv_update_func=min_max_update)
            calibration.calibrate({_SIGNATURE: [{'args_0': image[None]} for image in images]}, recipes)
            return bytes(quantizer.Quantizer(float_file, recipe).quantize(
                calibration.get_model_qsvs(), enable_progress_report=False).quantized_model)
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as e:
        raise UserError(f'{name} cannot be quantised to int8, ai-edge-quantizer stops with {type(e).__name__}'
                        f' ({first_line(e)[:200]}).') from e


def to_tflite(
        model: nn.Module,
        data_config: Mapping[str, Any],
        images: np.ndarray,
        same_kernels: bool = True,
        name: str = 'The model',
) -> bytes:
    """Convert a model to an int8 file whose input is the camera's pixel minus 128.

    Args:
        model: A model of images, in evaluation mode, on the CPU. It returns a tensor, or a tuple of tensors.
        data_config: How its input is prepared, in timm's terms.
        images: Pixels to calibrate with, uint8, N x H x W x C. A black and a white image are added, so that the scale
            of the input is 1 / 255.
        same_kernels: Apply `with_same_kernels`.
        name: What messages call the model.

    Returns:
        The repaired flatbuffer.

    Raises:
        UserError: An operator cannot be converted, or stays in floating point.
    """
    input_size = tuple(data_config['input_size'])
    if same_kernels:
        model = with_same_kernels(model, input_size)
    model = with_int8_weights(model, images, data_config)
    float_file = _to_float(on_pixels(model, data_config), input_size, name)
    data = repair(_quantise(float_file, with_black_and_white(images).astype(np.float32) / 255, name))
    check_all_int8(data, name)
    return data
