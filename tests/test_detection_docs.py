"""The Python blocks of docs/detection.md run as they stand: our detector, and our backbones in other libraries."""
import importlib.util
import re

import pytest
import torch

from conftest import ROOT

BLOCKS = dict(re.findall(r'<!-- ([\w ]+) -->\s*```python\n(.*?)```', (ROOT / 'docs/detection.md').read_text(), re.S))


def test_all_blocks_are_known():
    assert set(BLOCKS) == {'own detector', 'torchvision', 'effdet', 'transformers'}


@pytest.mark.parametrize('name', BLOCKS)
def test_block(name):
    if name in ('effdet', 'transformers') and importlib.util.find_spec(name) is None:
        pytest.skip(f'{name} is not installed')
    torch.manual_seed(0)
    scope = {}
    exec(BLOCKS[name], scope)
    if name == 'own detector':
        assert len(scope['found']['boxes']) and scope['optimizer'].state
