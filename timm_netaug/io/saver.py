"""Write the checkpoints of `train.py` atomically, so that a killed run leaves no truncated checkpoint."""
import os
import shutil
from typing import Any, Dict, NoReturn, Optional

import torch
from timm.task import TrainingTask
from timm.utils import CheckpointSaver

from ..errors import UserError, first_line
from .atomic import atomic_write, flush
from .checkpoint import check_finite, read_checkpoint

__all__ = ['AtomicSaver']

_MILESTONE = 'milestone-'
_FOR_RESUMING = ('optimizer', 'amp_scaler', 'task_state', 'task_state_ema', 'saver')


class _ForOtherTools:
    """Wrapper of a task that checks that the weights in a checkpoint are finite, and makes them contiguous. safetensors
    and other tools accept only contiguous tensors."""

    def __init__(self, task: TrainingTask):
        self.task = task

    def get_checkpoint_state(self, **kwargs: Any) -> Dict[str, Any]:
        state = self.task.get_checkpoint_state(**kwargs)
        check_finite(state.get('state_dict', {}), 'The trained model')
        for key in ('state_dict', 'state_dict_ema'):
            for name, tensor in state.get(key, {}).items():
                state[key][name] = tensor.contiguous()
        return state


class AtomicSaver(CheckpointSaver):
    """timm's saver, with atomic writes.

    `last`, recovery and milestone files are for resuming: they hold the optimizer's state, and with NetAug the
    super-network. `model_best` and numbered files hold only the weights of the stock model, so they are small. `last`
    is renamed after all other files of its epoch are on disk. If the process is killed before that, the resumed run
    repeats the epoch, and writes the best file and the history again.
    """

    _late = ()
    _small = None  # the content of an epoch's `model_best` and numbered file, once it has been read

    def save_checkpoint(self, epoch, metric=None, milestone=False):
        """Save an epoch.

        Args:
            milestone: Keep a copy of `last`, named by the number of finished epochs.
        """
        self._late, self._small = [], None
        result = super().save_checkpoint(epoch, metric)
        if milestone:
            self.save_milestone(epoch + 1)
        for src, dst in self._late:
            os.replace(src, dst)
        self._small = None
        return result

    def _save(self, save_path, epoch, metric=None):
        task = self.task
        try:
            self.task = task and _ForOtherTools(task)
            super()._save(save_path, epoch, metric)
            flush(save_path)
        except (OSError, RuntimeError) as e:
            if os.path.exists(save_path):
                os.remove(save_path)
            self._raise_full(e, save_path)
        finally:
            self.task = task

    def _raise_full(self, error: Exception, path: str) -> NoReturn:
        full_disk = any(part in str(error) for part in ('inline_container', 'StreamWriter'))  # of torch.save
        if isinstance(error, RuntimeError) and not full_disk:
            raise error
        raise self.full(error, path) from error

    def full(self, error: Exception, path: Optional[str] = None) -> UserError:
        """Return the error for a file that cannot be written."""
        path = path or getattr(error, 'filename', None) or self.checkpoint_dir
        last = os.path.join(self.checkpoint_dir, f'last{self.extension}')
        again = f'go on with --resume {last}' if os.path.exists(last) else 'start again'
        return UserError(f'{path} cannot be written ({first_line(error)}): make room on the disk, and {again}. The'
                         f' files of earlier epochs are complete.')

    def _replace(self, src, dst):
        if os.path.basename(dst) == f'last{self.extension}':
            self._late.append((src, dst))
        else:
            os.replace(src, dst)

    def _duplicate(self, src, dst):
        src = next((temporary for temporary, last in self._late if last == src), src)
        if not os.path.basename(dst).startswith(_MILESTONE):
            if self._small is None:
                self._small = {k: v for k, v in read_checkpoint(src).items() if k not in _FOR_RESUMING}
            try:
                with atomic_write(dst, 'wb') as f:
                    torch.save(self._small, f)
            except (OSError, RuntimeError) as e:
                self._raise_full(e, dst)
            return
        temporary = f'{dst}.tmp'
        if os.path.exists(temporary):
            os.unlink(temporary)
        try:
            os.link(src, temporary)
            os.replace(temporary, dst)
        except (OSError, NotImplementedError):  # a file system without hard links
            with open(src, 'rb') as f, atomic_write(dst, 'wb') as copy:
                shutil.copyfileobj(f, copy)
