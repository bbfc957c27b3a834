"""What is augmented, and how: the one configuration of NetAug."""
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple

__all__ = ['NetAugConfig']

# The paper's multipliers (arXiv 2110.08890, section 4.1, and the reference's experiment configs), by timm architecture.
_WIDTH_MULTS = {
    'netaug_mbv3_035': (1.0, 2.0, 3.0),
    'netaug_mcunet': (1.0, 1.6, 2.2),
}
_DEFAULT_WIDTH_MULTS = (1.0, 1.8, 2.6)
_DEFAULT_EXPAND_MULTS = (1.0, 1.6, 2.2, 2.8)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class NetAugConfig:
    """Configuration of a super-network and of its training.

    Args:
        width_mults: Multipliers that the width of the stem, of every untied block and of the head is drawn from.
            None stands for the model's default: the paper's for the five `netaug_*` models, 1 1.8 2.6 elsewhere.
        expand_mults: Multipliers that the expansion ratio of every block is drawn from, None as above (1 1.6 2.2 2.8).
        divisor: Augmented widths are rounded to the nearest multiple of it. The reference uses 1.
        alpha: Weight of the augmented sub-network's loss (equation 3 of the paper).
        stop_width_at: Fraction of the epochs after which widths are no longer augmented, nor channels sorted.
        sort: Bring the most important expansion channels to the front at the start of each epoch up to then.
        distill: Weight of a loss by which the tiny network learns from the augmented sub-network's logits, too (not in
            the paper).
        batch_fraction: The augmented sub-network sees this leading share of a batch (the paper: all of it).
        every: It is trained in every n-th update step, with n-fold weights of its losses (the paper: in all of them).

    Raises:
        ValueError: A field is out of its range.
    """
    width_mults: Optional[Tuple[float, ...]] = None
    expand_mults: Optional[Tuple[float, ...]] = None
    divisor: int = 1
    alpha: float = 1.0
    stop_width_at: float = 0.5
    sort: bool = True
    distill: float = 0.0
    batch_fraction: float = 1.0
    every: int = 1

    def __post_init__(self):
        for name in ('width_mults', 'expand_mults'):
            mults = getattr(self, name)
            if mults is None:
                continue
            if not isinstance(mults, (tuple, list)) or not mults or not all(_is_number(m) and m >= 1 for m in mults):
                raise ValueError(
                    f'NetAugConfig.{name} must be a non-empty list of numbers of at least 1, got {mults!r}.')
            object.__setattr__(self, name, tuple(float(m) for m in mults))
        for name in ('divisor', 'every'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'NetAugConfig.{name} must be a whole number of at least 1, got {value!r}.')
        for name in ('alpha', 'distill'):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ValueError(f'NetAugConfig.{name} must be a number of at least 0, got {value!r}.')
        if not _is_number(self.batch_fraction) or not 0 < self.batch_fraction <= 1:
            raise ValueError(
                f'NetAugConfig.batch_fraction is a share of the batch, above 0 up to 1, got {self.batch_fraction!r}.')
        if not _is_number(self.stop_width_at) or not 0 <= self.stop_width_at <= 1:
            raise ValueError(
                f'NetAugConfig.stop_width_at is a fraction of the epochs, from 0 to 1, got {self.stop_width_at!r}.')
        if not isinstance(self.sort, bool):
            raise ValueError(f'NetAugConfig.sort must be True or False, got {self.sort!r}.')

    def resolve(self, architecture: str) -> 'NetAugConfig':
        """Return the config with the defaults of a model, by its timm architecture name, filled in."""
        return dataclasses.replace(
            self,
            width_mults=self.width_mults or _WIDTH_MULTS.get(architecture, _DEFAULT_WIDTH_MULTS),
            expand_mults=self.expand_mults or _DEFAULT_EXPAND_MULTS,
        )

    def to_dict(self) -> Dict[str, Any]:
        """Return the fields as plain data (JSON, YAML and `weights_only` checkpoints can hold it)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> 'NetAugConfig':
        """Build a config from plain data.

        Raises:
            ValueError: A field is unknown or out of its range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f'NetAugConfig has no field {", ".join(unknown)}. Its fields are {", ".join(known)}.')
        return cls(**fields)
