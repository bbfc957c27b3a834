"""Loss and boxes of FCOS (arXiv 1904.01355), computed by torchvision from the raw predictions of a detector."""
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

__all__ = ['Fcos', 'Output', 'Target', 'STRIDES']

STRIDES = (8, 16, 32)
Output = Dict[str, List[torch.Tensor]]  # of `DenseDetector`
Target = Dict[str, torch.Tensor]  # of an image: 'boxes' (N, 4), in pixels of the input, and 'labels' (N,), from 0
_BASE_SIZE = 640  # pixels of the longer side at which the size ranges of torchvision's strides are right
_MIN_SCALE = 0.4  # below it, the ranges of the coarse levels are narrower than the grids of their points
_CENTER_RADIUS = 1.5  # strides


class _Loss(FCOSHead):
    """The loss of torchvision's head, without its layers."""

    def __init__(self, num_classes: int):
        nn.Module.__init__(self)
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = SimpleNamespace(num_classes=num_classes)


class Fcos(nn.Module):
    """What FCOS makes of raw predictions. It has no weights.

    torchvision lets the level of stride s learn the boxes whose farthest side is 4 to 8 anchor sizes away from the
    point, where an anchor is as large as the stride. That is made for images of 800 pixels: in small images nearly all
    boxes fall to the finest level. So the anchors, and with them the ranges, are scaled with the input here. The radius
    around a box's centre within which its points lie stays 1.5 strides. Points are the centres of the cells.

    Args:
        num_classes: Classes of objects; there is none for the background.
        scale: Anchor size divided by stride (see `scale_of`).
        score_thresh: Boxes of a lower score are left out.
        nms_thresh: Overlap (IoU) from which the weaker one of two boxes of a class is left out.
        detections_per_img: Boxes of an image, at most.
    """

    def __init__(
            self,
            num_classes: int,
            scale: float,
            score_thresh: float = 0.05,
            nms_thresh: float = 0.6,
            detections_per_img: int = 100,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.scale = scale
        nowhere = nn.Identity()
        nowhere.out_channels = 0
        self.torchvision = FCOS(
            nowhere,
            num_classes,
            anchor_generator=AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * len(STRIDES)),
            head=_Loss(num_classes),
            center_sampling_radius=_CENTER_RADIUS / scale,
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
        )

    @staticmethod
    def scale_of(img_size: Sequence[int]) -> float:
        """Return the scale for an input of this height and width: the longer side, divided by 640, and at least 0.4."""
        return max(max(img_size) / _BASE_SIZE, _MIN_SCALE)

    def anchors(self, sizes: Sequence[Tuple[int, int]], device: Any = None) -> List[torch.Tensor]:
        """Return the anchors of every level (points, 4), in pixels of the input.

        Args:
            sizes: Height and width of every level.
        """
        found = []
        for stride, (height, width) in zip(STRIDES, sizes):
            y, x = torch.meshgrid(
                (torch.arange(height, device=device) + 0.5) * stride,
                (torch.arange(width, device=device) + 0.5) * stride,
                indexing='ij',
            )
            points, half = torch.stack([x, y, x, y], -1).reshape(-1, 4), stride * self.scale / 2
            found.append(points + torch.tensor([-half, -half, half, half], device=device))
        return found

    def _flat(self, output: Output) -> Tuple[Output, List[torch.Tensor]]:
        """Return predictions as torchvision has them, (B, points, values) for every level, and the anchors."""
        flat = {k: [t.float().flatten(2).transpose(1, 2) for t in levels] for k, levels in output.items()}
        levels = output['cls_logits']
        return flat, self.anchors([tuple(t.shape[-2:]) for t in levels], levels[0].device)

    def losses(self, output: Output, targets: Sequence[Target]) -> Dict[str, torch.Tensor]:
        """Return the three losses of FCOS: 'classification', 'bbox_regression' and 'bbox_ctrness'.

        Args:
            output: Raw predictions of a batch, as `DenseDetector` makes them.
            targets: Boxes and labels of every image. They must be valid: `annotations.read_split` sees to it.
        """
        flat, anchors = self._flat(output)
        return self.torchvision.compute_loss(
            list(targets),
            {k: torch.cat(levels, 1) for k, levels in flat.items()},
            [torch.cat(anchors)] * len(targets),
            [len(a) for a in anchors],
        )

    def forward(self, output: Output, targets: Sequence[Target]) -> torch.Tensor:
        """Return the sum of the losses, as the criterion of a training task."""
        return sum(self.losses(output, targets).values())

    @torch.no_grad()
    def detections(self, output: Output) -> List[Dict[str, torch.Tensor]]:
        """Return 'boxes' (N, 4), 'scores' (N,) and 'labels' (N,) of every image, in pixels of the input."""
        flat, anchors = self._flat(output)
        height, width = output['cls_logits'][0].shape[-2:]
        images = len(output['cls_logits'][0])
        size = height * STRIDES[0], width * STRIDES[0]
        return self.torchvision.postprocess_detections(flat, [anchors] * images, [size] * images)

    def has_point(self, boxes: torch.Tensor, img_size: Sequence[int]) -> torch.Tensor:
        """Tell of every box whether a point of any level would learn it, if it were alone in its image.

        Args:
            boxes: (N, 4), in pixels of the input.
            img_size: Height and width of the input.
        """
        anchors = self.anchors([(img_size[0] // s, img_size[1] // s) for s in STRIDES])
        head, self.torchvision.head = self.torchvision.head, _Matched()
        try:
            matched = self.torchvision.compute_loss(
                [dict(boxes=box[None]) for box in boxes], {}, [torch.cat(anchors)] * len(boxes),
                [len(a) for a in anchors])
        finally:
            self.torchvision.head = head
        return torch.stack([(m >= 0).any() for m in matched]) if len(boxes) else torch.zeros(0, dtype=torch.bool)


class _Matched(nn.Module):
    """Stands in for a head to learn which box torchvision has assigned to each point, -1 for none."""

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched: List[torch.Tensor]) -> List[torch.Tensor]:
        return matched
