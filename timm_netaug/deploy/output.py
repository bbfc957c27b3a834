"""What native code prints past Python, held back."""
import os
import sys
import tempfile
from contextlib import contextmanager
from typing import Iterator, List

__all__ = ['captured']


@contextmanager
def captured() -> Iterator[List[str]]:
    """Hold back everything that the block prints, native libraries included.

    The converter prints hundreds of lines, and TensorFlow Lite Micro reports memory and errors on C's standard error
    output alone.

    Yields:
        A list that holds the printed text after the block.
    """
    printed: List[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield printed
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved):
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            printed.append(file.read().decode(errors='replace'))
