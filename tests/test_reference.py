"""The reference implementation's checkpoints load as they were published."""
import json
import re

import pytest
import timm
import torch

import timm_netaug
from conftest import MODELS, SHARED, images, make
from timm_netaug.card import model_card
from timm_netaug.convert import convert
from timm_netaug.errors import UserError
from timm_netaug.load import load_model

FILES = {
    'netaug_mbv2_tiny': 'tinymbv2',
    'netaug_mbv2_035': 'mbv2-0.35',
    'netaug_mbv3_035': 'mbv3-0.35',
    'netaug_proxylessnas_035': 'proxylessnas-0.35',
    'netaug_mcunet': 'mcunet',
}


def reference_names(model):
    """The reference's name of every tensor of a model, worked out from timm's (the filter goes the other way)."""
    last = len(model.blocks) - 1
    mobilenetv3 = hasattr(model, 'norm_head')
    names = {}
    for key in model.state_dict():
        block = re.match(r'blocks\.(\d+)\.(\d+)\.(.*)\.(\w+)$', key)
        if block:
            stage, index, layer, kind = int(block[1]), int(block[2]), block[3], block[4]
            place = 'backbone.input_stem.op_list.1' if stage == 0 else 'head.op_list.0' if stage == last \
                else f'backbone.stages.{stage - 1}.op_list.{index}'
            convs = {'bn1': ('conv_pw', 'inverted_conv.norm'), 'conv_pw': ('conv_pw', 'inverted_conv.conv'),
                     'bn2': ('', 'depth_conv.norm'), 'conv_dw': ('', 'depth_conv.conv'),
                     'bn3': ('', 'point_conv.norm'), 'conv_pwl': ('', 'point_conv.conv')}
            if stage == 0:
                convs = {'conv_dw': ('', 'depth_conv.conv'), 'bn1': ('', 'depth_conv.norm'),
                         'conv_pw': ('', 'point_conv.conv'), 'bn2': ('', 'point_conv.norm')}
            convs.update({'se.conv_reduce': ('', 'se_layer.reduce_conv'),
                          'se.conv_expand': ('', 'se_layer.expand_conv')})
            if mobilenetv3 and stage == last:
                names[key] = f'{place}.{"conv" if layer == "conv" else "norm"}.{kind}'
            else:
                names[key] = f'{place}.conv.{convs[layer][1]}.{kind}'
        else:
            layer, kind = key.rsplit('.', 1)
            classifier = 3 if mobilenetv3 or 'conv_head.weight' in model.state_dict() else 2
            names[key] = {
                'conv_stem': 'backbone.input_stem.op_list.0.conv', 'bn1': 'backbone.input_stem.op_list.0.norm',
                'conv_head': f'head.op_list.{2 if mobilenetv3 else 1}.conv', 'bn2': 'head.op_list.1.norm',
                'classifier': f'head.op_list.{classifier}.linear',
            }[layer] + f'.{kind}'
    return names


@pytest.mark.parametrize('name', MODELS)
def test_published_checkpoint_loads(name, tmp_path):
    source = make(name, num_classes=5).eval()
    names = reference_names(source)
    file = tmp_path / 'official.pth'
    torch.save({'state_dict': {names[k]: v for k, v in source.state_dict().items()}}, file)
    overlay = dict(file=str(file), num_classes=5)
    model = timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    x = images(2)
    assert torch.equal(model(x), source(x))
    # another number of classes keeps all but the classifier
    other = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(other.forward_features(x), source.forward_features(x)) and other(x).shape == (2, 3)


