"""The accuracy of a file beside that of the PyTorch model, and of other files, on the same images in the same run."""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from .images import batches, normalised
from .tflm import Tflm

__all__ = ['Accuracy', 'from_camera', 'measure', 'progress', 'quantised']


@dataclass(frozen=True)
class Accuracy:
    """Results on a set of images.

    Args:
        float_top1: Of the PyTorch model, in percent.
        int8_top1: Of the file in TensorFlow Lite Micro, in percent.
        agreement: Share of the images for which the two choose the same class, in percent.
        images: Number of images.
        others: Top-1 of the other files in percent.
    """
    float_top1: float
    int8_top1: float
    agreement: float
    images: int
    others: List[float]


def from_camera(pixels: np.ndarray) -> np.ndarray:
    """Return the int8 input of a deployed file: the pixel minus 128."""
    return (pixels.astype(np.int16) - 128).astype(np.int8)


def quantised(pixels: np.ndarray, data_config: Mapping[str, Any], file: Tflm) -> np.ndarray:
    """Return the int8 input that a file takes, of `deploy` or of another program.

    A file that `deploy` has written takes the pixel minus 128: its scale is 1 / 255 and its zero point -128. Any other
    file takes normalised images.
    """
    if file.input.zero_point == -128 and abs(255 * file.input.scale - 1) < 0.01:
        return from_camera(pixels)
    values = normalised(pixels, data_config).permute(0, 2, 3, 1).numpy() / file.input.scale + file.input.zero_point
    return np.clip(np.round(values), -128, 127).astype(np.int8)


@contextmanager
def progress(total: int, say: Callable[[str], None]) -> Iterator[Callable[..., None]]:
    """Show a bar of the images that are measured, or say a line for about every tenth of them where no bar is shown.

    Args:
        total: Number of images.

    Yields:
        A function to be called behind a batch: with the number of its images, and what to say behind that of all.
    """
    done = 0
    with tqdm(total=total, desc='Measure', unit='image', leave=False, disable=None, dynamic_ncols=True) as bar:
        def advance(count: int, so_far: str = '') -> None:
            nonlocal done
            bar.update(count)
            done += count
            if bar.disable and done * 10 // total > (done - count) * 10 // total:
                say(f'  {done:,} of {total:,} images{so_far}')
        yield advance


@torch.inference_mode()
def measure(
        model: nn.Module,
        file: Tflm,
        dataset: Any,
        indices: Sequence[int],
        data_config: Mapping[str, Any],
        others: Sequence[Tflm] = (),
        say: Callable[[str], None] = lambda line: None,
) -> Accuracy:
    """Compute the top-1 accuracy of a model and of its file.

    Args:
        model: In evaluation mode, on the CPU.
        file: Takes pixels minus 128.
        dataset: See `open_pixels`.
        indices: Of the images.
        others: Further files, whose input is that of `quantised`.
        say: Is called with a line of progress now and then, where no bar is shown.
    """
    counts: Dict[str, int] = dict(float=0, int8=0, agree=0)
    right, done = [0] * len(others), 0
    order = np.random.default_rng(0).permutation(indices)  # by class, the progress would show one class's accuracy
    with progress(len(indices), say) as advance:
        for pixels, labels in batches(dataset, order):
            expected = model(normalised(pixels, data_config)).argmax(1).numpy()
            found = np.array([file(image)[0].argmax() for image in from_camera(pixels)])
            counts['float'] += int((expected == labels).sum())
            counts['int8'] += int((found == labels).sum())
            counts['agree'] += int((expected == found).sum())
            for i, other in enumerate(others):
                chosen = [other(image)[0].argmax() for image in quantised(pixels, data_config, other)]
                right[i] += int((np.array(chosen) == labels).sum())
            done += len(labels)
            advance(len(labels), f', so far float {100 * counts["float"] / done:.2f} %,'
                                 f' int8 {100 * counts["int8"] / done:.2f} %')
    percent = [100 * value / len(indices) for value in (*counts.values(), *right)]
    return Accuracy(*percent[:3], len(indices), percent[3:])
