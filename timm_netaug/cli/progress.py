"""The progress that `train.py` shows: a bar in a terminal, log lines elsewhere."""
import logging
import time
from typing import Any, Iterator, Tuple

from ..evaluate import progress_bar

__all__ = ['Progress']

_logger = logging.getLogger('train')
_REFRESH = 0.5  # seconds between two updates; each one reads the loss, for which the CPU waits for the GPU


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f'{hours} h {minutes:02} min' if hours else f'{minutes} min' if minutes else 'under 1 min'


class Progress:
    """The progress of a run, and the time that is left.

    Args:
        start_epoch: First epoch of this process.
        end_epoch: Epoch after the last one.
        log_interval: Number of batches between two log lines, if there is no terminal.
        primary: Whether this process shows anything.
    """

    def __init__(self, start_epoch: int, end_epoch: int, log_interval: int = 50, primary: bool = True):
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.log_interval = log_interval
        self.primary = primary
        self.start = time.time()

    def title(self, epoch: int) -> str:
        """Return the title of an epoch. Files count epochs from 0, people count them from 1."""
        return f'Epoch {epoch} ({epoch + 1} of {self.end_epoch})'

    def batches(self, epoch: int, loader: Any) -> Iterator[Tuple[int, Any]]:
        """Yield number and content of the batches of an epoch."""
        self.epoch, self.total, self.images, self.shown = epoch, len(loader), 0, 0.0
        self.epoch_start = time.time()
        self.bar = progress_bar(loader, self.title(epoch), self.primary)
        yield from enumerate(self.bar)

    def time_left(self, batch: int) -> str:
        """Return the time to the end of the run, from the mean of all batches so far, validations included."""
        done = self.epoch - self.start_epoch + (batch + 1) / self.total
        left = self.end_epoch - self.start_epoch - done
        return _duration((time.time() - self.start) / done * left)

    def update(self, batch: int, images: int, loss: Any, lr: float, last: bool) -> None:
        """Show the state after a batch, unless it was shown a moment ago.

        Args:
            batch: Number of the batch in the epoch.
            images: Number of images in the batch, of all processes.
            loss: A tensor or number. A tensor is read only if it is shown.
            last: Whether this is the epoch's last batch.
        """
        self.images += images
        if not self.primary:
            return
        now = time.time()
        terminal = not self.bar.disable
        if not last and (now - self.shown < _REFRESH if terminal else batch % self.log_interval):
            return
        self.shown = now
        line = (f'loss {float(loss):.4g}  {self.images / (now - self.epoch_start):.1f} images/s  lr {lr:.3e}  '
                f'{self.time_left(batch)} left')
        if terminal:
            self.bar.set_postfix_str(line)
        else:
            _logger.info(f'{self.title(self.epoch)} [{batch + 1}/{self.total}]  {line}')
