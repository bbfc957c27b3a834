"""The configuration is validated, frozen, and plain data on the outside."""
import dataclasses
import json

import pytest

from timm_netaug import NetAugConfig


@pytest.mark.parametrize('fields', [
    dict(width_mults=()), dict(width_mults=(0.5, 1.0)), dict(width_mults='2'), dict(expand_mults=(1.0, float('nan'))),
    dict(expand_mults=3.0), dict(divisor=0), dict(divisor=8.0), dict(divisor=True), dict(alpha=-1), dict(alpha='1'),
    dict(stop_width_at=1.1), dict(stop_width_at=-0.1), dict(sort=1), dict(depth_mults=(1.0,)),
])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        NetAugConfig.from_dict(fields)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetAugConfig().alpha = 2


@pytest.mark.parametrize('name, widths', [
    ('netaug_mbv2_tiny', [1, 1.8, 2.6]), ('netaug_mbv2_035', [1, 1.8, 2.6]), ('netaug_mbv3_035', [1, 2, 3]),
    ('netaug_proxylessnas_035', [1, 1.8, 2.6]), ('netaug_mcunet', [1, 1.6, 2.2]), ('mobilenetv2_100', [1, 1.8, 2.6]),
])
def test_defaults_and_plain_data(name, widths):
    config = NetAugConfig(alpha=0.5).resolve(name)
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain['width_mults'] == widths and plain['expand_mults'] == [1, 1.6, 2.2, 2.8]
    assert (plain['divisor'], plain['alpha'], plain['stop_width_at'], plain['sort']) == (1, 0.5, 0.5, True)
    assert NetAugConfig.from_dict(plain) == config
    assert NetAugConfig(width_mults=[1, 4]).resolve(name).width_mults == (1.0, 4.0)
