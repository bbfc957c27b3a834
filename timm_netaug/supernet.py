"""The super-network: a timm model over larger tensors, whose leading slice is the tiny model.

`augment` makes one from a stock model, `slice_stock` makes stock models of any of its sub-networks.
"""
import copy
import math
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3

from .config import NetAugConfig
from .elastic import ELASTIC, STATE, STOCK, CheckpointedBlocks, ElasticBatchNormAct2d
from .layout import Channels, Layout, trace

__all__ = ['SuperNet', 'augment', 'leading_slices', 'slice_stock']


class SuperNet:
    """What a super-network has beyond the timm model that it is. Outside `sampled` it computes the tiny model.

    Attributes:
        netaug_config: The resolved `NetAugConfig`.
        layout: The channels that can be augmented (see `layout.Layout`).
        max_widths: Channels of every set in the whole super-network, by name.
    """
    netaug_config: NetAugConfig
    layout: Layout
    max_widths: Dict[str, int]

    def sample_widths(self, generator: torch.Generator, expand_only: bool = False) -> Dict[str, int]:
        """Draw the widths of an augmented sub-network (section 3.2 of the paper).

        Args:
            generator: The only source of randomness.
            expand_only: Augment the expansions alone, as in the second half of training.

        Returns:
            Number of active channels by the name of the convolution that writes them.
        """
        def draw(mults):
            return mults[torch.randint(len(mults), (), generator=generator, device=generator.device).item()]

        config = self.netaug_config
        return self.layout.widths(
            lambda c: 1.0 if expand_only else draw(config.width_mults),
            lambda c: draw(config.expand_mults),
            config.divisor,
        )

    @contextmanager
    def active(self, widths: Mapping[str, int]) -> Iterator[Dict[str, int]]:
        """Be the sub-network of the given widths within the block, and what it was before after it, come what may.

        `backward()` may come after the block.

        Args:
            widths: Number of active channels of every set, as `sample_widths` returns them.

        Raises:
            ValueError: A channel set is missing, unknown, or its width not between the tiny and the full one.
        """
        widths = self.check_widths(widths)
        modules = dict(self.named_modules())
        convs = {modules[name]: widths[c.name] for c in self.layout.channels.values() for name in c.writers}
        norms = [m for m in modules.values() if isinstance(m, ElasticBatchNormAct2d)]
        before = {conv: conv.active_out for conv in convs}, [norm.augmented for norm in norms]
        try:
            for conv, width in convs.items():
                conv.active_out = width
            for norm in norms:
                norm.augmented = True
            yield widths
        finally:
            for conv, width in before[0].items():
                conv.active_out = width
            for norm, augmented in zip(norms, before[1]):
                norm.augmented = augmented

    @contextmanager
    def sampled(self, generator: torch.Generator, expand_only: bool = False) -> Iterator[Dict[str, int]]:
        """Be one augmented sub-network, drawn from `generator` alone, within the block; yields its widths.

        Args: as for `sample_widths`.
        """
        with self.active(self.sample_widths(generator, expand_only)) as widths:
            yield widths

    def check_widths(self, widths: Mapping[str, int]) -> Dict[str, int]:
        """Return widths as a dict in forward order.

        Raises:
            ValueError: A channel set is missing, unknown, or its width not between the tiny and the full one.
        """
        wrong = sorted(set(widths) ^ set(self.max_widths))
        if wrong:
            raise ValueError(f"Widths need exactly one entry for each of the super-network's channel sets"
                             f' (`supernet.max_widths`); missing or unknown: {", ".join(wrong[:5])}.')
        for name, full in self.max_widths.items():
            if not self.layout.channels[name].base <= widths[name] <= full:
                raise ValueError(f"Width {widths[name]} of '{name}' is not between the tiny model's"
                                 f' {self.layout.channels[name].base} and the super-network\'s {full}.')
        return {name: int(widths[name]) for name in self.max_widths}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the whole super-network for a training from scratch, as the reference does.

        Convolutions: Kaiming-uniform (a = sqrt 5) with the fan-in of the full tensor; classifier: truncated normal
        of 0.02. The channels are sorted at once, so that the tiny model starts with the largest ones.
        """
        for name, tensor in self.named_parameters():
            tensor.copy_(_initial(self, name, tensor, self.layout))
        for name, tensor in self.named_buffers():
            tensor.fill_(1 if name.endswith('running_var') else 0)
        if self.netaug_config.sort:
            self.sort_channels()

    @torch.no_grad()
    def sort_channels(self, optimizer: Optional[torch.optim.Optimizer] = None) -> Dict[str, torch.Tensor]:
        """Bring the most important expansion channels of every block to the front (section 3.3 of the paper).

        The importance of a channel is the L1 norm of the weights that read it: those of the block's projection, and
        in squeeze-excite those of the expanding convolution. The function of the full super-network stays as it is.

        Args:
            optimizer: Its state of the sorted weights is permuted with them.

        Returns:
            Orders that were applied, by channel set; `permute_channels` applies them to a copy (an EMA, say).

        Raises:
            ValueError: The optimizer keeps a state that can not be permuted. Nothing was changed.
        """
        orders = {}
        for c in self.layout.channels.values():
            if c.kind == 'width':
                continue
            # The reader is the block's projection for 'expand', the expanding convolution for 'squeeze'; both are
            # dense. Squeeze-excite's reduction reads expansion channels too, but they are its input, not its choice.
            reader = next(
                name for name, axis in self.layout.axes.items()
                if axis.get(1) is c and (c.kind == 'squeeze' or axis[0].kind == 'width'))
            importance = self.get_parameter(reader).abs().sum((0, 2, 3))
            orders[c.name] = importance.argsort(descending=True, stable=True)
        self.permute_channels(orders, optimizer)
        return orders

    @torch.no_grad()
    def permute_channels(
            self,
            orders: Mapping[str, torch.Tensor],
            optimizer: Optional[torch.optim.Optimizer] = None,
    ) -> None:
        """Reorder channels in all tensors that they run through, and in the optimizer's state of them.

        Args:
            orders: For channel sets by name: the old position of every channel of the super-network, in new order.

        Raises:
            ValueError: The optimizer keeps a state that can not be permuted. Nothing was changed.
        """
        for tensor, dims in self._to_permute(orders, optimizer):
            for dim, order in dims.items():
                tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
        for module in self.modules():
            if isinstance(module, ElasticBatchNormAct2d):
                module.since_sort = 0  # the tiny network is another function now

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check, once an optimizer has made a step, that its state can be sorted with the weights.

        Raises:
            ValueError: It keeps a state that can not be permuted.
        """
        self._to_permute(dict.fromkeys(self.layout.channels), optimizer)

    def _to_permute(
            self,
            orders: Mapping[str, Any],
            optimizer: Optional[torch.optim.Optimizer],
    ) -> List[Tuple[torch.Tensor, Dict[int, Any]]]:
        """List all tensors that channel sets run through, with the orders of their axes."""
        while hasattr(optimizer, '_base_optimizer'):  # timm's Lookahead
            optimizer = optimizer._base_optimizer
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        todo = []
        for name, axis in self.layout.axes.items():
            dims = {dim: orders[c.name] for dim, c in axis.items() if c.name in orders}
            if not dims:
                continue
            tensor = tensors[name]
            todo.append((tensor, dims))
            if tensor.grad is not None:
                todo.append((tensor.grad, dims))
            for key, state in (optimizer.state.get(tensor, {}) if optimizer is not None else {}).items():
                if state is None or isinstance(state, (int, float)) or (torch.is_tensor(state) and state.numel() == 1):
                    continue
                if not torch.is_tensor(state) or state.shape != tensor.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps a '{key}' for '{name}' that is not of its shape"
                        f' {tuple(tensor.shape)} and can not be sorted with it. Use another optimizer or'
                        f' NetAugConfig(sort=False).')
                todo.append((state, dims))
        return todo

    @property
    def batches_since_sort(self) -> Optional[int]:
        """Tiny training batches since the last sort, None once they no longer matter to BatchNorm's statistics."""
        return next(m.since_sort for m in self.modules() if isinstance(m, ElasticBatchNormAct2d))

    @batches_since_sort.setter
    def batches_since_sort(self, count: Optional[int]) -> None:
        for module in self.modules():
            if isinstance(module, ElasticBatchNormAct2d):
                module.since_sort = count

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("A super-network's classifier can not be replaced: reset the stock model's, then augment it.")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of the blocks again in the backward pass, at the widths of the forward pass."""
        self.blocks.__class__ = CheckpointedBlocks if enable else nn.Sequential

    def synchronise_batchnorm(self) -> None:
        """Let BatchNorm normalise by the batches of all processes together. Needs CUDA, as PyTorch's own does.

        The layers stay what they are, so `convert_sync_batchnorm` has nothing to undo in the exported model.
        """
        for module in self.modules():
            if isinstance(module, ElasticBatchNormAct2d):
                module.synchronised = True


class EfficientNetSuperNet(SuperNet, EfficientNet):
    """Super-network of a timm `EfficientNet`."""


class MobileNetV3SuperNet(SuperNet, MobileNetV3):
    """Super-network of a timm `MobileNetV3`."""


_SUPERNETS = {EfficientNet: EfficientNetSuperNet, MobileNetV3: MobileNetV3SuperNet}
_STOCK = {supernet: stock for stock, supernet in _SUPERNETS.items()}


def _initial(model: nn.Module, name: str, tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Fresh values for a tensor of a super-network."""
    layer, _, kind = name.rpartition('.')
    role = layout.layers[layer]
    new = torch.empty_like(tensor)
    if role == 'scale':
        return new.fill_(model.get_submodule(layer).init_values)
    if kind == 'weight' and role == 'linear':
        return nn.init.trunc_normal_(new, std=0.02)
    if kind == 'weight' and role in ('conv', 'depthwise'):
        return nn.init.kaiming_uniform_(new, a=math.sqrt(5))
    return new.fill_(1 if kind in ('weight', 'running_var') else 0)


