"""The five models are stock timm models of the published size."""
import copy

import pytest
import timm
import torch
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features
from torch.utils.flop_counter import FlopCounterMode

from conftest import MODELS, images, make
from test_reference import reference_names
from timm_netaug.io.folder import export_folder
from timm_netaug.io.run import RunDescription

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


def assert_equal_features(got, want):
    got = list(got.values()) if isinstance(got, dict) else got
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))


def stages(model):
    """The stages after which the five feature maps are taken."""
    return [model.blocks[i] for i in (0, 1, 2, 4, 6)]


@pytest.mark.parametrize('name', [*MODELS, *timm.list_models('netaug_*', pretrained=True)])
def test_default_cfg(name):
    """What the config of an architecture, or of a tag, says of the model is true."""
    model = timm.create_model(name).eval()
    cfg, state_dict = model.default_cfg, model.state_dict()
    channels, *size = cfg['input_size']
    assert cfg['fixed_input_size'] is False and cfg['paper_ids'] == 'arXiv:2110.08890'
    assert state_dict[cfg['first_conv'] + '.weight'].shape[1] == channels
    assert state_dict[cfg['classifier'] + '.weight'].shape == (cfg['num_classes'], model.head_hidden_size)
    assert model.num_classes == cfg['num_classes']
    x = torch.randn(1, channels, *size)
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, '')
    for unpooled in (model, timm.create_model(name, num_classes=0, global_pool='').eval()):
        assert unpooled(x).shape == (1, model.head_hidden_size, *cfg['pool_size'])


@pytest.mark.parametrize('name', MODELS)
def test_kind_of_features(name):
    """As in timm's two families, `features_only` is the family's own extractor, and `feature_cls` asks for another."""
    own = MobileNetV3Features if name == 'netaug_mbv3_035' else EfficientNetFeatures
    model = timm.create_model(name, features_only=True)
    assert type(model) is own and not hasattr(model, 'classifier')
    assert 'num_classes' not in model.default_cfg and model.default_cfg['first_conv'] == 'conv_stem'
    kinds = {k: type(timm.create_model(name, features_only=True, feature_cls=k)).__name__
             for k in ('getter', 'list', 'dict', 'hook', 'fx')}
    assert kinds == dict(getter='FeatureGetterNet', list='FeatureListNet', dict='FeatureDictNet',
                         hook='FeatureHookNet', fx='FeatureGraphNet')
    given = timm.create_model(name, features_only=True, feature_cfg=dict(feature_cls='getter'))
    assert type(given).__name__ == 'FeatureGetterNet'


@pytest.mark.parametrize('kind', ['own', 'getter', 'list', 'dict', 'hook', 'fx'])
@pytest.mark.parametrize('name', MODELS)
def test_features_of_trained_weights(name, kind, tmp_path):
    """They are the whole model's with the same weights: bundled ones, a folder's, and a reference checkpoint's."""
    x = images(2, 64)
    kwargs = dict(pretrained=True, features_only=True, **({} if kind == 'own' else dict(feature_cls=kind)))
    bundled = timm.create_model(name, pretrained=True).eval()
    want = bundled.forward_intermediates(x, intermediates_only=True)
    assert_equal_features(timm.create_model(name, **kwargs).eval()(x), want)
    export_folder(bundled, tmp_path / 'folder', RunDescription.from_model(bundled, dict(input_size=(3, 64, 64))))
    assert_equal_features(timm.create_model(f'local-dir:{tmp_path / "folder"}', **kwargs).eval()(x), want)
    names = reference_names(bundled)
    torch.save({'state_dict': {names[k]: v for k, v in bundled.state_dict().items()}}, tmp_path / 'official.pth')
    overlay = dict(file=str(tmp_path / 'official.pth'), num_classes=10)
    assert_equal_features(timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs).eval()(x), want)


def test_features_of_another_model(tmp_path):
    mcunet = make('netaug_mcunet')
    names = reference_names(mcunet)
    torch.save({'state_dict': {names[k]: v for k, v in mcunet.state_dict().items()}}, tmp_path / 'official.pth')
    with pytest.raises(ValueError, match='does not fit netaug_mbv2_tiny: unmatched keys .*op_list'):
        timm.create_model('netaug_mbv2_tiny', pretrained=True, features_only=True,
                          pretrained_cfg_overlay=dict(file=str(tmp_path / 'official.pth'), num_classes=10))


