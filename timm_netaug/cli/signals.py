"""Stopping between two batches when the system or the user asks for it."""
import os
import signal
from typing import Any, Optional

__all__ = ['Stopped', 'StopSignals']

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal has asked for the end of the run."""


class StopSignals:
    """Note SIGINT and SIGTERM within the block, for `check` to raise; a second one ends the process at once.

    Attributes:
        number: Of the signal that has come, None before.
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
        if os.getpid() != self._process:  # a process of the loader, which inherits this: the main one ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.number = number
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        # Where the loader's processes got the signal too, PyTorch would raise in the middle of anything.
        if hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.number is not None:
            raise Stopped(signal.Signals(self.number).name)
