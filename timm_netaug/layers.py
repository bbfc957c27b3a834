"""Elastic layers: stock layers over larger tensors, of which a forward pass uses the leading slice.

A layer reads as many channels as its input has. Only a dense convolution stores how many channels it writes
(`active_out`). So the dense convolutions set the widths of a whole network, and every other layer follows.

`register_elastic` adds the elastic class of another stock layer.
"""
import math
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, BlurPool2d, Conv2dSame, LayerScale2d, Linear
from timm.layers.conv2d_same import conv2d_same
from torch.nn.modules._functions import SyncBatchNorm as sync_batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from .early_backward import leading
from .fused_bn_relu import FUSED, batch_norm_relu

__all__ = ['ELASTIC', 'PASS_STATE', 'LAYER_STATE', 'Elastic', 'ElasticBatchNorm', 'ElasticConv2d', 'register_elastic',
           'statistics_kept']

PASS_STATE = ('active_out', 'augmented')  # attributes of elastic layers that a forward pass depends on
# All attributes of elastic layers that stock layers lack.
LAYER_STATE = (*PASS_STATE, 'calls', 'frozen', 'since_sort', 'synchronised', 'tiny_in', 'tiny_width')

ELASTIC: Dict[type, type] = {}  # exact type of a stock layer -> its elastic class


class Elastic:
    """The interface of an elastic layer, which `augment` and `export` use."""
    stock: type  # exact type of the stock layer

    @staticmethod
    def refusal(layer: nn.Module) -> str:
        """Return why a stock layer cannot be made elastic, as a clause that follows 'which'; '' if it can."""
        return ''

    @staticmethod
    def fill(layer: nn.Module, name: str, new: torch.Tensor) -> torch.Tensor:
        """Fill a tensor of a layer, stock or elastic, with initial values for the whole super-network.

        Args:
            name: Name of the tensor within the layer.
            new: The tensor, with the full number of channels.
        """
        return new.fill_(1 if name in ('weight', 'running_var') else 0)

    def make_elastic(self, tiny: Mapping[str, torch.Size], calls: int) -> None:
        """Prepare a layer for its first forward pass, after its tensors have been enlarged.

        Args:
            tiny: Shapes of its parameters and buffers before they were enlarged, by name.
            calls: How often a forward pass of the network calls the layer.
        """
        self.update_shapes()

    def update_shapes(self) -> None:
        """Set attributes such as `in_channels` from the shapes of the tensors."""


def register_elastic(stock: type) -> Callable[[type], type]:
    """Register the decorated class, an `Elastic` and a subclass of the stock layer, as its elastic version.

    Its `forward` must compute, with the leading slices of its tensors, what a stock layer of that width computes.

    Args:
        stock: Exact type of the stock layer. A subclass may have another forward pass, so it needs its own entry.
    """
    def register(elastic: type) -> type:
        elastic.stock = stock
        ELASTIC[stock] = elastic
        return elastic
    return register


def _check_channels(layer: nn.Module, channels: int) -> None:
    if not layer.tiny_in <= channels <= layer.weight.shape[1]:
        raise RuntimeError(f'{type(layer).__name__} reads {layer.tiny_in} to {layer.weight.shape[1]} channels, its'
                           f' input has {channels}.')


