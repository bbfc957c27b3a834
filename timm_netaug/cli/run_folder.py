"""The folder of a run: its provenance, its checkpoints, and the checks before a run is resumed from it."""
import json
import logging
import os
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import PIL
import timm
import torch
import torchvision
import yaml
from timm.models import safe_model_name
from timm.task import TrainingTask
from timm.utils import get_outdir, trim_summary

import timm_netaug

from ..errors import UserError
from ..io.atomic import atomic_write
from ..io.checkpoint import read_checkpoint
from ..io.run import RunDescription
from ..io.saver import AtomicSaver
from .device import restarts
from .flags import Group, all_flags

__all__ = ['check_resume', 'find_restart', 'release_folder', 'set_up_saver', 'versions', 'GROUP_FIELDS_SET_BY_FLAGS']

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger('train')

_locked: List[int] = []  # handle of the folder of the present run

# Fields of an optimizer's parameter groups that flags set. Other fields may be counters.
GROUP_FIELDS_SET_BY_FLAGS = ('lr', 'weight_decay', 'momentum', 'betas', 'eps', 'lr_scale')


def versions() -> Dict[str, str]:
    """Return the versions of the libraries that affect the last bits of a run's results."""
    return dict(
        python=platform.python_version(),
        torch=str(torch.__version__),
        torchvision=str(torchvision.__version__),
        timm=timm.__version__,
        timm_netaug=timm_netaug.__version__,
        numpy=np.__version__,
        pillow=PIL.__version__,
    )


def _run_folder(args, name: str = '') -> str:
    return os.path.join(args.output or os.path.join('output', 'train'), name or args.experiment)


def _lies_in(checkpoint: str, folder: str) -> bool:
    return os.path.isdir(folder) and os.path.samefile(os.path.dirname(os.path.abspath(checkpoint)), folder)


def find_restart(args) -> None:
    """Set `args.resume` to the last checkpoint in the run's folder, with `--resume auto` and in processes that torchrun
    has restarted.

    Raises:
        UserError: Processes that torchrun restarts could not find the checkpoint.
    """
    allowed = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
    if allowed and int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1:
        raise UserError('torchrun --max-restarts works on one machine only: several machines would not agree on the'
                        ' checkpoint to continue from. Leave it out, and continue with --resume.')
    if allowed and not args.experiment:
        raise UserError('torchrun --max-restarts needs --experiment: restarted processes look for the last checkpoint'
                        ' in the folder with this name.')
    last = os.path.join(_run_folder(args), 'last.pth.tar')
    if restarts() and os.path.exists(last):
        args.resume, args.no_resume_opt, args.start_epoch = last, False, None
    if args.resume == 'auto':
        args.resume = last if os.path.exists(last) else ''
        args.no_resume_opt &= bool(args.resume)
        args.start_epoch = None if args.resume else args.start_epoch


def check_resume(args, flags: Sequence[Group], run: RunDescription) -> List[Optional[float]]:
    """Refuse a checkpoint of another model or training, and name what differs. Warn of flags that have changed.

    Returns:
        The metric after every epoch so far, for schedules that follow the metric.
    """
    checkpoint = read_checkpoint(args.resume)
    saved, there = checkpoint.get('args'), RunDescription.from_checkpoint(checkpoint)
    if there is None:
        raise UserError(f'--resume: {args.resume} is not a checkpoint of this train.py (but perhaps of that of timm):'
                        f' start from its weights with --initial-checkpoint instead.')
    if 'optimizer' not in checkpoint:
        last = os.path.join(os.path.dirname(args.resume), 'last.pth.tar')
        raise UserError(f'--resume: {args.resume} holds only the weights of the model: continue its run with {last},'
                        f' or start a new run from the weights with --initial-checkpoint.')
    old, new = ({'architecture': r.architecture, **r.model_args, 'classes': r.class_names} for r in (there, run))
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if changed:
        raise UserError(f'--resume: {args.resume} is of another model: ' + ', '.join(
            f'{k} is {old.get(k)!r} there and {new.get(k)!r} here' for k in changed) + '.')
    if bool(there.netaug) != bool(run.netaug):
        raise UserError(f'--resume: {args.resume} was trained with{"" if there.netaug else "out"} --netaug.')
    if saved.opt != args.opt and not args.no_resume_opt:
        raise UserError(f'--resume: {args.resume} was trained with --opt {saved.opt}: use the same optimizer, or start'
                        f' with a new one and --no-resume-opt.')
    goes_on = bool(args.experiment) and _lies_in(args.resume, _run_folder(args))
    if saved.eval_metric != args.eval_metric and (goes_on or args.sched == 'plateau'):
        raise UserError(f'--resume: {args.resume} was trained with --eval-metric {saved.eval_metric}, which its best'
                        f' checkpoints and the plateau schedule follow: use the same metric.')
    then, now = there.versions, run.versions
    changed = [f'{k} {then[k]}, not {now.get(k)}' for k in then if then[k] != now.get(k)]
    if changed:
        _logger.warning(f'The checkpoint was written with {", ".join(changed)}: results may differ in the last bits.')
    changed = [f.dest for f in all_flags(flags) if not f.free and f.dest != 'num_classes'
               and getattr(saved, f.dest, f.default) != getattr(args, f.dest)]
    if changed:
        _logger.warning('This is not the same training as that of the checkpoint: ' + ', '.join(
            f'{k} was {getattr(saved, k, None)!r}, is {getattr(args, k)!r}' for k in changed) + '.')
    return there.metrics


