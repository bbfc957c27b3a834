"""The deployment of a model: convert, quantise, repair, run, measure, and only then write."""
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch.nn as nn

from ..errors import UserError, first_line
from ..info import describe
from ..io.atomic import atomic_write
from ..io.data import DataSource
from ..load import LoadedModel
from .c_source import c_header, c_source
from .images import batches, open_pixels, spread
from .measure import from_camera, measure
from .output import captured
from .packages import require, versions
from .repair import operator_names, read_model
from .report import card_section
from .tflite import to_tflite
from .tflm import Tflm, reference_outputs

__all__ = ['DeployConfig', 'build', 'calibration_pixels', 'check_calibration', 'check_classes', 'check_drop',
           'check_same_task', 'deploy', 'measured_images', 'read_deployment', 'require_chain', 'write_deployment']

_FILE, _REPORT, _HEADER, _SOURCE = 'model.tflite', 'report.json', 'model.h', 'model.cc'


@dataclass(frozen=True)
class DeployConfig:
    """How a model is deployed.

    Args:
        calibration_split: Split that the ranges of the activations are taken from.
        split: Split that accuracy is measured on.
        calibration_images: Number of images for calibration.
        images: Number of images to measure accuracy on, 0 for all of the split.
        seed: Of the drawing of images.
        same_kernels: Write convolutions of stride 2 with larger kernels and SAME padding (`rewrite.with_same_kernels`).
        max_drop: Points of top-1, of AP50 for a detector, that int8 may lose.
        compared_images: Number of images on which the outputs are compared with those of the reference kernels.
        max_steps: Steps of the int8 output by which they may differ.
        beside: Other int8 files for the same task, to be measured in the same run.
    """
    calibration_split: str = 'train'
    split: str = 'validation'
    calibration_images: int = 200
    images: int = 0
    seed: int = 0
    same_kernels: bool = True
    max_drop: float = 1.0
    compared_images: int = 32
    max_steps: int = 1
    beside: Tuple[str, ...] = ()


def check_classes(loaded: LoadedModel, name: str) -> None:
    """Refuse a model whose images have several labels, or whose classes have too few or too many names.

    Raises:
        UserError: The model is such a one.
    """
    if loaded.target != 'class':
        raise UserError(f'{name} is a multi-label model. `deploy` measures top-1 accuracy, which exists only for models'
                        f' with one class per image: deploy a model that was trained without --task multilabel.')
    names, num_classes = loaded.class_names, loaded.model.num_classes
    if names and len(names) != num_classes:
        raise UserError(f'{name} has {num_classes} classes, but names for {len(names)} (label_names of its'
                        f' config.json): give each class a name, or none.')


def measured_images(loaded: LoadedModel, source: DataSource, config: DeployConfig) -> Tuple[Any, List[int]]:
    """Return the data set that accuracy is measured on, and the indices of its images that are measured."""
    dataset = open_pixels(source, config.split, loaded.data_config, loaded.model.num_classes, loaded.class_names)
    return dataset, spread(dataset, config.images, config.seed)[0]


def calibration_pixels(loaded: LoadedModel, source: DataSource, config: DeployConfig
                       ) -> Tuple[np.ndarray, Dict[str, Any]]:
    """Return the pixels to calibrate with, and what the report says of them. `classes` is absent where unknown.

    Raises:
        UserError: There are too few images, or all are of one class.
    """
    num_classes = loaded.model.num_classes
    dataset = open_pixels(source, config.calibration_split, loaded.data_config, num_classes, loaded.class_names)
    indices, classes = spread(dataset, config.calibration_images, config.seed)
    if classes is not None and classes < 2 <= num_classes:
        raise UserError(f'All {len(dataset)} images of the {config.calibration_split} split are of one class, and the'
                        f' model has {num_classes}: the ranges of the activations would be those of that class.'
                        f' Calibrate with a split of more classes (--calibration-split).')
    check_calibration(len(indices), config.calibration_split)
    pixels = np.concatenate([pixels for pixels, _ in batches(dataset, indices)])
    return pixels, dict(images=len(pixels), **({} if classes is None else dict(classes=classes)),
                        split=config.calibration_split, seed=config.seed)


def check_calibration(count: int, split: str) -> None:
    """Refuse to calibrate with so few images that their ranges say little.

    Raises:
        UserError: There are fewer than ten.
    """
    if count < 10:
        raise UserError(f'{count} images of the {split} split are too few to calibrate with: take at least 10, and'
                        f' better 200 (--calibration-images, --calibration-split).')


