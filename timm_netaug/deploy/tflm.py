"""A file in the interpreter of TensorFlow Lite Micro, built for this machine: its outputs and the memory that it takes.

The kernels are the reference kernels that run on any microcontroller. Memory is that of a 64-bit machine: pointers have
8 bytes, so the persistent part is larger than on a 32-bit chip. The activations are the same there, unless the kernels
are replaced by optimised ones that ask for scratch memory (CMSIS-NN's convolutions do).
"""
import re
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Tuple

import numpy as np

from ..errors import UserError
from .output import captured
from .packages import require
from .repair import outside_buffers, read_model

__all__ = ['Arena', 'Quantised', 'Tflm', 'reference_outputs']


@dataclass(frozen=True)
class Arena:
    """Memory that the interpreter takes from its arena, in bytes: activations (the head of the arena) and what lives as
    long as the interpreter (its tail)."""
    activations: int
    persistent: int

    @property
    def total(self) -> int:
        return self.activations + self.persistent

    def to_dict(self) -> Dict[str, int]:
        return dict(asdict(self), total=self.total)


@dataclass(frozen=True)
class Quantised:
    """An int8 input or output: its shape without the batch; a value is scale * (int8 - zero_point)."""
    shape: Tuple[int, ...]
    scale: float
    zero_point: int

    def values(self, data: np.ndarray) -> np.ndarray:
        """Return the values that int8 numbers stand for."""
        return ((data.astype(np.float32) - self.zero_point) * self.scale).astype(np.float32)

    def to_dict(self) -> Dict[str, Any]:
        return dict(asdict(self), shape=list(self.shape))


class Tflm:
    """A file that is ready to run.

    Args:
        data: The file.
        name: What messages call it.
        arena_size: Bytes of the arena; None for one that is large enough.

    Raises:
        UserError: The interpreter cannot run the file: buffers lie behind the flatbuffer, an operator is missing, or
            the arena is too small.
    """

    def __init__(self, data: bytes, name: str, arena_size: int = 0) -> None:
        runtime = require('tflite_micro.python.tflite_micro.runtime')
        model = read_model(data)
        outside = outside_buffers(model)
        if outside:
            raise UserError(f'{name} has {len(outside)} buffers behind the flatbuffer, which TensorFlow Lite Micro does'
                            f' not read: it would compute with random memory, without an error. Write the file with'
                            f' `python -m timm_netaug deploy`, which moves them into the flatbuffer.')
        self.name = name
        with captured() as printed:
            try:
                self._interpreter = runtime.Interpreter.from_bytes(data, arena_size=arena_size or 64 << 20)
            except RuntimeError as e:
                self._interpreter, error = None, e
        if self._interpreter is None:
            raise UserError(self._why(''.join(printed))) from error
        self.input = self._describe('input', self._interpreter.get_input_details(0))
        self.outputs = [self._describe('output', self._interpreter.get_output_details(i))
                        for i in range(len(model.subgraphs[0].outputs))]

    def _why(self, printed: str) -> str:
        missing = re.search(r"Didn't find op for builtin opcode '(\w+)'", printed)
        if missing:
            return (f'{self.name} has an operator that TensorFlow Lite Micro does not have, {missing[1]}: replace it in'
                    f' the model.')
        lines = [line for line in printed.splitlines() if line and not line.startswith('INFO')]
        return f'TensorFlow Lite Micro cannot run {self.name}: {"; ".join(lines[-2:])[:300] or "it does not say why"}.'

    def _describe(self, kind: str, detail: Any) -> Quantised:
        if detail['dtype'] is not np.int8:
            raise UserError(f'The {kind} of {self.name} is {np.dtype(detail["dtype"]).name}, it must be int8: quantise'
                            f' the file with its {kind}.')
        parameters = detail['quantization_parameters']
        return Quantised(tuple(int(n) for n in detail['shape'][1:]), float(parameters['scales'][0]),
                         int(parameters['zero_points'][0]))

    def __call__(self, image: np.ndarray) -> List[np.ndarray]:
        """Return the int8 outputs for one image, each without the batch.

        Args:
            image: int8, of the input's shape without the batch.
        """
        self._interpreter.set_input(image[None], 0)
        with_error = self._interpreter.invoke()
        if with_error:
            raise UserError(f'TensorFlow Lite Micro stops in {self.name} with status {with_error}.')
        return [self._interpreter.get_output(i)[0].copy() for i in range(len(self.outputs))]

    def arena(self) -> Arena:
        """Return the memory that the interpreter reports, after at least one image."""
        with captured() as printed:
            self._interpreter.print_allocations()
        sizes = dict(re.findall(r'Arena allocation (\w+) (\d+) bytes', ''.join(printed)))
        if not {'head', 'tail'} <= set(sizes):
            raise UserError('TensorFlow Lite Micro did not report its memory as expected: install the version of'
                            ' tflite-micro that the extra [deploy] names.')
        return Arena(int(sizes['head']), int(sizes['tail']))


def reference_outputs(data: bytes, images: np.ndarray) -> List[List[np.ndarray]]:
    """Return the outputs of LiteRT's reference kernels for each image, another implementation of the same arithmetic.

    Its default kernels round otherwise, and choose another class for some images.

    Args:
        images: int8, N x H x W x C.
    """
    module = require('ai_edge_litert.interpreter')
    with captured():
        interpreter = module.Interpreter(
            model_content=data, experimental_op_resolver_type=module.OpResolverType.BUILTIN_REF)
        interpreter.allocate_tensors()
        source = interpreter.get_input_details()[0]['index']
        targets = [detail['index'] for detail in interpreter.get_output_details()]
        outputs = []
        for image in images:
            interpreter.set_tensor(source, image[None])
            interpreter.invoke()
            outputs.append([interpreter.get_tensor(target)[0] for target in targets])
    return outputs
