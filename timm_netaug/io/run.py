"""What a checkpoint says of the run that wrote it."""
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch.nn as nn

__all__ = ['RunDescription']

_NOT_KEPT = ('netaug', 'pretrained_model_args')  # arguments of a model that the exported one is built without


@dataclass(frozen=True)
class RunDescription:
    """What it takes to build the model of a run again and to feed it, and how the run was made.

    Args:
        architecture: Name of the timm model.
        model_args: Arguments of its constructor.
        data_config: How images are prepared, in timm's terms.
        class_names: Names of the classes in label order, None where the data set has none.
        ema: Whether the run's metric is that of the moving average of the weights.
        versions: Versions of the libraries, by name.
        netaug: Fields of `NetAugConfig` and `NetAugTraining`, None for a run without NetAug.
        metrics: The metric after every epoch so far.
        input_img_mode: Pillow's mode that images were converted to, None for that of the model's channels.
        target: What the target of an image was: see `io.data.open_dataset`.
        detector: Fields of `DetectorConfig`, where the model is a detector on the architecture; None for a classifier.
    """
    architecture: str
    model_args: Dict[str, Any] = field(default_factory=dict)
    data_config: Dict[str, Any] = field(default_factory=dict)
    class_names: Optional[List[str]] = None
    ema: bool = False
    versions: Dict[str, str] = field(default_factory=dict)
    netaug: Optional[Dict[str, Any]] = None
    metrics: List[Optional[float]] = field(default_factory=list)
    input_img_mode: Optional[str] = None
    target: str = 'class'
    detector: Optional[Dict[str, Any]] = None

    @classmethod
    def from_model(
            cls,
            model: nn.Module,
            data_config: Mapping[str, Any],
            class_names: Optional[Sequence[str]] = None,
            **fields: Any,
    ) -> 'RunDescription':
        """Describe a timm model, as `create_model` has built it, and its input."""
        args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k not in _NOT_KEPT}
        return cls(
            model.pretrained_cfg['architecture'],
            {**args, 'num_classes': model.num_classes},
            dict(data_config),
            list(class_names) if class_names else None,
            **fields,
        )

    def to_dict(self) -> Dict[str, Any]:
        """Return the fields as plain data, which travels in a checkpoint as `args.run`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Optional['RunDescription']:
        """Read the description out of a checkpoint of `train.py`, None where a file is another program's.

        Fields that a later version has added are left out; those that an earlier one did not have get their defaults.
        """
        run = getattr(checkpoint.get('args'), 'run', None)
        if not isinstance(run, Mapping) or 'architecture' not in run:
            return None
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in run.items() if k in known})
