"""Which channels of a stock timm model may be widened, and which axes of which tensors they run along.

`trace` reads a model and never changes it. What it returns is all that augmenting, sampling, sorting and exporting
need to know about an architecture: add a row to `_BLOCKS` to support another block.
"""
from dataclasses import dataclass, field
from typing import Callable, Dict, List, NoReturn, Optional, Tuple

import torch.nn as nn
from timm.layers import (
    BatchNormAct2d,
    ConvNormAct,
    DropPath,
    LayerScale2d,
    Linear,
    SelectAdaptivePool2d,
    activations,
    activations_me,
)
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3

__all__ = ['Channels', 'Layout', 'trace']


@dataclass
class Channels:
    """A set of channels that all its writers and readers share.

    Args:
        name: The convolution that writes them first: the key of this set in a dict of widths.
        base: Their number in the tiny model.
        kind: 'width' (stem, block outputs, head), 'expand' (inside a block) or 'squeeze' (inside squeeze-excite).
        source: The channels that their number follows: the block's input for 'expand', the excited ones for 'squeeze'.
        writers: Names of the convolutions that write them; more than one where skip connections tie block outputs.
    """
    name: str
    base: int
    kind: str = 'width'
    source: Optional['Channels'] = None
    writers: List[str] = field(default_factory=list)


@dataclass
class Layout:
    """The channels of a model in forward order, and the axes that they run along.

    Args:
        channels: Channel sets by name, each behind the one that it follows.
        axes: For every tensor of the model's state dict (but counters): the channel set along each augmented axis.
        layers: Role of every layer that has such tensors: 'conv', 'depthwise', 'norm', 'scale' or 'linear'.
    """
    channels: Dict[str, Channels]
    axes: Dict[str, Dict[int, Channels]]
    layers: Dict[str, str]

    def widths(
            self,
            width_mult: Callable[[Channels], float],
            expand_mult: Callable[[Channels], float],
            divisor: int = 1,
    ) -> Dict[str, int]:
        """Work out the number of active channels of every set (section 3.2 of the paper).

        Args:
            width_mult: Gives the multiplier of a 'width' set, `expand_mult` that of an 'expand' set.
            divisor: Widths other than the stored ones are rounded to the nearest multiple of it.
        """
        widths = {}
        for c in self.channels.values():
            mult = width_mult(c) if c.kind == 'width' else expand_mult(c) if c.kind == 'expand' else 1.0
            source = widths[c.source.name] if c.source else None
            if mult == 1 and (source is None or source == c.source.base):
                widths[c.name] = c.base  # the stored width, however the model once rounded it
            else:
                wanted = mult * (c.base if source is None else source * c.base / c.source.base)
                widths[c.name] = max(c.base, int(wanted / divisor + 0.5) * divisor)
        return widths

    @property
    def tiny(self) -> Dict[str, int]:
        """Widths of the tiny model."""
        return {name: c.base for name, c in self.channels.items()}


@dataclass(frozen=True)
class _Block:
    """Where the layers of a timm block stand: `expand` writes the inner channels (None: they are the block's input),
    `project` reads them and writes the output."""
    project: str
    expand: Optional[str] = None
    inner: Tuple[str, ...] = ()  # layers on the inner channels
    outer: Tuple[str, ...] = ()  # layers on the output channels
    before: Tuple[str, ...] = ()  # layers on the input channels, ahead of `expand`


