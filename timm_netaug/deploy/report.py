"""What a deployment has measured, as a table for the terminal and as a section of a model card."""
from typing import Any, List, Mapping, Sequence, Tuple

__all__ = ['card_section', 'onnx_table', 'text_table']


def _size(count: int) -> str:
    return f'{count:,} bytes ({count / 1024:,.0f} KiB)'


def _percent(value: float) -> str:
    return f'{value:.2f} %'


def _top1(report: Mapping[str, Any], in_float: str, in_int8: str) -> List[Tuple[str, str]]:
    """Return the accuracies of a classifier; the arguments name what has computed them."""
    return [
        (f'top-1, float in {in_float}',
         f'{_percent(report["float_top1"])} of {report["images"]:,} images of the {report["split"]} split'),
        (f'top-1, int8 in {in_int8}',
         f'{_percent(report["int8_top1"])} (the same class as float for {_percent(report["agreement"])})')]


def _accuracy(report: Mapping[str, Any]) -> List[Tuple[str, str]]:
    if 'outputs' in report:  # of a detector
        images = f'{report["images"]:,} images of the {report["split"]} split'
        return [row for metric in report['int8'] for row in (
            (f'{metric}, float in PyTorch', f'{_percent(report["float"][metric])} over {images}'),
            (f'{metric}, int8 in TensorFlow Lite Micro', _percent(report['int8'][metric])))]
    return _top1(report, 'PyTorch', 'TensorFlow Lite Micro')


def _calibration(report: Mapping[str, Any]) -> Tuple[str, str]:
    calibrated = report['calibration']
    of_classes = f' of {calibrated["classes"]} classes' if 'classes' in calibrated else ''
    return 'calibrated with', (f'{calibrated["images"]} images{of_classes}, {calibrated["split"]} split, seed'
                               f' {calibrated["seed"]}')


def _outputs(report: Mapping[str, Any]) -> List[Tuple[str, str]]:
    def form(output: Mapping[str, Any], shape: str) -> str:
        return f'{shape} int8 (scale {output["scale"]:.6g}, zero point {output["zero_point"]})'

    if 'outputs' in report:
        return [(f'output {i}: {o["kind"]}, stride {o["stride"]}', form(o, ' x '.join(map(str, o['shape']))))
                for i, o in enumerate(report['outputs'])]
    return [('output', form(report['output'], str(report['num_classes'])))]


def _rows(report: Mapping[str, Any]) -> List[Tuple[str, str]]:
    arena, estimate = report['arena'], report['estimate']
    check, source = report['tflm_against_reference'], report['input']
    shape = ' x '.join(map(str, source['shape']))
    rows = [
        *_accuracy(report),
        ('file (flash), measured', _size(report['bytes'])),
        ('file, estimated by info', _size(estimate['flash'])),
        ('arena (RAM), measured', _size(arena['total'])),
        ('arena, estimated by info', _size(estimate['arena'])),
        ('  activations, measured', _size(arena['activations'])),
        ('  persistent, measured (64-bit pointers)', _size(arena['persistent'])),
        ('operators', ', '.join(f'{name} {count}' for name, count in sorted(report['operators'].items()))),
        ('input', f'{shape} int8, the pixel minus 128 (scale {source["scale"]:.6g}, zero point'
                  f' {source["zero_point"]})'),
        *_outputs(report),
        _calibration(report),
        ('against the reference kernels',
         f'at most {check["steps"]} steps of the output, over {check["images"]} images'),
    ]
    for other in report.get('beside', ()):
        rows += [(f'beside it: {other["file"]}',
                  f'top-1 {_percent(other["top1"])}, file {_size(other["bytes"])}, arena'
                  f' {_size(other["arena"]["total"])}, activations {_size(other["arena"]["activations"])}')]
    return rows


def _aligned(title: str, rows: Sequence[Tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return '\n'.join([title, '', *(f'{name:{width}}  {value}' for name, value in rows)])


def text_table(report: Mapping[str, Any]) -> str:
    """Return the report as aligned lines."""
    return _aligned(f'{report["model"]}, input {" x ".join(map(str, report["input"]["shape"]))}', _rows(report))


def onnx_table(report: Mapping[str, Any]) -> str:
    """Return the report of ONNX files as aligned lines."""
    shape = ' x '.join(map(str, report['input']['shape']))
    return _aligned(f'{report["model"]}, input {shape}', [
        *_top1(report, 'onnxruntime', 'onnxruntime'),
        *((file, _size(count)) for file, count in report['bytes'].items()),
        ('input', f'{shape} float32, {report["input"]["values"]}'),
        _calibration(report),
        ('float file against PyTorch',
         f'logits differ by at most {report["largest_difference_of_a_logit"]:.2g}'),
    ])


def card_section(report: Mapping[str, Any]) -> str:
    """Return the report as a section of a card, in Markdown."""
    rows = ''.join(f'| {name.strip()} | {value} |\n' for name, value in _rows(report))
    versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
    what = ('the part of this detector from the image to the raw predictions' if 'outputs' in report else 'this model')
    return (f'## On a microcontroller\n\n`model.tflite` is {what} in int8, for TensorFlow Lite Micro. These figures'
            f' were measured by running that file in its interpreter, with the reference kernels on a 64-bit machine,'
            f' by `python -m timm_netaug deploy`; no board was used.\n\n'
            f'| | |\n|---|---|\n{rows}\nVersions: {versions}.')
