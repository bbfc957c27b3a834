"""Evaluation: `evaluate_model` opens a data set and evaluates a model on it, `evaluate` runs over a given loader."""
import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import create_loader, create_naflex_loader
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from timm.utils import check_batch_size_retry, decay_batch_step
from torch.utils._pytree import tree_map
from torch.utils.data import IterableDataset
from tqdm import tqdm

from .errors import UserError
from .io.data import (
    DataSource,
    check_channels,
    check_split,
    class_names,
    encode_targets,
    open_dataset,
    watched,
)
from .labels import LabelEvaluator, read_real_labels, read_valid_labels

__all__ = ['evaluate', 'evaluate_model', 'open_split', 'progress_bar', 'to_device']

_logger = logging.getLogger(__name__)
_SHORT_OF_MEMORY = ('out of memory', "can't allocate memory", 'alloc_failed')  # CUDA, the CPU, and cuDNN or cuBLAS


def progress_bar(loader, description: str, enabled: bool = True) -> tqdm:
    """Wrap a loader in a progress bar. Without a terminal, its `disable` is set, and the caller logs lines instead."""
    disable = None if enabled else True
    return tqdm(
        watched(loader), total=len(loader), desc=description, disable=disable, leave=False, dynamic_ncols=True)


def to_device(batch: Any, device: torch.device, dtype: Optional[torch.dtype] = None) -> Any:
    """Move a tensor, or all tensors in lists and dicts (patches of a NaFlex loader, targets of detection), to a device.

    Args:
        dtype: Type to which floating-point tensors are converted. A single tensor is always converted.
    """
    if torch.is_tensor(batch):
        return batch.to(device=device, dtype=dtype)
    return tree_map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
                    if torch.is_tensor(t) else t, batch)


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Any,
        evaluator: ClassificationEvaluator,
        device: torch.device,
        dtype: Optional[torch.dtype] = None,
        autocast: Callable = nullcontext,
        channels_last: bool = False,
        description: str = 'Validate',
        log_interval: int = 50,
        distributed: bool = False,
        primary: bool = True,
        after_batch: Callable = lambda: None,
) -> Dict[str, float]:
    """Evaluate a model over a whole loader.

    Args:
        dtype: Type to which images are converted.
        primary: Whether this process reports progress.
        after_batch: Function that is called after every batch. It may raise an error to end the evaluation.

    Returns:
        The evaluator's metrics, such as 'loss', 'top1' and 'top5' (percent).
    """
    model.eval()
    bar = progress_bar(loader, description, primary)
    last = len(loader) - 1
    for i, (input, target) in enumerate(bar):
        input, target = to_device(input, device, dtype), to_device(target, device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(input)
        if isinstance(output, (tuple, list)):
            output = output[0]
        evaluator.update(output, target)
        if primary and (i == last or i % log_interval == 0):
            told = evaluator.summary()
            if torch.is_tensor(output) and output.shape[1] < 6:
                told.pop('top5', None)  # always 100 %
            line = '  '.join(f'{k} {v:.4g}' for k, v in told.items())
            if bar.disable:
                _logger.info(f'{description} [{i + 1}/{last + 1}]  so far: {line}')
            else:
                bar.set_postfix_str(line)
        after_batch()
    return evaluator.compute(distributed=distributed)


def open_split(
        source: DataSource,
        split: str,
        names: Optional[Sequence[str]],
        num_classes: int,
        valid_labels: str = '',
        target: str = 'class',
        **kwargs: Any,
) -> Tuple[Any, Optional[List[int]]]:
    """Open a split. Return the data set, and the model's class of each of its labels (None if both are equal).

    Args:
        target: Kind of targets, see `open_dataset`.
        kwargs: Further arguments of `open_dataset`.

    Raises:
        UserError: The split cannot be opened, or its classes do not fit the model.
    """
    dataset = open_dataset(source, split, target=target, **kwargs)
    check_split(dataset, source.data_dir, split, required=False)
    classes = class_names(dataset)
    if valid_labels:
        valid = read_valid_labels(valid_labels, num_classes)
        if classes and len(classes) != len(valid):
            raise UserError(f'--valid-labels has {len(valid)} lines, but the data set has {len(classes)} classes.')
        if classes and names and classes != [names[i] for i in valid]:
            raise UserError(f'--valid-labels does not list the classes of the data set in its order, which is'
                            f' {", ".join(classes[:5])} and so on.')
        return dataset, valid
    if target != 'class':
        if names and classes and classes != list(names):
            raise UserError('The data set has other classes than the model, or the same classes in another order.')
        return dataset, None
    if names and classes and source.class_map:
        moved = [name for i, name in enumerate(classes) if name in names and list(names)[i:i + 1] != [name]]
        if moved:
            raise UserError(f'--class-map gives the class {moved[0]} another label than the model does: leave the flag'
                            f' out, the model knows its classes.')
    elif names and classes and classes != list(names):
        # A data set with only some of the model's classes would count them from 0, so that its labels would be wrong.
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise UserError(f'The data set has classes that the model does not know: {", ".join(unknown[:5])}.')
        source = replace(source, class_map={name: i for i, name in enumerate(names)})
        dataset = open_dataset(source, split, target=target, **kwargs)
    if classes and len(classes) == 1 < num_classes and not names:
        raise UserError(f'The data set has one class, {classes[0]}, but the model has {num_classes}: put the images of'
                        f' each class into a folder of their own.')
    if classes and len(classes) > num_classes:
        raise UserError(f'The data set has {len(classes)} classes, but the model has {num_classes}.')
    return dataset, None


def _naflex_loader(model: nn.Module, **kwargs: Any) -> Any:
    patch_size = getattr(getattr(model, 'embeds', None), 'patch_size', None)
    if patch_size is None:
        raise UserError(f'--naflex-loader needs a NaFlex model (naflexvit_*), and this is a {type(model).__name__}.')
    return create_naflex_loader(patch_size=patch_size, **kwargs)


def _smaller_batch(error: BaseException, batch_size: int, retry: bool) -> int:
    """Return a smaller batch size to retry with after an error. Raise the error if it is not about memory."""
    if not (isinstance(error, MemoryError) or any(s in str(error).lower() for s in _SHORT_OF_MEMORY)):
        raise error
    smaller = decay_batch_step(batch_size) if retry and check_batch_size_retry(str(error)) else 0
    if not smaller:
        raise UserError(f'There is too little memory for batches of {batch_size}: use a smaller --batch-size'
                        f'{"" if retry else " or --retry"}.') from error
    _logger.warning(f'There is too little memory for batches of {batch_size}: trying again with {smaller}.')
    return smaller


def evaluate_model(
        model: nn.Module,
        source: DataSource,
        split: str,
        data_config: Mapping[str, Any],
        num_classes: int,
        class_names: Optional[Sequence[str]] = None,
        batch_size: int = 256,
        retry: bool = False,
        device: Union[str, torch.device] = 'cpu',
        dtype: torch.dtype = torch.float32,
        autocast: Callable = nullcontext,
        channels_last: bool = False,
        compile: Callable[[nn.Module], nn.Module] = lambda model: model,
        num_samples: Optional[int] = None,
        target: str = 'class',
        valid_labels: str = '',
        real_labels: str = '',
        metrics_avg: Optional[str] = None,
        log_interval: int = 10,
        naflex_max_seq_len: Optional[int] = None,
        **loader_args: Any,
) -> Dict[str, float]:
    """Evaluate a model on a split of a data set.

    Args:
        data_config: How images are prepared, as `timm.data.resolve_data_config` returns it.
        class_names: Names of the model's classes. A data set with only some of these classes gets their labels.
        retry: Try again with smaller batches if there is too little memory.
        compile: Function that is applied to the model on the device before every attempt.
        num_samples: Number of samples in the split, for iterable data sets.
        target: Kind of targets, see `open_dataset`.
        valid_labels, real_labels, metrics_avg: See `labels`.
        naflex_max_seq_len: Maximum number of patches of an image, for a NaFlex model.
        loader_args: Further arguments of timm's `create_loader`, or for a NaFlex model `create_naflex_loader`.

    Returns:
        'loss', 'top1' and 'top5' (percent; of multi-label images 'map', 'micro_f1', 'macro_f1' and 'sample_f1'), the
        number of 'images', and what `metrics_avg` adds.

    Raises:
        UserError: The data set does not fit the model, or there is too little memory.
    """
    device, tf_preprocessing = torch.device(device), loader_args.get('tf_preprocessing', False)
    dataset, valid = open_split(
        source, split, class_names, num_classes, valid_labels, channels=data_config['input_size'][0],
        num_samples=num_samples, load_bytes=tf_preprocessing, target=target)
    if num_samples is not None and not isinstance(dataset, IterableDataset):
        raise UserError('--num-samples is for iterable data sets alone (tfds, wds, hfids): leave it out.')
    encode_targets([dataset], num_classes, target)
    files = [sample[0] for sample in getattr(getattr(dataset, 'reader', None), 'samples', ())]
    if tf_preprocessing and any(isinstance(f, str) and not f.lower().endswith(('.jpg', '.jpeg')) for f in files):
        raise UserError('--tf-preprocessing reads only JPEG images, but the data set has other formats.')
    loader_args.update({k: data_config[k] for k in ('interpolation', 'mean', 'std')}, device=device, img_dtype=dtype)
    if naflex_max_seq_len is None:
        loader_args.update({k: data_config[k] for k in ('input_size', 'crop_pct', 'crop_mode')})
        make_loader = partial(create_loader, dataset, **loader_args)
    else:
        make_loader = partial(_naflex_loader, model, dataset=dataset, channels=data_config['input_size'][0],
                              max_seq_len=naflex_max_seq_len, **loader_args)
    model = model.eval().to(device=device, dtype=dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    while True:
        real = read_real_labels(real_labels, dataset, num_classes) if real_labels else None
        evaluator = LabelEvaluator(device, valid, real, metrics_avg) if target == 'class' else (
            MultiLabelClassificationEvaluator(device))
        loader = make_loader(batch_size=batch_size)
        if not tf_preprocessing and naflex_max_seq_len is None:
            check_channels(dataset, data_config['input_size'][0])
        try:
            metrics = evaluate(
                compile(model),
                loader,
                evaluator,
                device,
                dtype=dtype,
                autocast=autocast,
                channels_last=channels_last,
                log_interval=log_interval,
            )
            return dict(metrics, images=evaluator.num_samples)
        except (RuntimeError, MemoryError) as e:
            batch_size = _smaller_batch(e, batch_size, retry)
        if device.type == 'cuda':
            torch.cuda.empty_cache()
