"""BatchNorm and ReLU in one: values, gradients and statistics of PyTorch's own two, with less in memory."""
import copy

import pytest
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d

from conftest import generator
from timm_netaug.fused_bn_relu import FUSED, batch_norm_relu

SHAPES = [(4, 8, 5, 5), (2, 3, 1, 1), (3, 16, 7, 9)]


def two(act, channels, dtype=torch.float32):
    """The stock layer and its fused double."""
    torch.manual_seed(0)
    norm = BatchNormAct2d(channels, act_layer=act, inplace=True).train().to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 3)
        norm.bias.normal_()
    other = copy.deepcopy(norm)

    def fused(x):
        return batch_norm_relu(x, other.weight, other.bias, other.running_mean, other.running_var, 0.1, other.eps,
                               FUSED[act])

    return norm, other, fused


@pytest.mark.parametrize('act', FUSED)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('amp', [False, True])
def test_bit_equal(act, shape, format, dtype, amp):
    norm, other, fused = two(act, shape[1], torch.float32 if amp else dtype)
    x = (3 * torch.randn(shape, generator=generator())).to(dtype).contiguous(memory_format=format)
    grad = torch.randn(shape, generator=generator(1)).to(dtype).contiguous(memory_format=format)
    got = []
    for function, module in ((norm, norm), (fused, other)):
        leaf = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            y = function(leaf)
        y.backward(grad.to(y.dtype))
        got.append([y.detach(), leaf.grad, module.weight.grad, module.bias.grad, module.running_mean,
                    module.running_var])
    assert got[0][0].eq(0).any() and got[0][0].gt(0).any()
    for one, two_ in zip(*got):
        assert one.dtype == two_.dtype and torch.equal(one, two_)
    assert got[0][0].is_contiguous(memory_format=format) == got[1][0].is_contiguous(memory_format=format)


@pytest.mark.parametrize('act', FUSED)
def test_second_order(act):
    """An optimizer that differentiates the gradient gets what it would get from the two."""
    norm, other, fused = two(act, 4)
    x = torch.randn(3, 4, 5, 5, generator=generator())
    got = []
    for function, module in ((norm, norm), (fused, other)):
        leaf = x.clone().requires_grad_()
        inputs = (leaf, module.weight, module.bias)
        first = torch.autograd.grad(function(leaf).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        got.append([*first, *second])
    for one, two_ in zip(*got):
        torch.testing.assert_close(one, two_, rtol=1e-4, atol=1e-5)  # other kernels, which sum in another order


def saved_bytes(function, x):
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x * 1)
        z = nn.functional.conv2d(y, torch.ones(8, 8, 1, 1, requires_grad=True))
        assert z.requires_grad
    return sum(storages.values())


def test_keeps_one_tensor_less():
    norm, _, fused = two(nn.ReLU6, 8)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    size = x.numel() * x.element_size()
    assert saved_bytes(norm, x) >= 3 * size and saved_bytes(fused, x) < 2.2 * size


def test_one_value_per_channel_is_refused_as_by_pytorch():
    """It has no variance: PyTorch raises an error, where the kernel gives NaN statistics."""
    norm = BatchNormAct2d(4, act_layer=nn.ReLU)
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match='more than 1 value per channel') as want:
        norm(x)
    with pytest.raises(ValueError) as got:
        batch_norm_relu(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, 0.1, 1e-5, None)
    assert str(got.value) == str(want.value)