@pytest.mark.parametrize('name', MODELS)
def test_out_indices_of_features(name):
    x, kwargs = images(2, 64), dict(pretrained=True, features_only=True)
    whole = timm.create_model(name, **kwargs).eval()(x)
    for indices in ((1, 3), (-1,), (0, 2, 4)):
        model = timm.create_model(name, out_indices=indices, **kwargs).eval()
        assert_equal_features(model(x), [whole[i] for i in indices])
        assert model.feature_info.channels() == [whole[i].shape[1] for i in indices]
        assert model.feature_info.reduction() == [64 // whole[i].shape[-1] for i in indices]


@pytest.mark.parametrize('stride', [8, 16])
@pytest.mark.parametrize('name', MODELS)
def test_output_stride_of_features(name, stride):
    """Later stages keep the size, with dilated kernels of the same weights."""
    model = timm.create_model(name, pretrained=True, features_only=True, output_stride=stride).eval()
    usual = timm.create_model(name, pretrained=True, features_only=True).eval()
    want = [min(s, stride) for s in (2, 4, 8, 16, 32)]
    x = images(1, 64)
    features = model(x)
    assert model.feature_info.reduction() == want == [64 // t.shape[-1] for t in features]
    assert all(torch.equal(t, usual.state_dict()[k]) for k, t in model.state_dict().items())
    unchanged = want.index(stride) + 1
    assert_equal_features(features[:unchanged], usual(x)[:unchanged])


@pytest.mark.parametrize('name', MODELS)
def test_grad_checkpointing_of_features(name):
    """Features and gradients are the same to the last bit, and the blocks are computed again in the backward pass."""
    plain = timm.create_model(name, pretrained=True, features_only=True)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    off = copy.deepcopy(saving)
    off.set_grad_checkpointing(False)
    results, computed = [], []
    for model in (plain, saving, off):
        calls = []
        model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        features = model.train()(images(2, 64))
        sum(t.square().mean() for t in features).backward()
        results.append([*features, *(p.grad for p in model.parameters())])
        computed.append(len(calls))
    assert computed == [1, 2, 1]
    assert all(p.grad.abs().sum() > 0 for p in (saving.conv_stem.weight, saving.blocks[-1][0].bn1.bias))
    assert_equal_features(results[1], results[0])
    assert_equal_features(results[2], results[0])


@pytest.mark.parametrize('name', MODELS)
def test_location_of_features(name):
    """`expansion` means the widest maps of a stage's last block, before its projection; `bottleneck` its output."""
    x, kwargs = images(2, 64), dict(pretrained=True, features_only=True)
    model = timm.create_model(name, pretrained=True).eval()
    want = []
    for stage in stages(model):
        block = stage[-1]
        if hasattr(block, 'conv'):  # a plain convolution expands and does not project
            block.bn1.register_forward_hook(lambda module, inputs, output: want.append(output))
        else:
            projection = block.conv_pwl if hasattr(block, 'conv_pwl') else block.conv_pw
            projection.register_forward_pre_hook(lambda module, inputs: want.append(inputs[0]))
    model(x)
    expansion = timm.create_model(name, feature_location='expansion', **kwargs).eval()
    assert_equal_features(expansion(x), want)
    assert expansion.feature_info.channels() == [t.shape[1] for t in want]
    bottleneck = timm.create_model(name, feature_location='bottleneck', **kwargs).eval()
    assert_equal_features(bottleneck(x), model.forward_intermediates(x, intermediates_only=True))
    assert [t.shape[1] for t in bottleneck(x)] != [t.shape[1] for t in want]


@pytest.mark.parametrize('name', MODELS)
def test_pool_size_of_an_exported_folder(name, tmp_path):
    """It fits the input size of the run, which is not the registered one."""
    model = timm.create_model(name)
    export_folder(model, tmp_path, RunDescription.from_model(model, dict(input_size=(3, 96, 33))))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.pretrained_cfg['input_size'] == (3, 96, 33)
    assert tuple(again.pretrained_cfg['pool_size']) == (3, 2)
    assert again.forward_features(torch.randn(1, 3, 96, 33)).shape[2:] == (3, 2)


def test_no_pool_size_by_guess(tmp_path):
    """The stride of a model without padding does not say the size of its last map."""
    model = timm.create_model('test_efficientnet')
    model.pretrained_cfg['pool_size'] = (4, 4)  # of 160 pixels, where the stride of 32 says 5
    export_folder(model, tmp_path, RunDescription.from_model(model, dict(input_size=(3, 96, 96))))
    assert timm.create_model(f'local-dir:{tmp_path}').pretrained_cfg['pool_size'] is None


@pytest.mark.parametrize('name', MODELS)
def test_torch_export(name):
    model, x = make(name).eval(), images(2, 64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
