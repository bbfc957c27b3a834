"""Which channels of a network may be widened: `trace` finds its `Layout`.

The network is run once without computing anything (on PyTorch's meta device), and its channels are followed from
operator to operator. A dense convolution writes a new channel set. Depthwise convolutions, norms, activations and
pooling pass it on; sums and products tie two sets together. Where channels cannot be followed, the output is marked as
lost. If a layer with weights reads a lost activation, the network is refused, because the layer would silently not be
augmented.
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from timm.models._features import FeatureHooks
from torch.utils._pytree import tree_leaves, tree_map

from .layers import ELASTIC, ElasticBatchNorm
from .layout import Channels, Layout
from .meta import FastMeta, fingerprint, to_meta

__all__ = ['trace']


@dataclass(eq=False)
class _Group:
    """A channel set during the trace. Tied groups share one root: the group that was written first."""
    name: str
    base: int
    order: int
    writers: List[str] = field(default_factory=list)
    readers: List[str] = field(default_factory=list)
    fixed: str = ''  # why its width cannot change; empty if it can
    tied_to: Optional['_Group'] = None

    @property
    def root(self) -> '_Group':
        return self if self.tied_to is None else self.tied_to.root


@dataclass(frozen=True)
class _Flow:
    """The channels of an activation: their group, their dimension, and whether they have been pooled."""
    group: _Group
    dim: int
    pooled: bool = False


@dataclass(frozen=True)
class _Weight:
    """A parameter or buffer, or a view of one: its name, and the original axis of every dimension (None if new)."""
    name: str
    axes: Tuple[Optional[int], ...]

    @property
    def layer(self) -> str:
        return self.name.rpartition('.')[0]


class _Refusal(ValueError):
    """Raised if a network cannot be augmented. The class separates this error from errors of the network's code."""


# Operators that treat every channel alike but are not tagged as pointwise by every supported PyTorch.
_PASSING = (
    'avg_pool2d', '_adaptive_avg_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d', 'max_pool2d_with_indices',
    'constant_pad_nd', 'reflection_pad2d', 'replication_pad2d', 'upsample_nearest2d', '_upsample_nearest_exact2d',
    'upsample_bilinear2d', '_upsample_bilinear2d_aa', 'upsample_bicubic2d', 'clone', 'contiguous', '_to_copy', 'detach',
    'alias', 'lift_fresh', 'native_dropout', 'hardswish', 'leaky_relu',
)
_SPATIAL = tuple(op for op in _PASSING if 'pool' in op or 'pad' in op or 'upsample' in op)  # input: (B, C, H, W)
_REARRANGING = ('view', '_unsafe_view', 'reshape', 'squeeze', 'unsqueeze', 'expand', 'slice', 'select', 'permute',
                'transpose', 't')
_RULES = dict(convolution='convolution', addmm='linear', mm='linear', mean='reduction', sum='reduction',
              amax='reduction', native_batch_norm='norm', _native_batch_norm_legit='norm',
              _native_batch_norm_legit_no_training='norm', **dict.fromkeys(_REARRANGING, 'rearrangement'))
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _order(op: str, a: Dict[str, Any], before: Sequence[int], after: Sequence[int]) -> List[Optional[int]]:
    """Return the input dimension that each dimension of a rearranged tensor comes from, None for a new dimension."""
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


def _message(modules: Mapping[str, nn.Module], name: str, why: str) -> str:
    what = f"module '{name}' of type" if name else 'it is of type'
    return (f'NetAug cannot augment this model: {what} {type(modules[name]).__name__}, which {why}.'
            f' Supported types: {", ".join(dict.fromkeys(t.__name__ for t in ELASTIC))}.'
            f' Augment a part of the model without this module.')


def _check(model: nn.Module) -> None:
    """Refuse a model with hooks, or with tensors that two layers share, because a copy of the model would lose them."""
    modules, owners = dict(model.named_modules()), {}
    for name, module in modules.items():
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            if not isinstance(getattr(getattr(hook, 'func', None), '__self__', None), FeatureHooks):
                raise _Refusal(_message(modules, name, 'has a forward hook: remove it first'))
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and owners.setdefault(id(tensor), name) != name:
                raise _Refusal(_message(modules, name, f"shares its {key} with '{owners[id(tensor)]}'"))


def _is_pointwise(function: Any, op: str) -> bool:
    """Return whether an operator treats every element alike."""
    # Some in-place operators lack the tag of their counterparts: hardtanh_ in PyTorch 2.11, mish_ still in 2.14.
    packet = getattr(torch.ops.aten, op, None) if function.namespace == 'aten' else None
    counterpart = getattr(packet, function._overloadname, function)
    return torch.Tag.pointwise in (*function.tags, *counterpart.tags)


