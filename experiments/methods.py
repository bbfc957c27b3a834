"""Methods of training in pictures: the name and the colour of each, as they follow from the flags of `train.py`."""
import sys
from pathlib import Path
from typing import Any, Dict, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from timm_netaug.cli.style import (  # noqa: E402
    BLACK, BLUE, BROWN, GREEN, GREY, ORANGE, PURPLE, SKY_BLUE, VERMILION)


class Method(NamedTuple):
    """A method of training, with its name and colour in pictures."""
    name: str
    colour: str


METHODS: Dict[str, Method] = {
    'plain': Method('plain training', BLACK),
    'plain-timm-init': Method("plain training, timm's initial weights", GREY),
    'regularised': Method('regularised training', BROWN),
    'teacher': Method('plain training with a teacher', ORANGE),
    'stage': Method('NetAug, expansions from {stage}', GREEN),
    'stage-widths': Method('NetAug, widths and expansions from {stage}', SKY_BLUE),
    'expansions': Method('NetAug, expansions alone', BLUE),
    'widths': Method("NetAug, the paper's schedule", VERMILION),
    'distillation': Method('NetAug with in-situ distillation', PURPLE),
}


# Flags that regularise a training, by their names in `train.py`.
_REGULARISERS = ('aa', 'cutmix', 'cutmix_minmax', 'drop', 'drop_block', 'drop_connect', 'drop_path', 'mixup', 'reprob')


def augments_widths(flags: Dict[str, Any]) -> bool:
    """Return whether a training augments widths, in its first epochs at least."""
    mults = list(flags.get('netaug_width_mults') or [])
    return bool(flags.get('netaug')) and flags.get('netaug_stop_width_at') != 0 and mults != [1]


def method_of(flags: Dict[str, Any]) -> str:
    """Return the key in `METHODS` of a training, by its flags of `train.py` (underscores for hyphens)."""
    if not flags.get('netaug'):
        if flags.get('kd_model_name'):
            return 'teacher'
        if any(flags.get(name) for name in _REGULARISERS):
            return 'regularised'
        given = ('netaug_init', 'pretrained', 'pretrained_path', 'initial_checkpoint')
        return 'plain' if any(flags.get(name) for name in given) else 'plain-timm-init'
    if flags.get('netaug_distill'):
        return 'distillation'
    if flags.get('netaug_from_stage', 0) in (0, '0'):
        return 'widths' if augments_widths(flags) else 'expansions'
    return 'stage-widths' if augments_widths(flags) else 'stage'


def method_name(flags: Dict[str, Any]) -> str:
    """Return the name of a training's method, by its flags as in `method_of`."""
    stage = str(flags.get('netaug_from_stage'))
    return METHODS[method_of(flags)].name.format(stage=f'stage {stage}' if stage.isdigit() else stage)
