"""The authors' checkpoints (the tiny models' `.pth` files), carried over to timm's names.

There are two kinds. The NetAug reference implementation names the layers `backbone...` and `head...`. The older files of
the same authors' ProxylessNAS, Once-for-all and MCUNet releases number the blocks through (`blocks.N...`).
"""
from typing import Any, Dict, Mapping

import torch.nn as nn
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, InvertedResidual
from timm.models.mobilenetv3 import MobileNetV3

__all__ = ['checkpoint_filter_fn', 'input_config', 'is_reference']

# Within a block: the reference's name of a layer -> timm's.
_PARTS = {
    InvertedResidual: {
        'conv.inverted_conv.conv': 'conv_pw',
        'conv.inverted_conv.norm': 'bn1',
        'conv.depth_conv.conv': 'conv_dw',
        'conv.depth_conv.norm': 'bn2',
        'conv.se_layer.reduce_conv': 'se.conv_reduce',
        'conv.se_layer.expand_conv': 'se.conv_expand',
        'conv.point_conv.conv': 'conv_pwl',
        'conv.point_conv.norm': 'bn3',
    },
    DepthwiseSeparableConv: {
        'conv.depth_conv.conv': 'conv_dw',
        'conv.depth_conv.norm': 'bn1',
        'conv.point_conv.conv': 'conv_pw',
        'conv.point_conv.norm': 'bn2',
    },
    ConvBnAct: {'conv': 'conv', 'norm': 'bn1'},
}
# The same within a block of an older file.
_OLDER_PARTS = {
    InvertedResidual: {
        'inverted_bottleneck.conv': 'conv_pw',
        'inverted_bottleneck.bn': 'bn1',
        'depth_conv.conv': 'conv_dw',
        'depth_conv.bn': 'bn2',
        'point_linear.conv': 'conv_pwl',
        'point_linear.bn': 'bn3',
    },
    DepthwiseSeparableConv: {
        'depth_conv.conv': 'conv_dw',
        'depth_conv.bn': 'bn1',
        'point_linear.conv': 'conv_pw',
        'point_linear.bn': 'bn2',
    },
}


def _is_older(state_dict: Mapping[str, Any]) -> bool:
    return 'first_conv.conv.weight' in state_dict and any('.mobile_inverted_conv.' in key for key in state_dict)


def is_reference(state_dict: Mapping[str, Any]) -> bool:
    """Tell whether a state dict has the names of one of the two kinds of the authors' files."""
    new = bool(state_dict) and all(key.startswith(('backbone.', 'head.')) for key in state_dict)
    return new or _is_older(state_dict)


def input_config(state_dict: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what a state dict says of the model's input in timm's terms: nothing, unless it has the older names.

    The networks of older files were trained on images that are normalised to the range from -1 to 1. With ImageNet's
    mean and standard deviation, MCUNet's published weights lose 18 points of top-1.
    """
    if isinstance(state_dict.get('state_dict'), dict):
        state_dict = state_dict['state_dict']
    return dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)) if _is_older(state_dict) else {}


def _older_layer_names(model: nn.Module) -> Dict[str, str]:
    """Map the layers of an older file to timm's: all blocks are numbered through, whatever their stage."""
    names = {'first_conv.conv': 'conv_stem', 'first_conv.bn': 'bn1', 'classifier.linear': 'classifier',
             'feature_mix_layer.conv': 'conv_head', 'feature_mix_layer.bn': 'bn2'}
    blocks = [(f'blocks.{i}.{j}', block) for i, stage in enumerate(model.blocks) for j, block in enumerate(stage)]
    for number, (place, block) in enumerate(blocks):
        for theirs, ours in _OLDER_PARTS.get(type(block), {}).items():
            names[f'blocks.{number}.mobile_inverted_conv.{theirs}'] = f'{place}.{ours}'
    return names


def _layer_names(model: nn.Module) -> Dict[str, str]:
    """Map the reference's layers to timm's: an input stem, stages, and a head that begins with timm's last stage."""
    names = {'backbone.input_stem.op_list.0.conv': 'conv_stem', 'backbone.input_stem.op_list.0.norm': 'bn1'}
    last = len(model.blocks) - 1
    for i, stage in enumerate(model.blocks):
        for j, block in enumerate(stage):
            place = f'backbone.stages.{i - 1}.op_list.{j}'
            if i in (0, last):
                place = 'backbone.input_stem.op_list.1' if i == 0 else 'head.op_list.0'
            for theirs, ours in _PARTS.get(type(block), {}).items():
                names[f'{place}.{theirs}'] = f'blocks.{i}.{j}.{ours}'
    # The pooling counts too: it comes before MobileNetV3's head convolution and behind the others'.
    has_head = isinstance(model.conv_head, nn.Conv2d)
    if has_head and isinstance(model, MobileNetV3):
        names['head.op_list.2.conv'] = 'conv_head'
    elif has_head:
        names.update({'head.op_list.1.conv': 'conv_head', 'head.op_list.1.norm': 'bn2'})
    names[f'head.op_list.{3 if has_head else 2}.linear'] = 'classifier'
    return names


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Rename the tensors of an authors' checkpoint for the timm model; any other state dict passes as it is.

    This is the `pretrained_filter_fn` of the `netaug_*` models.

    Args:
        state_dict: Weights of a tiny model as published, also with `state_dict` around them.
        model: The timm model that they are for.

    Raises:
        ValueError: It is an authors' checkpoint, but not of this model.
    """
    if isinstance(state_dict.get('state_dict'), dict):
        state_dict = state_dict['state_dict']
    if not is_reference(state_dict):
        return state_dict
    architecture = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
    if not hasattr(model, 'blocks') or not hasattr(model, 'conv_head'):
        raise ValueError(f'The reference checkpoint does not fit {architecture}: it is of a netaug_* model.')
    names = _older_layer_names(model) if _is_older(state_dict) else _layer_names(model)
    renamed, unmatched = {}, []
    missing = set(model.state_dict())
    if isinstance(model.get_classifier(), nn.Identity):  # a model without a classifier leaves theirs out
        state_dict = {k: v for k, v in state_dict.items() if '.linear.' not in k}
    for key, tensor in state_dict.items():
        layer, _, kind = key.rpartition('.')
        name = f'{names.get(layer)}.{kind}'
        if name in missing:
            missing.remove(name)
            renamed[name] = tensor
        else:
            unmatched.append(key)
    if unmatched or missing:
        raise ValueError(
            f'The reference checkpoint does not fit {architecture}: unmatched keys'
            f' {", ".join(unmatched[:3]) or "none"}; not in the file {", ".join(sorted(missing)[:3]) or "none"}.'
            f' Is it the checkpoint of another model?')
    return renamed
