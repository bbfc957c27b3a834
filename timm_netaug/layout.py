"""The channels of a network that may be widened. Augmenting, sampling, sorting and exporting need nothing else.

`graph.trace` finds the layout of a network.
"""
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

__all__ = ['Channels', 'Layout']


@dataclass
class Channels:
    """A set of channels that all its writers and readers share.

    Args:
        name: Name of the convolution that writes them first. It is the key of this set in a dict of widths.
        base: Their number in the tiny model.
        kind: 'expand' if all convolutions that write or read the channels lie in one block, 'squeeze' for the channels
            between the two convolutions of squeeze-excite, 'width' for all others (stem, block outputs, head).
        source: The channel set that their number depends on: the input of the block for 'expand', the channels that
            squeeze-excite scales for 'squeeze'.
        writers: Names of the convolutions that write them; more than one where additions or products tie channels.
        readers: Names of the layers whose weights decide the channels' importance, for 'expand' and 'squeeze'.
    """
    name: str
    base: int
    kind: str = 'width'
    source: Optional['Channels'] = None
    writers: List[str] = field(default_factory=list)
    readers: List[str] = field(default_factory=list)


@dataclass
class Layout:
    """The channels of a network in forward order, and the axes that they run along.

    Args:
        channels: Channel sets by name, each behind its `source`.
        axes: Names of parameters and buffers -> the channel set along each augmented axis.
        layers: Names of the layers that become elastic -> number of calls in a forward pass.
        blocks: Names of the blocks: the innermost modules that hold at least two convolutions.
        fixed: Names of the convolutions whose channels have a fixed number although a layer reads them -> why.
        inputs: Arguments of the forward pass, on the meta device.
        checked: Whether a wider sub-network has been compared with the stock network of the same widths.
    """
    channels: Dict[str, Channels]
    axes: Dict[str, Dict[int, Channels]]
    layers: Dict[str, int]
    blocks: List[str]
    fixed: Dict[str, str]
    inputs: Tuple[Any, ...] = field(compare=False)
    checked: bool = False

    def widths(
            self,
            width_mult: Callable[[Channels], float],
            expand_mult: Callable[[Channels], float],
            divisor: int = 1,
            full: Optional[Mapping[str, int]] = None,
    ) -> Dict[str, int]:
        """Compute the number of active channels of every set (section 3.2 of the paper).

        Args:
            width_mult: Returns the multiplier of a 'width' set.
            expand_mult: Returns the multiplier of an 'expand' set.
            divisor: Augmented widths are rounded to the nearest multiple of it.
            full: Widths of the whole super-network, None to compute these. Squeezed channels keep the proportion that
                they have in the super-network, as in the reference implementation.
        """
        widths: Dict[str, int] = {}
        for c in self.channels.values():
            mult = width_mult(c) if c.kind == 'width' else expand_mult(c) if c.kind == 'expand' else 1.0
            source = widths[c.source.name] if c.source else None
            if mult == 1 and (source is None or source == c.source.base):
                widths[c.name] = c.base  # the model may have rounded its own width in another way
                continue
            wanted = mult * (c.base if source is None else source * c.base / c.source.base)
            if c.kind == 'squeeze' and full:
                wanted = source / (full[c.source.name] / full[c.name])
            widths[c.name] = max(c.base, int(wanted / divisor + 0.5) * divisor)
        return widths

    @property
    def tiny(self) -> Dict[str, int]:
        """Widths of the tiny model."""
        return {name: c.base for name, c in self.channels.items()}

    def slices(self, name: str, ndim: int, widths: Mapping[str, int]) -> tuple:
        """Return the index of the part of a parameter or buffer that the sub-network of the given widths uses."""
        axes = self.axes.get(name, {})
        return tuple(slice(widths[axes[dim].name]) if dim in axes else slice(None) for dim in range(ndim))

    def after(self, trunk: Sequence[str]) -> 'Layout':
        """Return the layout without the channels that are written in a trunk.

        Args:
            trunk: Names of the trunk's modules.
        """
        if not trunk:
            return self
        channels: Dict[str, Channels] = {}
        for name, c in self.channels.items():
            if not any(f'{writer}.'.startswith(f'{module}.') for writer in c.writers for module in trunk):
                channels[name] = replace(c, source=channels.get(c.source.name) if c.source else None)
        axes = {name: {dim: channels[c.name] for dim, c in of.items() if c.name in channels}
                for name, of in self.axes.items()}
        return replace(self, channels=channels, axes=axes)
