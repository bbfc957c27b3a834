"""What a model costs on a microcontroller: multiply-accumulates, flash and memory of its int8 TensorFlow Lite file.

The estimate follows the file that `python -m timm_netaug deploy` writes, and the way in which the interpreter of
TensorFlow Lite Micro runs it. `MEMORY_MODEL` states it in a few sentences. The constants below were measured on such
files; docs/deploy.md compares estimates and measurements.

Activations are int8 tensors at batch 1. An operator's inputs, its output and every tensor that a later operator still
reads are in memory while it runs, and each of them keeps its place: no operator works in place. The interpreter plans
the places before it runs, the largest tensor first, each in the first gap that is free as long as the tensor is needed
(`greedy_plan`). That can take more memory than the largest sum of live tensors. BatchNorm, ReLU and ReLU6 are part of
the operator before them; views are free.
"""
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.fx import Node

from .meta import fingerprint

__all__ = ['MEMORY_MODEL', 'Costs', 'costs', 'greedy_plan']

MEMORY_MODEL = (
    'Estimated, not measured: the int8 file and the memory arena of TensorFlow Lite Micro on a 64-bit machine, as'
    ' `python -m timm_netaug deploy` measures them. Flash: int8 weights, 16 bytes per output channel for bias, scale'
    ' and zero point, about 300 bytes per layer and 120 per other operator; the code of the interpreter is not counted.'
    ' Arena: activations at batch 1, layer by layer, as the greedy memory planner of the interpreter places them, and'
    ' what persists, 8 bytes per output channel, about 260 per layer and 130 per other operator. There is neither'
    ' patch-based execution nor depthwise convolution in place, so these figures are not comparable with'
    " MCUNet's published ones, which TinyEngine reaches with both."
)

# Per output channel by the formats, per operator fitted to files of the five netaug_* models (docs/deploy.md).
_FLASH_PER_CHANNEL = 16  # int32 bias, float32 scale and int64 zero point of the weights
_FLASH_PER_LAYER, _FLASH_PER_OTHER = 302, 119  # tables of the flatbuffer: the operator, its tensors, its buffers
_PERSISTENT_PER_CHANNEL = 8  # int32 multiplier and shift
_PERSISTENT_PER_LAYER, _PERSISTENT_PER_OTHER = 264, 130  # structures with 64-bit pointers
_ALIGNMENT = 16

_LAYERS = ('aten::conv1d', 'aten::conv2d', 'aten::conv3d', 'aten::linear')
_POOLS = ('aten::max_pool2d', 'aten::avg_pool2d')
_NORM = 'aten::batch_norm'
_FUSED = ('aten::relu', 'aten::relu_', 'aten::relu6', 'aten::relu6_', 'aten::hardtanh', 'aten::hardtanh_')
_CAN_FUSE = (*_LAYERS, 'aten::add', 'aten::add_', 'aten::mul', 'aten::mul_', _NORM)  # take an activation in
_TWO_OPERATORS = ('aten::silu', 'aten::silu_', _NORM)
_KEEPS_SCRATCH = ('aten::silu', 'aten::silu_')  # the result of the first of two, while the second runs
_MEANS = ('aten::mean', 'aten::sum', 'aten::adaptive_avg_pool2d')  # with int32 sums as scratch memory
_FREE = ('aten::dropout', 'getitem')  # beside views


@dataclass(eq=False)
class _Buffer:
    """A tensor's memory, and the first and last operator that need it."""
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Costs:
    """What a model costs.

    Args:
        layers: A row for every operator in the order of execution: `name`, `op`, `shape` (of the output without the
            batch), `macs` (of convolutions and linear layers), `weight_bytes` (flash) and `live_bytes` (activations
            that are in memory while it runs).
        activation_bytes: Memory for activations.
        persistent_bytes: Memory that the interpreter needs besides, as long as it lives.
        flash_bytes: Size of the file.
    """
    layers: List[Dict[str, Any]]
    activation_bytes: int
    persistent_bytes: int
    flash_bytes: int


def greedy_plan(buffers: Sequence[Tuple[int, int, int]]) -> int:
    """Return the memory in which the greedy planner of TensorFlow Lite Micro places tensors.

    Args:
        buffers: Size, first and last operator of every tensor, in the order of the file.
    """
    placed: List[Tuple[int, int, int, int]] = []  # offset, end, first and last operator, by offset
    order = sorted(reversed(buffers), key=lambda buffer: -buffer[0])  # of equals, the last one first
    for size, first, last in order:
        size, offset = -(-size // _ALIGNMENT) * _ALIGNMENT, 0
        for start, end, other_first, other_last in placed:
            if other_first > last or other_last < first:
                continue
            if start - offset >= size:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, first, last))
        placed.sort(key=lambda entry: entry[0])
    return max((end for _, end, _, _ in placed), default=0)


