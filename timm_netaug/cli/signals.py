"""Stop a run between two batches when the system or the user asks for it."""
import os
import signal
from typing import Any, Optional

__all__ = ['Stopped', 'StopSignals']

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Raised after a signal to end the run."""


class StopSignals:
    """Record SIGINT and SIGTERM within the block, so that `check` can raise. A second signal ends the process at once.

    Attributes:
        number: Number of the received signal, None if there was none.
    """
    number: Optional[int] = None

    def __enter__(self) -> 'StopSignals':
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # worker processes inherit this handler; the main process ends them
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.number = number
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        # If the worker processes got the signal, too, PyTorch's handler would raise an error at an arbitrary place.
        if hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.number is not None:
            raise Stopped
