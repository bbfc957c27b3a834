"""Checkpoints of the NetAug reference implementation (the tiny models' `.pth` files), carried over to timm's names."""
from typing import Any, Dict, Mapping

import torch.nn as nn
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, InvertedResidual
from timm.models.mobilenetv3 import MobileNetV3

__all__ = ['checkpoint_filter_fn', 'is_reference']

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


def is_reference(state_dict: Mapping[str, Any]) -> bool:
    """Tell whether a state dict has the reference implementation's names."""
    return bool(state_dict) and all(key.startswith(('backbone.', 'head.')) for key in state_dict)


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
    """Rename the tensors of a reference checkpoint for the timm model; any other state dict passes as it is.

    This is the `pretrained_filter_fn` of the `netaug_*` models.

    Args:
        state_dict: Weights of a tiny model as published, also with `state_dict` around them.
        model: The timm model that they are for.

    Raises:
        ValueError: It is a reference checkpoint, but not of this model.
    """
    if isinstance(state_dict.get('state_dict'), dict):
        state_dict = state_dict['state_dict']
    if not is_reference(state_dict):
        return state_dict
    architecture = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
    if not hasattr(model, 'blocks') or not hasattr(model, 'conv_head'):
        raise ValueError(f'The reference checkpoint does not fit {architecture}: it is of a netaug_* model.')
    names, renamed, unmatched = _layer_names(model), {}, []
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