def _op(node: Node) -> str:
    return node.target._schema.name if hasattr(node.target, '_schema') else getattr(node.target, '__name__', '')


def _arguments(node: Node) -> Dict[str, Any]:
    return {**{a.name: value for a, value in zip(node.target._schema.arguments, node.args)}, **node.kwargs}


def _shapes(node: Node) -> List[List[int]]:
    value = node.meta.get('val')
    return [list(t.shape) for t in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(t)]


def _elements(node: Node) -> int:
    return sum(map(math.prod, _shapes(node)))


def _name(node: Node) -> str:
    stack = list(node.meta.get('nn_module_stack', {}).values())
    module = stack[-1][0].partition('@')[0] if stack else ''
    op = '' if module and _op(node) in _LAYERS else f'({_op(node).rpartition(":")[2].rstrip("_")})'
    return f'{module} {op}'.strip()


def _is_view(node: Node) -> bool:
    returns = node.target._schema.returns if hasattr(node.target, '_schema') else ()
    return _op(node) in _FREE or any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _pair(value: Any) -> Tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1]) if value else (0, 0)


def _window(node: Node, same_kernels: bool) -> Optional[Tuple[List[int], List[int]]]:
    """Return the kernel of a convolution or pooling of images as it is written into the file, and height and width of
    the padded copy of its input that a converter adds (the input's own where none is needed); None for other nodes."""
    if _op(node) not in ('aten::conv2d', *_POOLS):
        return None
    arguments = _arguments(node)
    sides = _shapes(node.args[0])[0][-2:]
    kernel = _shapes(arguments['weight'])[0][-2:] if _op(node) in _LAYERS else list(_pair(arguments['kernel_size']))
    if isinstance(arguments.get('padding'), str):
        return kernel, sides
    stride = _pair(arguments.get('stride') or (1 if _op(node) in _LAYERS else kernel))
    padding, dilation = _pair(arguments.get('padding') or 0), _pair(arguments.get('dilation') or 1)
    widened = (same_kernels and _op(node) in _LAYERS and stride == (2, 2) and dilation == (1, 1)
               and padding != (0, 0) and all(k % 2 and p == k // 2 for k, p in zip(kernel, padding)))
    if widened:  # see deploy.rewrite.with_same_kernels
        kernel = [k + (side % 2 == 0) for k, side in zip(kernel, sides)]
    needed = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, s, d, k in zip(sides, stride, dilation, kernel)]
    if padding == (0, 0) or all(n == 2 * p for n, p in zip(needed, padding)):
        return kernel, sides
    return kernel, [n + 2 * p for n, p in zip(sides, padding)]


class _Walk:
    """The operators of a file, collected node by node."""

    def __init__(self) -> None:
        self.rows: List[Dict[str, Any]] = []
        self.buffers: List[_Buffer] = []
        self.channels = 0  # of the outputs of layers
        self.layers = 0  # convolutions and linear layers
        self.others = 0  # all other operators

    def buffer(self, size: int) -> _Buffer:
        now = len(self.rows)
        self.buffers.append(_Buffer(size, now, now))
        return self.buffers[-1]

    def run(
            self,
            name: str,
            op: str,
            shape: Sequence[int],
            reads: Sequence[_Buffer],
            scratch: int = 0,
            channels: int = 0,
            others: int = 1,
            macs: int = 0,
            weight_bytes: int = 0,
    ) -> _Buffer:
        """Add a layer (with `channels`) or `others` operators of another kind; returns the memory of the output."""
        now = len(self.rows)
        for buffer in reads:
            buffer.last = now
        if scratch:
            self.buffer(scratch)
        output = self.buffer(math.prod(shape))
        self.rows.append(dict(name=name, op=op, shape=list(shape), macs=macs, weight_bytes=weight_bytes))
        self.channels += channels
        self.layers += channels > 0
        self.others += 0 if channels else others
        return output

    def costs(self) -> Costs:
        for i, row in enumerate(self.rows):
            row['live_bytes'] = sum(b.size for b in self.buffers if b.first <= i <= b.last)
        return Costs(
            self.rows,
            greedy_plan([(b.size, b.first, b.last) for b in self.buffers]),
            _PERSISTENT_PER_CHANNEL * self.channels + _PERSISTENT_PER_LAYER * self.layers
            + _PERSISTENT_PER_OTHER * self.others,
            sum(row['weight_bytes'] for row in self.rows) + _FLASH_PER_LAYER * self.layers
            + _FLASH_PER_OTHER * self.others,
        )


_COSTS: Dict[Any, Costs] = {}  # of models that have been traced, by fingerprint


def costs(model: nn.Module, input_size: Sequence[int], same_kernels: bool = True) -> Costs:
    """Estimate what a model costs.

    Args:
        model: In evaluation mode. It may be on the meta device.
        input_size: Channels, height and width.
        same_kernels: Whether convolutions of stride 2 are written with larger kernels and SAME padding, as `deploy`
            does by default.
    """
    key = fingerprint(model, [*input_size, same_kernels])
    if key is None:
        return _costs(model, input_size, same_kernels)
    if key not in _COSTS:
        _COSTS[key] = _costs(model, input_size, same_kernels)
    found = _COSTS[key]
    return Costs([dict(row) for row in found.layers], found.activation_bytes, found.persistent_bytes, found.flash_bytes)


def _costs(model: nn.Module, input_size: Sequence[int], same_kernels: bool) -> Costs:
    with torch.no_grad():
        parameter = next(model.parameters())
        image = torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype)
        program = torch.export.export(model, (image,))
    walk, values, fusible, counted = _Walk(), {}, set(), set()
    for node in program.graph.nodes:
        if node.op == 'placeholder' and node.name in program.graph_signature.user_inputs:
            values[node] = walk.run(
                '(normalise)', 'conv2d', input_size, [walk.buffer(math.prod(input_size))], channels=input_size[0],
                weight_bytes=input_size[0] * (1 + _FLASH_PER_CHANNEL))
        if node.op == 'output':
            for source in node.all_input_nodes:
                if source in values:
                    values[source].last = len(walk.rows)
        sources = [n for n in node.all_input_nodes if n in values]
        if node.op != 'call_function' or not sources or not _shapes(node):
            continue  # a constant, or a number
        op, reads = _op(node), [values[n] for n in sources]
        if _is_view(node):
            values[node] = reads[0]
            fusible.update([node] if sources[0] in fusible and len(sources[0].users) == 1 else [])
            continue
        alone = len(sources) == 1 and len(sources[0].users) == 1
        if alone and sources[0] in fusible and (
                op in _FUSED or op == _NORM and _op(sources[0]) in _LAYERS):
            values[node] = reads[0]
            fusible.update([node] if op == _NORM else [])
            continue
        values[node] = _operator(walk, node, op, reads, counted, same_kernels)
        fusible.update([node] if op in _CAN_FUSE else [])
    return walk.costs()