# By exact type: a subclass with another forward (CondConvResidual, say) is another block.
_BLOCKS = {
    InvertedResidual: _Block('conv_pwl', 'conv_pw', ('bn1', 'conv_dw', 'bn2', 'se'), ('bn3',)),
    DepthwiseSeparableConv: _Block('conv_pw', None, ('conv_dw', 'bn1', 'se'), ('bn2',)),
    ConvBnAct: _Block('conv', None, (), ('bn1',)),
    EdgeResidual: _Block('conv_pwl', 'conv_exp', ('bn1', 'se'), ('bn2',)),
    UniversalInvertedResidual: _Block(
        'pw_proj.conv',
        'pw_exp.conv',
        ('pw_exp.bn', 'dw_mid', 'se'),
        ('pw_proj.bn', 'dw_end', 'layer_scale'),
        ('dw_start',),
    ),
}
_MODELS = (EfficientNet, MobileNetV3)
# Layers without tensors that treat every channel alike, whichever others there are.
_ELEMENTWISE = (
    nn.Identity, nn.Flatten, nn.Dropout, DropPath, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU,
    nn.Mish, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
    *(t for m in (activations, activations_me) for t in vars(m).values()
      if isinstance(t, type) and issubclass(t, nn.Module)),
)


class _Tracer:
    """Walks a model in forward order; `channels` is what the layers walked so far have written."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.layout = Layout({}, {}, {})

    def refuse(self, name: str, why: str = 'is not supported') -> NoReturn:
        supported = dict.fromkeys(t.__name__ for t in (*_MODELS, *_BLOCKS, nn.Conv2d, *_LAYERS, nn.Linear))
        what = f"module '{name}' of type" if name else 'it is of type'
        raise ValueError(
            f'NetAug can not augment this model: {what} {type(self.model.get_submodule(name)).__name__}, which {why}.'
            f' Supported types: {", ".join(supported)}.')

    def get(self, name: str, *types: type) -> nn.Module:
        module = self.model.get_submodule(name)
        if type(module) not in types:
            self.refuse(name)
        return module

    def put(self, name: str, role: str, **axes: Dict[int, Channels]) -> None:
        """Record the axes of a layer's tensors, of those that it has."""
        module = self.model.get_submodule(name)
        self.layout.layers[name] = role
        for tensor, axis in axes.items():
            value = getattr(module, tensor, None)
            if value is None:
                continue
            for dim, channels in axis.items():
                if value.shape[dim] != channels.base:
                    self.refuse(name, f'has a {tensor} of shape {tuple(value.shape)} for {channels.base} channels')
            self.layout.axes[f'{name}.{tensor}'] = axis

    def new(self, name: str, kind: str = 'width', source: Optional[Channels] = None) -> Channels:
        channels = Channels(name, self.get(name, nn.Conv2d).out_channels, kind, source)
        self.layout.channels[name] = channels
        return channels

    def conv(self, name: str, reads: Optional[Channels], writes: Channels) -> Channels:
        conv = self.get(name, nn.Conv2d)
        if conv.groups != 1 or conv.padding_mode != 'zeros':
            self.refuse(name, f'has groups={conv.groups}, padding_mode={conv.padding_mode}')
        self.put(name, 'conv', weight={0: writes, **({1: reads} if reads else {})}, bias={0: writes})
        writes.writers.append(name)
        return writes

    def layer(self, name: str, channels: Channels) -> None:
        """A layer that has as many output channels as input channels."""
        module = self.get(name, nn.Identity, *_LAYERS)
        if type(module) is not nn.Identity:
            _LAYERS[type(module)](self, name, channels)

    def depthwise(self, name: str, channels: Channels) -> None:
        conv = self.get(name, nn.Conv2d)
        if not conv.groups == conv.in_channels == conv.out_channels or conv.padding_mode != 'zeros':
            self.refuse(name, f'has groups={conv.groups}, padding_mode={conv.padding_mode}')
        self.put(name, 'depthwise', weight={0: channels}, bias={0: channels})

    def norm(self, name: str, channels: Channels) -> None:
        if self.model.get_submodule(name).running_mean is None:
            self.refuse(name, 'has no running statistics')
        axis = {0: channels}
        self.put(name, 'norm', weight=axis, bias=axis, running_mean=axis, running_var=axis)

    def scale(self, name: str, channels: Channels) -> None:
        self.put(name, 'scale', gamma={0: channels})

    def depthwise_norm(self, name: str, channels: Channels) -> None:
        self.depthwise(f'{name}.conv', channels)
        self.layer(f'{name}.bn', channels)

    def squeeze_excite(self, name: str, channels: Channels) -> None:
        squeezed = self.new(f'{name}.conv_reduce', 'squeeze', channels)
        self.conv(f'{name}.conv_reduce', channels, squeezed)
        self.conv(f'{name}.conv_expand', squeezed, channels)

    def block(self, name: str, channels: Channels) -> Channels:
        block = self.get(name, *_BLOCKS)
        spec = _BLOCKS[type(block)]
        for part in spec.before:
            self.layer(f'{name}.{part}', channels)
        inner = channels
        if spec.expand:
            inner = self.new(f'{name}.{spec.expand}', 'expand', channels)
            self.conv(f'{name}.{spec.expand}', channels, inner)
        for part in spec.inner:
            self.layer(f'{name}.{part}', inner)
        project = f'{name}.{spec.project}'
        out = self.conv(project, inner, channels if block.has_skip else self.new(project))
        for part in spec.outer:
            self.layer(f'{name}.{part}', out)
        self.get(f'{name}.drop_path', nn.Identity, DropPath)
        return out

    def head(self, name: str, channels: Channels) -> Channels:
        if type(self.model.get_submodule(name)) is nn.Identity:
            return channels
        return self.conv(name, channels, self.new(name))

    def trace(self) -> Layout:
        model = self.model
        self.get('', *_MODELS)
        channels = self.conv('conv_stem', None, self.new('conv_stem'))
        self.layer('bn1', channels)
        for i, stage in enumerate(model.blocks):
            for j in range(len(self.get(f'blocks.{i}', nn.Sequential))):
                channels = self.block(f'blocks.{i}.{j}', channels)
        if self.get('global_pool', SelectAdaptivePool2d).feat_mult() != 1:
            self.refuse('global_pool', 'concatenates pooled features, so its tiny part is no leading slice')
        channels = self.head('conv_head', channels)
        self.layer('norm_head' if type(model) is MobileNetV3 else 'bn2', channels)
        if type(model.classifier) is not nn.Identity:
            self.get('classifier', nn.Linear, Linear)
            self.put('classifier', 'linear', weight={1: channels}, bias={})

        if len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False))):
            self.refuse('', 'shares weights between layers')
        # The safety net: whatever no rule above knew is refused, be it a module around others with a forward of its
        # own, a layer with a tensor (an activation with weights, say), or one that works across channels without any.
        known = (*_MODELS, *_BLOCKS, *_LAYERS, *_ELEMENTWISE, nn.Sequential, nn.Linear, Linear)
        for name, module in model.named_modules():
            if name.rpartition('.')[2] == 'aa' and type(module) is not nn.Identity:
                self.refuse(name, 'is anti-aliasing and is not supported')
            if type(module) not in known and not f'{name}.'.startswith('global_pool.'):
                self.refuse(name)
            if module._forward_hooks or module._forward_pre_hooks:
                self.refuse(name, 'has a forward hook: remove it first')
        for name in [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]:
            if name not in self.layout.axes and not name.endswith('num_batches_tracked'):
                self.refuse(name.rpartition('.')[0], f"has a tensor '{name.rpartition('.')[2]}' that is not supported")
        return self.layout


_LAYERS: Dict[type, Callable] = {
    nn.Conv2d: _Tracer.depthwise,
    BatchNormAct2d: _Tracer.norm,
    SqueezeExcite: _Tracer.squeeze_excite,
    ConvNormAct: _Tracer.depthwise_norm,
    LayerScale2d: _Tracer.scale,
}


def trace(model: nn.Module) -> Layout:
    """Find the channels of a model that can be augmented. The model is only read.

    Args:
        model: A timm `EfficientNet` or `MobileNetV3` made of supported blocks.

    Raises:
        ValueError: A module is not supported; the message names it, its type, and the supported types.
    """
    return _Tracer(model).trace()
