"""Which channels of a network may be widened, and which axes of which tensors they run along.

`trace` runs the network once without computing anything (on PyTorch's meta device) and follows the channels from
operator to operator. A dense convolution writes a new channel set. Depthwise convolutions, norms, activations and
pooling pass it on; sums and products tie two sets together. What cannot be followed is refused.

The `Layout` that `trace` returns is all that augmenting, sampling, sorting and exporting need to know of a network.
"""
import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from timm.models._features import FeatureHooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .layers import ELASTIC, ElasticBatchNorm

__all__ = ['Channels', 'Layout', 'fingerprint', 'shapes', 'to_meta', 'trace']


@dataclass
class Channels:
    """A set of channels that all its writers and readers share.

    Args:
        name: The convolution that writes them first: the key of this set in a dict of widths.
        base: Their number in the tiny model.
        kind: 'expand': all convolutions that write or read them lie in one block; 'squeeze': the channels between the
            two convolutions of squeeze-excite; 'width': all others (stem, block outputs, head).
        source: The channels that their number follows: the block's input for 'expand', the excited ones for 'squeeze'.
        writers: Names of the convolutions that write them; more than one where additions or products tie channels.
        readers: Names of the layers whose weights rank them, for 'expand' and 'squeeze'.
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
        channels: Channel sets by name, each behind the one that it follows.
        axes: Names of parameters and buffers -> the channel set along each augmented axis.
        layers: Names of the layers that become elastic, with the number of calls in a forward pass.
        blocks: Names of the blocks: the innermost modules that hold at least two convolutions.
        inputs: Arguments of the forward pass, on the meta device.
        checked: Whether wider networks of this kind have been found to be exact.
    """
    channels: Dict[str, Channels]
    axes: Dict[str, Dict[int, Channels]]
    layers: Dict[str, int]
    blocks: List[str]
    inputs: Tuple[Any, ...] = field(compare=False)
    checked: bool = False

    def widths(
            self,
            width_mult: Callable[[Channels], float],
            expand_mult: Callable[[Channels], float],
            divisor: int = 1,
            full: Optional[Dict[str, int]] = None,
    ) -> Dict[str, int]:
        """Work out the number of active channels of every set (section 3.2 of the paper).

        Args:
            width_mult: Gives the multiplier of a 'width' set, `expand_mult` that of an 'expand' set.
            divisor: Widths other than the stored ones are rounded to the nearest multiple of it.
            full: Widths of the whole super-network, None to work these out. Squeezed channels keep their proportion, as
                in the reference implementation.
        """
        widths: Dict[str, int] = {}
        for c in self.channels.values():
            mult = width_mult(c) if c.kind == 'width' else expand_mult(c) if c.kind == 'expand' else 1.0
            source = widths[c.source.name] if c.source else None
            if mult == 1 and (source is None or source == c.source.base):
                widths[c.name] = c.base  # the stored width, however the model once rounded it
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


@dataclass(eq=False)
class _Group:
    """A channel set while it is being found. Tied groups have one root, the group that was written first."""
    name: str
    base: int
    order: int
    writers: List[str] = field(default_factory=list)
    readers: List[str] = field(default_factory=list)
    kept: bool = False  # its width stays what it is
    returned: bool = False  # it reaches the output of the network
    tied_to: Optional['_Group'] = None

    @property
    def root(self) -> '_Group':
        return self if self.tied_to is None else self.tied_to.root


@dataclass(frozen=True)
class _Flow:
    """The channels of an activation: their group, the dimension that they lie in, whether they were pooled."""
    group: _Group
    dim: int
    pooled: bool = False


@dataclass(frozen=True)
class _Weight:
    """A parameter or buffer, or a view of one: its name, and for every dimension the axis that it was."""
    name: str
    axes: Tuple[Optional[int], ...]

    @property
    def layer(self) -> str:
        return self.name.rpartition('.')[0]


@dataclass
class _Obstacle:
    """An operator that cannot be followed. It counts if a layer with weights reads its result."""
    message: str
    groups: List[_Group]
    counts: bool = False


