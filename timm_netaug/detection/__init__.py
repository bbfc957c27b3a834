"""Tiny detectors on timm backbones: `create_detector`. The command lines are `train_detection.py` and
`validate_detection.py`."""
from .annotations import read_split
from .create import create_detector
from .detector import DenseDetector, Detector, DetectorConfig, create_backbone
from .evaluate import evaluate_detector, predict
from .fcos import Fcos
from .folder import export_detector
from .pictures import draw, draw_grid
from .task import DetectionTask, NetAugDetectionTask

__all__ = ['DenseDetector', 'DetectionTask', 'Detector', 'DetectorConfig', 'Fcos', 'NetAugDetectionTask',
           'create_backbone', 'create_detector', 'draw', 'draw_grid', 'evaluate_detector', 'export_detector', 'predict',
           'read_split']
