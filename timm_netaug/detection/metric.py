"""Average precision of detections, computed by torchmetrics on faster-coco-eval."""
import importlib.util
import logging
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
import torch.distributed as dist

from ..errors import UserError
from .fcos import Fcos, Output, Target

__all__ = ['METRICS', 'DetectionEvaluator', 'check_metric']

# Ours -> torchmetrics' name. In percent. COCO's definition: precision at 101 values of recall, not VOC07's 11.
METRICS = dict(AP='map', AP50='map_50', AP75='map_75', AP_small='map_small', AP_medium='map_medium',
               AP_large='map_large')
logging.getLogger('faster_coco_eval').setLevel(logging.WARNING)  # it prints a table at every evaluation
_PACKAGES = dict(torchmetrics='torchmetrics', faster_coco_eval='faster-coco-eval')


def check_metric() -> None:
    """Refuse to begin what could not be evaluated.

    Raises:
        UserError: A package of the extra `detection` is not installed.
    """
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'The average precision needs {" and ".join(missing)}: pip install {" ".join(missing)} (or'
                        f' timm_netaug[detection]).')


class DetectionEvaluator:
    """Accumulates detections, with the interface of timm's evaluators.

    Boxes are compared in pixels of the original images. Sizes are COCO's: small below 32 x 32 pixels, large from
    96 x 96. A metric is None where no image has objects of the kind.

    Args:
        fcos: Decodes the raw predictions, and computes their loss.
        class_names: For AP by class; None without it.
    """
    default_metric = 'AP50'
    metric_names = ('loss', *METRICS)

    def __init__(self, fcos: Fcos, class_names: Optional[Sequence[str]] = None):
        self.fcos = fcos
        self.class_names = class_names
        self.num_samples = 0
        self.loss_sum = 0.0
        self.found: Dict[int, Dict[str, torch.Tensor]] = {}  # by index of the image
        self.true: Dict[int, Dict[str, torch.Tensor]] = {}
        self.by_class: Dict[str, Optional[float]] = {}

    @torch.no_grad()
    def update(self, output: Output, target: Sequence[Target]) -> None:
        """Add a batch.

        Args:
            output: Raw predictions of `DenseDetector`.
            target: Of every image, as `DetectionDataset` has them in evaluation.
        """
        height, width = (n * 8 for n in output['cls_logits'][0].shape[-2:])
        self.loss_sum += self.fcos(output, target).item() * len(target)
        self.num_samples += len(target)
        for found, true in zip(self.fcos.detections(output), target):
            index, size = int(true['index']), true['size'].cpu()
            factor = torch.tensor([size[1] / width, size[0] / height] * 2)
            self.found[index] = dict(boxes=found['boxes'].cpu() * factor, scores=found['scores'].cpu(),
                                     labels=found['labels'].cpu())
            self.true[index] = dict(boxes=true['true_boxes'].cpu(), labels=true['true_labels'].cpu(),
                                    iscrowd=true['ignored'].cpu().long())

    def summary(self) -> Dict[str, float]:
        """Return what is known before the end: the loss."""
        return dict(loss=self.loss_sum / max(self.num_samples, 1))

    def compute(self, distributed: bool = False) -> Dict[str, Optional[float]]:
        """Return 'loss' and the metrics in percent; `by_class` has AP by class then.

        Args:
            distributed: Gather the images of all processes, which all call this.
        """
        if distributed:
            parts: List[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (self.found, self.true, self.loss_sum, self.num_samples))
            self.found = {k: v for part in parts for k, v in part[0].items()}
            self.true = {k: v for part in parts for k, v in part[1].items()}
            self.loss_sum, self.num_samples = (sum(part[i] for part in parts) for i in (2, 3))
        metrics = average_precision(self.found, self.true, self.class_names)
        self.by_class = metrics.pop('by_class')
        return dict(loss=self.loss_sum / max(self.num_samples, 1), **metrics)


def average_precision(
        found: Mapping[int, Dict[str, torch.Tensor]],
        true: Mapping[int, Dict[str, torch.Tensor]],
        class_names: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """Compute COCO's metrics, in percent, of boxes by image.

    Args:
        found: 'boxes' (N, 4), 'scores' and 'labels' (N,) of every image.
        true: 'boxes', 'labels' and 'iscrowd' of every image.

    Returns:
        The metrics by our names, None for those without any object, and 'by_class': AP by class.
    """
    check_metric()
    from torchmetrics.detection import MeanAveragePrecision  # of the extra `detection`
    metric = MeanAveragePrecision(backend='faster_coco_eval', class_metrics=class_names is not None)
    metric.warn_on_many_detections = False
    indices = sorted(true)
    metric.update([found[i] for i in indices], [true[i] for i in indices])
    values = metric.compute()

    def percent(value: torch.Tensor) -> Optional[float]:
        return 100 * value.item() if value.item() >= 0 else None  # -1 stands for no object

    metrics: Dict[str, Any] = {name: percent(values[key]) for name, key in METRICS.items()}
    metrics['by_class'] = {}
    if class_names is not None:
        seen = dict(zip(values['classes'].reshape(-1).tolist(), values['map_per_class'].reshape(-1)))
        metrics['by_class'] = {name: percent(seen[i]) if i in seen else None for i, name in enumerate(class_names)}
    return metrics
