"""The deployment of a detector: its dense part as an int8 file, the average precision measured with that file.

The file ends at the raw predictions. Decoding and non-maximum suppression are the program's on the chip; `model.h`
says how.
"""
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..detection.annotations import Split, find_classes, read_split
from ..detection.data import DetectionDataset, collate, pixel_transform
from ..detection.detector import Detector
from ..detection.fcos import STRIDES, Output
from ..detection.folder import architecture_of
from ..detection.metric import DetectionEvaluator, check_metric
from ..errors import UserError
from .images import normalised
from .measure import from_camera, progress
from .pipeline import DeployConfig, build, check_calibration, check_drop, require_chain, write_deployment
from .tflm import Tflm

__all__ = ['DenseOutputs', 'deploy_detector', 'measure_detector', 'raw_predictions']

_KINDS = ('cls_logits', 'bbox_regression', 'bbox_ctrness')  # of the predictions at each stride, in the file's order
_METRICS = ('AP', 'AP50')
_BATCH = 32  # images


class DenseOutputs(nn.Module):
    """A dense part that returns a tuple of nine predictions, as a file has them: each kind at the strides 8, 16, 32."""

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


def _class_names(detector: Detector, name: str, calibrated: Split, evaluated: Split) -> List[str]:
    """Return the names of the classes in label order. A detector without names takes those of the calibration split.

    Raises:
        UserError: The data have another number of classes than the detector, or a class that it does not know.
    """
    num_classes, names = detector.config.num_classes, detector.config.class_names
    if names is None:
        names = find_classes(calibrated)
        if len(names) != num_classes:
            raise UserError(f'{name} has {num_classes} classes without names, and the {calibrated.name} split has'
                            f' {len(names)}: write the names in label order into its config.json (class_names).')
    return find_classes(evaluated, class_names=names)


def _pixels(dataset: DetectionDataset, indices: Sequence[int]) -> Tuple[np.ndarray, List[Dict[str, torch.Tensor]]]:
    """Return pixels (uint8, N x H x W x C) and targets of images."""
    images, targets = collate([dataset[i] for i in indices])
    return images.permute(0, 2, 3, 1).numpy(), targets


def _without_objects(split: Split) -> Split:
    """Return the images of a split alone: calibration takes no labels, so it takes classes of any kind."""
    images = [replace(image, boxes=image.boxes[:0], classes=(), ignored=image.ignored[:0], trained=image.trained[:0])
              for image in split.images]
    return replace(split, images=images)


def _drawn(split: Split, count: int, seed: int) -> List[int]:
    """Draw images of a split, 0 for all."""
    order = np.random.default_rng(seed).permutation(len(split.images))
    return sorted(order[:count or None].tolist())


@torch.inference_mode()
def measure_detector(
        detector: Detector,
        file: Tflm,
        dataset: DetectionDataset,
        indices: Sequence[int],
        data_config: Mapping[str, Any],
        say: Callable[[str], None],
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Return the metrics, in percent, of the PyTorch model and of its file on the same images."""
    evaluators = [DetectionEvaluator(detector.fcos) for _ in range(2)]
    with progress(len(indices), say) as advance:
        for start in range(0, len(indices), _BATCH):
            pixels, targets = _pixels(dataset, indices[start:start + _BATCH])
            evaluators[0].update(detector.dense(normalised(pixels, data_config)), targets)
            evaluators[1].update(raw_predictions(file, from_camera(pixels)), targets)
            advance(len(pixels))
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
    """Write the files of a detector's dense part, as `pipeline.deploy` does for a classifier: with the same further
    arguments, result and errors.

    Args:
        detector: On the CPU.
        data_dir: Data set in the layout of Pascal VOC or COCO.
    """
    check_metric()
    require_chain()
    detector.eval()
    data_config, transform = detector.config.data_config, pixel_transform(detector.config.data_config)
    calibrated, evaluated = (read_split(data_dir, split) for split in (config.calibration_split, config.split))
    names = _class_names(detector, name, calibrated, evaluated)
    for note in evaluated.notes:
        say(note)
    indices = _drawn(calibrated, config.calibration_images, config.seed)
    check_calibration(len(indices), config.calibration_split)
    pixels = _pixels(DetectionDataset(_without_objects(calibrated), names, transform), indices)[0]
    dataset, measured = DetectionDataset(evaluated, names, transform), _drawn(evaluated, config.images, config.seed)
    if all(evaluated.images[i].ignored.all() for i in measured):
        raise UserError(f'The {len(measured)} images of the {config.split} split that are measured have no objects:'
                        f' measure more (--images), or another split (--split).')
    compared = _pixels(dataset, measured[:config.compared_images])[0]
    data, file, report = build(
        detector.dense, DenseOutputs(detector.dense), name, data_config, pixels, compared, config, say)
    say(f'Measuring the average precision on {len(measured):,} images.')
    in_float, in_int8 = measure_detector(detector, file, dataset, measured, data_config, say)
    check_drop(in_float['AP50'], in_int8['AP50'], config.max_drop, 'AP50')
    kinds = [(kind, stride) for kind in _KINDS for stride in STRIDES]
    decoder = detector.fcos.torchvision
    report.update(
        architecture=architecture_of(detector.config),
        class_names=list(detector.config.class_names) if detector.config.class_names else None,
        float=in_float,
        int8=in_int8,
        images=len(measured),
        split=config.split,
        outputs=[dict(kind=kind, stride=stride, **output.to_dict())
                 for (kind, stride), output in zip(kinds, file.outputs)],
        decoding=dict(anchor_scale=detector.config.scale, score_thresh=decoder.score_thresh,
                      nms_thresh=decoder.nms_thresh, detections_per_img=decoder.detections_per_img),
        calibration=dict(images=len(pixels), split=config.calibration_split, seed=config.seed),
    )
    write_deployment(Path(out_dir), data, report)
    return report
