"""The description of a run, which its checkpoints hold."""
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch.nn as nn

__all__ = ['RunDescription']

_NOT_KEPT = ('netaug', 'pretrained_model_args')  # constructor arguments that the exported model does not get


@dataclass(frozen=True)
class RunDescription:
    """What is needed to rebuild the model of a run and to prepare its input, and how the run was made.

    Args:
        architecture: Name of the timm model.
        model_args: Arguments of its constructor.
        data_config: How images are prepared, as `timm.data.resolve_data_config` returns it.
        class_names: Names of the classes in label order, None if the data set does not name them.
        ema: Whether the run validated the moving average of the weights.
        versions: Versions of the libraries, by name.
        netaug: Fields of `NetAugConfig` and `NetAugTraining`, None for a run without NetAug.
        metrics: The metric after every epoch so far.
        input_img_mode: Pillow mode to which images were converted, None for the one that fits the model's channels.
        target: Kind of targets, see `io.data.open_dataset`.
        detector: Fields of `DetectorConfig` if the model is a detector with this architecture, None for a classifier.
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
        """Describe a model that `timm.create_model` has built, and its input."""
        args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k not in _NOT_KEPT}
        return cls(
            model.pretrained_cfg['architecture'],
            {**args, 'num_classes': model.num_classes},
            dict(data_config),
            list(class_names) if class_names else None,
            **fields,
        )

    def to_dict(self) -> Dict[str, Any]:
        """Return the fields as plain data, which a checkpoint holds as `args.run`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Optional['RunDescription']:
        """Return the description in a checkpoint of `train.py`, None for a checkpoint of another program.

        Fields that a later version has added are ignored. Fields that an earlier version lacks get their defaults.
        """
        run = getattr(checkpoint.get('args'), 'run', None)
        if not isinstance(run, Mapping) or 'architecture' not in run:
            return None
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in run.items() if k in known})