def older_names(model):
    """The name of every tensor of a model in an older file of the authors, worked out from timm's."""
    numbers = [f'{i}.{j}' for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    names = {}
    for key in model.state_dict():
        block = re.match(r'blocks\.(\d+\.\d+)\.(.*)\.(\w+)$', key)
        if not block:
            layer, kind = key.rsplit('.', 1)
            names[key] = {'conv_stem': 'first_conv.conv', 'bn1': 'first_conv.bn', 'classifier': 'classifier.linear',
                          'conv_head': 'feature_mix_layer.conv', 'bn2': 'feature_mix_layer.bn'}[layer] + f'.{kind}'
            continue
        layers = ['inverted_bottleneck', 'depth_conv', 'point_linear'][numbers.index(block[1]) == 0:]
        convs = ['conv_pw', 'conv_dw', 'conv_pwl'] if len(layers) == 3 else ['conv_dw', 'conv_pw']
        place = convs.index(block[2]) if block[2] in convs else int(block[2][-1]) - 1
        part = 'conv' if block[2] in convs else 'bn'
        names[key] = f'blocks.{numbers.index(block[1])}.mobile_inverted_conv.{layers[place]}.{part}.{block[3]}'
    return names


@pytest.mark.parametrize('name', ['netaug_mcunet', 'netaug_proxylessnas_035'])
def test_older_file_loads(name, tmp_path):
    """Its weights, and the normalisation that belongs to them, whichever way it is read."""
    source = make(name, num_classes=5).eval()
    names = older_names(source)
    file, out = tmp_path / 'older.pth', tmp_path / 'out'
    weights = {names[k]: v for k, v in source.state_dict().items()}
    torch.save({'state_dict': weights}, file)
    convert(str(file), out, name)
    overlay = dict(file=str(file), num_classes=5)
    extractor = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    x = images(2)
    for model in (
            timm.create_model(f'local-dir:{out}', pretrained=True).eval(),
            load_model(str(file), name).model,
            timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval(),
    ):
        assert torch.equal(model(x), source(x))
        data_config = timm.data.resolve_model_data_config(model)
        assert tuple(data_config['mean']) == tuple(data_config['std']) == (0.5, 0.5, 0.5)
    assert torch.equal(extractor(x)[0], source.forward_intermediates(x, intermediates_only=True)[0])
    assert extractor.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)
    assert 'mean 0.5 0.5 0.5, std 0.5 0.5 0.5' in model_card(source, json.loads((out / 'config.json').read_text()), 'a/b')
    # The registered model keeps ImageNet's normalisation, and another model is refused.
    assert timm.create_model(name).pretrained_cfg['mean'] != (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match='does not fit netaug_mbv2_tiny: unmatched keys'):
        load_model(str(file), 'netaug_mbv2_tiny')


def test_own_names_pass():
    model = make('netaug_mcunet')
    state_dict = model.state_dict()
    assert timm_netaug.checkpoint_filter_fn(state_dict, model) is state_dict


def test_wrong_model_is_named(tmp_path):
    mcunet = make('netaug_mcunet')
    names = reference_names(mcunet)
    state_dict = {names[k]: v for k, v in mcunet.state_dict().items()}
    with pytest.raises(ValueError, match='does not fit netaug_mbv2_tiny: unmatched keys .*op_list'):
        timm_netaug.checkpoint_filter_fn(state_dict, make('netaug_mbv2_tiny'))
    with pytest.raises(ValueError, match='not in the file classifier.bias'):
        timm_netaug.checkpoint_filter_fn({k: v for k, v in state_dict.items() if 'linear.bias' not in k}, mcunet)


@pytest.mark.skipif(not (SHARED / 'official_format').is_dir(), reason='the parity data is not part of the project')
@pytest.mark.parametrize('name', MODELS)
def test_parity(name):
    from safetensors.torch import load_file
    folder = SHARED / 'official_format'
    overlay = dict(file=str(folder / f'{FILES[name]}.pth'), num_classes=10)
    model = timm.create_model(name, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay).eval()
    assert set(reference_names(model).values()) == set(torch.load(overlay['file'], weights_only=True)['state_dict'])
    stored = load_file(folder / f'{FILES[name]}.io.safetensors')
    with torch.no_grad():
        # 1e-6: convolution kernels, and so the order of summation, are chosen by the machine
        torch.testing.assert_close(model(stored['input']), stored['logits'], rtol=0, atol=1e-6)
