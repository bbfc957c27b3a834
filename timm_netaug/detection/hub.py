"""Detectors to and from the Hugging Face Hub, by the functions that push and pull classifiers."""
import shutil
import tempfile
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import torch

from ..card import known_facts
from ..errors import UserError
from ..hub import CARD, TFLITE, TOLERANCE, check_destination, check_out_dir, check_target, commit, write_dry_run
from .annotations import read_split
from .card import detector_card
from .detector import Detector
from .evaluate import evaluate_detector
from .folder import BACKBONE, architecture_of, export_detector, find_detector_folder, load_detector_folder, read_config
from .metric import METRICS

__all__ = ['pull_detector', 'push_detector']


def _check_reload(one: Detector, other: Detector) -> None:
    """Refuse a folder that another detector is made of; predictions must be equal to the last bit."""
    images = torch.randn(1, 3, *one.config.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = one.dense(images), other.dense(images)
    if not all(torch.equal(a, b) for k in first for a, b in zip(first[k], second[k])):
        raise UserError('The exported detector does not compute what the checkpoint does, nothing is pushed. That is a'
                        ' fault of this program: report it.')


def push_detector(
        detector: Detector,
        repo: str,
        facts: Mapping[str, Any],
        *,
        revision: Optional[str] = None,
        private: bool = False,
        dry_run: Optional[str] = None,
        data_dir: Optional[str] = None,
        license: Optional[str] = None,
        files: Sequence[Path] = (),
) -> None:
    """Push a detector with its config, backbone and card as one commit, or write what would be pushed.

    The arguments are those of `hub.push`.

    Raises:
        UserError: It does not work, the message says why; nothing has been pushed.
    """
    check_destination(repo, dry_run, BACKBONE, TFLITE)
    facts = {**known_facts(dict(timm_netaug=dict(facts)), METRICS), **(dict(license=license) if license else {})}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parent = None if dry_run else check_target(repo, revision, private, architecture_of(detector.config))
        if data_dir:
            split = read_split(data_dir, facts.get('split', 'val'))
            measured = evaluate_detector(detector, split)[0]
            for metric, recorded in facts.get('metrics', {}).items():
                if measured[metric] is None:
                    raise UserError(f'The {metric} is on record, but {data_dir} has no objects to measure it on: name'
                                    f' the data set that the detector was validated on. Nothing is pushed.')
                if abs(measured[metric] - recorded) > TOLERANCE:
                    raise UserError(f'The {metric} on {data_dir} is {measured[metric]:.2f}, the checkpoint has'
                                    f' {recorded:.2f} on record: name the data set that it was validated on. Nothing is'
                                    f' pushed.')
            facts['metrics'] = {k: round(measured[k], 4) for k in METRICS if measured[k] is not None}
            facts['images'] = measured['images']
        export_detector(detector, folder, facts)
        _check_reload(detector, load_detector_folder(folder))
        print('Reloaded: the predictions are bit-equal.')
        for file in files:
            shutil.copyfile(file, folder / file.name)
        name = f'{repo}@{revision}' if revision not in (None, 'main') else repo
        (folder / CARD).write_text(detector_card(detector, facts, name), encoding='utf-8')
        if dry_run:
            write_dry_run(folder, dry_run)
            return
        url = commit(folder, repo, revision, private, parent)
    print(f"Pushed: {url}\nLoad it with:\n\n    from timm_netaug.detection import create_detector\n"
          f"    detector = create_detector('hf-hub:{name}')")


def pull_detector(repo: str, out_dir: str, revision: Optional[str] = None) -> bool:
    """Fetch a detector, check it, and write it as a folder; returns False where the repository is of something else.

    Raises:
        UserError: It cannot be fetched, or is not fit for use.
    """
    name = f'{repo}@{revision}' if revision else repo
    there = find_detector_folder(f'hf-hub:{name}')
    if there is None:
        return False
    check_out_dir(out_dir, BACKBONE, TFLITE)
    facts = known_facts(read_config(there, name)[1], METRICS)
    facts.pop('deployed', None)  # the int8 file is not fetched
    export_detector(load_detector_folder(there, name), out_dir, facts)
    print(f"Pulled. Load it with:\n\n    from timm_netaug.detection import create_detector\n"
          f"    detector = create_detector('local-dir:{out_dir}')")
    return True
