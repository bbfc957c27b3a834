"""The five tiny models of the NetAug paper, as timm models under the names `netaug_*`.

Each is timm's own `EfficientNet` or `MobileNetV3`, built from an architecture definition. Sources of the definitions:
MobileNetV2 (arXiv 1801.04381), MobileNetV3 (1905.02244), ProxylessNAS (1812.00332), MCUNet (2007.10319), and NetAug
(2110.08890) for MobileNetV2-Tiny and the input sizes.
"""
import dataclasses
import logging
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Union

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import make_divisible
from timm.models import PretrainedCfg, create_model, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models.efficientnet import EfficientNet, _create_effnet
from timm.models.mobilenetv3 import MobileNetV3, _create_mnv3

from .config import NetAugConfig, register_defaults
from .reference import checkpoint_filter_fn, input_config
from .bundled import bundled_cfgs
from .supernet import SuperNet, augment

__all__ = []

_logger = logging.getLogger(__name__)
_SOURCES = ('state_dict', 'file', 'url', 'hf_hub_id')  # fields of a pretrained config that name a source of weights

# The first block of a stage never has a skip connection here, even where stride and widths would allow one.
_MOBILENETV2 = [
    ['ds_r1_k3_s1_c16_noskip'],
    ['ir_r1_k3_s2_e6_c24_noskip', 'ir_r1_k3_s1_e6_c24'],
    ['ir_r1_k3_s2_e6_c32_noskip', 'ir_r2_k3_s1_e6_c32'],
    ['ir_r1_k3_s2_e6_c64_noskip', 'ir_r3_k3_s1_e6_c64'],
    ['ir_r1_k3_s1_e6_c96_noskip', 'ir_r2_k3_s1_e6_c96'],
    ['ir_r1_k3_s2_e6_c160_noskip', 'ir_r2_k3_s1_e6_c160'],
    ['ir_r1_k3_s1_e6_c320_noskip'],
]
_PROXYLESSNAS = [
    ['ds_r1_k3_s1_c16_noskip'],
    ['ir_r1_k5_s2_e3_c32_noskip', 'ir_r1_k3_s1_e3_c32'],
    ['ir_r1_k7_s2_e3_c40_noskip', 'ir_r1_k3_s1_e3_c40', 'ir_r2_k5_s1_e3_c40'],
    ['ir_r1_k7_s2_e6_c80_noskip', 'ir_r3_k5_s1_e3_c80'],
    ['ir_r1_k5_s1_e6_c96_noskip', 'ir_r3_k5_s1_e3_c96'],
    ['ir_r1_k7_s2_e6_c192_noskip', 'ir_r1_k7_s1_e6_c192', 'ir_r2_k7_s1_e3_c192'],
    ['ir_r1_k7_s1_e6_c320_noskip'],
]
_MCUNET = [  # final widths
    ['ds_r1_k3_s1_c8_noskip'],
    ['ir_r1_k7_s2_e3_c16_noskip', 'ir_r1_k3_s1_e5_c16', 'ir_r1_k7_s1_e5_c16', 'ir_r1_k5_s1_e4_c16'],
    ['ir_r1_k5_s2_e5_c24_noskip', 'ir_r2_k5_s1_e5_c24'],
    ['ir_r1_k3_s2_e5_c40_noskip', 'ir_r1_k7_s1_e6_c40', 'ir_r1_k5_s1_e4_c40'],
    ['ir_r1_k5_s1_e5_c48_noskip', 'ir_r1_k7_s1_e5_c48', 'ir_r1_k3_s1_e5_c48'],
    ['ir_r1_k3_s2_e6_c96_noskip', 'ir_r1_k7_s1_e5_c96', 'ir_r1_k3_s1_e4_c96'],
    ['ir_r1_k7_s1_e5_c160_noskip'],
]
# MobileNetV3-Large is defined by expansion widths, and each width is scaled and rounded separately. So these expansion
# ratios are valid only for the multiplier 0.35. The comments show the expansion widths for the multiplier 1.0.
_MOBILENETV3_035 = [
    ['ds_r1_k3_s1_c16_nre'],
    ['ir_r1_k3_s2_e3_c24_nre_noskip', 'ir_r1_k3_s1_e3_c24_nre'],  # 64 72
    ['ir_r1_k5_s2_e3_c40_se0.25_nre_noskip', 'ir_r2_k5_s1_e2.5_c40_se0.25_nre'],  # 72 120 120
    ['ir_r1_k3_s2_e5.5_c80_noskip', 'ir_r1_k3_s1_e2.25_c80', 'ir_r2_k3_s1_e2_c80'],  # 240 200 184 184
    ['ir_r1_k3_s1_e5.25_c112_se0.25_noskip', 'ir_r1_k3_s1_e5.8_c112_se0.25'],  # 480 672
    ['ir_r1_k5_s2_e5.8_c160_se0.25_noskip', 'ir_r2_k5_s1_e6_c160_se0.25'],  # 672 960 960
    ['cn_r1_k1_s1_c960'],
]


# The paper's multipliers (section 4.1 and the reference's experiment configs) where they differ from the defaults.
register_defaults('netaug_mbv3_035', width_mults=(1.0, 2.0, 3.0))
register_defaults('netaug_mcunet', width_mults=(1.0, 1.6, 2.2))


def _squeezed_channels(channels: float) -> int:
    return max(16, make_divisible(channels, 8))


