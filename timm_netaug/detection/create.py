"""Build a new detector, or load a trained one: `create_detector`."""
from typing import Any, Mapping, Optional, Sequence, Union

from ..errors import UserError, first_line
from .detector import DenseDetector, Detector, create_backbone, describe_detector
from .folder import find_detector_folder, load_detector_folder

__all__ = ['create_detector']


def create_detector(
        name: str,
        num_classes: Optional[int] = None,
        img_size: Union[int, Sequence[int], None] = None,
        pretrained: bool = False,
        *,
        backbone_args: Optional[Mapping[str, Any]] = None,
        **fields: Any,
) -> Detector:
    """Build a tiny detector on a timm backbone, or load a trained one.

    Args:
        name: Name of the backbone: any convolutional timm model, `local-dir:DIR` or `hf-hub:OWNER/NAME` of a
            classifier. A folder or repository of a detector is loaded whole, with its weights, and takes no further
            arguments.
        num_classes: Classes of objects, without the background.
        img_size: Height and width of the input, or one number for both; multiples of 32.
        pretrained: Load the backbone's weights. Neck and head are new.
        backbone_args: Further arguments of the backbone's constructor.
        fields: Further fields of `DetectorConfig`: channels, class_names, mean, std, interpolation, scale.

    Returns:
        The detector; `.dense` is the module to train, to augment and to export.

    Raises:
        UserError: The name is unknown or not fit for a backbone, or an argument is missing or out of its range.
    """
    folder = find_detector_folder(name)
    if folder is not None:
        if num_classes is not None or img_size is not None or backbone_args or fields:
            raise UserError(f'{name} is a trained detector, which has its own classes and sizes: leave the arguments'
                            f' out.')
        return load_detector_folder(folder, name)
    if num_classes is None or img_size is None:
        raise UserError(f'{name} is a backbone: create_detector() needs num_classes and img_size, too.')
    backbone = create_backbone(name, pretrained, **(backbone_args or {}))
    try:
        config = describe_detector(backbone, num_classes, img_size, **fields)
    except (ValueError, TypeError) as e:
        raise UserError(f'{first_line(e)}.') from e
    return Detector(DenseDetector(backbone, config), config)