# Operators that treat every channel alike but are not tagged as pointwise by PyTorch.
_PASSING = (
    'avg_pool2d', '_adaptive_avg_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d', 'max_pool2d_with_indices',
    'constant_pad_nd', 'reflection_pad2d', 'replication_pad2d', 'upsample_nearest2d', '_upsample_nearest_exact2d',
    'upsample_bilinear2d', '_upsample_bilinear2d_aa', 'upsample_bicubic2d', 'clone', 'contiguous', '_to_copy', 'detach',
    'alias', 'lift_fresh', 'native_dropout', 'hardswish',
)
_SPATIAL = tuple(op for op in _PASSING if 'pool' in op or 'pad' in op or 'upsample' in op)  # that expect B, C, H, W
_REARRANGING = ('view', '_unsafe_view', 'reshape', 'squeeze', 'unsqueeze', 'expand', 'slice', 'select', 'permute',
                'transpose', 't')
_RULES = dict(convolution='convolution', addmm='linear', mm='linear', mean='reduction', sum='reduction',
              amax='reduction', native_batch_norm='norm', _native_batch_norm_legit='norm',
              _native_batch_norm_legit_no_training='norm', **dict.fromkeys(_REARRANGING, 'rearrangement'))
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _order(op: str, a: Dict[str, Any], before: Sequence[int], after: Sequence[int]) -> List[Optional[int]]:
    """Return, for every dimension of a rearranged tensor, which dimension of its input it is; None where it is new."""
    dims: List[Optional[int]] = list(range(len(before)))
    if op == 'permute':
        return [d % len(before) for d in a['dims']]
    if op in ('transpose', 't'):
        one, other = a.get('dim0', 0), a.get('dim1', 1)
        dims[one], dims[other] = dims[other], dims[one]
        return dims
    if op == 'select':
        del dims[a['dim'] % len(before)]
        return dims
    if op in ('slice', 'expand'):  # dimensions are aligned from the last one
        shift = len(after) - len(before)
        return [i - shift if i >= shift and before[i - shift] == size else None for i, size in enumerate(after)]
    return [next((d for d in dims if before[d] == size and math.prod(before[:d]) == math.prod(after[:i])), None)
            for i, size in enumerate(after)]


def _message(modules: Dict[str, nn.Module], name: str, why: str) -> str:
    what = f"module '{name}' of type" if name else 'it is of type'
    return (f'NetAug can not augment this model: {what} {type(modules[name]).__name__}, which {why}.'
            f' Supported types: {", ".join(dict.fromkeys(t.__name__ for t in ELASTIC))}.')


