"""The model card of a detector's repository, filled from its `config.json`; what is not known is left out."""
from typing import Any, Mapping

from huggingface_hub import EvalResult, ModelCardData

from ..card import CITATION, deployed_section, needs, shell_block
from ..costs import MEMORY_MODEL
from ..info import describe
from .detector import Detector
from .metric import METRICS

__all__ = ['detector_card']


def detector_card(detector: Detector, facts: Mapping[str, Any], repo: str) -> str:
    """Write the card of a detector.

    Args:
        facts: What is known of its training: 'command', 'epoch', 'epochs', 'processes', 'split', 'metrics' (percent),
            'images', 'dataset', 'dataset_terms', 'license', 'about' (sentences of the user), and 'deployed', the
            report of a deployment.
        repo: OWNER/NAME, or OWNER/NAME@REVISION.
    """
    config, name = detector.config, repo.partition('@')[0].rpartition('/')[2]
    metrics = {k: v for k, v in facts.get('metrics', {}).items() if k in METRICS and v is not None}
    command, dataset = list(map(str, facts.get('command', []))), facts.get('dataset')
    split = facts.get('split', 'val')
    with_netaug = '--netaug' in command
    results = [
        EvalResult(task_type='object-detection', dataset_type=dataset or 'boxes', dataset_name=dataset or 'boxes',
                   dataset_split=split, metric_type='mAP', metric_name=f'{key} (percent, COCO)',
                   metric_value=round(value, 4))
        for key, value in metrics.items()]
    front = ModelCardData(
        library_name='timm',
        pipeline_tag='object-detection',
        tags=['object-detection', 'timm', 'tinyml', *(['netaug'] if with_netaug else [])],
        license=facts.get('license'),
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()
    size = 'x'.join(map(str, config.img_size))
    info = describe(detector.dense, (3, *config.img_size), samples=1)
    classes = f' ({", ".join(config.class_names)})' if config.class_names and config.num_classes <= 100 else ''
    about = (f'A detector of {config.num_classes} classes{classes} on `{config.backbone}`, for images of {size} (height'
             f' and width)')
    parts = [
        f'---\n{front}\n---\n\n# {name}\n\n{about}'
        + (', trained with [Network Augmentation](https://arxiv.org/abs/2110.08890).' if with_netaug else '.'),
        *filter(None, [facts.get('about')]),
        f"""## Use

{needs('train_detection.py', 'validate_detection.py')}

```python
from PIL import Image
from timm_netaug.detection import create_detector, predict

detector = create_detector('hf-hub:{repo}').eval()
found = predict(detector, Image.open('image.jpg'), score=0.3)  # boxes, scores, labels, classes
```

The folder `backbone/` is the backbone alone, as a timm model.""",
        f"""## Size

| | |
|---|---|
| parameters | {info['parameters']:,} |
| MACs | {info['macs'] / 1e6:,.2f} M |
| flash, int8 | {info['flash_int8_bytes'] / 1024:,.0f} KiB |
| peak activations, int8 | {info['peak_activation_int8_bytes'] / 1024:,.0f} KiB, at `{info['peak_layer']}` |

Estimated for {size}, without the decoding of boxes. {MEMORY_MODEL}""",
    ]
    if command:
        processes = facts.get('processes', 1)
        program = ['python'] if processes == 1 else ['torchrun', '--nproc-per-node', str(processes)]
        done = f'{facts["epoch"]} of {facts["epochs"]} epochs' if {'epoch', 'epochs'} <= set(facts) else ''
        parts.append('## Training\n\n' + shell_block(
            [*program, 'train_detection.py', '--data-dir', 'DATA', *command])
            + (f'\n\nThe weights are those after {done}. ' if done else '\n\n')
            + 'Flags that are not there have the defaults of `train_detection.py`.')
    if dataset:
        parts.append(f'## Data\n\n{dataset}' + (f': {facts["dataset_terms"]}' if facts.get('dataset_terms') else ''))
    if metrics:
        rows = ''.join(f'| {k} | {v:.2f} % |\n' for k, v in metrics.items())
        images = f' of {facts["images"]:,} images' if 'images' in facts else ''
        line = ['python', 'validate_detection.py', '--data-dir', 'DATA', '--model', f'hf-hub:{repo}', '--split', split]
        parts.append(f'## Metrics\n\n| `{split}` split{images} | |\n|---|---|\n{rows}\nCOCO\'s average precision, over'
                     f' 101 values of recall.\n\n{shell_block(line)}')
    parts += deployed_section(facts)
    parts.append(f'## Citation\n\n```bibtex\n{CITATION}\n```')
    return '\n\n'.join(parts) + '\n'
