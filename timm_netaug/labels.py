"""Labels other than the data set's own, and metrics beyond accuracy."""
from typing import Any, Dict, List, Optional

import torch
from timm.data import RealLabelsImagenet
from timm.task import ClassificationEvaluator

from .errors import UserError, rewording

__all__ = ['LabelEvaluator', 'read_valid_labels', 'read_real_labels']


def read_valid_labels(path: str, num_classes: int) -> List[int]:
    """Read the index of the model's class for each class of the data set. The file has one index on a line.

    Raises:
        UserError: The file does not exist, or has lines that are not indices of classes.
    """
    with rewording('--valid-labels takes a text file of class indices, one on a line', OSError, ValueError):
        with open(path, encoding='utf-8') as f:
            labels = [int(line) for line in f if line.strip()]
    if not labels or len(set(labels)) < len(labels) or min(labels) < 0 or max(labels) >= num_classes:
        raise UserError(f'--valid-labels {path}: the indices must be distinct, from 0 to {num_classes - 1}.')
    return labels


def read_real_labels(path: str, dataset: Any, num_classes: int) -> RealLabelsImagenet:
    """Read the ReaL labels of ImageNet's validation set, for images in the order of a data set.

    Raises:
        UserError: The file does not hold ReaL labels, or holds those of other images.
    """
    if num_classes < 5:
        raise UserError('--real-labels: top-5 needs a model of at least five classes.')
    try:
        names = dataset.filenames(basename=True)
        with rewording('--real-labels takes the JSON file of the ReaL labels', OSError, ValueError, TypeError):
            labels = RealLabelsImagenet(names, real_json=path)
    except AssertionError as e:
        raise UserError(f'--real-labels {path} does not fit the {len(names)} images of the data set.') from e
    except (AttributeError, NotImplementedError) as e:
        raise UserError('--real-labels needs a data set of image files.') from e
    for name in names:
        if not isinstance(labels.real_labels.get(name), list):
            raise UserError(f'--real-labels: there are no labels for {name}. The files must have their names in'
                            f' ImageNet: ILSVRC2012_val_00000001.JPEG and so on.')
    return labels


class LabelEvaluator(ClassificationEvaluator):
    """timm's evaluator, extended for a part of the classes, several labels for an image, and averages over classes.

    Args:
        valid_labels: Class of the model for each label of the data set, None if both are equal.
        real_labels: Labels for top-1 and top-5, in place of the data set's labels.
        metrics_avg: scikit-learn's name of the average for precision, recall and F1, None to leave these out.
    """

    def __init__(
            self,
            device: torch.device,
            valid_labels: Optional[List[int]] = None,
            real_labels: Optional[RealLabelsImagenet] = None,
            metrics_avg: Optional[str] = None,
    ) -> None:
        super().__init__(device)
        self.valid_labels = valid_labels
        self.real_labels = real_labels
        self.metrics_avg = metrics_avg
        self.predictions: List[torch.Tensor] = []
        self.targets: List[torch.Tensor] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        if self.valid_labels is not None:
            output = output[:, self.valid_labels]
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < output.shape[1]:
            # On a GPU the loss would not raise an error but abort the process.
            raise UserError(f'The data set has labels from {int(target.min())} to {int(target.max())}, but only'
                            f' {output.shape[1]} classes are evaluated.')
        super().update(output, target)
        if self.real_labels is not None:
            self.real_labels.add_result(output)
        if self.metrics_avg:
            self.predictions.append(output.argmax(dim=1).cpu())
            self.targets.append(target.cpu())

    def compute(self, distributed: bool = False) -> Dict[str, float]:
        metrics = super().compute(distributed)
        if self.real_labels is not None:
            metrics.update(top1=self.real_labels.get_accuracy(k=1), top5=self.real_labels.get_accuracy(k=5))
        if self.metrics_avg:
            from sklearn.metrics import precision_recall_fscore_support  # a slow import, needed here only
            values = precision_recall_fscore_support(
                torch.cat(self.targets).numpy(),
                torch.cat(self.predictions).numpy(),
                average=self.metrics_avg,
                zero_division=0,
            )
            names = ('precision', 'recall', 'f1_score')
            metrics.update({f'{self.metrics_avg}_{name}': 100 * float(v) for name, v in zip(names, values)})
        return metrics
