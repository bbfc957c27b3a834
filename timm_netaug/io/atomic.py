"""Atomic writes: a file is complete at every moment."""
import os
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator, Union

__all__ = ['atomic_write', 'flush']


def flush(path: str) -> None:
    """Wait until a file is on the disk."""
    with open(path, 'rb') as f:
        os.fsync(f.fileno())


@contextmanager
def atomic_write(path: Union[str, Path], mode: str = 'w') -> Iterator[IO]:
    """Open a temporary file that replaces `path` at the end of the block. After an error, `path` is unchanged.

    Args:
        mode: 'w' for text, 'wb' for bytes.
    """
    temporary = f'{path}.tmp'
    text = {} if 'b' in mode else dict(newline='', encoding='utf-8')
    try:
        with open(temporary, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
