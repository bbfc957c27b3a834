"""The five models are stock timm models of the published size."""
import pytest
import timm
import torch
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch.utils.flop_counter import FlopCounterMode

from conftest import MODELS, images, make

# Parameters and million MACs at the input size, with 1000 classes (the paper's table and the reference's layer tables).
PUBLISHED = {
    'netaug_mbv2_tiny': (750_280, 23.50, 144),
    'netaug_mbv2_035': (1_677_128, 30.87, 160),
    'netaug_mbv3_035': (2_109_840, 19.50, 160),
    'netaug_proxylessnas_035': (1_781_344, 35.72, 160),
    'netaug_mcunet': (737_408, 81.79, 176),
}


@pytest.mark.parametrize('name', MODELS)
def test_published_size(name):
    params, mmacs, size = PUBLISHED[name]
    model = timm.create_model(name).eval()
    assert type(model) is (MobileNetV3 if name == 'netaug_mbv3_035' else EfficientNet)
    assert sum(p.numel() for p in model.parameters()) == params
    assert model.num_classes == 1000
    cfg = model.pretrained_cfg
    assert cfg['input_size'] == (3, size, size)
    assert (cfg['interpolation'], cfg['crop_pct']) == ('bilinear', 0.875)
    assert cfg['mean'] == (0.485, 0.456, 0.406) and cfg['std'] == (0.229, 0.224, 0.225)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(images(1, size)).shape == (1, 1000)
    assert round(counter.get_total_flops() / 2e6, 2) == mmacs


@pytest.mark.parametrize('name', MODELS)
def test_timm_interfaces(name):
    x = images(2, 64)
    model = make(name).eval()
    final, intermediates = model.forward_intermediates(x)
    features = timm.create_model(name, features_only=True).eval()
    assert features.feature_info.channels() == [t.shape[1] for t in features(x)] == [t.shape[1] for t in intermediates]
    assert features.feature_info.reduction() == [2, 4, 8, 16, 32]
    if type(model) is EfficientNet:
        assert final.shape[1] == model.num_features
    model.reset_classifier(7, 'max')
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    other = make(name, num_classes=3, in_chans=1, global_pool='avgmax', drop_rate=0.1, drop_path_rate=0.1, bn_eps=1e-3)
    assert other(x[:, :1]).shape == (2, 3)
    assert all(m.eps == 1e-3 for m in other.modules() if isinstance(m, torch.nn.BatchNorm2d))
    other.set_grad_checkpointing()
    other.train()(x[:, :1]).sum().backward()
    assert other.conv_stem.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('name', MODELS)
def test_torch_export(name):
    model, x = make(name).eval(), images(2, 64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
