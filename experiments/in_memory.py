"""Loaders that keep a decoded data set in the memory of the device, for runs on a GPU.

A GPU trains a tiny network on small images faster than processors decode the images. Here, every image is decoded once,
cropped, resized and flipped by the device, many at a time. Crops are drawn as timm draws them (area and aspect ratio,
ten attempts) and resized bilinearly, whatever `--train-interpolation` says. Unlike Pillow, `grid_sample` does not
smooth when it reduces, so store images near the size of training. Validation images are prepared by timm's own
transform.
"""
import fcntl
import hashlib
import math
import os
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform

from timm_netaug.errors import UserError

CACHE = Path(__file__).resolve().parent / 'runs' / 'data'
REFUSED = ('aa', 'aug_splits', 'aug_repeats', 'cutmix_minmax', 'gaussian_blur_prob', 'grayscale_prob', 'in_chans',
           'mixup_off_epoch', 'model_dtype', 'no_aug', 'reprob', 'train_crop_mode', 'train_img_sizes', 'vflip')


def _decoded(args, dataset: Any, transform: Optional[Any]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the images of a data set (N, height, width, 3), each at the top left of its array, their heights and
    widths (N, 2), and their labels (N). What was decoded is kept in a file, until an image or a flag changes."""
    files = [dataset.filename(i, absolute=True) for i in range(len(dataset))]
    state = [(os.path.realpath(file), os.stat(file).st_mtime_ns) for file in files]
    name = repr((state, args.class_map, args.input_img_mode, transform))
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f'{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz'
    with open(path.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process decodes, the others wait for its file
        if not path.exists():
            images, labels = [], []
            for image, label in (dataset[i] for i in range(len(dataset))):
                image = image if transform is None else transform(image).permute(1, 2, 0)
                images.append(np.asarray(image, dtype=np.uint8))
                labels.append(label)
            sizes = np.array([image.shape[:2] for image in images])
            canvas = np.zeros((len(images), *sizes.max(0), 3), np.uint8)
            for whole, image in zip(canvas, images):
                whole[:image.shape[0], :image.shape[1]] = image
            temporary = path.with_suffix(f'.{os.getpid()}.npz')
            np.savez(temporary, images=canvas, sizes=sizes, labels=np.array(labels))
            temporary.rename(path)
    with np.load(path) as content:
        return content['images'], content['sizes'], content['labels']


class _Loader:
    """What both loaders share: images in the device's memory, and the members that train.py reads."""

    def __init__(self, args, dataset, transform, data_config, device: torch.device, batch_size: int):
        images, self.sizes, labels = _decoded(args, dataset, transform)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        self.size = data_config['input_size'][-2:]
        self.mean, self.std = (
            torch.tensor(data_config[key], device=device).view(1, 3, 1, 1) * 255 for key in ('mean', 'std'))

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class TrainLoader(_Loader):
    """Batches of cropped and flipped images (B, 3, height, width), without the last, smaller one."""

    def __init__(self, args, dataset, data_config, device):
        super().__init__(args, dataset, None, data_config, device, args.batch_size)
        self.scale, self.ratio, self.hflip = args.scale or (0.08, 1), args.ratio or (3 / 4, 4 / 3), args.hflip
        self.mixup = Mixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob, mode=args.mixup_mode,
            switch_prob=args.mixup_switch_prob, label_smoothing=args.smoothing, num_classes=args.num_classes,
        ) if args.mixup or args.cutmix else None

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def boxes(self) -> np.ndarray:
        """Draw a crop for every image: top, left, height, width (N, 4)."""
        height, width = self.sizes.T[:, :, None]
        area = height * width * np.random.uniform(*self.scale, (len(self.sizes), 10))
        ratio = np.exp(np.random.uniform(*np.log(self.ratio), area.shape))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w <= width) & (h <= height)
        first = fits.argmax(1)[:, None]
        w, h = (np.take_along_axis(side, first, 1)[:, 0] for side in (w, h))
        fits, (height, width) = fits.any(1), self.sizes.T
        # As timm: where no attempt fits, the largest centred crop of an allowed aspect ratio.
        low, high = self.ratio
        w = np.where(fits, w, np.minimum(width, np.rint(height * high)))
        h = np.where(fits, h, np.minimum(height, np.rint(width / low)))
        places = np.where(fits, np.random.uniform(size=(2, len(w))), 0.5)
        return np.stack(
            [np.floor(places[0] * (height - h + fits)), np.floor(places[1] * (width - w + fits)), h, w], 1)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        top, left, h, w = self.boxes().T
        flip = np.where(np.random.uniform(size=len(w)) < self.hflip, -1, 1)
        height, width = self.images.shape[1:3]
        # From coordinates of -1 to 1 in the crop to those in the whole array, pixels counted by their corners.
        theta = np.zeros((len(w), 2, 3), np.float32)
        theta[:, 0, 0], theta[:, 0, 2] = flip * w / width, (2 * left + w) / width - 1
        theta[:, 1, 1], theta[:, 1, 2] = h / height, (2 * top + h) / height - 1
        theta = torch.from_numpy(theta).to(self.device)
        # A crop ends at its own edge, as Pillow's does: from its centre to that of its outermost pixels.
        centre = theta[:, None, None, :, 2]
        reach = theta.diagonal(dim1=1, dim2=2).abs()[:, None, None] - torch.tensor(
            [1 / width, 1 / height], device=self.device)
        order = torch.randperm(len(self.images)).to(self.device)
        for number in range(len(self)):
            these = order[number * self.batch_size:(number + 1) * self.batch_size]
            grid = F.affine_grid(theta[these], (len(these), 3, *self.size), align_corners=False)
            grid = torch.minimum(torch.maximum(grid, (centre - reach)[these]), (centre + reach)[these])
            images = self.images[these].permute(0, 3, 1, 2).float()
            images = self.normalized(F.grid_sample(images, grid, padding_mode='border', align_corners=False))
            target = self.labels[these]
            yield (images, target) if self.mixup is None else self.mixup(images, target)


class ValidationLoader(_Loader):
    """Batches of all images, prepared by timm's transform, in order."""

    def __init__(self, args, dataset, data_config, device):
        how = {key: data_config[key] for key in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')}
        super().__init__(args, dataset, create_transform(**how, use_prefetcher=True), data_config, device,
                         args.validation_batch_size or args.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size)):
            yield self.normalized(images.permute(0, 3, 1, 2).float()), labels


def set_up_loaders(args, splits, data_config, device, dtype) -> Tuple[TrainLoader, ValidationLoader, None]:
    """Take the place of `timm_netaug.cli.loaders.set_up_loaders`.

    Raises:
        UserError: A flag asks for what these loaders cannot do.
    """
    refused = [f'--{flag.replace("_", "-")}' for flag in REFUSED if getattr(args, flag)]
    if refused:
        raise UserError(f'Images in memory are only cropped, flipped and mixed: leave {", ".join(refused)} out.')
    if args.color_jitter:
        raise UserError('Images in memory have no colour jitter: add --color-jitter 0.')
    if args.distributed:
        raise UserError('Images in memory are for one process: start without torchrun.')
    if args.task == 'multilabel' or not args.data_dir:
        raise UserError('Images in memory come from folders of classes: give --data-dir, and leave --task out.')
    if len(splits.train) < args.batch_size:
        raise UserError(f'The train split has fewer images than a batch ({args.batch_size}): use a smaller'
                        f' --batch-size.')
    return (TrainLoader(args, splits.train, data_config, device),
            ValidationLoader(args, splits.validation, data_config, device), None)