def leading_slices(axis: Mapping[int, Channels], widths: Mapping[str, int], ndim: int) -> tuple:
    """Index the part of a tensor that a sub-network uses."""
    return tuple(slice(widths[axis[dim].name]) if dim in axis else slice(None) for dim in range(ndim))


def _rebuild(model: nn.Module, tensors: Mapping[str, torch.Tensor], types: Mapping[str, type]) -> nn.Module:
    """Copy a model with other tensors and other types in places; tensors that are not given are copied."""
    memo = {}
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors:
            new = tensors[name]
            memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    clone = copy.deepcopy(model, memo)
    for name, kind in types.items():
        clone.get_submodule(name).__class__ = kind
    return clone


@torch.no_grad()
def augment(model: nn.Module, config: Optional[NetAugConfig] = None) -> SuperNet:
    """Make the super-network of a stock timm model (section 3.2 of the paper). The model itself is left as it is.

    The tiny model's weights are the leading slice of the super-network's; the weights behind it are initialised with
    torch's global generator. Memory format, dtype, device and training mode are the model's.

    Args:
        model: A timm `EfficientNet` or `MobileNetV3` made of supported blocks.
        config: What to augment, None for the defaults.

    Raises:
        ValueError: A module is not supported; the message names it, its type, and the supported types. Or the config
            is not a `NetAugConfig`.
    """
    if config is not None and not isinstance(config, NetAugConfig):
        raise ValueError(f'augment() takes a NetAugConfig, got {config!r}: build one with NetAugConfig.from_dict().')
    layout = trace(model)
    config = (config or NetAugConfig()).resolve(getattr(model, 'pretrained_cfg', {}).get('architecture', ''))
    max_widths = layout.widths(
        lambda c: max(config.width_mults), lambda c: max(config.expand_mults), config.divisor)

    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # 1x1 convolutions look channels-last in either format: what the others are counts.
    channels_last = any(
        t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
        for t in old.values())
    tensors = {}
    for name, axis in layout.axes.items():
        shape = [max_widths[axis[dim].name] if dim in axis else size for dim, size in enumerate(old[name].shape)]
        new = torch.empty(
            shape,
            dtype=old[name].dtype,
            device=old[name].device,
            memory_format=torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format,
        )
        new.copy_(_initial(model, name, new, layout))
        new[leading_slices(axis, layout.tiny, new.ndim)] = old[name]
        tensors[name] = new

    types = {name: ELASTIC[role, type(model.get_submodule(name))] for name, role in layout.layers.items()}
    supernet = _rebuild(model, tensors, {**types, '': _SUPERNETS[type(model)]})
    for name in layout.layers:
        supernet.get_submodule(name).fit()
    for c in layout.channels.values():
        for name in c.writers:
            supernet.get_submodule(name).active_out = c.base
    for name, role in layout.layers.items():
        if role == 'norm':
            norm = supernet.get_submodule(name)
            norm.tiny_width = layout.axes[f'{name}.running_mean'][0].base
            # Of the instance from now on: what is compiled looks at where an attribute is, too.
            norm.augmented, norm.frozen, norm.since_sort = norm.augmented, norm.frozen, norm.since_sort
    supernet.netaug_config, supernet.layout, supernet.max_widths = config, layout, max_widths
    supernet.set_grad_checkpointing(model.grad_checkpointing)
    supernet.grad_checkpointing = False  # timm's own knows nothing of widths
    return supernet


