"""Errors of users, and how a command tells them."""
import sys
from contextlib import contextmanager
from typing import Iterator

__all__ = ['UserError', 'told_plainly']


class UserError(ValueError):
    """Wrong input: its message is all that a user of a command gets to see."""


@contextmanager
def told_plainly(program: str) -> Iterator[None]:
    """End a command with one sentence and a non-zero exit status where its input is wrong."""
    try:
        yield
    except (UserError, OSError) as e:
        sys.exit(f'{program}: error: {e}')
