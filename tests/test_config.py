"""The configurations are validated, frozen, and plain data on the outside."""
import dataclasses
import json

import pytest

from timm_netaug import NetAugConfig, NetAugTraining
from timm_netaug.config import split_fields


@pytest.mark.parametrize('fields', [
    dict(width_mults=()), dict(width_mults=(0.5, 1.0)), dict(width_mults='2'), dict(expand_mults=(1.0, float('nan'))),
    dict(expand_mults=3.0), dict(divisor=0), dict(divisor=8.0), dict(divisor=True), dict(alpha=-1), dict(alpha='1'),
    dict(stop_width_at=1.1), dict(stop_width_at=-0.1), dict(sort=1), dict(depth_mults=(1.0,)), dict(every=0),
    dict(batch_fraction=0), dict(distill=-0.1),
])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        split_fields(fields)


@pytest.mark.parametrize('kind, fields, other', [
    (NetAugConfig, dict(alpha=7), 'NetAugTraining'), (NetAugTraining, dict(divisor=8), 'NetAugConfig')])
def test_a_field_of_the_other_configuration(kind, fields, other):
    """What one of them does not use, it refuses, and names the one that does."""
    with pytest.raises(ValueError, match=f'{kind.__name__} has no field .* is a field of {other}'):
        kind.from_dict(fields)
    with pytest.raises(TypeError):
        kind(**fields)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetAugConfig().divisor = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetAugTraining().alpha = 2


@pytest.mark.parametrize('name, widths', [
    ('netaug_mbv2_tiny', [1, 1.8, 2.6]), ('netaug_mbv2_035', [1, 1.8, 2.6]), ('netaug_mbv3_035', [1, 2, 3]),
    ('netaug_proxylessnas_035', [1, 1.8, 2.6]), ('netaug_mcunet', [1, 1.6, 2.2]), ('mobilenetv2_100', [1, 1.8, 2.6]),
])
def test_defaults_and_plain_data(name, widths):
    config, training = NetAugConfig().resolve(name), NetAugTraining(alpha=0.5)
    plain = json.loads(json.dumps({**config.to_dict(), **training.to_dict()}))
    assert plain['width_mults'] == widths and plain['expand_mults'] == [1, 1.6, 2.2, 2.8]
    assert (plain['divisor'], plain['alpha'], plain['stop_width_at'], plain['sort']) == (1, 0.5, 0.5, True)
    assert split_fields(plain) == (config, training)
    assert NetAugConfig(width_mults=[1, 4]).resolve(name).width_mults == (1.0, 4.0)