class _Tracer(TorchDispatchMode):
    """Follows channels through the operators of one forward pass of a model on the meta device."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.modules = dict(model.named_modules())
        self.stack = ['']  # names of the modules that are being called
        self.flows: Dict[int, _Flow] = {}  # by id of a tensor, as the next two
        self.weights: Dict[int, _Weight] = {}
        self.obstacles_of: Dict[int, List[_Obstacle]] = {}
        self.alive: List[Any] = []  # so that no id is used twice
        self.groups: Dict[str, _Group] = {}  # by writer
        self.axes: Dict[str, Dict[int, _Group]] = {}
        self.layers: Counter = Counter()
        self.convs: Dict[str, Optional[_Flow]] = {}  # with what each reads
        self.obstacles: List[_Obstacle] = []
        self.reads_fixed: Set[str] = set()  # layers that read activations of a fixed width, in one of their calls
        self.used_by: Dict[str, str] = {}  # layers whose tensors another module's code computes with
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.weights[id(tensor)] = _Weight(name, tuple(range(tensor.ndim)))
        for name, module in self.modules.items():
            module.register_forward_pre_hook(partial(self.enter, name))
            module.register_forward_hook(self.leave)

    def enter(self, name: str, *_: Any) -> None:
        self.stack.append(name)

    def leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        names = (a.name for a in function._schema.arguments)
        self.follow(function, {**dict(zip(names, args)), **(kwargs or {})}, output)
        return output

    def follow(self, function: Any, arguments: Dict[str, Any], output: Any) -> None:
        """Follow the channels of an operator's arguments into its output."""
        op = function._schema.name.rpartition(':')[2].rstrip('_')
        inputs = [t for t in tree_leaves(list(arguments.values())) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        self.alive += outputs
        carried = {id(o): o for t in inputs for o in self.obstacles_of.get(id(t), ())}
        for t in outputs:
            self.obstacles_of.setdefault(id(t), []).extend(carried.values())
        flows = [self.flows[id(t)] for t in inputs if id(t) in self.flows]
        for t in inputs:
            if id(t) in self.weights and self.weights[id(t)].layer != self.stack[-1]:
                self.used_by[self.weights[id(t)].layer] = self.stack[-1]
        if op in _RULES:
            getattr(self, _RULES[op])(op, arguments, outputs[0])
        elif flows and torch.Tag.pointwise in function.tags:
            self.pointwise(inputs, output)
        elif flows and op in _PASSING and (flows[0].dim == 1 or op not in _SPATIAL):
            pooled = flows[0].pooled or op.startswith(('_adaptive', 'adaptive'))
            self.flows[id(outputs[0])] = _Flow(flows[0].group, flows[0].dim, pooled)
        elif flows:
            self.stop(f'applies {op}, an operator that channels are not followed through', inputs, output)
        for t in outputs:
            flow = self.flows.get(id(t))
            if flow is not None and t.shape[flow.dim] != flow.group.root.base:
                self.stop(f'changes the number of channels ({op})', [t, *inputs], t)

    def stop(self, why: str, inputs: Sequence[Any], output: Any, name: Optional[str] = None, counts=False) -> None:
        """Note that channels cannot be followed through an operator of a module, the innermost one by default."""
        groups = [self.flows[id(t)].group for t in inputs if id(t) in self.flows]
        counts = counts or any(id(t) in self.weights for t in inputs)
        message = _message(self.modules, self.stack[-1] if name is None else name, why)
        self.obstacles.append(_Obstacle(message, groups, counts))
        for t in tree_leaves(output):
            self.flows.pop(id(t), None)
            self.obstacles_of.setdefault(id(t), []).append(self.obstacles[-1])

    def supported(self, layer: str, inputs: Sequence[Any], output: Any) -> bool:
        """Count a call of a layer that has an elastic version; the channels end at a layer that has none."""
        elastic = ELASTIC.get(type(self.modules[layer]))
        why = elastic.refusal(self.modules[layer]) if elastic else 'is not supported'
        if not why and 'forward' in vars(self.modules[layer]):
            why = 'has a forward method of its own'
        if why:
            self.stop(why, inputs, output, layer)
        else:
            self.layers[layer] += 1
            if not any(id(t) in self.flows for t in inputs):
                self.reads_fixed.add(layer)
        return not why

    def reads(self, *inputs: Any) -> None:
        """A layer with weights reads its inputs: what could not be followed on the way to them counts."""
        for t in inputs:
            for obstacle in self.obstacles_of.get(id(t), ()):
                obstacle.counts = True

    def along(self, tensor: Any, axis: int, flow: Optional[_Flow]) -> None:
        """Note that channels run along an axis of a parameter or buffer, where there are both."""
        if tensor is not None and flow is not None:
            axes = self.axes.setdefault(self.weights[id(tensor)].name, {})
            axes[axis] = self.tie(axes.get(axis, flow.group), flow.group)

    def tie(self, one: _Group, other: _Group) -> _Group:
        """Make one group of two; the one that was written first gives the name."""
        first, second = sorted((one.root, other.root), key=lambda g: g.order)
        if first is not second:
            second.tied_to = first
            first.writers += second.writers
            first.readers += second.readers
            first.kept |= second.kept
            first.returned |= second.returned
        return first

    # Operators with rules of their own

    def convolution(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, weight, bias, groups = a['input'], a['weight'], a['bias'], a['groups']
        flow, known = self.flows.get(id(x)), self.weights.get(id(weight))
        self.reads(x)
        depthwise = 1 < groups == x.shape[1] == output.shape[1]
        if flow and flow.dim != 1:
            self.stop('convolves over the channels', (x, weight), output)
        elif bias is not None and id(bias) not in self.weights:
            self.stop('computes the bias of a convolution', (x, weight), output, counts=True)
        elif depthwise and known and known.axes[0] is None:  # one filter for all channels, however many there are
            self.pass_on(flow, output)
        elif known is None or known.axes[:2] != (0, 1):
            self.stop('computes the weight of a convolution', (x, weight), output, counts=True)
        elif not self.supported(known.layer, (x, weight), output):
            return
        elif depthwise:
            self.convs.setdefault(known.layer, flow)
            self.along(weight, 0, flow)
            self.along(bias, 0, flow)
            self.pass_on(flow, output)
        else:
            order = len(self.groups)
            group = self.groups.setdefault(
                known.layer, _Group(known.layer, output.shape[1], order, [known.layer]))
            written = self.flows[id(output)] = _Flow(group, 1)
            self.convs.setdefault(known.layer, flow)
            self.along(weight, 0, written)
            self.along(bias, 0, written)
            self.along(weight, 1, flow)
            if flow:
                flow.group.root.readers.append(known.layer)

    def pass_on(self, flow: Optional[_Flow], output: torch.Tensor) -> None:
        if flow:
            self.flows[id(output)] = flow

    def norm(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, names = a['input'], ('weight', 'bias', 'running_mean', 'running_var')
        tensors = [a[name] for name in names if a.get(name) is not None]
        layer = next((self.weights[id(t)].layer for t in tensors if id(t) in self.weights), self.stack[-1])
        flow = self.flows.get(id(x))
        self.reads(x)
        if flow and flow.dim != 1:
            self.stop('normalises another dimension than the channels', (x, *tensors), output)
        elif self.supported(layer, (x, *tensors), output):
            for t in tensors:
                self.along(t, 0, flow)
            self.pass_on(flow, output)

    def linear(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, weight = a.get('mat1', a['self']), a['mat2']
        flow, known = self.flows.get(id(x)), self.weights.get(id(weight))
        self.reads(x, weight)
        if known is None or known.axes != (1, 0) or (flow and flow.dim != x.ndim - 1):
            if flow or id(weight) in self.flows:
                self.stop('multiplies activations that channels are not followed through', (x, weight), output)
        elif flow and self.supported(known.layer, (x, weight), output):
            self.along(weight, 1, flow)
            flow.group.root.readers.append(known.layer)

    def pointwise(self, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        """Tie the channels of the operands, and the weights that have as many."""
        flows = [(t, self.flows[id(t)]) for t in inputs if id(t) in self.flows]
        dims = {f.dim + output.ndim - t.ndim for t, f in flows}
        dim = dims.pop()
        size = output.shape[dim]
        whole = [f for t, f in flows if t.shape[f.dim] == size]
        if dims or not whole:
            self.stop('combines channels that lie in different dimensions', inputs, output)
            return
        group = whole[0].group
        for flow in whole[1:]:
            group = self.tie(group, flow.group)
        for t in inputs:
            own = dim - (output.ndim - t.ndim)
            known, flow = self.weights.get(id(t)), self.flows.get(id(t))
            if flow is not None:
                flow.group.root.kept |= t.shape[flow.dim] != size  # one channel, broadcast over the others
            elif own < 0 or t.shape[own] != size or size == 1:
                continue
            elif known is None or known.axes[own] is None:
                group.root.kept = True  # it meets a tensor whose width is fixed
            elif self.supported(known.layer, inputs, output):
                self.along(t, known.axes[own], whole[0])
            else:
                return
        self.flows[id(output)] = _Flow(group, dim, all(f.pooled for f in whole))

    def reduction(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, dims, flow = a['self'], a.get('dim'), self.flows.get(id(a['self']))
        if flow is None:
            return
        dims = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))}
        if flow.dim in dims:
            self.stop(f'reduces over the channels ({op})', (x,), output)
            return
        shift = 0 if a.get('keepdim') else sum(d < flow.dim for d in dims)
        self.flows[id(output)] = _Flow(flow.group, flow.dim - shift, flow.pooled or len(dims) > 1)

    def rearrangement(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x = a['self']
        known, flow = self.weights.get(id(x)), self.flows.get(id(x))
        order = _order(op, a, x.shape, output.shape)
        if known is not None:
            axes = tuple(None if d is None else known.axes[d] for d in order)
            self.weights[id(output)] = _Weight(known.name, axes)
        elif flow is not None and flow.dim in order:
            self.flows[id(output)] = _Flow(flow.group, order.index(flow.dim), flow.pooled)
        elif flow is not None:
            self.stop(f'reshapes the channels ({op})', (x,), output)

    # What is made of it

    def finish(self, inputs: Tuple[Any, ...], outputs: Any) -> Layout:
        """Name the channel sets, after the forward pass has returned its outputs."""
        for t in tree_leaves(outputs):
            if id(t) in self.flows:
                root = self.flows[id(t)].group.root
                root.kept = root.returned = True
            elif not isinstance(t, (torch.Tensor, int, float, str, type(None))):
                why = f'returns a {type(t).__name__}; only tensors in lists, tuples and dicts can be followed'
                raise ValueError(_message(self.modules, '', why))
        for name, of in self.axes.items():
            layer = name.rpartition('.')[0]
            for axis in of if layer in self.reads_fixed else ():
                of[axis].root.kept |= axis == 1 or layer not in self.groups
        for obstacle in self.obstacles:
            if obstacle.counts and not (obstacle.groups and all(g.root.returned for g in obstacle.groups)):
                raise ValueError(obstacle.message)
            for group in obstacle.groups:
                group.root.kept = True
        free = [g for g in self.groups.values() if g.tied_to is None and not g.kept and g.readers]
        if not free:
            raise ValueError(_message(self.modules, '', 'has no channels between two layers that can be widened'))
        blocks = self.blocks(free)
        sets = {g: Channels(g.name, g.base, writers=list(dict.fromkeys(g.writers))) for g in free}
        for group, c in sets.items():
            places = {next((b for b in blocks if n.startswith(f'{b}.')), None) for n in group.writers + group.readers}
            readers = list(dict.fromkeys(group.readers))
            excited = self.excited(group)
            if excited is not None:
                c.kind, c.source, c.readers = 'squeeze', sets.get(excited), readers
            elif len(places) == 1 and None not in places:
                c.kind, c.readers = 'expand', [n for n in readers if self.excited(self.groups.get(n)) is None]
        for group, c in sets.items():
            if c.kind == 'expand':
                c.source = self.block_input(group, sets)
        axes = {name: {axis: sets[g.root] for axis, g in groups.items() if g.root in sets}
                for name, groups in self.axes.items()}
        axes = {name: of for name, of in axes.items() if of}
        augmented = {name.rpartition('.')[0] for name in axes}
        for name in augmented & set(self.used_by):
            raise ValueError(_message(
                self.modules, name, f"has its tensors used by the code of '{self.used_by[name] or 'the network'}'"))
        layers = {name: calls for name, calls in self.layers.items()
                  if name in augmented or issubclass(ELASTIC[type(self.modules[name])], ElasticBatchNorm)}
        return Layout({c.name: c for c in sets.values()}, axes, layers, blocks, inputs)

    def excited(self, group: Optional[_Group]) -> Optional[_Group]:
        """Return the group that squeeze-excite computes a gate for, where the given group is its squeezed channels:
        they are read off pooled channels, and written back onto the same ones. None otherwise."""
        if group is None:
            return None
        group = group.root
        read = {f.group.root if (f := self.convs[n]) is not None and f.pooled else None for n in group.writers}
        written = {self.groups[n].root if n in self.groups else None for n in group.readers}
        if len(read) == 1 and read == written and None not in read and group not in read:
            return read.pop()
        return None

    def blocks(self, groups: Sequence[_Group]) -> List[str]:
        """List the innermost modules, other than the network itself and plain containers, that hold at least two
        convolutions; those of squeeze-excite do not count."""
        gates = {n for g in groups if self.excited(g) for n in g.writers + g.readers}
        convs = [n for n in self.convs if n not in gates]
        found = [name for name, module in self.modules.items() if name and type(module) not in _CONTAINERS
                 and sum(n.startswith(f'{name}.') for n in convs) >= 2]
        return [name for name in found if not any(other.startswith(f'{name}.') for other in found)]

    def block_input(self, group: _Group, sets: Dict[_Group, Channels]) -> Optional[Channels]:
        """Return the channels that the block of an inner group reads, behind other inner groups too."""
        seen = [group]
        while True:
            flow = self.convs[group.writers[0]]
            source = sets.get(flow.group.root) if flow else None
            if source is None or source.kind != 'expand':
                return source
            group = flow.group.root
            if group in seen:  # a layer that reads what it writes
                return None
            seen.append(group)


def _check(model: nn.Module) -> None:
    """Refuse what a rebuilt model could not keep: hooks of others, and a tensor that two layers share."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            if not isinstance(getattr(getattr(hook, 'func', None), '__self__', None), FeatureHooks):
                raise ValueError(_message(modules, name, 'has a forward hook: remove it first'))
    owners: Dict[int, str] = {}
    for name, module in modules.items():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and owners.setdefault(id(tensor), name) != name:
                raise ValueError(_message(modules, name, f"shares its {key} with '{owners[id(tensor)]}'"))


def fingerprint(model: nn.Module, inputs: Any) -> Optional[Tuple[Any, ...]]:
    """Return a key that two models share only if they compute the same function of their weights, for inputs of these
    shapes; None where that cannot be told."""
    parts: List[Any] = [tuple(ELASTIC)]
    parts += [(t.dtype, tuple(t.shape)) if isinstance(t, torch.Tensor) else t for t in tree_leaves(inputs)]
    hidden = ('_parameters', '_buffers', '_modules', 'training')
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if k not in hidden}
        if not _is_plain(attributes):
            return None
        parts += [name, type(module), type(module).forward, repr(attributes)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts += [name, tensor.dtype, tuple(tensor.shape)]
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    """Tell whether `repr` says all about a value."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def to_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, in evaluation mode. No memory for its tensors is needed."""
    memo: Dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).eval()


def shapes(model: nn.Module, inputs: Tuple[Any, ...]) -> List[Any]:
    """Return, for every call of a module within a model on the meta device, the shapes that it reads and writes."""
    calls: List[Any] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls.append((name, [tuple(t.shape) for t in tree_leaves((args, output)) if isinstance(t, torch.Tensor)]))

    handles = [m.register_forward_hook(partial(record, name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


_LAYOUTS: Dict[Any, Layout] = {}  # by fingerprint


def trace(model: nn.Module, inputs: Tuple[Any, ...]) -> Layout:
    """Find the channels of a model that can be augmented. The model is only read.

    A layout is kept for the next model that computes the same.

    Args:
        inputs: Arguments of the forward pass. Only shapes and types of tensors count.

    Raises:
        ValueError: Channels cannot be followed; the message names the module, its type, the reason and the layers that
            are supported.
    """
    _check(model)
    key = fingerprint(model, inputs)
    if key is not None and key in _LAYOUTS:
        return _LAYOUTS[key]
    inputs = tree_map(lambda t: t.to('meta') if isinstance(t, torch.Tensor) else t, inputs)
    # In inference mode, operators would arrive in another form.
    with torch.inference_mode(False):
        layout = _trace(to_meta(model), inputs)
    if key is not None:
        _LAYOUTS[key] = layout
    return layout


def _trace(model: nn.Module, inputs: Tuple[Any, ...]) -> Layout:
    tracer = _Tracer(model)
    try:
        with torch.no_grad(), tracer:
            outputs = model(*inputs)
    except Exception as e:  # whatever the model's own code raises
        shapes = ', '.join(' x '.join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
        why = f'fails in a forward pass on an input of {shapes} ({" ".join(str(e).split())[:200]})'
        raise ValueError(_message(tracer.modules, tracer.stack[-1], why)) from e
    return tracer.finish(inputs, outputs)
