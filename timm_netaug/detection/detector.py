"""The network of a tiny detector on any timm backbone.

Its dense part, images to raw predictions, is one plain module (`DenseDetector`): what is trained, augmented, exported
and counted. `Detector` is that and the decoding of its predictions into boxes.
"""
import dataclasses
import logging
import math
from dataclasses import dataclass, field
from typing import Any, Container, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import create_model
from timm.data import resolve_data_config

from ..errors import UserError, check_model_name
from ..fetch import local_name
from .fcos import STRIDES, Fcos, Output

__all__ = ['DenseDetector', 'Detector', 'DetectorConfig', 'build_detector', 'create_backbone', 'describe_detector',
           'name_in_model']

_PRIOR = 0.01  # share of points that are taken for an object before the training (arXiv 1708.02002, section 3.3)
_FIRST_BOX = 4.0  # sides of the boxes before the training, in anchors: where the range of every level begins
_DIVISOR = STRIDES[-1]
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic')  # that torchvision has for tensors


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is built of, and how its images are prepared. It is saved beside the weights.

    Args:
        backbone: Name of the timm architecture.
        num_classes: Classes of objects, without the background.
        img_size: Height and width of the input in training, multiples of 32.
        backbone_args: Arguments of the backbone's constructor.
        channels: Of the neck and the head.
        class_names: In label order, None where they are not known.
        mean, std: Of the pixels from 0 to 1, by channel.
        interpolation: How images are resized.
        scale: See `Fcos`.

    Raises:
        ValueError: A field is out of its range.
    """
    backbone: str
    num_classes: int
    img_size: Tuple[int, int]
    backbone_args: Dict[str, Any] = field(default_factory=dict)
    channels: int = 48
    class_names: Optional[Tuple[str, ...]] = None
    mean: Tuple[float, ...] = (0.485, 0.456, 0.406)
    std: Tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = 'bilinear'
    scale: Optional[float] = None

    def __post_init__(self):
        size = (self.img_size,) * 2 if isinstance(self.img_size, int) else tuple(self.img_size)
        if len(size) != 2 or any(type(n) is not int or n < _DIVISOR or n % _DIVISOR for n in size):
            near = ' x '.join(str(max(1, round(n / _DIVISOR)) * _DIVISOR) for n in size)
            raise ValueError(f'A detector takes images whose height and width are multiples of {_DIVISOR}, got'
                             f' {" x ".join(map(str, size))}: take {near}.')
        for name in ('num_classes', 'channels'):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f'{name} of a detector must be a whole number of at least 1, got'
                                 f' {getattr(self, name)!r}.')
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f'A detector of {self.num_classes} classes needs as many class names, got'
                             f' {len(self.class_names)}.')
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f'A detector resizes images by one of {", ".join(_INTERPOLATIONS)}, got'
                             f' {self.interpolation!r}.')
        for name in ('mean', 'std'):
            if len(getattr(self, name)) != 3:
                raise ValueError(f'{name} of a detector must be three numbers, one for each channel, got'
                                 f' {getattr(self, name)!r}.')
        values = dict(img_size=size, scale=Fcos.scale_of(size) if self.scale is None else float(self.scale))
        for name in ('class_names', 'mean', 'std'):
            if getattr(self, name) is not None:
                values[name] = tuple(getattr(self, name))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> Dict[str, Any]:
        """Return the fields as plain data, which JSON and `weights_only` checkpoints can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> 'DetectorConfig':
        """Build a config of plain data; fields of a later version are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in fields.items() if k in known})

    @property
    def data_config(self) -> Dict[str, Any]:
        """How images are prepared, in timm's terms: the whole image is resized, its aspect ratio is not kept."""
        return dict(input_size=(3, *self.img_size), mean=self.mean, std=self.std, interpolation=self.interpolation,
                    crop_pct=1.0, crop_mode='squash')


class _Separable(nn.Sequential):
    """A depthwise 3x3 convolution and a pointwise one, then BatchNorm and ReLU, or a bias for a prediction."""

    def __init__(self, channels: int, out_channels: int, is_prediction: bool = False):
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, out_channels, 1, bias=is_prediction),
            *(() if is_prediction else (nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))),
        )


