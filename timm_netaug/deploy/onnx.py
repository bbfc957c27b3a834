"""A model as ONNX files, in float and in int8, which the tools of chip vendors read (`deploy --format onnx`).

No interpreter for microcontrollers runs these files, so their memory on a chip is not measured here. The int8 file has
QuantizeLinear and DequantizeLinear around the operators (QDQ), with a scale per channel of the weights. Its channels
are equalised and its weights rounded as those of the file for TensorFlow Lite Micro (`int8_weights.py`).
"""
import json
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..errors import UserError, first_line
from ..io.atomic import atomic_write
from ..io.data import DataSource
from ..load import LoadedModel
from .images import batches, with_black_and_white
from .int8_weights import with_int8_weights
from .output import captured
from .packages import require, versions
from .pipeline import DeployConfig, calibration_pixels, check_classes, check_drop, measured_images
from .rewrite import on_pixels

__all__ = ['deploy_onnx']

_FLOAT, _INT8, _REPORT = 'model.onnx', 'model_int8.onnx', 'report_onnx.json'
_INPUT = 'pixels'
_TOLERANCE = 1e-3  # of a logit, for kernels that sum in another order


def _inputs(pixels: np.ndarray) -> np.ndarray:
    """Return the input of the files, N x C x H x W from 0 to 1, for pixels of N x H x W x C."""
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 1).astype(np.float32) / 255)


def _export(model: nn.Module, data_config: Mapping[str, Any], path: Path, name: str) -> nn.Module:
    """Write a float file, with the normalisation in it; returns the PyTorch model that it must agree with."""
    whole = on_pixels(model, data_config)
    try:
        with captured():
            torch.onnx.export(
                whole, (torch.zeros(1, *data_config['input_size']),), str(path), dynamo=True, external_data=False,
                input_names=[_INPUT], output_names=['logits'], verbose=False)
    except Exception as e:  # whatever torch.export or the exporter find wrong with an operator
        raise UserError(f'{name} cannot be written as ONNX, torch.onnx stops with {type(e).__name__}'
                        f' ({first_line(e)[:200]}).') from e
    return whole


def _quantise(path: Path, target: Path, pixels: np.ndarray) -> None:
    """Write the int8 file of a float file, calibrated with the minima and maxima over pixels."""
    quantization = require('onnxruntime.quantization', 'onnx')
    preprocess = require('onnxruntime.quantization.shape_inference', 'onnx').quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(_inputs(with_black_and_white(pixels)))

        def get_next(self) -> Optional[Dict[str, np.ndarray]]:
            image = next(self.images, None)
            return None if image is None else {_INPUT: image[None]}

    prepared = path.with_name('prepared.onnx')
    with captured():
        preprocess(str(path), str(prepared))  # folds BatchNorm into the convolutions
        quantization.quantize_static(
            str(prepared), str(target), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax)


def _session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from inputs to the logits of a file; images go through it one by one."""
    session = require('onnxruntime', 'onnx').InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda x: np.concatenate([session.run(None, {_INPUT: image[None]})[0] for image in x])


def deploy_onnx(
        loaded: LoadedModel,
        name: str,
        out_dir: str,
        source: DataSource,
        config: DeployConfig = DeployConfig(),
        say: Callable[[str], None] = print,
) -> Dict[str, Any]:
    """Write `model.onnx` (float), `model_int8.onnx` and `report_onnx.json` of a model, if they are found to be good.

    The files take pixels divided by 255, of 1 x C x H x W. The arguments are those of `pipeline.deploy`.

    Returns:
        The report: plain data.

    Raises:
        UserError: A package is missing, the data set does not fit, or a file is not good. Nothing has been written.
    """
    check_classes(loaded, name)
    for module in ('onnx', 'onnxscript', 'onnxruntime'):
        require(module, 'onnx')
    model, data_config = loaded.model.eval(), loaded.data_config
    evaluated, indices = measured_images(loaded, source, config)
    pixels, calibration = calibration_pixels(loaded, source, config)
    with tempfile.TemporaryDirectory() as folder:
        paths, rounded = [Path(folder, file) for file in (_FLOAT, _INT8)], Path(folder, 'rounded.onnx')
        say(f'Writing {name} as ONNX and calibrating with {len(pixels)} images.')
        whole = _export(model, data_config, paths[0], name)
        _export(with_int8_weights(model, pixels, data_config), data_config, rounded, name)
        _quantise(rounded, paths[1], pixels)
        runs = dict(zip(('float', 'int8'), map(_session, paths)))
        x = _inputs(next(batches(evaluated, indices[:config.compared_images], config.compared_images))[0])
        with torch.inference_mode():
            difference = float(np.abs(runs['float'](x) - whole(torch.from_numpy(x)).numpy()).max())
        if difference > _TOLERANCE:
            raise UserError(f'The logits of the ONNX file differ from those of PyTorch by {difference:.2g} on {len(x)}'
                            f' images, and {_TOLERANCE:g} is tolerated: the file is not good, nothing was written.')
        say(f'Measuring top-1 on {len(indices):,} images.')
        right, same = dict(float=0, int8=0), 0
        with tqdm(total=len(indices), desc='Measure', unit='image', leave=False, disable=None) as bar:
            for images, labels in batches(evaluated, indices):
                found = {kind: run(_inputs(images)).argmax(1) for kind, run in runs.items()}
                right = {kind: count + int((found[kind] == labels).sum()) for kind, count in right.items()}
                same += int((found['float'] == found['int8']).sum())
                bar.update(len(labels))
        top1 = {k: 100 * v / len(indices) for k, v in right.items()}
        check_drop(top1['float'], top1['int8'], config.max_drop)
        report = dict(
            model=name,
            class_names=list(loaded.class_names) if loaded.class_names else None,
            float_top1=top1['float'],
            int8_top1=top1['int8'],
            agreement=100 * same / len(indices),
            images=len(indices),
            split=config.split,
            largest_difference_of_a_logit=difference,
            bytes={path.name: path.stat().st_size for path in paths},
            input=dict(shape=[1, *data_config['input_size']], values='the pixel divided by 255'),
            calibration=calibration,
            versions=versions('onnx'),
        )
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        for path in paths:
            with atomic_write(Path(out_dir, path.name), 'wb') as f:
                f.write(path.read_bytes())
        with atomic_write(Path(out_dir, _REPORT)) as f:
            f.write(json.dumps(report, indent=2))
    return report