def set_up_saver(
        args,
        flags: Sequence[Group],
        task: TrainingTask,
        optimizer,
        loss_scaler,
        start_epoch: int,
) -> AtomicSaver:
    """Set up everything that the first process writes: the run's folder, its provenance, and the checkpoints."""
    size = args.run['data_config']['input_size'][-1]
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder, resumed_here = _set_up_folder(args, name, start_epoch)
    _write_provenance(args, flags, folder)
    saver = AtomicSaver(
        task.get_trainable_module(),
        optimizer,
        args=args,
        amp_scaler=loss_scaler,
        checkpoint_dir=folder,
        recovery_dir=folder,
        decreasing=args.eval_metric == 'loss',
        max_history=args.checkpoint_hist,
        task=task,
    )
    if resumed_here:
        saver.load_state_dict_from_checkpoint(args.resume)
    if args.log_wandb:
        try:
            import wandb
        except ImportError:
            raise UserError('--log-wandb needs the package wandb: pip install wandb.') from None
        wandb.init(project=args.wandb_project, name=args.experiment or None, config=vars(args), tags=args.wandb_tags,
                   resume='must' if args.wandb_resume_id else None, id=args.wandb_resume_id or None)
    return saver


def _set_up_folder(args, name: str, start_epoch: int) -> Tuple[str, bool]:
    """Make the folder of a run. If a run is resumed in its folder, cut its summary before the epoch that comes next.

    Returns:
        The folder, and whether the resumed checkpoint lies in it.

    Raises:
        UserError: The run would overwrite another run, or later epochs of itself, or another process writes there.
    """
    folder = get_outdir(_run_folder(args, name))
    _lock(folder)
    summary, last = os.path.join(folder, 'summary.csv'), os.path.join(folder, 'last.pth.tar')
    if args.resume and _lies_in(args.resume, folder):
        if os.path.exists(last) and read_checkpoint(last)['epoch'] >= start_epoch:
            raise UserError(f'{folder} holds later epochs than {args.resume}: continue with {last}, or choose another'
                            f' --experiment to train these epochs again.')
        if os.path.exists(summary):
            with atomic_write(summary, 'wb') as f:
                f.write(Path(summary).read_bytes())
                f.flush()
                trim_summary(f.name, start_epoch)
        return folder, True
    if os.path.exists(last):
        raise UserError(f'{folder} holds a run already: continue it with --resume {last}, or choose another'
                        f' --experiment.')
    if os.path.exists(summary):
        if len(Path(summary).read_text().splitlines()) > 2:
            raise UserError(f'{folder} holds the results of a run: choose another --experiment.')
        os.remove(summary)  # left by a run that was killed before its first checkpoint
    if args.resume:
        _logger.warning(f'{folder} is not the folder of {args.resume}: best metric and summary start anew.')
    return folder, False


def release_folder() -> None:
    """Let other processes train in the folder of this process's run."""
    while _locked:
        os.close(_locked.pop())


if hasattr(os, 'register_at_fork'):  # else the loader processes of a run that is killed would keep its lock
    os.register_at_fork(after_in_child=release_folder)


def _lock(folder: str) -> None:
    """Keep other processes from training in a folder until the run ends. Nothing where the system has no flock.

    Raises:
        UserError: Another process trains in the folder.
    """
    release_folder()
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f'Another process trains in {folder}: choose another --experiment.') from None
    except OSError:  # a file system without locks
        pass
    _locked.append(handle)


def _write_provenance(args, flags: Sequence[Group], output_dir: str) -> None:
    """Write the resolved flags (as a config for -c) and the versions beside the results."""
    left_out = ['data', 'local_rank', 'resume', 'no_resume_opt', 'stop_epoch']
    if not args.device_given:  # the chosen device depends on the machine
        left_out.append('device')
    values = {f.dest: getattr(args, f.dest) for f in all_flags(flags) if f.dest not in left_out}
    values = {k: v for k, v in values.items() if v not in (None, [])}
    with atomic_write(os.path.join(output_dir, 'args.yaml')) as f:
        yaml.safe_dump(values, f, sort_keys=True)
    revision = None
    checkout = Path(timm_netaug.__file__).parents[1]
    if (checkout / '.git').exists():  # git would also find the repository of a project that contains the environment
        try:
            git = ['git', 'describe', '--always', '--dirty']
            revision = subprocess.run(git, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    provenance = dict(
        **versions(),
        revision=revision,
        command=[os.path.basename(sys.argv[0]), *sys.argv[1:]],
    )
    with atomic_write(os.path.join(output_dir, 'versions.json')) as f:
        json.dump(provenance, f, indent=2)
        f.write('\n')
