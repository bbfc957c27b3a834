"""What the operators of a model cost on a microcontroller: multiply-accumulates, flash and activation memory.

Flash is that of the weights in int8: one byte each, and per output channel of a convolution or linear layer 4 bytes for
the scale of its requantisation and 4 for its int32 bias. BatchNorm is folded into the convolution before it, which has
a bias then; one that follows no convolution has 8 bytes per channel. Other constants have 4 bytes per element of a
vector, 1 of anything larger. Code is not counted.

Activations are int8 tensors at batch 1, computed layer by layer in the order of the forward pass. While an operator
runs, its inputs (the image too), its output, and every tensor that a later operator still reads are in memory.
BatchNorm, activations and other elementwise operators write into an input that nobody reads later; views and padding
are free. There is neither patch-based execution nor depthwise convolution in place. MCUNet's published figures are
measured with an engine that has both (TinyEngine), so these are not comparable with them.
"""
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch.fx import Node

from .meta import fingerprint

__all__ = ['MEMORY_MODEL', 'operators']

MEMORY_MODEL = (
    'Flash: int8 weights, 4 bytes per output channel for a requantisation scale and 4 for an int32 bias (BatchNorm is'
    ' folded into it), no code. Activations: int8, batch 1, layer by layer: inputs (the image too) and output of an'
    ' operator and all that is read later, elementwise operators in place, no patch-based execution and no depthwise'
    " convolution in place, so not comparable with MCUNet's published figures, which TinyEngine reaches with both."
)

_LAYERS = ('aten::conv1d', 'aten::conv2d', 'aten::conv3d', 'aten::linear')
_NORM = 'aten::batch_norm'
_ELEMENTWISE = (_NORM, 'aten::hardswish', 'aten::prelu')  # beside those that PyTorch tags so
_FREE = ('aten::dropout', 'aten::pad', 'aten::constant_pad_nd', 'getitem')  # beside views


@dataclass(eq=False)
class _Storage:
    """A piece of activation memory, and the first and last node at which it is in use."""
    size: int
    first: int
    last: int


def _op(node: Node) -> str:
    return node.target._schema.name if hasattr(node.target, '_schema') else getattr(node.target, '__name__', '')


def _arguments(node: Node) -> Dict[str, Any]:
    return {**{a.name: value for a, value in zip(node.target._schema.arguments, node.args)}, **node.kwargs}


def _shapes(node: Node) -> List[List[int]]:
    value = node.meta.get('val')
    return [list(t.shape) for t in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(t)]


def _name(node: Node) -> str:
    stack = list(node.meta.get('nn_module_stack', {}).values())
    module = stack[-1][0].partition('@')[0] if stack else ''
    op = '' if module and _op(node) in _LAYERS else f'({_op(node).rpartition(":")[2].rstrip("_")})'
    return f'{module} {op}'.strip()


def _shares(node: Node) -> bool:
    """Tell whether a node's value lies where its first input does: a view of it, or written over it."""
    returns = node.target._schema.returns if hasattr(node.target, '_schema') else ()
    return _op(node) in _FREE or any(r.alias_info is not None for r in returns)


def _place(nodes: Sequence[Node], inputs: Sequence[str]) -> Tuple[Dict[Node, _Storage], Set[Node]]:
    """Give every value that depends on the image (the others are constants) its memory; tell which need none of their
    own."""
    storages, in_place = {}, set()
    for i, node in enumerate(nodes):
        reads = [storages[n] for n in node.all_input_nodes if n in storages]
        for storage in reads:
            storage.last = i
        if node.op == 'call_function' and reads and _shares(node):
            storages[node] = reads[0]
            in_place.add(node)
        elif node.name in inputs or (node.op == 'call_function' and reads):
            storages[node] = _Storage(sum(map(math.prod, _shapes(node))), i, i)
    for i, node in enumerate(nodes):
        is_elementwise = _op(node) in _ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, 'tags', ())
        if node not in storages or node in in_place or not is_elementwise:
            continue
        for storage in (storages[n] for n in node.all_input_nodes if n in storages):
            if storage.last == i and storage.size == storages[node].size:
                storage.last = i - 1  # the output has taken its place
                in_place.add(node)
                break
    return storages, in_place


_ROWS: Dict[Any, List[Dict[str, Any]]] = {}  # of models that have been traced, by fingerprint


def operators(model: nn.Module, input_size: Sequence[int]) -> List[Dict[str, Any]]:
    """List what the operators of a model cost, in forward order, without those that are fused into another one.

    Args:
        model: In evaluation mode. It may be on the meta device.
        input_size: Channels, height and width.

    Returns:
        Rows of `name`, `op`, `shape` (of the output), `macs` (of convolutions and linear layers), `weight_bytes`
        (flash) and `live_bytes` (activations in memory while it runs).
    """
    key = fingerprint(model, list(input_size))
    if key is None or key not in _ROWS:
        rows = _operators(model, input_size)
        if key is None:
            return rows
        _ROWS[key] = rows
    return [dict(row) for row in _ROWS[key]]


def _operators(model: nn.Module, input_size: Sequence[int]) -> List[Dict[str, Any]]:
    with torch.no_grad():
        parameter = next(model.parameters())
        image = torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype)
        program = torch.export.export(model, (image,))
    nodes = list(program.graph.nodes)
    storages, in_place = _place(nodes, program.graph_signature.user_inputs)

    rows, layers, counted = [], {}, set()
    for i, node in enumerate(nodes):
        reads = [n for n in node.all_input_nodes if n in storages]
        if node not in storages or not reads or not _shapes(node):
            continue
        constants = [n for n in node.all_input_nodes if n not in storages and n not in counted]
        counted.update(constants)  # weights that layers share are stored once
        op, shape, macs = _op(node), _shapes(node)[0], 0
        if op in _LAYERS:
            arguments = _arguments(node)
            weight = _shapes(arguments['weight'])[0]
            macs = math.prod(shape) // weight[0] * math.prod(weight)
            weight_bytes = weight[0] * (4 if arguments.get('bias') is None else 8)
            if arguments['weight'] in constants:
                weight_bytes += math.prod(weight)
        elif op == _NORM:
            layer = layers.get(reads[0])
            if layer is not None and len(reads[0].users) == 1:
                if _arguments(reads[0]).get('bias') is None:
                    layer['weight_bytes'] += 4 * shape[1]
                continue
            weight_bytes = 8 * shape[1]
        else:
            tensors = [s for n in constants for s in _shapes(n)]
            weight_bytes = sum(math.prod(s) * (4 if math.prod(s) == max(s, default=1) else 1) for s in tensors)
        if node in in_place and len(reads) == 1 and not weight_bytes:
            continue
        live = {s for s in storages.values() if s.first <= i <= s.last}
        rows.append(dict(name=_name(node), op=op.rpartition(':')[2], shape=shape[1:], macs=macs,
                         weight_bytes=weight_bytes, live_bytes=sum(s.size for s in live)))
        if op in _LAYERS:
            layers[node] = rows[-1]
    return rows