def _compare(data: bytes, file: Tflm, pixels: np.ndarray, max_steps: int) -> int:
    """Return the largest difference between the outputs of TensorFlow Lite Micro and the reference kernels, in steps.

    Raises:
        UserError: It is larger than `max_steps`.
    """
    images = from_camera(pixels)
    steps = max(int(np.abs(found.astype(int) - expected).max())
                for image, outputs in zip(images, reference_outputs(data, images))
                for found, expected in zip(file(image), outputs))
    if steps > max_steps:
        raise UserError(f'The outputs of TensorFlow Lite Micro differ from those of the reference kernels by {steps}'
                        f' steps on {len(images)} images, and at most {max_steps} are tolerated (--max-steps): the file'
                        f' is not good, nothing was written. Report it with the versions of the packages, which are'
                        f' {", ".join(f"{k} {v}" for k, v in versions().items())}.')
    return steps


def check_drop(in_float: float, in_int8: float, max_drop: float, metric: str = 'top-1') -> None:
    """Refuse an int8 file that loses more points of a metric in percent than `max_drop`.

    Raises:
        UserError: It does.
    """
    drop = in_float - in_int8
    if drop > max_drop:
        raise UserError(f'The int8 file has {in_int8:.2f} % {metric} and the float model {in_float:.2f} %, {drop:.2f}'
                        f' points more; {max_drop:g} are tolerated, so nothing was written. Calibrate with images like'
                        f' those of the camera (--calibration-split, --calibration-images), or allow more with'
                        f' --max-drop.')


def check_same_task(file: Tflm, input_size: Sequence[int], num_classes: int) -> None:
    """Refuse an int8 file whose input or output has another shape than that of the model.

    Args:
        input_size: Channels, height and width of the model's input.

    Raises:
        UserError: A shape differs.
    """
    channels, height, width = input_size
    for what, found, expected in (('input', file.input.shape, (height, width, channels)),
                                  ('output', file.outputs[0].shape, (num_classes,))):
        if tuple(found) != expected:
            raise UserError(f'--beside: the {what} of {file.name} has the shape {" x ".join(map(str, found))}, and that'
                            f' of the model has {" x ".join(map(str, expected))}: name files for the same task and'
                            f' input size.')


def _others(files: Sequence[str], input_size: Sequence[int], num_classes: int) -> List[Tuple[str, bytes, Tflm]]:
    """Return the name in the report, the bytes and the interpreter of each file."""
    names, others = [os.path.basename(path) for path in files], []
    for path, name in zip(files, names):
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise UserError(f'--beside: {path} cannot be read ({e.strerror}): name a .tflite file.') from e
        file = Tflm(data, path)
        check_same_task(file, input_size, num_classes)
        others.append((name if names.count(name) == 1 else path, data, file))
    return others


def deploy(
        loaded: LoadedModel,
        name: str,
        out_dir: str,
        source: DataSource,
        config: DeployConfig = DeployConfig(),
        say: Callable[[str], None] = print,
) -> Dict[str, Any]:
    """Write `model.tflite`, `model.h`, `model.cc` and `report.json` of a model, if the file is found to be good.

    Args:
        loaded: The model, as `load_model` returns it.
        name: What messages and the report call it.
        out_dir: Folder for the files.
        source: Data set with a split to calibrate with and one to measure on.
        say: Is called with a line for every step.

    Returns:
        The report: plain data, the contents of `report.json`.

    Raises:
        UserError: A package is missing, the data set does not fit, an operator has no int8 form, or the file is not
            good. Nothing has been written.
    """
    check_classes(loaded, name)
    require_chain()
    model, data_config = loaded.model.eval(), loaded.data_config
    others = _others(config.beside, data_config['input_size'], model.num_classes)
    evaluated, indices = measured_images(loaded, source, config)
    pixels, calibration = calibration_pixels(loaded, source, config)
    compared = next(batches(evaluated, indices[:config.compared_images], config.compared_images))[0]
    data, file, report = build(model, model, name, data_config, pixels, compared, config, say)
    say(f'Measuring top-1 on {len(indices):,} images.')
    accuracy = measure(model, file, evaluated, indices, data_config, [other for _, _, other in others], say)
    check_drop(accuracy.float_top1, accuracy.int8_top1, config.max_drop)
    report.update(
        class_names=list(loaded.class_names) if loaded.class_names else None,
        float_top1=accuracy.float_top1,
        int8_top1=accuracy.int8_top1,
        agreement=accuracy.agreement,
        images=accuracy.images,
        split=config.split,
        output=dict(scale=file.outputs[0].scale, zero_point=file.outputs[0].zero_point),
        calibration=calibration,
        beside=[dict(file=other_name, bytes=len(content), top1=top1, arena=other.arena().to_dict())
                for (other_name, content, other), top1 in zip(others, accuracy.others)],
    )
    write_deployment(Path(out_dir), data, report)
    return report


