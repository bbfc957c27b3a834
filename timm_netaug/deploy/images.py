"""Images for calibration and measurement: pixels as a camera with the model's input size would give them."""
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import IterableDataset

from ..errors import UserError
from ..evaluate import open_split
from ..io.data import DataSource, check_channels

__all__ = ['batches', 'normalised', 'open_pixels', 'spread', 'with_black_and_white']


def open_pixels(
        source: DataSource,
        split: str,
        data_config: Mapping[str, Any],
        num_classes: int,
        class_names: Optional[Sequence[str]],
) -> Any:
    """Open a split whose samples are pixels (uint8, C x H x W), resized and cropped as in validation, and labels.

    Raises:
        UserError: The split cannot be opened, or does not fit the model.
    """
    channels = data_config['input_size'][0]
    dataset, _ = open_split(source, split, class_names, num_classes, channels=channels)
    if isinstance(dataset, IterableDataset):
        raise UserError('Data sets that are read as a stream (wds, tfds, hfids) cannot be drawn from: name a folder of'
                        ' images, or a data set of the types torch or hfds.')
    dataset.transform = create_transform(
        use_prefetcher=True,  # timm's word for: pixels as they are
        **{k: data_config[k] for k in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')},
    )
    check_channels(dataset, channels)
    return dataset


def _labels(dataset: Any) -> Optional[List[int]]:
    """Return the labels of a folder of images, None for other data sets, whose labels only come with the images."""
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    return [int(sample[1]) for sample in samples] if samples else None


def spread(dataset: Any, count: int, seed: int) -> Tuple[List[int], Optional[int]]:
    """Draw samples of a data set, as many of one class as of another as far as there are so many.

    Args:
        count: Number of samples; 0 for all.
        seed: Of the drawing.

    Returns:
        Indices of the samples, and the number of their classes, None where the labels are unknown.
    """
    generator = np.random.default_rng(seed)
    places: Dict[int, List[int]] = {}
    labels = _labels(dataset)
    for index, label in enumerate(labels or [0] * len(dataset)):
        places.setdefault(label, []).append(index)
    drawn = [(rank, generator.random(), int(index))
             for indices in places.values() for rank, index in enumerate(generator.permutation(indices))]
    chosen = sorted(drawn)[:count or None]
    return sorted(index for _, _, index in chosen), len(places) if labels else None


def batches(dataset: Any, indices: Sequence[int], size: int = 64) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Yield pixels (uint8, N x H x W x C) and labels of samples of a data set.

    Raises:
        UserError: Too many images cannot be read.
    """
    for start in range(0, len(indices), size):
        samples = [dataset[i] for i in indices[start:start + size]]
        getattr(dataset, 'check', lambda: None)()
        pixels = [np.moveaxis(np.asarray(image), 0, -1) for image, _ in samples]
        yield np.stack(pixels), np.array([label for _, label in samples])


def normalised(pixels: np.ndarray, data_config: Mapping[str, Any]) -> torch.Tensor:
    """Return the input of the PyTorch model for pixels of N x H x W x C."""
    mean, std = (torch.tensor(data_config[key], dtype=torch.float32) for key in ('mean', 'std'))
    return ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)


def with_black_and_white(pixels: np.ndarray) -> np.ndarray:
    """Put a black and a white image in front of pixels of N x H x W x C, so that the scale of the input is 1 / 255."""
    return np.concatenate([np.stack([np.full_like(pixels[0], value) for value in (0, 255)]), pixels])