def _operator(
        walk: _Walk,
        node: Node,
        op: str,
        reads: List[_Buffer],
        counted: set,
        same_kernels: bool,
) -> _Buffer:
    """Add the operator of a node, and the padded copy of its input where one is needed.

    Args:
        counted: Constants that are in the file already: weights that layers share are stored once.
    """
    shape, macs, channels = _shapes(node)[0], 0, 0
    constants = [n for n in node.all_input_nodes if n.op in ('placeholder', 'get_attr') and _shapes(n)]
    new = [n for n in constants if n not in counted]
    counted.update(new)
    window = _window(node, same_kernels)
    if window and window[1] != _shapes(node.args[0])[0][-2:]:
        padded = [_shapes(node.args[0])[0][1], *window[1]]
        reads = [walk.run(f'{_name(node)} (pad)', 'pad', padded, reads)]
    if op in _LAYERS:
        weight_node = _arguments(node)['weight']
        weight = _shapes(weight_node)[0]
        channels = weight[0]
        macs = math.prod(shape) // channels * math.prod(weight)
        written = [*weight[:2], *window[0]] if window else weight
        weight_bytes = channels * _FLASH_PER_CHANNEL + (math.prod(written) if weight_node in new else 0)
    elif op == _NORM:
        weight_bytes = 2 * shape[1]
    else:
        weight_bytes = sum(map(_elements, new))
    scratch = math.prod(shape) if op in _KEEPS_SCRATCH else 4 * math.prod(shape) if op in _MEANS else 0
    return walk.run(_name(node), op.rpartition(':')[2].rstrip('_'), shape[1:], reads, scratch, channels,
                    1 + (op in _TWO_OPERATORS), macs, weight_bytes)
