"""A file as C++ source, in the form that the examples of TensorFlow Lite Micro have: `model.h` and `model.cc`."""
import json
from typing import Any, Mapping

__all__ = ['c_header', 'c_source']

_PER_LINE = 16
_ADDERS = {  # where TensorFlow Lite Micro's method has another name than the rule of _adder() makes
    'BATCH_MATMUL': 'AddBatchMatMul', 'CUMSUM': 'AddCumSum', 'PADV2': 'AddPadV2',
    'UNIDIRECTIONAL_SEQUENCE_LSTM': 'AddUnidirectionalSequenceLSTM',
}


def _adder(operator: str) -> str:
    """Return the call that registers an operator: CONV_2D is `AddConv2D()`."""
    return _ADDERS.get(operator, 'Add' + ''.join(part.title() for part in operator.split('_'))) + '()'


def _about_output(report: Mapping[str, Any]) -> str:
    """Return the lines of the comment that say how the output is read."""
    if 'outputs' not in report:
        return (f'// Output: {report["num_classes"]} int8 values, the largest one is of the class. A logit is\n'
                f'// {report["output"]["scale"]:.9g} * (value - ({report["output"]["zero_point"]})).')
    lines = [f'//   output({i}): {o["kind"]}, stride {o["stride"]}, {" x ".join(map(str, o["shape"]))}, scale'
             f' {o["scale"]:.9g}, zero point {o["zero_point"]}' for i, o in enumerate(report['outputs'])]
    d = report['decoding']
    return '\n'.join([
        f'// Outputs: {len(lines)} int8 tensors (rows, columns, channels). A value is scale * (int8 - zero point).',
        '//',
        *lines,
        '//',
        '// The point of a row and a column lies at x = (column + 0.5) * stride, y = (row + 0.5) * stride, in pixels',
        '// of the input. Its score for class k is sqrt(sigmoid(cls_logits[k]) * sigmoid(bbox_ctrness)). Drop scores',
        f'// up to {d["score_thresh"]:g}. The left, upper, right and lower side of its box are the four values of',
        f'// bbox_regression times stride * {d["anchor_scale"]:.9g} away from the point. Clip the box to the image.',
        f'// Where two boxes of a class have an intersection over union above {d["nms_thresh"]:g}, drop the one of the',
        f'// lower score. Of all boxes keep the best {d["detections_per_img"]}.'])


def c_header(report: Mapping[str, Any]) -> str:
    """Return `model.h`: what a sketch needs to know, from the report of a deployment."""
    operators = sorted(report['operators'])
    adders = '\n'.join(f'//   resolver.{_adder(operator)};' for operator in operators)
    height, width, channels = report['input']['shape']
    arena = report['arena']
    names = 'extern const char* const kClassNames[kNumClasses];' if report['class_names'] else '// Unnamed classes.'
    return f"""// {report['model']}, int8, for TensorFlow Lite Micro.
// Written by `python -m timm_netaug deploy`.
//
// Arena: {arena['total']:,} bytes, of which {arena['activations']:,} are activations. Measured in the interpreter on a
// 64-bit machine with the reference kernels. On a 32-bit chip, pointers are half as long and the arena is smaller.
// Kernels with scratch memory of their own, such as those of CMSIS-NN, need more:
// tflite::MicroInterpreter::arena_used_bytes() tells, after AllocateTensors().
//
//   alignas(16) static uint8_t arena[kTensorArenaSize];
//   tflite::MicroMutableOpResolver<{len(operators)}> resolver;
{adders}
//   tflite::MicroInterpreter interpreter(tflite::GetModel(g_model), resolver, arena, kTensorArenaSize);
//   interpreter.AllocateTensors();
//
// Input: {height} x {width} x {channels} (rows, columns, channels), the channels of a pixel side by side. Each value is
// that of the camera minus 128; the normalisation is in the model:
//
//   for (int i = 0; i < kInputSize; ++i) interpreter.input(0)->data.int8[i] = (int8_t)(camera[i] - 128);
//   interpreter.Invoke();
//
{_about_output(report)}
#ifndef TIMM_NETAUG_MODEL_H_
#define TIMM_NETAUG_MODEL_H_

#include <cstdint>

constexpr int kTensorArenaSize = {-(-arena['total'] // 16) * 16};
constexpr int kInputHeight = {height};
constexpr int kInputWidth = {width};
constexpr int kInputChannels = {channels};
constexpr int kInputSize = kInputHeight * kInputWidth * kInputChannels;
constexpr int kNumClasses = {report['num_classes']};

extern const unsigned char g_model[];
extern const unsigned int g_model_len;
{names}

#endif  // TIMM_NETAUG_MODEL_H_
"""


def c_source(data: bytes, report: Mapping[str, Any]) -> str:
    """Return `model.cc`, to be written as UTF-8: the bytes of the file, and the names of the classes."""
    rows = (data[i:i + _PER_LINE] for i in range(0, len(data), _PER_LINE))
    text = '\n'.join('    ' + ', '.join(f'0x{byte:02x}' for byte in row) + ',' for row in rows)
    names = report['class_names']
    listed = '\n'.join(f'    {json.dumps(name, ensure_ascii=False)},' for name in names or ())
    classes = f'\nconst char* const kClassNames[kNumClasses] = {{\n{listed}\n}};\n' if names else ''
    return (f'// {report["model"]}: see model.h.\n#include "model.h"\n\n'
            f'alignas(16) const unsigned char g_model[] = {{\n{text}\n}};\n'
            f'const unsigned int g_model_len = {len(data)};\n{classes}')
