"""The recipes of detection: as generated, accepted as they are, and of the paper's batch and epochs."""
import importlib.util
import re

import pytest
import yaml

from conftest import ROOT
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_detection import _check_args, train_detection_parser

FOLDER = ROOT / 'hfconfigs'
RECIPES = sorted(p.parent.name for p in FOLDER.glob('*/train_detection.yaml'))
PAPER = {'voc': (64, 200), 'coco': (128, 120)}  # images of an update, epochs


def test_as_generated():
    spec = importlib.util.spec_from_file_location('make_detection_recipes', FOLDER / 'make_detection_recipes.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {r: (FOLDER / r / 'train_detection.yaml').read_text() for r in RECIPES} == module.recipes()


@pytest.mark.parametrize('recipe', RECIPES)
def test_accepted(recipe, monkeypatch):
    """Every key is a flag by its own name; what the paper does not tell is marked as ours."""
    pytest.importorskip('faster_coco_eval')
    parser, text = train_detection_parser(), (FOLDER / recipe / 'train_detection.yaml').read_text()
    assert set(yaml.safe_load(text)) <= {a.dest for a in parser._actions}
    assert all(len(line) <= 120 for line in text.splitlines()) and 'not yet run here' in text.splitlines()[0]
    monkeypatch.chdir(ROOT)
    command = re.search(r'^#   python train_detection.py (.*)\\\n#     (.*)$', text, re.M)
    args = parse_args(parser, f'{command[1]} {command[2]}'.split())
    _check_args(args)
    assert (args.batch_size, args.epochs) == PAPER[recipe.rpartition('_')[2]]
    assert args.experiment == recipe and args.model == recipe.split('.')[0] and args.data_dir == 'DATA'
    for key in ('img_size', 'opt', 'lr', 'hflip', 'crop_prob'):
        assert re.search(rf'^{key}: .*  # ours', text, re.M)