class _ElasticConv(Elastic):
    """Dense convolution of all channels of the input to the first `active_out` output channels, or depthwise
    convolution of all channels of the input."""
    active_out: int

    @staticmethod
    def refusal(layer: nn.Conv2d) -> str:
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        if layer.padding_mode == 'zeros' and (layer.groups == 1 or depthwise):
            return ''
        return f'has groups={layer.groups}, padding_mode={layer.padding_mode}'

    @staticmethod
    def fill(layer: nn.Module, name: str, new: torch.Tensor) -> torch.Tensor:
        return nn.init.kaiming_uniform_(new, a=math.sqrt(5)) if name == 'weight' else new.zero_()

    def _active(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor], int]:
        """Return the active weight and bias, and the number of groups."""
        channels, dense = x.shape[1], self.groups == 1
        if dense:
            _check_channels(self, channels)
        out = self.active_out if dense else channels
        weight = leading(self.weight, out, channels) if dense else leading(self.weight, out)
        return weight, None if self.bias is None else leading(self.bias, out), 1 if dense else channels

    def make_elastic(self, tiny: Mapping[str, torch.Size], calls: int) -> None:
        self.tiny_in = tiny['weight'][1]
        if self.groups == 1:
            self.active_out = tiny['weight'][0]
        self.update_shapes()

    def update_shapes(self) -> None:
        dense = self.groups == 1
        self.out_channels = self.weight.shape[0]
        self.in_channels = self.weight.shape[1] if dense else self.out_channels
        self.groups = 1 if dense else self.out_channels


