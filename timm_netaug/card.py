"""The model card of a Hub repository, filled from the facts in its `config.json`. Unknown facts are left out."""
import re
import shlex
from typing import Any, Container, Dict, List, Mapping

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData

from .costs import MEMORY_MODEL
from .deploy.report import card_section
from .info import describe

__all__ = ['CITATION', 'METRICS', 'known_facts', 'model_card', 'needs', 'shell_block']

_FACTS = dict(about=str, command=list, processes=int, evaluated_with=list, epoch=int, epochs=int, metrics=dict,
              images=int, dataset=str, dataset_terms=str, converted_from=str, netaug=bool, deployed=dict, baseline=dict,
              baseline_about=str, split=str, license=str)
METRICS = {
    'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy', 'map': 'Mean average precision', 'micro_f1': 'F1 (micro)',
    'macro_f1': 'F1 (macro)', 'sample_f1': 'F1 (samples)',
}
_METRIC_TYPES = {'top1': 'accuracy', 'top5': 'accuracy', 'map': 'mean_average_precision'}  # the Hub's names
CITATION = """@inproceedings{cai2022netaug,
  title={Network Augmentation for Tiny Deep Learning},
  author={Cai, Han and Gan, Chuang and Lin, Ji and Han, Song},
  booktitle={International Conference on Learning Representations},
  year={2022}
}"""


def known_facts(config: Mapping[str, Any], known_metrics: Container[str] = METRICS) -> Dict[str, Any]:
    """Return the facts that a `config.json` has about a training, without unknown keys and values of the wrong type.

    Args:
        known_metrics: Names of the metrics to keep.
    """
    facts = config.get('timm_netaug')
    facts = {k: v for k, v in facts.items() if isinstance(v, _FACTS.get(k, ()))} if isinstance(facts, dict) else {}
    for key in ('command', 'evaluated_with'):
        if key in facts:
            facts[key] = [str(word) for word in facts[key]]
    for key in ('metrics', 'baseline'):
        if key in facts:
            facts[key] = {k: v for k, v in facts[key].items() if k in known_metrics and isinstance(v, (int, float))}
    return facts


def _front_matter(name: str, config: Mapping[str, Any], facts: Mapping[str, Any], with_netaug: bool) -> str:
    dataset, split = facts.get('dataset'), (facts.get('evaluated_with') or [None])[-1]
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset or 'imagefolder',
            dataset_name=dataset or 'image folder',
            dataset_split=split,
            metric_type=_METRIC_TYPES.get(key, 'f1'),
            metric_name=METRICS[key],
            metric_value=round(value, 4),
        )
        for key, value in facts.get('metrics', {}).items()
    ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'tinyml', *(['netaug'] if with_netaug else [])],
        license=(config.get('pretrained_cfg') or {}).get('license'),
        datasets=[dataset] if dataset and re.fullmatch(r'[\w.-]+(/[\w.-]+)?', dataset) else None,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def needs(train: str, validate: str) -> str:
    """Say what the lines of a card need; both scripts are named on it."""
    return ('These lines need the package `timm_netaug`: `pip install -e .` in the folder of its source, which also has'
            f' `{train}` and `{validate}`.')


