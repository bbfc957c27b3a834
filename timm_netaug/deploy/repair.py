"""A quantised flatbuffer, made fit for TensorFlow Lite Micro.

The quantizer writes buffers of about a KiB and more behind the flatbuffer and notes their place in `Buffer.offset` and
`Buffer.size`. TensorFlow Lite Micro knows neither field: it takes an empty buffer for an activation, and computes with
whatever lies in memory, without an error. So all buffers are written into the flatbuffer. On the way, what only a
debugger reads is dropped: names, metadata, signatures, and the scales of biases, which follow from those of the input
and of the weights.
"""
from typing import Any, List

import numpy as np

from ..errors import UserError
from .packages import require

__all__ = ['check_all_int8', 'inline_buffers', 'operator_names', 'outside_buffers', 'read_model', 'repair', 'strip']

_ALIGNMENT = 16  # bytes, of `Buffer.data` in the schema; a processor may fault on an int32 bias at an odd address
_BIAS = dict(CONV_2D=2, DEPTHWISE_CONV_2D=2, FULLY_CONNECTED=2, TRANSPOSE_CONV=3)  # its place among the inputs


def _schema() -> Any:
    require('tflite_micro')
    return require('tflite_micro.tensorflow.lite.micro.python.schema_py_generated')


def read_model(data: bytes) -> Any:
    """Return the contents of a file as the objects of the schema (`ModelT`).

    Raises:
        UserError: It is not a TensorFlow Lite file.
    """
    schema = _schema()
    if bytes(data[4:8]) != b'TFL3':
        raise UserError('The file is not a TensorFlow Lite model: the mark TFL3 is missing.')
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))


def operator_names(model: Any) -> List[str]:
    """Return the names of the operators of the first subgraph, in the order of their execution."""
    schema = _schema()
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    return [names[codes[operator.opcodeIndex]] for operator in model.subgraphs[0].operators]


def outside_buffers(model: Any) -> List[int]:
    """Return the indices of the buffers whose data lie behind the flatbuffer."""
    return [i for i, buffer in enumerate(model.buffers) if buffer.offset > 1]


def inline_buffers(model: Any, data: bytes) -> None:
    """Move the data of buffers that lie behind the flatbuffer into it.

    Args:
        model: Is changed.
        data: The whole file that it was read from.

    Raises:
        UserError: The file is shorter than its buffers.
    """
    for i in outside_buffers(model):
        buffer = model.buffers[i]
        if buffer.offset + buffer.size > len(data):
            raise UserError(f'The file is truncated: buffer {i} ends at byte {buffer.offset + buffer.size:,}, and the'
                            f' file has {len(data):,}.')
        buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
        buffer.offset = buffer.size = 0


def strip(model: Any, names: List[str]) -> None:
    """Drop what TensorFlow Lite Micro does not read.

    Args:
        model: Is changed.
        names: Of its operators (`operator_names`).
    """
    model.description, model.metadata, model.metadataBuffer, model.signatureDefs = None, None, None, None
    for graph in model.subgraphs:
        graph.name = None
        for tensor in graph.tensors:
            tensor.name = tensor.shapeSignature = None
            if tensor.quantization is not None:
                tensor.quantization.min = tensor.quantization.max = None
    graph = model.subgraphs[0]
    for name, operator in zip(names, graph.operators):
        place = _BIAS.get(name)
        if place is not None and len(operator.inputs) > place and operator.inputs[place] >= 0:
            graph.tensors[operator.inputs[place]].quantization = None
    used = {0, *(tensor.buffer for graph in model.subgraphs for tensor in graph.tensors)}
    places = {old: new for new, old in enumerate(sorted(used))}
    model.buffers = [model.buffers[old] for old in sorted(used)]
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.buffer = places[tensor.buffer]


def _write(model: Any) -> bytes:
    flatbuffers = require('flatbuffers')

    class Aligned(_schema().BufferT):
        """A buffer whose data begin at a multiple of 16 bytes, which the generated code does not see to."""

        def Pack(self, builder: Any) -> int:
            if self.data is None or not len(self.data):
                return super().Pack(builder)
            schema, content = _schema(), np.asarray(self.data, np.uint8).tobytes()
            builder.StartVector(1, len(content), _ALIGNMENT)
            builder.head -= len(content)
            builder.Bytes[builder.head:builder.head + len(content)] = content
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    model.buffers = [Aligned(b.data, 0, 0) for b in model.buffers]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b'TFL3')
    return bytes(builder.Output())


def repair(data: bytes) -> bytes:
    """Return a file that TensorFlow Lite Micro reads as the quantizer meant it, without what nothing reads there.

    Raises:
        UserError: It is not a whole TensorFlow Lite file.
    """
    model = read_model(data)
    inline_buffers(model, data)
    strip(model, operator_names(model))
    return _write(model)


def check_all_int8(data: bytes, name: str) -> None:
    """Refuse a file in which an operator computes in floating point.

    Args:
        name: What messages call the model.

    Raises:
        UserError: An operator was not quantised; it is named.
    """
    model = read_model(data)
    graph, floating = model.subgraphs[0], _schema().TensorType.FLOAT32
    kinds = [kind for operator, kind in zip(graph.operators, operator_names(model))
             if any(graph.tensors[i].type == floating for i in [*operator.inputs, *operator.outputs] if i >= 0)]
    if kinds:
        kind = next((kind for kind in kinds if kind not in ('QUANTIZE', 'DEQUANTIZE')), kinds[0])  # those lie around it
        raise UserError(f'{name} has an operator that cannot be quantised to int8, {kind}: it would run in floating'
                        f' point, which most microcontrollers do too slowly. Replace this operator in the model.')