def require_chain() -> None:
    """Refuse to begin without the packages of the extra `deploy`.

    Raises:
        UserError: One of them cannot be imported.
    """
    with captured():  # of warnings about hardware
        for module in ('litert_torch', 'ai_edge_quantizer.quantizer', 'tflite_micro'):
            require(module)


def build(
        model: nn.Module,
        converted: nn.Module,
        name: str,
        data_config: Mapping[str, Any],
        pixels: np.ndarray,
        compared: np.ndarray,
        config: DeployConfig,
        say: Callable[[str], None],
) -> Tuple[bytes, Tflm, Dict[str, Any]]:
    """Convert a model, load the file, and compare its outputs with those of the reference kernels.

    Args:
        model: Has the weights, and the name of its architecture.
        converted: The same with outputs that a file can have: a tensor, or a tuple of tensors.
        data_config: How its input is prepared, in timm's terms.
        pixels: To calibrate with, uint8, N x H x W x C.
        compared: Pixels of the images whose outputs are compared.

    Returns:
        The file's bytes, the interpreter that runs it, and what the report says whatever the task of the model is.

    Raises:
        UserError: An operator has no int8 form, or the file is not good.
    """
    say(f'Converting {name} and calibrating with {len(pixels)} images.')
    info = describe(model, data_config['input_size'], samples=1, same_kernels=config.same_kernels)
    data = to_tflite(converted, data_config, pixels, config.same_kernels, name)
    file = Tflm(data, name)
    say(f'Comparing TensorFlow Lite Micro with the reference kernels on {len(compared)} images.')
    steps = _compare(data, file, compared, config.max_steps)
    return data, file, dict(
        model=name,
        architecture=info['architecture'],
        file=_FILE,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        weights_sha256=_weights_hash(model),
        num_classes=model.num_classes,
        arena=file.arena().to_dict(),
        estimate=dict(flash=info['flash_int8_bytes'], arena=info['arena_bytes'],
                      activations=info['peak_activation_int8_bytes'], persistent=info['persistent_bytes']),
        operators=dict(Counter(operator_names(read_model(data)))),
        input=file.input.to_dict(),
        same_kernels=config.same_kernels,
        tflm_against_reference=dict(images=len(compared), steps=steps),
        versions=versions(),
    )


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_deployment(folder: str, model: nn.Module) -> Tuple[Path, Dict[str, Any]]:
    """Read what `deploy` has written.

    Args:
        folder: Of the deployment.
        model: That must have been deployed.

    Returns:
        The path of the file, and the report.

    Raises:
        UserError: The folder holds no deployment, one of other weights, or one whose report is incomplete.
    """
    file = Path(folder, _FILE)
    try:
        report = json.loads(Path(folder, _REPORT).read_text(encoding='utf-8'))
        whole = hashlib.sha256(file.read_bytes()).hexdigest() == report['sha256']
        same = _weights_hash(model) == report['weights_sha256']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{folder} is not a folder that `python -m timm_netaug deploy` has written'
                        f' ({first_line(e)}).') from e
    if not whole or not same:
        what = 'its model.tflite is not the one of its report.json' if same else 'it was made of other weights'
        raise UserError(f'{folder} is not a deployment of this model: {what}. Deploy the model again.')
    try:
        card_section(report)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f'{Path(folder, _REPORT)} is incomplete, so the model card cannot be written from it'
                        f' ({type(e).__name__}: {first_line(e)}). Deploy the model again.') from e
    return file, report


def write_deployment(folder: Path, data: bytes, report: Dict[str, Any]) -> None:
    """Write the four files of a deployment."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {_HEADER: c_header(report), _SOURCE: c_source(data, report), _REPORT: json.dumps(report, indent=2)}
    with atomic_write(folder / _FILE, 'wb') as f:
        f.write(data)
    for file, text in texts.items():
        with atomic_write(folder / file) as f:
            f.write(text)
