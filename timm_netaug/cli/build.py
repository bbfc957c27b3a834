"""Build what `train.py` trains: the model with its initial weights, the teacher, and the task with the losses."""
import logging
import math
import os
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from timm import create_model
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import load_class_stats, resolve_class_weights
from timm.models import resolve_model_input_args
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

import timm_netaug

from ..errors import UserError, check_model_name, rewording
from ..fetch import local_name
from ..io.checkpoint import check_finite, count_classes, read_weights
from ..load import load_model
from ..reference import checkpoint_filter_fn
from .device import uses_channels_last
from .flags import flag_name
from .train_flags import flag_of_weights, loss_of, mixes_images, netaug_config

__all__ = ['set_up_model', 'set_up_task', 'set_up_teacher', 'prepare_for_training']

_logger = logging.getLogger('train')


def _check_given(args, model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Refuse a file of weights that lacks tensors of the model other than those of the classifier. timm would train
    these from scratch without an error.

    Raises:
        UserError: Most of the model's tensors are not in the file, or with NetAug any of them.
    """
    if type(model) not in (EfficientNet, MobileNetV3):  # older files of other models may have other names
        return
    given = checkpoint_filter_fn(weights, model)
    head = model.pretrained_cfg.get('classifier') or ''
    wanted = [n for n, _ in model.named_parameters() if n.rpartition('.')[0] != head]
    missing = [n for n in wanted if n not in given]
    if missing and (args.netaug or 2 * len(missing) > len(wanted)):
        raise UserError(f'--pretrained-path: {args.pretrained_path} is of another model than {args.model}:'
                        f' {len(missing)} of the {len(wanted)} tensors of the model are not in the file'
                        f' ({", ".join(missing[:2])}).')


def set_up_model(args) -> nn.Module:
    """Build the stock model with its initial weights."""
    check_model_name(args.model)
    for flag in ('pretrained_path', 'initial_checkpoint'):
        if getattr(args, flag) and not os.path.isfile(getattr(args, flag)):
            raise UserError(f'{flag_name(flag)}: there is no file {getattr(args, flag)}.')
    if args.initial_checkpoint and not args.initial_checkpoint.lower().endswith(('.npz', '.npy')):
        check_finite(read_weights(args.initial_checkpoint), args.initial_checkpoint)  # reports what is wrong with it
    pretrained, overlay = args.pretrained, dict(args.pretrained_cfg_overlay)
    if args.pretrained_path:
        pretrained = True
        weights = read_weights(args.pretrained_path)
        check_finite(weights, args.pretrained_path)
        classes = count_classes(weights, args.model)
        overlay.update(file=args.pretrained_path, num_classes=-1 if classes is None else classes)
        if classes is not None and args.num_classes not in (None, classes):
            _logger.info(f'The weights are for {classes} classes, not {args.num_classes}: the classifier is a new one.')
    source = local_name(args.model, weights=args.pretrained and not args.pretrained_path)
    optional = dict(  # arguments that some models do not have: they are passed only if a flag sets them
        drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        global_pool=args.gp,
    )
    try:
        model = create_model(
            pretrained=pretrained,
            checkpoint_path=args.initial_checkpoint or None,
            scriptable=args.torchscript,
            **resolve_model_input_args(
                source,
                vars(args),
                in_chans=args.in_chans,
                num_classes=args.num_classes,
                drop_rate=args.drop,
                pretrained_cfg_overlay=overlay,
                **optional,
                **args.model_kwargs,
            ),
        )
    except TypeError as e:
        raise UserError(f'{args.model} does not take one of the arguments given: {e}.') from e
    except (FileNotFoundError, RuntimeError, ValueError, AssertionError) as e:
        hint = ' (--pretrained-path takes weights with another classifier, or of the reference implementation.)'
        raise UserError(f'{args.model} cannot be built: {" ".join(str(e).split())[:300] or type(e).__name__}'
                        + (hint if args.initial_checkpoint else '')) from e
    if args.pretrained_path:
        _check_given(args, model, weights)
    if isinstance(model, timm_netaug.SuperNet):
        raise UserError('Use --netaug instead of --model-kwargs netaug=...')
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as e:
            raise UserError(f'--grad-checkpointing: {args.model} does not support it, leave the flag out.') from e
    if args.num_classes is None:
        args.num_classes = model.num_classes
    return model


def _warn_of_large_head(args, model: nn.Module) -> None:
    """Warn if the initial weights of a new classifier are so large that its gradients destroy pretrained weights.

    timm's EfficientNet, MobileNetV3 and RexNet draw them from -r to r, r = 1 / sqrt(classes), whatever the number of
    features. The named scale gives a standard deviation of 0.02, as the reference draws classifiers
    (docs/training.md has measurements).
    """
    head = model.get_classifier() if hasattr(model, 'get_classifier') else None
    new = (args.pretrained or args.pretrained_path) and model.pretrained_cfg.get('num_classes') != model.num_classes
    if not new or not isinstance(head, nn.Linear) or args.resume or args.head_init_scale is not None:
        return
    std = head.weight.std().item()
    # The logits of features with a mean square of 1 have this standard deviation.
    if std * math.sqrt(head.in_features) > 1 and std > 0.03:
        _logger.warning(
            f'The classifier for {head.out_features} classes is new, and its initial weights are so large'
            f' (timm\'s, standard deviation {std:.2g}) that the first steps can destroy the pretrained weights before'
            f' it: add --head-init-scale {0.02 / std:.1g}.')


@torch.no_grad()
def _set_up_head(args, model: nn.Module) -> None:
    heads = model.get_classifier() if hasattr(model, 'get_classifier') else None
    heads = heads if isinstance(heads, (tuple, list)) else [heads]  # distilled models have two
    parameters = [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]
    biases = [head.bias for head in heads if getattr(head, 'bias', None) is not None]
    for flag, value, found in (
            ('--head-init-scale', args.head_init_scale, parameters), ('--head-init-bias', args.head_init_bias, biases)):
        if value is not None and not found:
            raise UserError(f'{flag}: {args.model} has no such parameters in its classifier, leave the flag out.')
    if args.head_init_scale is not None:
        for p in parameters:
            p.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        for bias in biases:
            nn.init.constant_(bias, args.head_init_bias)


def prepare_for_training(args, model: nn.Module, config: Optional[Tuple[Any, Any]], device, dtype) -> nn.Module:
    """Turn the stock model into the trained model: with NetAug the super-network, on the device, in format and dtype.

    Args:
        config: Configurations of the super-network and of its training; None without --netaug and --netaug-init.

    Raises:
        UserError: NetAug does not support the model.
    """
    given = flag_of_weights(args)
    if given:  # the tiny network's classifier alone: augment() draws the weights behind it with a deviation of 0.02
        _warn_of_large_head(args, model)
        _set_up_head(args, model)
    if config is not None:
        try:
            if args.netaug_init:
                timm_netaug.init_weights(model, config[0])
            else:
                model = timm_netaug.augment(model, config[0])
        except ValueError as e:
            flag = '--netaug-init' if args.netaug_init else '--netaug'
            hint = '' if str(e).startswith('from_stage') else ' docs/models.md lists the models that NetAug takes.'
            raise UserError(f'{flag}: {e}{hint}') from e
        if args.netaug and not given:
            model.init_weights(config[1].sort)
    if not given:
        _set_up_head(args, model)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=dtype)
    if uses_channels_last(args):
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and not args.distributed:
        _logger.warning('--sync-bn has no effect in a single process.')
    elif args.sync_bn:
        args.dist_bn = ''  # the processes have the same statistics already
        if args.netaug:
            model.synchronise_batchnorm()
        else:
            model = convert_sync_batchnorm(model)
    if args.torchscript:
        with rewording(f'--torchscript: {args.model} cannot be scripted'):
            model = torch.jit.script(model)
    return model


def set_up_teacher(
        args,
        data_config: Dict[str, Any],
        class_names: Optional[List[str]],
        device: torch.device,
        dtype: torch.dtype,
) -> Optional[DistillationTeacher]:
    """Build the teacher that `--kd-model-name` names, with its weights. Return None without the flag.

    Raises:
        UserError: The teacher does not exist, has no weights, has other classes than the student, or cannot process
            the student's images.
    """
    name = args.kd_model_name
    if not name:
        return None
    check_model_name(name)
    channels = data_config['input_size'][0]
    try:
        teacher = load_model(name, in_chans=channels)
    except UserError as e:
        raise UserError(f'--kd-model-name: {e}') from e
    model, names = teacher.model, teacher.class_names
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if len(cfg.get('mean', ())) not in (0, channels):
        raise UserError(f'--kd-model-name: {name} has a normalisation for {len(cfg["mean"])} channels, but the images'
                        f' have {channels}: train the teacher on such images first.')
    if model.num_classes != args.num_classes:
        raise UserError(f'--kd-model-name: {name} is for {model.num_classes} classes, but the student for'
                        f' {args.num_classes}: train the teacher on this data set first, export it, and name it as'
                        f' local-dir:OUT_DIR.')
    if names and class_names and list(names) != list(class_names):
        odd = next((pair for pair in zip(names, class_names) if pair[0] != pair[1]), None)
        told = f'{odd[0]}, here {odd[1]}' if odd else f'{len(names)} names, here {len(class_names)}'
        raise UserError(f'--kd-model-name: {name} has other classes than the data set ({told}).')
    model = model.to(device=device, dtype=dtype)
    for size in [data_config['input_size'], *((channels, n, n) for n in args.train_img_sizes or ())]:
        told = ' x '.join(map(str, size))
        with rewording(f'--kd-model-name: {name} does not take images of {told}'), torch.inference_mode():
            model(torch.zeros(1, *size, device=device, dtype=dtype))
    return DistillationTeacher(model, device=device, dtype=dtype)


@torch.inference_mode()
def _check_features(task: FeatureDistillationTask, input: torch.Tensor) -> None:
    task.eval()
    try:
        student, teacher = task.trainable_module(input)[1], task.teacher(input, return_features=True)
    except RuntimeError as e:
        raise UserError(f'--kd-student-feature-dim {task.trainable_module.projection.in_features} is not the number of'
                        f' features of the student.') from e
    task.train()
    if student.shape != teacher.shape:
        raise UserError(f'--kd-distill-type feature: the teacher has {teacher.shape[-1]} features, but the features of'
                        f' the student are projected to {student.shape[-1]}. Leave --kd-teacher-feature-dim and'
                        f' --kd-student-feature-dim out.')


def _criterion_kwargs(args) -> Dict[str, Any]:
    """Return the arguments of timm's create_classification_loss().

    Raises:
        UserError: A file of weights or of class statistics cannot be read, or has another number of classes.
    """
    loss = loss_of(args)
    kwargs: Dict[str, Any] = dict(
        loss_type=loss,
        smoothing=args.smoothing,
        soft_targets=mixes_images(args) and loss != 'jsd',
        jsd_splits=args.aug_splits,
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        poly_epsilon=args.poly_epsilon,
        poly_gamma=args.poly_gamma,
    )
    with rewording('The weights of the loss cannot be set up', ValueError, OSError):
        stats = load_class_stats(args.class_stats)
        for kind, value in (('pos_weight', args.loss_pos_weight), ('class_weight', args.loss_class_weight)):
            kwargs[kind] = resolve_class_weights(value, kind, stats, power=args.loss_weight_power)
    if args.bce_pos_weight is not None:
        kwargs['pos_weight'] = args.bce_pos_weight
    if loss == 'db':
        kwargs.update(class_counts=stats[0], num_samples=stats[1])
    for kind in ('pos_weight', 'class_weight', 'class_counts'):
        count = len(kwargs[kind]) if torch.is_tensor(kwargs.get(kind)) else args.num_classes
        if count != args.num_classes:
            raise UserError(f'The weights of the loss ({kind}) are {count} numbers, but the model has'
                            f' {args.num_classes} classes.')
    return kwargs


def set_up_task(
        args,
        model: nn.Module,
        teacher: Optional[DistillationTeacher],
        data_config: Dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
) -> TrainingTask:
    """Build the task that computes the losses.

    Raises:
        UserError: The model does not support this kind of distillation.
    """
    multi_label = args.task == 'multilabel'
    kwargs: Dict[str, Any] = dict(criterion_kwargs=_criterion_kwargs(args), device=device, dtype=dtype)
    weights = dict(task_loss_weight=args.task_loss_weight, distill_loss_weight=args.distill_loss_weight)
    soft = dict(temperature=args.kd_temperature, **weights)
    if args.netaug:
        training = netaug_config(args)[1].to_dict()
        task = timm_netaug.NetAugTask(
            model, teacher=teacher, seed=args.seed, multi_label=multi_label, **training, **soft, **kwargs)
    elif teacher is None:
        return (MultiLabelClassificationTask if multi_label else ClassificationTask)(model, **kwargs)
    else:
        with rewording(f'--kd-distill-type {args.kd_distill_type}', ValueError, AttributeError):
            if args.kd_distill_type == 'feature':
                task = FeatureDistillationTask(
                    model, teacher, student_feature_dim=args.kd_student_feature_dim,
                    teacher_feature_dim=args.kd_teacher_feature_dim, **weights, **kwargs)
                _check_features(task, torch.zeros(1, *data_config['input_size'], device=device, dtype=dtype))
            elif args.kd_distill_type == 'token':
                task = TokenDistillationTask(model, teacher, distill_type=args.kd_token_distill_type, **soft, **kwargs)
            else:
                task = LogitDistillationTask(model, teacher, loss_type=args.kd_loss_type, **soft, **kwargs)
    if teacher is not None:  # timm uses mean and std of the registered model, which the images need not have
        for name in ('mean', 'std'):
            value = torch.tensor(data_config[name], device=device, dtype=dtype).view(1, -1, 1, 1)
            task.register_buffer(f'student_{name}', value, persistent=False)
    return task
