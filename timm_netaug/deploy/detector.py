"""The deployment of a detector: its dense part as an int8 file, the average precision measured with that file.

The file ends at the raw predictions. Decoding and non-maximum suppression are the program's on the chip; `model.h`
says how.
"""
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..detection.annotations import Split, find_classes, read_split
from ..detection.data import DetectionDataset, collate, pixel_transform
from ..detection.detector import Detector
from ..detection.fcos import STRIDES, Output
from ..detection.metric import DetectionEvaluator, check_metric
from ..errors import UserError
from .images import normalised
from .measure import from_camera
from .pipeline import DeployConfig, build, check_drop, require_chain, write_deployment
from .tflm import Tflm

__all__ = ['DenseOutputs', 'deploy_detector', 'raw_predictions']

_KINDS = ('cls_logits', 'bbox_regression', 'bbox_ctrness')  # of the predictions at each stride, in the file's order
_METRICS = ('AP', 'AP50')
_BATCH = 32  # images


class DenseOutputs(nn.Module):
    """A dense part whose nine predictions are a tuple, as a file has them: kind by kind, each at the strides 8 to 32."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        self.dense = dense

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        output = self.dense(images)
        return tuple(level for kind in _KINDS for level in output[kind])


def raw_predictions(file: Tflm, images: np.ndarray) -> Output:
    """Run the file of a dense part.

    Args:
        images: int8, N x H x W x C.

    Returns:
        What `DenseDetector` returns for these images.
    """
    found = [file(image) for image in images]
    levels = [torch.from_numpy(output.values(np.stack(values))).permute(0, 3, 1, 2)
              for output, values in zip(file.outputs, zip(*found))]
    return {kind: levels[i * len(STRIDES):(i + 1) * len(STRIDES)] for i, kind in enumerate(_KINDS)}


def _pixels(dataset: DetectionDataset, indices: Sequence[int]) -> Tuple[np.ndarray, List[Dict[str, torch.Tensor]]]:
    """Return pixels (uint8, N x H x W x C) and targets of images."""
    images, targets = collate([dataset[i] for i in indices])
    return images.permute(0, 2, 3, 1).numpy(), targets


def _drawn(split: Split, count: int, seed: int) -> List[int]:
    """Draw images of a split, 0 for all."""
    order = np.random.default_rng(seed).permutation(len(split.images))
    return sorted(order[:count or None].tolist())


@torch.inference_mode()
def _measure(
        detector: Detector,
        file: Tflm,
        dataset: DetectionDataset,
        indices: Sequence[int],
        data_config: Mapping[str, Any],
        say: Callable[[str], None],
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Return the metrics, in percent, of the PyTorch model and of its file on the same images."""
    evaluators = [DetectionEvaluator(detector.fcos) for _ in range(2)]
    with tqdm(total=len(indices), desc='Measure', unit='image', leave=False, disable=None, dynamic_ncols=True) as bar:
        for start in range(0, len(indices), _BATCH):
            pixels, targets = _pixels(dataset, indices[start:start + _BATCH])
            evaluators[0].update(detector.dense(normalised(pixels, data_config)), targets)
            evaluators[1].update(raw_predictions(file, from_camera(pixels)), targets)
            bar.update(len(pixels))
            done = start + len(pixels)
            if bar.disable and done * 10 // len(indices) > start * 10 // len(indices):
                say(f'  {done:,} of {len(indices):,} images')
    in_float, in_int8 = ({k: v for k, v in e.compute().items() if k in _METRICS} for e in evaluators)
    return in_float, in_int8


def deploy_detector(
        detector: Detector,
        name: str,
        out_dir: str,
        data_dir: str,
        config: DeployConfig = DeployConfig(split='val'),
        say: Callable[[str], None] = print,
) -> Dict[str, Any]:
    """Write `model.tflite`, `model.h`, `model.cc` and `report.json` of a detector's dense part, if the file is good.

    Args:
        detector: In evaluation mode, on the CPU.
        name: What messages and the report call it.
        out_dir: Folder for the files.
        data_dir: Data set in the layout of Pascal VOC or COCO.
        say: Is called with a line for every step.

    Returns:
        The report: plain data, the contents of `report.json`.

    Raises:
        UserError: A package is missing, the data set does not fit, an operator has no int8 form, or the file is not
            good. Nothing has been written.
    """
    check_metric()
    require_chain()
    data_config, transform = detector.config.data_config, pixel_transform(detector.config.data_config)
    calibrated, evaluated = (read_split(data_dir, split) for split in (config.calibration_split, config.split))
    names = find_classes(evaluated, class_names=detector.config.class_names)
    find_classes(calibrated, class_names=names)
    indices = _drawn(calibrated, config.calibration_images, config.seed)
    if len(indices) < 10:
        raise UserError(f'The {config.calibration_split} split has {len(indices)} images, which is too few to calibrate'
                        f' with: give at least 10, and better 200.')
    pixels = _pixels(DetectionDataset(calibrated, names, transform), indices)[0]
    dataset, measured = DetectionDataset(evaluated, names, transform), _drawn(evaluated, config.images, config.seed)
    compared = _pixels(dataset, measured[:config.compared_images])[0]
    data, file, report = build(
        detector.dense, DenseOutputs(detector.dense), name, data_config, pixels, compared, config, say)
    say(f'Measuring the average precision on {len(measured):,} images.')
    in_float, in_int8 = _measure(detector, file, dataset, measured, data_config, say)
    if in_float['AP50'] is None:
        raise UserError(f'The measured images of the {config.split} split have no objects: name another one (--split).')
    check_drop(in_float['AP50'], in_int8['AP50'], config.max_drop, 'AP50')
    kinds = [(kind, stride) for kind in _KINDS for stride in STRIDES]
    report.update(
        class_names=list(names),
        float=in_float,
        int8=in_int8,
        images=len(measured),
        split=config.split,
        outputs=[dict(kind=kind, stride=stride, **output.to_dict())
                 for (kind, stride), output in zip(kinds, file.outputs)],
        anchor_scale=detector.config.scale,
        calibration=dict(images=len(pixels), split=config.calibration_split, seed=config.seed),
        beside=[],
    )
    write_deployment(Path(out_dir), data, report)
    return report
