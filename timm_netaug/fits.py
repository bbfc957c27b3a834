"""Whether a model fits a microcontroller: `--fits SRAM FLASH` of `info` and `deploy`."""
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Mapping, Optional, Sequence

import torch.nn as nn

from .errors import UserError
from .info import estimate

__all__ = ['Board', 'check_fits', 'parse_board']

_UNITS = {'': 1, 'K': 1 << 10, 'M': 1 << 20}
_STEP = 8  # of the input sizes that are tried, where the model asks for no other


@dataclass(frozen=True)
class Board:
    """Memory of a microcontroller that the model may take, in bytes."""
    sram: int
    flash: int


def _parse_size(text: str) -> int:
    match = re.fullmatch(r'(\d+(?:\.\d+)?)([KM]?)(?:i?B)?', text, re.I)
    size = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not size:
        raise UserError(f'--fits: {text} is no size of a memory. Write bytes, KiB or MiB, as in 327680, 320K or 1M.')
    return size


def parse_board(sizes: Sequence[str]) -> Board:
    """Read SRAM and flash as a user writes them: 320K, 1M, 327680. K is 1024 bytes.

    Raises:
        UserError: A size is none.
    """
    return Board(*map(_parse_size, sizes))


def _largest_size(
        model: nn.Module,
        info: Mapping[str, Any],
        sram: int,
        same_kernels: bool,
        step: int,
) -> Optional[int]:
    """Return the largest multiple of `step` for height and width whose arena is estimated to fit, None without one."""
    @lru_cache(None)
    def fits(steps: int) -> Optional[bool]:
        try:
            found = estimate(model, (info['input_size'][0], steps * step, steps * step), same_kernels)
        except UserError:  # the model does not take such a size
            return None
        return found.activation_bytes + found.persistent_bytes <= sram

    low, high = 0, -(-max(info['input_size'][1:]) // step)  # in steps; high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        taken = next((n for n in range(middle, high) if fits(n) is not None), middle)  # the next size it takes
        low, high = (taken, high) if fits(taken) else (low, middle)
    return low * step or None


def check_fits(
        model: nn.Module,
        info: Mapping[str, Any],
        board: Board,
        measured: Optional[Mapping[str, int]] = None,
        same_kernels: bool = True,
        step: int = _STEP,
) -> None:
    """Refuse a model that needs more memory than a microcontroller has.

    Args:
        model: A stock model.
        info: Of the model, from `info.describe`.
        board: What there is.
        measured: `arena` and `flash` in bytes where they have been measured; None for the estimates.
        same_kernels: As for `info.describe`.
        step: Number of pixels that height and width must be multiples of, for the input size that is suggested.

    Raises:
        UserError: It does not fit; the sentence says what, by how much, where, and which input would.
    """
    how = 'is estimated to need' if measured is None else 'needs'
    arena = info['arena_bytes'] if measured is None else measured['arena']
    flash = info['flash_int8_bytes'] if measured is None else measured['flash']
    size = ' x '.join(map(str, info['input_size']))
    told = []
    if arena > board.sram:
        live = max(row['live_bytes'] for row in info['layers'])
        side = _largest_size(model, info, board.sram, same_kernels, step)
        told.append(
            f'it {how} {arena:,} bytes of RAM with an input of {size}, {arena - board.sram:,} more than {board.sram:,}'
            f' ({info["persistent_bytes"]:,} persist by estimate, and {live:,} of activations are most, at'
            f' {info["peak_layer"]}); '
            + (f'the largest input that fits, in steps of {step} pixels, is {side} x {side} (--img-size {side})' if side
               else f'no smaller input fits either, in steps of {step} pixels'))
    if flash > board.flash:
        heaviest = max(info['layers'], key=lambda row: row['weight_bytes'])
        told.append(
            f'it {how} {flash:,} bytes of flash, {flash - board.flash:,} more than {board.flash:,} (most for'
            f' {heaviest["name"]}, {heaviest["weight_bytes"]:,} bytes); no input size changes that, fewer classes or a'
            f' smaller model do')
    if told:
        raise UserError(f'{info["architecture"]} does not fit: {"; and ".join(told)}.')
