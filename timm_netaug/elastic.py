"""Elastic layers: stock layers over larger tensors, of which a forward pass uses the leading slice.

A layer reads as many channels as its input has; only a dense convolution has to be told how many to write
(`active_out`). So the widths of a whole network are set at its convolutions, and every other layer follows.
"""
from contextlib import nullcontext
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, LayerScale2d, Linear
from torch.nn.modules._functions import SyncBatchNorm as sync_batch_norm
from torch.utils.checkpoint import checkpoint

from .norm_act import FUSED, batch_norm_relu

__all__ = [
    'ELASTIC', 'STATE', 'STOCK', 'CheckpointedBlocks', 'ElasticConv2d', 'ElasticDepthwiseConv2d',
    'ElasticBatchNormAct2d', 'ElasticLayerScale2d', 'ElasticLinear',
]

# Attributes that elastic layers have and stock ones have not; the first two are those of a forward pass.
STATE = ('active_out', 'augmented', 'frozen', 'since_sort', 'synchronised', 'tiny_width')


class ElasticConv2d(nn.Conv2d):
    """Dense convolution, from as many input channels as there are to the first `active_out` output channels."""
    active_out: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight[:self.active_out, :x.shape[1]]
        bias = None if self.bias is None else self.bias[:self.active_out]
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def fit(self) -> None:
        """Let the attributes of the layer follow the shapes of its tensors."""
        self.out_channels, self.in_channels = self.weight.shape[:2]


class ElasticDepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of as many channels as there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        bias = None if self.bias is None else self.bias[:channels]
        return F.conv2d(x, self.weight[:channels], bias, self.stride, self.padding, self.dilation, groups=channels)

    def fit(self) -> None:
        self.out_channels = self.in_channels = self.groups = self.weight.shape[0]


class ElasticBatchNormAct2d(BatchNormAct2d):
    """BatchNorm and activation of as many channels as there are.

    In training, the running statistics of the tiny slice are written by the tiny pass alone, as the augmented
    sub-networks see other inputs; an augmented pass writes those of the channels behind it, so that they are at hand
    when a sort brings these channels into the slice. After a sort the tiny network is another function, so its
    statistics start anew: a mean of the batches since the sort, the later ones weighing more as the weights still move,
    until it is as long as the moving average.

    Attributes:
        tiny_width: Channels of the tiny slice.
        augmented: Whether the network is within an augmented pass.
        frozen: Whether running statistics are left as they are, in a pass that has been made before.
        since_sort: Tiny training batches since the last sort, None once that no longer matters.
        synchronised: Whether a training batch is that of all processes together.
    """
    tiny_width: int
    augmented = False
    frozen = False
    since_sort = None
    synchronised = False

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
        weight = None if self.weight is None else self.weight[:channels]
        bias = None if self.bias is None else self.bias[:channels]
        together = self.synchronised and self.training and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if together else 1
        fused = (
            self.training and processes == 1 and weight is not None and bias is not None
            and type(self.act) in FUSED and type(self.drop) is nn.Identity and not torch.compiler.is_compiling())
        if fused:
            x = batch_norm_relu(x, weight, bias, mean, var, momentum, self.eps, FUSED[type(self.act)])
        elif processes > 1:
            group = torch.distributed.group.WORLD
            x = sync_batch_norm.apply(x, weight, bias, mean, var, self.eps, momentum, group, processes)
        else:
            x = F.batch_norm(
                x, mean, var, weight, bias, self.training or self.running_mean is None, momentum, self.eps)
        if self.training and self.augmented and not self.frozen and mean is not None:
            # Autograd keeps the tiny pass's statistics without using them, and would take a visible write for an
            # error when the two losses are summed before `backward()`; `.data` makes it an invisible one.
            behind = slice(self.tiny_width, channels)
            self.running_mean.data[behind], self.running_var.data[behind] = mean[behind], var[behind]
        return x if fused else self.act(self.drop(x))

    def _count_batch(self) -> float:
        """Count a batch of the tiny pass and return its weight in the running statistics."""
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if self.since_sort is None:
            return momentum
        self.since_sort += 1
        mean_weight = 3.0 / (self.since_sort + 2)  # the n-th batch since the sort counts n (n + 1) / 2 times the first
        if self.momentum is not None and mean_weight <= momentum:
            self.since_sort = None
        return max(mean_weight, momentum)

    def fit(self) -> None:
        self.num_features = self.running_mean.shape[0] if self.weight is None else self.weight.shape[0]


class ElasticLayerScale2d(LayerScale2d):
    """LayerScale of as many channels as there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma[:x.shape[1]].view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma

    def fit(self) -> None:
        pass  # its tensor is all that it knows of its width


class _ElasticLinear:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Contiguous, because autograd chooses the order of the weight gradient's sums by the strides of the weight.
        return F.linear(x, self.weight[:, :x.shape[-1]].contiguous(), self.bias)

    def fit(self) -> None:
        self.in_features = self.weight.shape[1]


class ElasticLinear(_ElasticLinear, nn.Linear):
    """Classifier that reads as many features as there are."""


class ElasticTimmLinear(_ElasticLinear, Linear):
    """The same for timm's subclass of `nn.Linear`."""


class CheckpointedBlocks(nn.Sequential):
    """Stages of blocks whose activations are computed again in the backward pass (gradient checkpointing).

    By then the network may have other widths than in the forward pass, so those are brought back for the block. The
    second time, BatchNorm's running statistics are left alone.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self:
            for block in stage:
                x = checkpoint(
                    block, x, use_reentrant=False, context_fn=lambda block=block: (nullcontext(), _Again(block)))
        return x


class _Again:
    """The context of a block's repeated forward pass, which is as the block is now."""

    def __init__(self, block: nn.Module):
        now = [(m, {k: getattr(m, k) for k in STATE[:2] if hasattr(m, k)}) for m in block.modules()]
        self.now = [(m, {**state, 'frozen': True} if 'augmented' in state else state) for m, state in now if state]

    def __enter__(self) -> None:
        self.before = [(m, {k: getattr(m, k) for k in state}) for m, state in self.now]
        for m, state in self.now:
            vars(m).update(state)

    def __exit__(self, *exc: Any) -> None:
        for m, state in self.before:
            vars(m).update(state)


# The role of a layer in its network (see `layout.Layout`) and its exact stock type -> its elastic type.
ELASTIC: Dict[Tuple[str, type], type] = {
    ('conv', nn.Conv2d): ElasticConv2d,
    ('depthwise', nn.Conv2d): ElasticDepthwiseConv2d,
    ('norm', BatchNormAct2d): ElasticBatchNormAct2d,
    ('scale', LayerScale2d): ElasticLayerScale2d,
    ('linear', nn.Linear): ElasticLinear,
    ('linear', Linear): ElasticTimmLinear,
}
STOCK: Dict[type, type] = {elastic: stock for (_, stock), elastic in ELASTIC.items()}