def _cfg(size: int, **kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, size, size),
        'pool_size': (-(-size // 32), -(-size // 32)),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem',
        'classifier': 'classifier',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2110.08890',
        'origin_url': 'https://github.com/mit-han-lab/tinyml',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'netaug_mbv2_tiny': _cfg(144),
    'netaug_mbv2_035': _cfg(160),
    'netaug_mbv3_035': _cfg(160),
    'netaug_proxylessnas_035': _cfg(160),
    'netaug_mcunet': _cfg(176),
    **bundled_cfgs(),
})


for _default in default_cfgs.values():  # else a name without a tag would get input size and classes of the weights
    _default.tags.remove('')
    _default.tags.appendleft('')


def _shipped_cfg(variant: str, *given: Union[Mapping[str, Any], PretrainedCfg, None]) -> Optional[PretrainedCfg]:
    """Return the config of the bundled weights, which `pretrained=True` loads for a name without a tag. Return None if
    there are no bundled weights, or if one of the given configs has another source of weights."""
    fields = [cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg or {} for cfg in given]
    tag = next((t for t in default_cfgs[variant].tags if default_cfgs[variant].cfgs[t].has_weights), None)
    if tag is None or any(cfg.get(key) for cfg in fields for key in _SOURCES):
        return None
    cfg = default_cfgs[variant].cfgs[tag]
    _logger.warning(f'{variant}: loading the weights {variant}.{tag}, trained on {cfg.description}'
                    f' ({cfg.num_classes} classes, images of {" x ".join(map(str, cfg.input_size))}).')
    return dataclasses.replace(cfg, architecture=variant, tag=tag)


def _filter_fn(variant: str, state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Rename the tensors of a reference checkpoint, and note the normalisation that the weights of an older file were
    trained with. This works for timm's feature extractors, too.

    The renaming recognises a reference checkpoint by its head. A feature extractor has no head, so the whole model is
    used in its place, on the meta device (without memory).
    """
    whole = model if hasattr(model, 'conv_head') else create_model(variant, device='meta')
    model.pretrained_cfg.update(input_config(state_dict))
    return checkpoint_filter_fn(state_dict, whole)


def _create(
        create_fn: Callable[..., nn.Module],
        variant: str,
        arch_def: List[List[str]],
        pretrained: bool,
        multiplier: float = 0.35,
        act_layer: str = 'relu6',
        netaug: Union[bool, Mapping[str, Any], NetAugConfig, None] = None,
        **kwargs: Any,
) -> Union[nn.Module, SuperNet]:
    """Build a model with timm's function for the family, or with `netaug` (True or config fields) the super-network."""
    kwargs.setdefault('round_chs_fn', partial(round_channels, multiplier=multiplier))
    given = kwargs.get('pretrained_cfg')
    if pretrained and not isinstance(given, str):  # a string is a tag
        kwargs['pretrained_cfg'] = _shipped_cfg(variant, given, kwargs.get('pretrained_cfg_overlay')) or given
    if 'feature_cls' in kwargs:
        kwargs.setdefault('feature_cfg', dict(flatten_sequential=True))  # the classes 'list' and 'dict' need it
    model = create_fn(
        variant,
        pretrained,
        pretrained_filter_fn=partial(_filter_fn, variant),
        block_args=decode_arch_def(arch_def),
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, act_layer),
        **kwargs,
    )
    if netaug is None or netaug is False:
        return model
    if netaug is not True and not isinstance(netaug, (Mapping, NetAugConfig)):
        raise ValueError(f'netaug must be True, a dict of NetAugConfig fields, or a NetAugConfig, got {netaug!r}.')
    if not isinstance(netaug, NetAugConfig):
        netaug = NetAugConfig() if netaug is True else NetAugConfig.from_dict(netaug)
    return augment(model, netaug)


@register_model
def netaug_mbv2_tiny(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2-Tiny of the NetAug paper: MobileNetV2 x0.35 with a head of 448 channels, for 144 x 144 pixels."""
    kwargs = dict(dict(stem_size=32, num_features=448), **kwargs)
    return _create(_create_effnet, 'netaug_mbv2_tiny', _MOBILENETV2, pretrained, **kwargs)


@register_model
def netaug_mbv2_035(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 x0.35 for 160 x 160 pixels."""
    kwargs = dict(dict(stem_size=32, num_features=1280), **kwargs)
    return _create(_create_effnet, 'netaug_mbv2_035', _MOBILENETV2, pretrained, **kwargs)


@register_model
def netaug_mbv3_035(pretrained: bool = False, **kwargs) -> MobileNetV3:
    """MobileNetV3-Large x0.35 for 160 x 160 pixels."""
    se_layer = partial(
        SqueezeExcite, gate_layer='hard_sigmoid', force_act_layer=nn.ReLU, rd_round_fn=_squeezed_channels)
    kwargs = dict(dict(stem_size=16, num_features=1280, se_layer=se_layer, act_layer='hard_swish'), **kwargs)
    return _create(_create_mnv3, 'netaug_mbv3_035', _MOBILENETV3_035, pretrained, **kwargs)


@register_model
def netaug_proxylessnas_035(pretrained: bool = False, **kwargs) -> EfficientNet:
    """ProxylessNAS-Mobile x0.35 for 160 x 160 pixels."""
    kwargs = dict(dict(stem_size=32, num_features=1280), **kwargs)
    return _create(_create_effnet, 'netaug_proxylessnas_035', _PROXYLESSNAS, pretrained, **kwargs)


@register_model
def netaug_mcunet(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MCUNet's ImageNet model for 320 kB of SRAM and 1 MB of flash, for 176 x 176 pixels, without head convolution."""
    kwargs = dict(dict(stem_size=16, num_features=0, multiplier=1.0), **kwargs)
    return _create(_create_effnet, 'netaug_mcunet', _MCUNET, pretrained, **kwargs)