class _Tracer(FastMeta):
    """Follows channels through the operators of one forward pass of a model on the meta device."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.modules = dict(model.named_modules())
        self.stack = ['']  # names of the modules that are being called
        self.flows: Dict[int, _Flow] = {}  # this dict and the next two are keyed by the id of a tensor
        self.weights: Dict[int, _Weight] = {}
        self.lost: Dict[int, str] = {}  # the error message, in case a layer with weights reads the tensor
        self.alive: List[Any] = []  # keeps tensors alive, so that no id is used twice
        self.groups: Dict[str, _Group] = {}  # by the convolution that writes the channels
        self.axes: Dict[str, Dict[int, _Group]] = {}
        self.layers: Counter = Counter()
        self.convs: Dict[str, Optional[_Flow]] = {}  # convolution -> the channels that it reads
        self.reads_fixed: Set[str] = set()  # layers that read activations of a fixed width in at least one call
        self.used_by: Dict[str, str] = {}  # layer -> another module whose code uses the layer's tensors
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
        output = super().__torch_dispatch__(function, types, args, kwargs)
        names = (a.name for a in function._schema.arguments)
        self.follow(function, {**dict(zip(names, args)), **(kwargs or {})}, output)
        return output

    def follow(self, function: Any, arguments: Dict[str, Any], output: Any) -> None:
        """Follow the channels of an operator's arguments into its output."""
        op = function._schema.name.rpartition(':')[2].rstrip('_')
        inputs = [t for t in tree_leaves(list(arguments.values())) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        self.alive += outputs
        lost = next((self.lost[id(t)] for t in inputs if id(t) in self.lost), '')
        flows = [self.flows[id(t)] for t in inputs if id(t) in self.flows]
        for t in inputs:
            if id(t) in self.weights and self.weights[id(t)].layer != self.stack[-1]:
                self.used_by[self.weights[id(t)].layer] = self.stack[-1]
        if op in _RULES:
            getattr(self, _RULES[op])(op, arguments, outputs[0])
        elif flows and _is_pointwise(function, op):
            self.pointwise(inputs, output)
        elif flows and op in _PASSING and (flows[0].dim == 1 or op not in _SPATIAL):
            pooled = flows[0].pooled or op.startswith(('_adaptive', 'adaptive'))
            self.flows[id(outputs[0])] = _Flow(flows[0].group, flows[0].dim, pooled)
        elif flows:
            self.lose(f'applies {op}, an operator that channels are not followed through', inputs, outputs)
        for t in outputs:
            flow = self.flows.get(id(t))
            if flow is not None and t.shape[flow.dim] != flow.group.root.base:
                self.lose(f'changes the number of channels ({op})', [t, *inputs], outputs)
            elif flow is None and lost:
                self.lost.setdefault(id(t), lost)

    # Where channels cannot be followed

    def message(self, why: str) -> str:
        return _message(self.modules, self.stack[-1], why)

    def refuse(self, why: str, name: Optional[str] = None) -> NoReturn:
        raise _Refusal(_message(self.modules, self.stack[-1] if name is None else name, why))

    def lose(self, why: str, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        """Fix the width of the channels that an operator reads, and mark its outputs as lost."""
        if any(id(t) in self.weights for t in inputs):
            self.refuse(why)
        for t in inputs:
            if id(t) in self.flows:
                self.fix(self.flows[id(t)], f"'{self.stack[-1]}' {why}")
        for t in outputs:
            self.flows.pop(id(t), None)
            self.lost[id(t)] = self.message(why)

    def fix(self, flow: _Flow, why: str) -> None:
        """Exclude channels from augmentation: their width is fixed."""
        flow.group.root.fixed = flow.group.root.fixed or why

    def read(self, layer: str, *inputs: Any) -> None:
        """Count a call of a layer with weights. Refuse a layer that is not supported or reads a lost activation."""
        elastic = ELASTIC.get(type(self.modules[layer]))
        why = elastic.refusal(self.modules[layer]) if elastic else 'is not supported'
        if not why and 'forward' in vars(self.modules[layer]):
            why = 'has a forward method of its own'  # on the instance, so its class does not show what it computes
        if why:
            self.refuse(why, layer)
        for t in inputs:
            if id(t) in self.lost:
                raise _Refusal(self.lost[id(t)])
        self.layers[layer] += 1
        if not any(id(t) in self.flows for t in inputs):
            self.reads_fixed.add(layer)

    # The axes of weights that channels run along

    def along(self, tensor: Any, axis: int, flow: Optional[_Flow]) -> None:
        """Record that channels run along an axis of a parameter or buffer. Do nothing if one of the two is None."""
        if tensor is not None and flow is not None:
            axes = self.axes.setdefault(self.weights[id(tensor)].name, {})
            axes[axis] = self.tie(axes.get(axis, flow.group), flow.group)

    def tie(self, one: _Group, other: _Group) -> _Group:
        """Merge two groups into one. The group that was written first gives it its name."""
        first, second = sorted((one.root, other.root), key=lambda g: g.order)
        if first is not second:
            second.tied_to = first
            first.writers += second.writers
            first.readers += second.readers
            first.fixed = first.fixed or second.fixed
        return first

    # Operators with rules of their own

    def convolution(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, weight, bias, groups = a['input'], a['weight'], a['bias'], a['groups']
        flow, known = self.flows.get(id(x)), self.weights.get(id(weight))
        depthwise = 1 < groups == x.shape[1] == output.shape[1]
        if flow and flow.dim != 1:
            self.lose('convolves over the channels', (x, weight), [output])
        elif bias is not None and id(bias) not in self.weights:
            self.refuse('computes the bias of a convolution')
        elif depthwise and known and known.axes[0] is None:  # one filter, expanded to any number of channels
            self.pass_on(flow, output)
        elif known is None or known.axes[:2] != (0, 1):
            self.refuse('computes the weight of a convolution')
        elif groups == 1 or flow or id(x) in self.lost:  # grouped convolutions of the image itself are ignored
            self.read(known.layer, x)
            self.convs.setdefault(known.layer, flow)
            written = flow
            if not depthwise:
                group = _Group(known.layer, output.shape[1], len(self.groups), [known.layer])
                written = _Flow(self.groups.setdefault(known.layer, group), 1)
                if flow:
                    flow.group.root.readers.append(known.layer)
            self.along(weight, 0, written)
            self.along(bias, 0, written)
            self.along(weight, 1, None if depthwise else flow)
            self.pass_on(written, output)

    def pass_on(self, flow: Optional[_Flow], output: torch.Tensor) -> None:
        if flow:
            self.flows[id(output)] = flow

    def norm(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, names = a['input'], ('weight', 'bias', 'running_mean', 'running_var')
        tensors = [a[name] for name in names if a.get(name) is not None]
        layer = next((self.weights[id(t)].layer for t in tensors if id(t) in self.weights), self.stack[-1])
        flow = self.flows.get(id(x))
        if flow and flow.dim != 1:
            self.lose('normalises another dimension than the channels', (x, *tensors), [output])
        elif flow or id(x) in self.lost or type(self.modules[layer]) in ELASTIC:
            self.read(layer, x)
            for t in tensors:
                self.along(t, 0, flow)
            self.pass_on(flow, output)

    def linear(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, weight = a.get('mat1', a['self']), a['mat2']
        flow, known = self.flows.get(id(x)), self.weights.get(id(weight))
        if known is None or known.axes != (1, 0) or (flow and flow.dim != x.ndim - 1):
            if flow or id(weight) in self.flows:
                self.lose('multiplies activations so that channels are not followed', (x, weight), [output])
        elif flow or id(x) in self.lost or type(self.modules[known.layer]) in ELASTIC:
            self.read(known.layer, x)
            self.along(weight, 1, flow)
            if flow:
                flow.group.root.readers.append(known.layer)

    def pointwise(self, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        """Tie the channels of all operands, including weights with the same number of channels."""
        flows = [(t, self.flows[id(t)]) for t in inputs if id(t) in self.flows]
        dims = {f.dim + output.ndim - t.ndim for t, f in flows}
        dim = dims.pop()
        size = output.shape[dim]
        whole = [f for t, f in flows if t.shape[f.dim] == size]
        if dims or not whole:
            self.lose('combines channels that lie in different dimensions', inputs, [output])
            return
        for flow in whole[1:]:
            self.tie(whole[0].group, flow.group)
        for t in inputs:
            own = dim - (output.ndim - t.ndim)
            known, flow = self.weights.get(id(t)), self.flows.get(id(t))
            if flow is not None and t.shape[flow.dim] != size:
                self.fix(flow, 'it is a single channel that is combined with several others')
            elif flow is not None or own < 0 or t.shape[own] != size or size == 1:
                continue
            elif known is None or known.axes[own] is None:
                self.fix(whole[0], f"it is combined with a tensor of a fixed width in '{self.stack[-1]}'")
            else:
                self.read(known.layer, *inputs)
                self.along(t, known.axes[own], whole[0])
        self.flows[id(output)] = _Flow(whole[0].group, dim, all(f.pooled for f in whole))

    def reduction(self, op: str, a: Dict[str, Any], output: torch.Tensor) -> None:
        x, dims, flow = a['self'], a.get('dim'), self.flows.get(id(a['self']))
        if flow is None:
            return
        dims = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))}
        if flow.dim in dims:
            self.lose(f'reduces over the channels ({op})', (x,), [output])
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
            self.lose(f'reshapes the channels ({op})', (x,), [output])

    # The layout

    def finish(self, inputs: Tuple[Any, ...], outputs: Any) -> Layout:
        """Build the layout from the groups, after the forward pass has returned its outputs."""
        for t in tree_leaves(outputs):
            if id(t) in self.flows:
                self.fix(self.flows[id(t)], 'the network returns them')
            elif not isinstance(t, (torch.Tensor, int, float, str, type(None))):
                self.refuse(f'returns a {type(t).__name__}; only tensors in lists, tuples and dicts can be followed')
        for name, of in self.axes.items():
            layer = name.rpartition('.')[0]
            for axis in of if layer in self.reads_fixed else ():
                if axis == 1 or layer not in self.groups:
                    of[axis].root.fixed = of[axis].root.fixed or f"'{layer}' reads activations of a fixed width, too"
        roots = [g for g in self.groups.values() if g.tied_to is None and g.readers]
        free = [g for g in roots if not g.fixed]
        if not free:
            self.refuse('has no channels between two layers that can be widened')
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
            self.refuse(f"has its tensors used by the code of '{self.used_by[name] or 'the network'}'", name)
        layers = {name: calls for name, calls in self.layers.items()
                  if name in augmented or issubclass(ELASTIC[type(self.modules[name])], ElasticBatchNorm)}
        fixed = {name: g.fixed for g in roots if g.fixed for name in dict.fromkeys(g.writers)}
        return Layout({c.name: c for c in sets.values()}, axes, layers, blocks, fixed, inputs)

    def excited(self, group: Optional[_Group]) -> Optional[_Group]:
        """Return the channels that squeeze-excite scales, if the given group holds its squeezed channels, else None.

        Squeezed channels are computed from pooled channels, and a gate for these channels is computed from them."""
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
        convolutions. The convolutions of squeeze-excite do not count."""
        gates = {n for g in groups if self.excited(g) for n in g.writers + g.readers}
        convs = [n for n in self.convs if n not in gates]
        found = [name for name, module in self.modules.items() if name and type(module) not in _CONTAINERS
                 and sum(n.startswith(f'{name}.') for n in convs) >= 2]
        return [name for name in found if not any(other.startswith(f'{name}.') for other in found)]

    def block_input(self, group: _Group, sets: Dict[_Group, Channels]) -> Optional[Channels]:
        """Return the input channels of the block that a group lies in. Other groups inside the block are skipped."""
        seen = [group]
        while True:
            flow = self.convs[group.writers[0]]
            source = sets.get(flow.group.root) if flow else None
            if source is None or source.kind != 'expand':
                return source
            group = flow.group.root
            if group in seen:  # a layer that reads its own output
                return None
            seen.append(group)


_LAYOUTS: Dict[Any, Layout] = {}  # by fingerprint


def trace(model: nn.Module, inputs: Tuple[Any, ...]) -> Layout:
    """Find the channels of a model that can be augmented. The model is not changed.

    The layout is cached for later models that compute the same function.

    Args:
        inputs: Arguments of the forward pass. Only shapes and types of tensors count.

    Raises:
        ValueError: Channels cannot be followed; the message names the module, its type, the reason and the layers that
            are supported.
    """
    key = fingerprint(model, inputs)
    key = key and (*ELASTIC, *key)
    if key in _LAYOUTS:
        return _LAYOUTS[key]
    inputs = tree_map(lambda t: t.to('meta') if isinstance(t, torch.Tensor) else t, inputs)
    try:
        _check(model)
        # In inference mode, PyTorch would dispatch other operators.
        with torch.inference_mode(False):
            layout = _trace(to_meta(model), inputs)
    except _Refusal as e:
        raise ValueError(str(e)) from None
    if key is not None:
        _LAYOUTS[key] = layout
    return layout


def _trace(model: nn.Module, inputs: Tuple[Any, ...]) -> Layout:
    tracer = _Tracer(model)
    try:
        with torch.no_grad(), tracer:
            outputs = model(*inputs)
    except _Refusal:
        raise
    except Exception as e:  # the model's own code may raise anything
        sizes = ', '.join(' x '.join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
        why = f'fails in a forward pass on an input of {sizes} ({" ".join(str(e).split())[:200]})'
        raise _Refusal(tracer.message(why)) from e
    return tracer.finish(inputs, outputs)
