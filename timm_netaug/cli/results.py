"""List what `validate.py` evaluates in bulk, and write its results to files."""
import csv
import json
import os
from typing import Any, Dict, List, Optional, Tuple

from timm.models import get_pretrained_cfg, is_model, list_models
from timm.utils import natural_key

from ..errors import UserError
from ..io.atomic import atomic_write

__all__ = ['bulk_entries', 'sort_results', 'write_results']

_SUFFIXES = ('.pth.tar', '.pth', '.pt', '.bin', '.safetensors')
_UNFINISHED = ('tmp.pth.tar', 'recovery_tmp.pth.tar')  # temporary files that a killed run leaves
_PRINTED_ONLY = ('loss', 'images')  # timm's files of results have no such columns


def bulk_entries(model: str, checkpoint: str, num_classes: int = 1000) -> Optional[List[Tuple[str, str]]]:
    """List the (model, checkpoint) pairs that `--model` and `--checkpoint` stand for. Return None for a single model.

    Args:
        model: Name, wildcard, text file of names, or 'all' for all models with pretrained weights.
        checkpoint: File or folder.
        num_classes: Number of classes of the models that 'all' includes (many pretrained weights have no classifier).

    Raises:
        UserError: No model or checkpoint matches.
    """
    names = None
    if model == 'all':
        names = [n for n in list_models(pretrained=True) if get_pretrained_cfg(n).num_classes == num_classes]
    elif ':' not in model and any(c in model for c in '*?['):
        # If no match has pretrained weights, the evaluation reports that for each name, which says more than no match.
        names = list_models(model, pretrained=True) or list_models(model)
    elif os.path.isfile(model) and not is_model(model):
        try:
            with open(model, encoding='utf-8') as f:
                names = [line.strip() for line in f if line.strip()]
        except UnicodeDecodeError as e:
            raise UserError(f'--model {model} is not a text file of names: pass a checkpoint with --checkpoint.') from e
    if names is not None and checkpoint:
        raise UserError(f'--checkpoint {checkpoint} needs a single model, but --model {model} stands for {len(names)}.')
    if names is not None and not names:
        raise UserError(f'--model {model}: there is no such model.')
    if names:
        return [(name, '') for name in names]
    if not os.path.isdir(checkpoint):
        return None
    files = [entry.path for entry in os.scandir(checkpoint)
             if entry.is_file() and entry.name.endswith(_SUFFIXES) and entry.name not in _UNFINISHED]
    if not files:
        raise UserError(f'There is no checkpoint (*{", *".join(_SUFFIXES)}) in the folder {checkpoint}.')
    return [(model, path) for path in sorted(files, key=natural_key)]


def sort_results(results: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Order the results of a bulk run as timm does: the best comes first, and failed models come last."""
    return sorted(results, key=lambda row: row.get('top1', row.get('map', -1.0)), reverse=True)


def write_results(path: str, results: Any, format: str) -> None:
    """Write results in timm's format, by an atomic write.

    Args:
        results: The row of a single model, or the list of rows of a bulk run.
        format: 'csv' or 'json'.
    """
    all_rows = results if isinstance(results, list) else [results]
    rows = [{k: v for k, v in row.items() if k not in _PRINTED_ONLY} for row in all_rows]
    with atomic_write(path) as f:
        if format == 'json':
            json.dump(rows if isinstance(results, list) else rows[0], f, indent=4)
        else:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
