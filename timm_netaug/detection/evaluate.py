"""The average precision of a detector on a split of a data set."""
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
from PIL import Image
from torchvision.transforms import v2

from ..evaluate import evaluate
from ..io.data import eight_bits
from .annotations import Split, find_classes
from .data import DetectionDataset, DetectionLoader, collate, eval_transform
from .detector import Detector
from .metric import DetectionEvaluator, check_metric

__all__ = ['evaluate_detector', 'predict']


def evaluate_detector(
        detector: Detector,
        split: Split,
        img_size: Optional[Tuple[int, int]] = None,
        batch_size: int = 32,
        workers: int = 0,
        device: Union[str, torch.device] = 'cpu',
        autocast: Callable = nullcontext,
        channels_last: bool = False,
        log_interval: int = 50,
) -> Tuple[Dict[str, Any], DetectionEvaluator, DetectionDataset]:
    """Evaluate a detector.

    Args:
        img_size: Height and width of the input, multiples of 32; None for those of the training. The sizes of boxes
            that the levels are for stay those of the training.

    Returns:
        'loss' and the metrics in percent, with AP by class as 'AP_by_class'; the evaluator, which holds the boxes; and
        the data set.

    Raises:
        UserError: The metric's packages are missing, or the split has classes that the detector does not know.
    """
    check_metric()
    config = detector.config
    data_config = replace(config, img_size=tuple(img_size or config.img_size)).data_config
    names = find_classes(split, class_names=config.class_names)
    dataset = DetectionDataset(split, names, eval_transform(data_config))
    loader = DetectionLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    device = torch.device(device)
    dense = detector.dense.to(device)
    if channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    evaluator = DetectionEvaluator(detector.fcos, names)
    metrics = evaluate(dense, loader, evaluator, device, autocast=autocast, channels_last=channels_last,
                       log_interval=log_interval)
    return dict(metrics, AP_by_class=evaluator.by_class, images=evaluator.num_samples), evaluator, dataset


@torch.inference_mode()
def predict(detector: Detector, image: Image.Image, score: float = 0.0) -> Dict[str, Any]:
    """Find the objects of one image.

    Args:
        detector: In evaluation mode.
        image: Of any size.
        score: Boxes of a lower score are left out.

    Returns:
        'boxes' (N, 4) in pixels of the image, 'scores' (N,), 'labels' (N,), the best first, and 'classes', their names
        where the detector knows them.
    """
    image = eight_bits(image).convert('RGB')
    height, width = detector.config.img_size
    parameter = next(detector.parameters())
    input = eval_transform(detector.config.data_config)(v2.functional.to_image(image))
    found = detector(input[None].to(parameter))[0]
    keep = found['scores'] >= score
    found = {k: t[keep].cpu() for k, t in found.items()}
    found['boxes'] = found['boxes'] * torch.tensor([image.width / width, image.height / height] * 2)
    names = detector.config.class_names
    return dict(found, classes=[names[i] if names else str(i) for i in found['labels'].tolist()])
