"""Tiny detectors on timm backbones: `create_detector`. The command lines are `train_detection.py` and
`validate_detection.py`."""
from .detector import DenseDetector, Detector, DetectorConfig, create_backbone, create_detector
from .fcos import Fcos
from .folder import export_detector
from .task import DetectionTask, NetAugDetectionTask

__all__ = ['DenseDetector', 'DetectionTask', 'Detector', 'DetectorConfig', 'Fcos', 'NetAugDetectionTask',
           'create_backbone', 'create_detector', 'export_detector']
