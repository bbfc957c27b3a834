"""Checkpoints of the NetAug reference implementation (the tiny models' `.pth` files), carried over to timm's names."""
import re
from typing import Any, Dict, Mapping

import torch.nn as nn
from timm.models.mobilenetv3 import MobileNetV3

__all__ = ['checkpoint_filter_fn', 'is_reference']

_PREFIXES = ('backbone.', 'head.')  # every key of a reference checkpoint starts with one of these
_BLOCK_PARTS = {  # the reference's names -> timm's, in blocks with and without an expansion
    True: {'inverted_conv.conv': 'conv_pw', 'inverted_conv.norm': 'bn1', 'depth_conv.conv': 'conv_dw',
           'depth_conv.norm': 'bn2', 'point_conv.conv': 'conv_pwl', 'point_conv.norm': 'bn3'},
    False: {'depth_conv.conv': 'conv_dw', 'depth_conv.norm': 'bn1', 'point_conv.conv': 'conv_pw',
            'point_conv.norm': 'bn2'},
}
_SE_PARTS = {'se_layer.reduce_conv': 'se.conv_reduce', 'se_layer.expand_conv': 'se.conv_expand'}


def is_reference(state_dict: Mapping[str, Any]) -> bool:
    """Tell whether a state dict has the reference implementation's names."""
    return bool(state_dict) and all(key.startswith(_PREFIXES) for key in state_dict)


def _layer_names(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, str]:
    """Map the reference's places of blocks and head layers to timm's.

    A network is an input stem (convolution, first block), stages of blocks, and a head, whose first member is the
    last block (or, in MobileNetV3, a convolution) where timm has one more stage.
    """
    last = len(model.blocks) - 1
    names = {'backbone.input_stem.op_list.0': '', 'backbone.input_stem.op_list.1': 'blocks.0.0'}
    for key in state_dict:
        match = re.match(r'backbone\.stages\.(\d+)\.op_list\.(\d+)\.', key)
        if match:
            names[match[0][:-1]] = f'blocks.{int(match[1]) + 1}.{match[2]}'
    head = sorted({int(key.split('.')[2]) for key in state_dict if re.match(r'head\.op_list\.\d+\.', key)})
    for i, index in enumerate(head):
        is_classifier = i == len(head) - 1
        names[f'head.op_list.{index}'] = f'blocks.{last}.0' if i == 0 else 'classifier' if is_classifier else 'head'
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
    if 'state_dict' in state_dict and isinstance(state_dict['state_dict'], dict):
        state_dict = state_dict['state_dict']
    if not is_reference(state_dict):
        return state_dict
    norm_of_head = 'norm_head' if isinstance(model, MobileNetV3) else 'bn2'
    plain = {'': {'conv': 'conv_stem', 'norm': 'bn1'}, 'head': {'conv': 'conv_head', 'norm': norm_of_head}}
    names = _layer_names(state_dict, model)
    wanted = model.state_dict()
    renamed, unmatched = {}, []
    for key, tensor in state_dict.items():
        place, inner = re.match(r'((?:backbone\.|head\.).*?op_list\.\d+)\.(.*)', key + '.').groups() \
            if 'op_list' in key else ('', key + '.')
        layer, _, kind = inner[:-1].rpartition('.')
        block = names.get(place)
        if block in plain:
            name = plain[block].get(layer)
        elif block == 'classifier':
            name = {'linear': ''}.get(layer)
        else:
            layer = layer.removeprefix('conv.') if layer not in ('conv', 'norm') else layer
            has_expansion = f'{place}.conv.inverted_conv.conv.weight' in state_dict
            parts = {**_BLOCK_PARTS[has_expansion], **_SE_PARTS, 'conv': 'conv', 'norm': 'bn1'}
            name = parts.get(layer)
        timm_key = '.'.join(p for p in (block if block not in plain else '', name, kind) if p) if name is not None else ''
        if timm_key in wanted:
            renamed[timm_key] = tensor
        else:
            unmatched.append(key)
    if unmatched or set(wanted) - set(renamed):
        missing = sorted(set(wanted) - set(renamed))
        raise ValueError(
            f'The reference checkpoint does not fit {getattr(model, "pretrained_cfg", {}).get("architecture", "the model")}:'
            f' unmatched keys {", ".join(unmatched[:3]) or "none"}; not in the file {", ".join(missing[:3]) or "none"}.'
            f' Is it the checkpoint of another model?')
    return renamed