@register_elastic(nn.Conv2d)
class ElasticConv2d(_ElasticConv, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, groups = self._active(x)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


@register_elastic(Conv2dSame)
class ElasticConv2dSame(_ElasticConv, Conv2dSame):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, groups = self._active(x)
        return conv2d_same(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class ElasticBatchNorm(Elastic):
    """BatchNorm of all channels of the input.

    In training, only the tiny pass updates the running statistics of the tiny slice, because the layer gets other
    inputs in an augmented sub-network. An augmented pass updates the statistics of the channels behind the slice, which
    are needed when a sort moves these channels into the slice. A sort changes the function of the tiny network, so its
    statistics start anew. At first they are a mean of the batches since the sort, with larger weights for later
    batches. When the weight of a new batch has fallen to the momentum, they become the usual moving average again.

    Attributes:
        tiny_width: Channels of the tiny slice.
        calls: Number of calls of the layer in a forward pass of the network (several for a head that levels share).
        augmented: Whether an augmented pass is running.
        frozen: Whether the running statistics are not updated, because the pass recomputes an earlier one.
        since_sort: Calls of the layer in tiny passes since the last sort; None while the statistics are the usual
            moving average.
        synchronised: Whether a training batch is normalised over all processes.
    """
    tiny_width: int
    calls = 1
    augmented = False
    frozen = False
    since_sort = None
    synchronised = False

    @staticmethod
    def refusal(layer: nn.Module) -> str:
        return 'has no running statistics' if layer.running_mean is None else ''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        mean = var = None  # an augmented pass over the tiny channels alone writes no statistics
        momentum = 0.0
        if self.running_mean is not None and not (self.training and self.augmented and channels <= self.tiny_width):
            mean, var = self.running_mean[:channels], self.running_var[:channels]
            if self.training and (self.augmented or self.frozen):
                mean, var = mean.clone(), var.clone()
                momentum = 0.1 if self.momentum is None else self.momentum
            elif self.training:
                momentum = self._count_batch()
        weight = None if self.weight is None else leading(self.weight, channels)
        bias = None if self.bias is None else leading(self.bias, channels)
        together = self.synchronised and self.training and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if together else 1
        limits = self._fused_limits() if self.training and processes == 1 and weight is not None else None
        if limits is not None and bias is not None and not torch.compiler.is_compiling():
            x = batch_norm_relu(x, weight, bias, mean, var, momentum, self.eps, *limits)
        elif processes > 1:
            group = torch.distributed.group.WORLD
            x = self._activate(sync_batch_norm.apply(x, weight, bias, mean, var, self.eps, momentum, group, processes))
        else:
            x = self._activate(F.batch_norm(
                x, mean, var, weight, bias, self.training or self.running_mean is None, momentum, self.eps))
        if self.training and self.augmented and not self.frozen and mean is not None:
            # Autograd saves the statistics of the tiny pass, although it does not use them. It would report a visible
            # write as an error in `backward()` of the sum of both losses; a write to `.data` is invisible to it.
            behind = slice(self.tiny_width, channels)
            self.running_mean.data[behind], self.running_var.data[behind] = mean[behind], var[behind]
        return x

    def _fused_limits(self) -> Optional[Tuple[Optional[float]]]:
        """Return a tuple with the upper limit of the activation that can be fused with the norm. Return None if there
        is no such activation."""
        return None

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _count_batch(self) -> float:
        """Count a batch of the tiny pass and return its weight in the running statistics."""
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if self.since_sort is None:
            return momentum
        self.since_sort += 1
        # Every call in the n-th pass since the sort counts n (n + 1) / 2 times a call in the first pass.
        n = -(-self.since_sort // self.calls)
        before = self.calls * (n - 1) * n * (n + 1) // 6
        this = n * (n + 1) // 2
        mean_weight = this / (before + (self.since_sort - (n - 1) * self.calls) * this)
        if self.momentum is not None and mean_weight <= momentum:
            self.since_sort = None
        return max(mean_weight, momentum)

    def make_elastic(self, tiny: Mapping[str, torch.Size], calls: int) -> None:
        self.tiny_width = next(iter(tiny.values()))[0]
        # Set on the instance: compiled code depends on whether an attribute is found on the instance or on the class.
        self.augmented, self.frozen, self.since_sort, self.calls = False, False, None, calls
        self.update_shapes()

    def update_shapes(self) -> None:
        self.num_features = self.running_mean.shape[0] if self.weight is None else self.weight.shape[0]


@register_elastic(nn.BatchNorm2d)
class ElasticBatchNorm2d(ElasticBatchNorm, nn.BatchNorm2d):
    pass


@register_elastic(nn.BatchNorm1d)
class ElasticBatchNorm1d(ElasticBatchNorm, nn.BatchNorm1d):
    pass


@register_elastic(BatchNormAct2d)
class ElasticBatchNormAct2d(ElasticBatchNorm, BatchNormAct2d):
    def _fused_limits(self) -> Optional[Tuple[Optional[float]]]:
        fused = type(self.act) in FUSED and type(self.drop) is nn.Identity
        return (FUSED[type(self.act)],) if fused else None

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(x))


@register_elastic(LayerScale2d)
class ElasticLayerScale2d(Elastic, LayerScale2d):
    @staticmethod
    def fill(layer: nn.Module, name: str, new: torch.Tensor) -> torch.Tensor:
        return new.fill_(layer.init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = leading(self.gamma, x.shape[1]).view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


@register_elastic(BlurPool2d)
class ElasticBlurPool2d(Elastic, BlurPool2d):
    @staticmethod
    def fill(layer: nn.Module, name: str, new: torch.Tensor) -> torch.Tensor:
        return new.copy_(layer.filt[:1].expand_as(new))  # the filter of every channel is the same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        x = F.pad(x, self.padding, mode=self.pad_mode)
        return F.conv2d(x, self.filt[:channels], stride=self.stride, groups=channels)

    def update_shapes(self) -> None:
        self.channels = self.filt.shape[0]


class _ElasticLinear(Elastic):
    """Linear layer of all features of the input."""

    @staticmethod
    def fill(layer: nn.Module, name: str, new: torch.Tensor) -> torch.Tensor:
        return nn.init.trunc_normal_(new, std=0.02) if name == 'weight' else new.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_channels(self, x.shape[-1])
        # Contiguous, because the strides of the weight decide the order in which autograd sums the weight gradient.
        return F.linear(x, leading(self.weight, self.out_features, x.shape[-1]).contiguous(), self.bias)

    def make_elastic(self, tiny: Mapping[str, torch.Size], calls: int) -> None:
        self.tiny_in = tiny['weight'][1]
        self.update_shapes()

    def update_shapes(self) -> None:
        self.in_features = self.weight.shape[1]


@register_elastic(nn.Linear)
class ElasticLinear(_ElasticLinear, nn.Linear):
    pass


@register_elastic(Linear)
class ElasticTimmLinear(_ElasticLinear, Linear):
    pass


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within the block, keep the stock BatchNorms of a module from updating their running statistics."""
    norms = [m for m in module.modules()
             if isinstance(m, _BatchNorm) and not isinstance(m, Elastic) and m.training and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
