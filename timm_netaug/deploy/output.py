"""What native code prints past Python, held back."""
import os
import sys
import tempfile
from contextlib import contextmanager
from typing import IO, Iterator

__all__ = ['captured']


@contextmanager
def captured() -> Iterator[IO[bytes]]:
    """Write everything that the block prints, native libraries included, into a file instead.

    The converter prints hundreds of lines, and TensorFlow Lite Micro reports memory and errors on C's standard error
    output alone.

    Yields:
        The file, to be read after the block.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    file = tempfile.TemporaryFile()
    saved = os.dup(1), os.dup(2)
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield file
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved):
            os.dup2(copy, descriptor)
            os.close(copy)
        file.seek(0)