class DenseDetector(nn.Module):
    """Images to raw predictions: a timm backbone, a top-down neck, and a head that all levels share.

    The neck and the head are made of separable convolutions. They are plain layers, so that `augment` follows them into
    the backbone, and exporters take them.

    Args:
        backbone: A `features_only` model of timm with features at the strides 8, 16 and 32.
        config: Of the detector.
    """

    def __init__(self, backbone: nn.Module, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        # What timm's helpers and `augment` read of a model.
        self.pretrained_cfg = dict(config.data_config, architecture=config.backbone)
        channels, levels = config.channels, range(len(STRIDES))
        self.backbone = backbone
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
            for n in backbone.feature_info.channels())
        self.smooth = nn.ModuleList(_Separable(channels, channels) for _ in levels)
        self.class_tower = _Separable(channels, channels)
        self.box_tower = _Separable(channels, channels)
        self.classes = _Separable(channels, config.num_classes, is_prediction=True)
        self.boxes = _Separable(channels, 4, is_prediction=True)
        self.centerness = _Separable(channels, 1, is_prediction=True)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in (*self.lateral.modules(), *self.smooth.modules(), *self.class_tower, *self.box_tower,
                       *self.classes, *self.boxes, *self.centerness):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity='relu')  # by the inputs: depthwise ones have 9
        for prediction in (self.classes, self.boxes, self.centerness):
            nn.init.normal_(prediction[-1].weight, std=0.01)
        nn.init.constant_(self.classes[-1].bias, -math.log((1 - _PRIOR) / _PRIOR))
        nn.init.constant_(self.boxes[-1].bias, _FIRST_BOX)
        nn.init.zeros_(self.centerness[-1].bias)

    def forward(self, images: torch.Tensor) -> Output:
        """Compute the raw predictions of normalised images (B, 3, H, W).

        Returns:
            For every stride s of 8, 16 and 32: 'cls_logits' (B, classes, H/s, W/s), 'bbox_regression' (B, 4, H/s, W/s),
            the distances from the point to the left, upper, right and lower side in anchor sizes, and 'bbox_ctrness'
            (B, 1, H/s, W/s), a logit.
        """
        levels = [lateral(x) for lateral, x in zip(self.lateral, self.backbone(images))]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], scale_factor=2.0, mode='nearest')
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels)]
        class_features, box_features = [self.class_tower(x) for x in levels], [self.box_tower(x) for x in levels]
        return dict(
            cls_logits=[self.classes(x) for x in class_features],
            bbox_regression=[F.relu(self.boxes(x)) for x in box_features],
            bbox_ctrness=[self.centerness(x) for x in box_features],
        )


class Detector(nn.Module):
    """A dense part, and the decoding of its predictions into boxes.

    Args:
        dense: The weights; a super-network of it works, too.
        config: Of the detector.
    """

    def __init__(self, dense: nn.Module, config: DetectorConfig):
        super().__init__()
        self.dense = dense
        self.config = config
        self.fcos = Fcos(config.num_classes, config.scale)

    def forward(self, images: torch.Tensor) -> List[Dict[str, torch.Tensor]]:
        """Find the objects in normalised images (B, 3, H, W).

        Returns:
            For every image 'boxes' (N, 4), left, upper, right and lower side in pixels of the input, 'scores' (N,), the
            best first, and 'labels' (N,).
        """
        return self.fcos.detections(self.dense(images))


def create_backbone(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a timm model that returns its features at the strides 8, 16 and 32.

    Args:
        name: Of timm's models; `local-dir:DIR` or `hf-hub:OWNER/NAME`.
        pretrained: Load its weights.
        kwargs: Further arguments of its constructor.

    Raises:
        UserError: There is no such model, or it has no such features.
    """
    check_model_name(name)
    source = local_name(name, weights=pretrained)
    logger = logging.getLogger('timm.models._builder')

    def build(indices: Optional[Sequence[int]], pretrained: bool) -> nn.Module:
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of the head's weights, which no backbone has
        try:
            return create_model(source, pretrained=pretrained, features_only=True,
                                **({} if indices is None else dict(out_indices=indices)), **kwargs)
        except Exception as e:  # whatever a constructor, a folder or the Hub find wrong
            told = ' '.join(str(e).split())[:300].rstrip('.')
            raise UserError(f'{name} cannot be built as a backbone: {told}.') from e
        finally:
            logger.setLevel(level)

    with torch.device('meta'):
        strides = build(None, False).feature_info.reduction()
    wanted = [i for i, stride in enumerate(strides) if stride in STRIDES]
    if [strides[i] for i in wanted] != list(STRIDES):
        raise UserError(f'{name} has features at the strides {", ".join(map(str, strides))}, and a detector needs those'
                        f' at {", ".join(map(str, STRIDES))}: take a convolutional network, such as netaug_mbv2_tiny.')
    return build(wanted, pretrained)


def name_in_model(name: str, names: Container[str]) -> Optional[str]:
    """Return the name that a tensor of a backbone has in the whole model.

    timm's `FeatureListNet` flattens the sequential layers of some models: `stages.0.x` of the model is `stages_0.x` of
    its backbone. `FeatureGetterNet` puts `model.` in front.

    Args:
        name: Name of the tensor in the backbone.
        names: Names of the tensors of the whole model.

    Returns:
        The name, None if the model has no such tensor.
    """
    head, _, rest = name.partition('.')
    flattened = (f'{head[:i]}.{head[i + 1:]}.{rest}' for i, letter in enumerate(head) if letter == '_')
    candidates = (name, *flattened, *([rest] if head == 'model' else []))
    return next((candidate for candidate in candidates if candidate in names), None)


def describe_detector(backbone: nn.Module, num_classes: int, img_size: Any, **fields: Any) -> DetectorConfig:
    """Return the config of a detector on a backbone that has been built.

    Args:
        fields: Further fields of `DetectorConfig`; the normalisation is the backbone's where they say nothing else.
    """
    left_out = ('features_only', 'out_indices', 'num_classes', 'netaug', 'pretrained_model_args')
    args = {k: v for k, v in getattr(backbone, '_model_args', {}).items() if k not in left_out}
    data_config = resolve_data_config(pretrained_cfg=backbone.pretrained_cfg)
    own = {k: data_config[k] for k in ('mean', 'std', 'interpolation')}
    return DetectorConfig(backbone.pretrained_cfg['architecture'], num_classes, img_size, args, **{**own, **fields})


def build_detector(config: DetectorConfig) -> Detector:
    """Build a detector of a config, without trained weights.

    Raises:
        UserError: Its backbone cannot be built.
    """
    return Detector(DenseDetector(create_backbone(config.backbone, **config.backbone_args), config), config)