@torch.no_grad()
def slice_stock(supernet: SuperNet, widths: Optional[Mapping[str, int]] = None) -> nn.Module:
    """Copy a sub-network out of a super-network, as a stock timm model. See `timm_netaug.export.export`."""
    if not isinstance(supernet, SuperNet):
        raise ValueError(f'Only a super-network can be exported, got {type(supernet).__name__}.')
    layout = supernet.layout
    widths = layout.tiny if widths is None else supernet.check_widths(widths)
    tensors = {
        name: tensor[leading_slices(layout.axes[name], widths, tensor.ndim)].clone()
        for name, tensor in [*supernet.named_parameters(), *supernet.named_buffers()] if name in layout.axes
    }
    types = {name: type(supernet.get_submodule(name)) for name in layout.layers}
    model = _rebuild(supernet, tensors, {})
    for attribute in ('netaug_config', 'layout', 'max_widths'):
        del model.__dict__[attribute]
    for name, elastic in types.items():
        layer = model.get_submodule(name)
        layer.fit()
        layer.__class__ = STOCK[elastic]
        for attribute in STATE:
            layer.__dict__.pop(attribute, None)
    model.__class__ = _STOCK[type(supernet)]
    model.blocks.__class__ = nn.Sequential
    if hasattr(model, '_model_args'):
        model._model_args = {k: v for k, v in model._model_args.items() if k != 'netaug'}
    _fit_features(model)
    return model


def _fit_features(model: nn.Module) -> None:
    """Let the widths that a timm model tells of itself follow its layers."""
    def out_channels(module):
        return [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1].out_channels

    last = out_channels(model.blocks)
    has_head = isinstance(model.conv_head, nn.Conv2d)
    model.head_hidden_size = model.conv_head.out_channels if has_head else last
    model.num_features = last if isinstance(model, MobileNetV3) else model.head_hidden_size
    for info in model.feature_info:
        info['num_chs'] = out_channels(model.blocks[info['stage'] - 1] if info['stage'] else model.conv_stem)
