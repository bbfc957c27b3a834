"""Load a model from a checkpoint, a file of weights, an exported folder, a Hub repository, or by a timm model name."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch.nn as nn
from timm import create_model
from timm.data import resolve_input_data_config
from timm.models import is_model, resolve_model_input_args

from .errors import UserError, check_model_name, rewording
from .fetch import local_name
from .io.checkpoint import check_finite, count_classes, load_weights, read_checkpoint, read_weights, run_weights
from .io.folder import load_folder, sample_fields
from .io.run import RunDescription

__all__ = ['LoadedModel', 'load_model', 'read_run']


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its metadata.

    Args:
        name: Name of the model in results.
        data_config: How its input is prepared, as `timm.data.resolve_data_config` returns it.
        class_names: Names of its classes in label order, None if they are unknown.
        run: Description of the run of `train.py` that made the weights, None for other weights.
        folder: The exported folder from which it was read, None for other sources.
        input_img_mode: Pillow mode to which images are converted, None for the one that fits the model's channels.
        target: Kind of targets, see `io.data.open_dataset`.
    """
    model: nn.Module
    name: str
    data_config: Dict[str, Any]
    class_names: Optional[List[str]] = None
    run: Optional[RunDescription] = None
    folder: Optional[Path] = None
    input_img_mode: Optional[str] = None
    target: str = 'class'

    def describe(self) -> RunDescription:
        """Return the description of the run. If there is no run, describe the model alone."""
        return self.run or RunDescription.from_model(
            self.model, self.data_config, self.class_names, input_img_mode=self.input_img_mode, target=self.target)


def _data_config(model: nn.Module, name: str, flags: Mapping[str, Any], **kwargs: Any) -> Dict[str, Any]:
    with rewording(f'{name} does not take such an input', ValueError, AssertionError):
        return resolve_input_data_config(model, args=flags, **kwargs)


def _create(
        name: str,
        pretrained: bool,
        flags: Mapping[str, Any],
        model_args: Mapping[str, Any],
) -> Tuple[nn.Module, Dict[str, str]]:
    """Build a model by its name. Return it with the fields of its config that describe samples."""
    check_model_name(name)
    source = local_name(name, weights=pretrained)
    try:
        model = create_model(pretrained=pretrained, **resolve_model_input_args(source, flags, **model_args)).eval()
        prefix, _, folder = source.partition(':')
        return model, sample_fields(folder) if prefix == 'local-dir' else {}
    except Exception as e:  # a constructor, a folder and the Hub may raise anything
        told = ' '.join(str(e).split())[:300].rstrip('.')
        raise UserError(f'{name} cannot be {"loaded" if pretrained else "built"}: {told}.') from e


def read_run(path: str) -> Optional[RunDescription]:
    """Return the run description in a checkpoint of `train.py`, None for a broken file or one of another kind."""
    try:
        return RunDescription.from_checkpoint(read_checkpoint(path))
    except UserError:
        return None  # reading the weights will report what is wrong with the file


def _load_run(path: str, use_ema: Optional[bool], flags: Mapping[str, Any]) -> LoadedModel:
    checkpoint = read_checkpoint(path)
    run = RunDescription.from_checkpoint(checkpoint)
    if run.detector:
        raise UserError(f'{path} is of a detector: use validate_detection.py, or timm_netaug.detection in Python.')
    weights = run_weights(checkpoint, run, use_ema, path)
    with rewording(f'{path}: its model cannot be built with this version of timm', RuntimeError, TypeError, ValueError):
        model = create_model(run.architecture, **run.model_args).eval()
    load_weights(model, weights, path)
    config = run.data_config
    given = {k: v for k, v in flags.items() if v not in (None, '', {})}
    if given:
        own = {k: v for k, v in config.items() if k != 'input_size' or not {'img_size', 'input_size'} & set(given)}
        config = _data_config(model, run.architecture, {**own, 'in_chans': config['input_size'][0], **given})
    return LoadedModel(model, run.architecture, config, run.class_names, run, None, run.input_img_mode, run.target)


def _load_weights(
        path: str,
        model_name: Optional[str],
        use_ema: bool,
        pretrained: bool,
        flags: Mapping[str, Any],
        model_args: Dict[str, Any],
) -> nn.Module:
    state_dict = read_weights(path, use_ema)
    if not model_name:
        raise UserError(f'{path} is not a checkpoint of train.py and does not say which model it belongs to: name the'
                        f' model with --model.')
    check_model_name(model_name)
    if model_args.get('num_classes') is None:
        model_args['num_classes'] = count_classes(state_dict, model_name)
    model, _ = _create(model_name, pretrained, flags, model_args)
    load_weights(model, state_dict, path)
    return model


def _is_path(source: str) -> bool:
    """Return whether a source is meant to be a file, even if the file does not exist."""
    like_a_path = source.endswith(('.tar', '.pth', '.pt')) or os.sep in source and ':' not in source
    return like_a_path or os.path.isfile(source)


def load_model(
        source: str,
        model_name: Optional[str] = None,
        use_ema: Optional[bool] = None,
        pretrained: Optional[bool] = None,
        flags: Optional[Mapping[str, Any]] = None,
        use_test_size: bool = False,
        **model_args: Any,
) -> LoadedModel:
    """Load a model.

    Args:
        source: Checkpoint of `train.py`, file of weights, exported folder, `local-dir:DIR`, `hf-hub:OWNER/NAME`, or a
            timm model name, such as ARCH.TAG of bundled weights.
        model_name: Architecture, for a file that does not contain it.
        use_ema: Load the moving average of the weights. None: load it if the run validated it.
        pretrained: Load the pretrained weights of a model name. None: load them if `source` is the name.
        flags: Command-line flags about the input.
        use_test_size: Use the test input size of a pretrained config that has one.
        model_args: Arguments of the model's constructor. Checkpoints and folders have their own instead.

    Raises:
        UserError: The model does not exist, or its weights are broken or belong to another model.
    """
    flags, name, folder, samples = flags or {}, source, None, {}
    if os.path.isdir(source) and not is_model(source):
        if model_name or use_ema:
            raise UserError(f'{source} is an exported folder, which holds one model: leave --model and --use-ema out.')
        model, folder, samples = load_folder(source, source), Path(source), sample_fields(source)
    elif model_name or _is_path(source):
        run = read_run(source)
        if run is not None and model_name not in (None, '', run.architecture):
            raise UserError(f'{source} contains the name of its model, {run.architecture}: leave --model out.')
        if run is not None:
            return _load_run(source, use_ema, flags)
        model, name = _load_weights(source, model_name, bool(use_ema), bool(pretrained), flags, model_args), model_name
    else:
        model, samples = _create(source, pretrained is not False, flags, model_args)
        check_finite(model.state_dict(), source)
    config = _data_config(model, name, flags, use_test_size=use_test_size)
    return LoadedModel(model, name, config, (model.pretrained_cfg or {}).get('label_names'), None, folder, **samples)