def model_card(model: nn.Module, config: Mapping[str, Any], repo: str) -> str:
    """Write the card of a model.

    Args:
        config: Contents of its `config.json`.
        repo: OWNER/NAME, or OWNER/NAME@REVISION.
    """
    facts, cfg = known_facts(config), config['pretrained_cfg']
    command = facts.get('command', [])
    with_netaug = '--netaug' in command or ('converted_from' in facts and facts.get('netaug', True))
    name = repo.partition('@')[0].rpartition('/')[2]
    info = describe(model, cfg['input_size'], samples=1)
    size = ' x '.join(map(str, info['input_size']))
    summary = f'`{config["architecture"]}` for {info["num_classes"]} classes and images of {size}'
    if with_netaug:
        summary += ', trained with [Network Augmentation](https://arxiv.org/abs/2110.08890)'
    if 'converted_from' in facts:
        summary += f"; the weights are those of the authors' file `{facts['converted_from']}`"
    parts = [
        f'---\n{_front_matter(name, config, facts, with_netaug)}\n---\n\n# {name}\n\n{summary}.',
        *filter(None, [facts.get('about')]),
        f"""## Use

{needs('train.py', 'validate.py')}

```python
import timm
import timm_netaug  # registers the netaug_* names; without it, timm says "Unknown model"

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`transform` makes the input as in validation: {size}, mean {_numbers(cfg['mean'])}, std {_numbers(cfg['std'])},
{cfg['interpolation']}, crop {cfg['crop_pct']:g} ({cfg['crop_mode']}).""",
        f"""## Size

| | |
|---|---|
| parameters | {info['parameters']:,} |
| MACs | {info['macs'] / 1e6:,.2f} M |
| flash, int8, estimated | {info['flash_int8_bytes'] / 1024:,.0f} KiB |
| RAM, int8, estimated | {info['arena_bytes'] / 1024:,.0f} KiB |
| of which activations | {info['peak_activation_int8_bytes'] / 1024:,.0f} KiB, most at `{info['peak_layer']}` |

Flash and RAM are for {size}. {MEMORY_MODEL}""",
    ]
    if command:
        processes = facts.get('processes', 1)
        program = ['python'] if processes == 1 else ['torchrun', '--nproc-per-node', str(processes)]
        done = f'{facts["epoch"]} of {facts["epochs"]} epochs' if {'epoch', 'epochs'} <= set(facts) else ''
        parts.append('## Training\n\n' + shell_block([*program, 'train.py', '--data-dir', 'DATA', *command]) + (
            f'\n\nThe weights are those after {done}. ' if done else '\n\n')
            + 'Flags that are not listed have the defaults of `train.py`.')
    if facts.get('dataset'):
        terms = f': {facts["dataset_terms"]}' if facts.get('dataset_terms') else ''
        parts.append(f'## Data\n\n{facts["dataset"]}{terms}')
    if facts.get('metrics'):
        rows = ''.join(f'| {METRICS[k]} | {v:.2f} % |\n' for k, v in facts['metrics'].items())
        note = f' ({facts["baseline_about"]})' if facts.get('baseline_about') else ''
        rows += ''.join(f'| {METRICS[k]} of the same training without NetAug{note}, of one seed | {v:.2f} % |\n'
                        for k, v in facts.get('baseline', {}).items())
        images = f' of {facts["images"]:,} images' if 'images' in facts else ''
        split = facts.get('evaluated_with', ['--split', 'validation'])
        line = ['python', 'validate.py', '--data-dir', 'DATA', '--model', f'hf-hub:{repo}', *split]
        parts.append(f'## Metrics\n\n| `{split[-1]}` split{images} | |\n|---|---|\n{rows}\n{shell_block(line)}')
    parts += deployed_section(facts)
    parts.append(f'## Citation\n\n```bibtex\n{CITATION}\n```')
    return '\n\n'.join(parts) + '\n'


def deployed_section(facts: Mapping[str, Any]) -> List[str]:
    """Return the section about the int8 file in a list; an empty one where there is no file, or its report is broken,
    as it may be in a config that another program has written."""
    try:
        return [card_section(facts['deployed'])] if facts.get('deployed') else []
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _numbers(values: List[float]) -> str:
    return ' '.join(f'{v:g}' for v in values)


def shell_block(words: List[str]) -> str:
    """Return a code block with a command, with line breaks before flags where lines would be too long."""
    lines = ['']
    for i, word in enumerate(words):
        flag = word.startswith('--')
        if flag and len(lines[-1]) + sum(len(shlex.quote(w)) + 1 for w in words[i:i + 3]) > 110:
            lines.append('   ')
        lines[-1] += (' ' if lines[-1] else '') + shlex.quote(word)
    return '```bash\n' + ' \\\n'.join(lines) + '\n```'
