"""Annotated images as batches: transforms that boxes follow, the data set, and how samples are put together."""
from typing import Any, Iterator, List, Mapping, Sequence, Tuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..errors import UserError, first_line
from ..io.data import eight_bits
from .annotations import Split
from .fcos import Target

__all__ = ['DetectionDataset', 'DetectionLoader', 'collate', 'eval_transform', 'pixel_transform', 'train_transform']


class _Crop(v2.RandomIoUCrop):
    """torchvision's crop around some of the objects, for images with objects alone: it needs one."""

    def __call__(self, image: torch.Tensor, target: Target) -> Tuple[torch.Tensor, Target]:
        return super().__call__(image, target) if len(target['boxes']) else (image, target)


def train_transform(
        data_config: Mapping[str, Any],
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.0,
        crop_prob: float = 0.0,
        scale: Sequence[float] = (0.3, 1.0),
        ratio: Sequence[float] = (0.5, 2.0),
) -> v2.Transform:
    """Return the transform of an image and its target in training.

    Args:
        data_config: How images are prepared, in timm's terms.
        hflip, vflip: Probabilities of flips.
        color_jitter: Factor of brightness, contrast and saturation.
        crop_prob: Probability of a crop around some of the objects.
        scale: Sides of the crop, relative to the image.
        ratio: Aspect ratios of the crop.
    """
    crop = [v2.RandomApply([_Crop(*scale, *ratio)], p=crop_prob)] if crop_prob else []
    jitter = [v2.ColorJitter(*[color_jitter] * 3)] if color_jitter else []
    flips = [v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)]
    return v2.Compose([*crop, *_resized(data_config), *flips, v2.SanitizeBoundingBoxes(), *jitter,
                       *_normalised(data_config)])


def eval_transform(data_config: Mapping[str, Any]) -> v2.Transform:
    """Return the transform of an image and its target in evaluation: the whole image, resized."""
    return v2.Compose([*_resized(data_config), *_normalised(data_config)])


def pixel_transform(data_config: Mapping[str, Any]) -> v2.Transform:
    """Return the transform of evaluation up to the pixels, uint8, of the size of the input."""
    return v2.Compose(_resized(data_config))


def _resized(data_config: Mapping[str, Any]) -> List[Any]:
    mode = v2.InterpolationMode(data_config['interpolation'])
    return [v2.Resize(list(data_config['input_size'][1:]), mode, antialias=True)]


def _normalised(data_config: Mapping[str, Any]) -> List[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data_config['mean'], data_config['std'])]


class DetectionDataset(Dataset):
    """Images (3, H, W), normalised, with their targets.

    A target has 'boxes' (N, 4) in pixels of the input and 'labels' (N,). In evaluation it has, besides, what the metric
    takes: all objects in pixels of the image ('true_boxes', 'true_labels', 'ignored'), the image's 'size' (height and
    width) and its 'index'.

    Args:
        split: Part of a data set.
        class_names: In label order.
        transform: Of an image and its target.
        is_training: Leave out what the metric takes.
    """

    def __init__(self, split: Split, class_names: Sequence[str], transform: v2.Transform, is_training: bool = False):
        self.split = split
        self.labels = {name: i for i, name in enumerate(class_names)}
        self.transform = transform
        self.is_training = is_training

    def __len__(self) -> int:
        return len(self.split.images)

    def image(self, index: int) -> Image.Image:
        """Read an image as it is.

        Raises:
            UserError: It cannot be read, or does not have the size that its annotation was made for.
        """
        item = self.split.images[index]
        try:
            with Image.open(item.file) as image:
                image = eight_bits(image).convert('RGB')
        except Exception as e:  # whatever Pillow finds wrong
            raise UserError(f'{item.file} cannot be read as an image ({first_line(e)}): mend it, or take it out of the'
                            f' split.') from e
        if (image.height, image.width) != tuple(item.size):
            raise UserError(f'{item.file} has {image.height} x {image.width} pixels, and its annotation says'
                            f' {item.size[0]} x {item.size[1]}: mend the annotation.')
        return image

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Target]:
        item = self.split.images[index]
        labels = torch.tensor([self.labels[c] for c in item.classes], dtype=torch.int64)
        boxes = tv_tensors.BoundingBoxes(
            item.boxes[item.trained], format='XYXY', canvas_size=item.size, dtype=torch.float32)
        target = dict(boxes=boxes, labels=labels[item.trained])
        image, target = self.transform(v2.functional.to_image(self.image(index)), target)
        target = dict(boxes=target['boxes'].as_subclass(torch.Tensor), labels=target['labels'])
        if not self.is_training:
            target.update(true_boxes=item.boxes, true_labels=labels, ignored=item.ignored,
                          size=torch.tensor(item.size), index=torch.tensor(index))
        return image.as_subclass(torch.Tensor), target


def collate(samples: Sequence[Tuple[torch.Tensor, Target]]) -> Tuple[torch.Tensor, List[Target]]:
    """Make a batch: images (B, 3, H, W), and a list of B targets."""
    images, targets = zip(*samples)
    return torch.stack(images), list(targets)


class DetectionLoader(DataLoader):
    """A loader of batches whose worker processes report an unusable image in one sentence, as one process does."""

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except UserError as e:  # of a worker, its text is a traceback whose last line has the message
            last = str(e).strip().splitlines()[-1]
            raise UserError(last.removeprefix(f'{UserError.__module__}.{UserError.__qualname__}: ')) from e
