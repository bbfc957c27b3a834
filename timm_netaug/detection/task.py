"""Training tasks of detectors: those of classifiers, with the loss of FCOS and an evaluator of detections."""
from typing import Any, Optional

import torch.nn as nn
from timm.task import ClassificationTask

from ..task import NetAugTask
from .fcos import Fcos
from .metric import DetectionEvaluator

__all__ = ['DetectionTask', 'NetAugDetectionTask']


class _Detection:
    """What a task of either kind has for detection.

    Args:
        model: The dense part of a detector, or a super-network of it.
        fcos: The loss, and the decoding of boxes in evaluation.
        kwargs: Arguments of the task.
    """

    def __init__(self, model: nn.Module, fcos: Fcos, **kwargs: Any):
        super().__init__(model, criterion=fcos, **kwargs)
        self.evaluator: Optional[DetectionEvaluator] = None

    def create_evaluator(self, *args: Any, **kwargs: Any) -> DetectionEvaluator:
        """Return a new evaluator, which `evaluator` keeps: it holds the detections of the last evaluation."""
        self.evaluator = DetectionEvaluator(self.criterion)
        return self.evaluator


class DetectionTask(_Detection, ClassificationTask):
    """Training of a detector."""


class NetAugDetectionTask(_Detection, NetAugTask):
    """Training of a detector with NetAug."""
