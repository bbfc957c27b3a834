"""What a deployment has measured, as a table for the terminal and as a section of a model card."""
from typing import Any, List, Mapping, Tuple

__all__ = ['card_section', 'text_table']


def _size(count: int) -> str:
    return f'{count:,} bytes ({count / 1024:,.0f} KiB)'


def _rows(report: Mapping[str, Any]) -> List[Tuple[str, str]]:
    arena, estimate, calibrated = report['arena'], report['estimate'], report['calibration']
    check, source, target = report['tflm_against_reference'], report['input'], report['output']
    of_classes = f' of {calibrated["classes"]} classes' if 'classes' in calibrated else ''
    shape = ' x '.join(map(str, source['shape']))
    percent, images = '{:.2f} %'.format, f'{report["images"]:,} images of the {report["split"]} split'
    rows = [
        ('top-1, float in PyTorch', f'{percent(report["float_top1"])} of {images}'),
        ('top-1, int8 in TensorFlow Lite Micro',
         f'{percent(report["int8_top1"])} (the same class as float for {percent(report["agreement"])})'),
        ('file (flash), measured', _size(report['bytes'])),
        ('file, estimated by info', _size(estimate['flash'])),
        ('arena (RAM), measured', _size(arena['total'])),
        ('arena, estimated by info', _size(estimate['arena'])),
        ('  activations, measured', _size(arena['activations'])),
        ('  persistent, measured (64-bit pointers)', _size(arena['persistent'])),
        ('operators', ', '.join(f'{name} {count}' for name, count in sorted(report['operators'].items()))),
        ('input', f'{shape} int8, the pixel minus 128 (scale {source["scale"]:.6g}, zero point'
                  f' {source["zero_point"]})'),
        ('output', f'{report["num_classes"]} int8 (scale {target["scale"]:.6g}, zero point {target["zero_point"]})'),
        ('calibrated with', f'{calibrated["images"]} images{of_classes},'
                            f' {calibrated["split"]} split, seed {calibrated["seed"]}'),
        ('against the reference kernels',
         f'at most {check["steps"]} steps of the output, over {check["images"]} images'),
    ]
    for other in report['beside']:
        rows += [(f'beside it: {other["file"]}',
                  f'top-1 {percent(other["top1"])}, file {_size(other["bytes"])}, arena'
                  f' {_size(other["arena"]["total"])}, activations {_size(other["arena"]["activations"])}')]
    return rows


def text_table(report: Mapping[str, Any]) -> str:
    """Return the report as aligned lines."""
    rows = _rows(report)
    width = max(len(name) for name, _ in rows)
    title = f'{report["model"]}, input {" x ".join(map(str, report["input"]["shape"]))}'
    return '\n'.join([title, '', *(f'{name:{width}}  {value}' for name, value in rows)])


def card_section(report: Mapping[str, Any]) -> str:
    """Return the report as a section of a card, in Markdown."""
    rows = ''.join(f'| {name.strip()} | {value} |\n' for name, value in _rows(report))
    versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
    return (f'## On a microcontroller\n\n`model.tflite` is this model in int8, for TensorFlow Lite Micro. These figures'
            f' were measured by running that file in its interpreter, with the reference kernels on a 64-bit machine,'
            f' by `python -m timm_netaug deploy`; no board was used.\n\n'
            f'| | |\n|---|---|\n{rows}\nVersions: {versions}.')
