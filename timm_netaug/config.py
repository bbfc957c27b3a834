"""Configurations: the shape of a super-network (`NetAugConfig`), and how it is trained (`NetAugTraining`)."""
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple, Union

__all__ = ['NetAugConfig', 'NetAugTraining', 'register_defaults', 'split_fields']

_DEFAULTS = dict(width_mults=(1.0, 1.8, 2.6), expand_mults=(1.0, 1.6, 2.2, 2.8))
_LARGEST_MULT, _LARGEST_DIVISOR = 100, 256  # beyond them, memory ends, or no width is augmented
_OF_MODELS: Dict[str, Dict[str, Tuple[float, ...]]] = {}  # timm architecture -> its own defaults


def register_defaults(architecture: str, **mults: Tuple[float, ...]) -> None:
    """Register the default multipliers of a timm architecture."""
    _OF_MODELS[architecture] = mults


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class _Fields:
    """The common base of both configurations: range checks, and fields as plain data."""

    def _check(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise ValueError(f'{type(self).__name__}.{name} {wanted}, got {getattr(self, name)!r}.')

    def _check_whole(self, name: str) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        self._check(name, whole and value >= 1, 'must be a whole number of at least 1')

    def to_dict(self) -> Dict[str, Any]:
        """Return the fields as plain data, which JSON, YAML and `weights_only` checkpoints can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Any:
        """Build a configuration from plain data.

        Raises:
            ValueError: A field is unknown or out of its range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in sorted(set(fields) - set(known)):
            other = next((c for c in (NetAugConfig, NetAugTraining) if name in c.__dataclass_fields__), None)
            hint = f' {name} is a field of {other.__name__}.' if other else ''
            raise ValueError(f'{cls.__name__} has no field {name}. Its fields are {", ".join(known)}.{hint}')
        return cls(**fields)


@dataclass(frozen=True)
class NetAugConfig(_Fields):
    """The shape of a super-network.

    Args:
        width_mults: Multipliers of widths, from which the stem, the head and every set of blocks that skip connections
            tie together draw one each. None for the model's default: the paper's multipliers for the five `netaug_*`
            models, (1, 1.8, 2.6) for other models.
        expand_mults: Multipliers of expansion ratios, from which every block draws one. None for the model's default,
            (1, 1.6, 2.2, 2.8).
        divisor: Augmented widths are rounded to the nearest multiple of it. The reference implementation uses 1.
        from_stage: Number of the first stage that is augmented, or name of the first module that is augmented. The
            modules before it, the trunk, are computed once for the tiny and the augmented pass. 0: the whole network
            is augmented, as in the paper.

    Raises:
        ValueError: A field is out of its range.
    """
    width_mults: Optional[Tuple[float, ...]] = None
    expand_mults: Optional[Tuple[float, ...]] = None
    divisor: int = 1
    from_stage: Union[int, str] = 0

    def __post_init__(self):
        for name in _DEFAULTS:
            mults = getattr(self, name)
            if mults is None:
                continue
            valid = isinstance(mults, (tuple, list)) and mults and all(_is_number(m) and m >= 1 for m in mults)
            self._check(name, valid, 'must be a non-empty list of numbers of at least 1')
            self._check(name, max(mults) <= _LARGEST_MULT, f'must have no number above {_LARGEST_MULT}')
            object.__setattr__(self, name, tuple(float(m) for m in mults))
        self._check_whole('divisor')
        self._check('divisor', self.divisor <= _LARGEST_DIVISOR, f'must be at most {_LARGEST_DIVISOR}')
        stage = self.from_stage
        valid = bool(stage) if isinstance(stage, str) else type(stage) is int and stage >= 0
        self._check('from_stage', valid, 'must be the number of a stage, from 0, or the name of a module')

    def resolve(self, architecture: str) -> 'NetAugConfig':
        """Return the configuration, with the default multipliers of a timm architecture in place of None."""
        defaults = {**_DEFAULTS, **_OF_MODELS.get(architecture, {})}
        return dataclasses.replace(self, **{k: getattr(self, k) or v for k, v in defaults.items()})


@dataclass(frozen=True)
class NetAugTraining(_Fields):
    """How a super-network is trained: the arguments of `NetAugTask` with the same names.

    Args:
        alpha: Weight of the augmented sub-network's loss (equation 3 of the paper).
        stop_width_at: Fraction of the epochs after which widths are no longer augmented, nor channels sorted.
        sort: Whether to bring the most important expansion channels to the front at the start of each epoch, as long as
            widths are augmented.
        distill: Weight of in-situ distillation: a loss by which the tiny network also learns from the output of the
            augmented sub-network. The paper has no such loss.
        batch_fraction: Share of the batch that the augmented sub-network gets, from its beginning. The paper uses 1.
        every: Train the augmented sub-network only in every n-th update step, with n times the weight of its losses.
            The paper uses 1.

    Raises:
        ValueError: A field is out of its range.
    """
    alpha: float = 1.0
    stop_width_at: float = 0.5
    sort: bool = True
    distill: float = 0.0
    batch_fraction: float = 1.0
    every: int = 1

    def __post_init__(self):
        for name in ('alpha', 'distill'):
            in_range = _is_number(getattr(self, name)) and getattr(self, name) >= 0
            self._check(name, in_range, 'must be a number of at least 0')
        self._check_whole('every')
        in_range = _is_number(self.batch_fraction) and 0 < self.batch_fraction <= 1
        self._check('batch_fraction', in_range, 'must be a share of the batch, above 0 and at most 1')
        in_range = _is_number(self.stop_width_at) and 0 <= self.stop_width_at <= 1
        self._check('stop_width_at', in_range, 'must be a fraction of the epochs, from 0 to 1')
        self._check('sort', isinstance(self.sort, bool), 'must be True or False')


def split_fields(fields: Mapping[str, Any]) -> Tuple[NetAugConfig, NetAugTraining]:
    """Build both configurations from one dict with the fields of both, as checkpoints hold it.

    Raises:
        ValueError: A field is unknown or out of its range.
    """
    shape = {k: v for k, v in fields.items() if k in NetAugConfig.__dataclass_fields__}
    return NetAugConfig.from_dict(shape), NetAugTraining.from_dict({k: fields[k] for k in fields if k not in shape})
