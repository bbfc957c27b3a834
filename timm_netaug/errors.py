"""Errors of users, and how a command tells them."""
import difflib
import sys
from contextlib import contextmanager
from typing import Iterator, Type

from timm.models import is_model, list_models

__all__ = ['UserError', 'check_model_name', 'exit_on_user_error', 'first_line', 'rewording']


class UserError(Exception):
    """Wrong input: its message is all that a user of a command gets to see."""


def check_model_name(name: str) -> None:
    """Refuse a name that neither timm nor this package registers, with the nearest one that is.

    Raises:
        UserError: One sentence with the nearest name.
    """
    if ':' not in name and not is_model(name):
        near = difflib.get_close_matches(name.split('.')[0], list_models(), 1, 0)
        raise UserError(f'Unknown model {name}; the nearest name is {near[0]}.')


def first_line(error: BaseException) -> str:
    """Return the first sentence of another library's error; some have no text at all, others end with advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split('. ')[0].rstrip('.')


@contextmanager
def rewording(subject: str, *errors: Type[BaseException], hint: str = '', whole: bool = False) -> Iterator[None]:
    """Turn errors of another library into one sentence: what failed, what the library says of it, what to do.

    Args:
        subject: What failed; a colon and the library's words follow.
        errors: Types of errors; none of them for all.
        hint: What to do, a sentence.
        whole: Keep the whole text of the error, not only its first sentence.

    Raises:
        UserError: In place of such an error. Errors of this type pass as they are.
    """
    try:
        yield
    except UserError:
        raise
    except errors or Exception as e:
        text = ' '.join(str(e).split()) if whole else first_line(e)[:300]
        raise UserError(f'{subject}: {text.rstrip(".")}.{f" {hint}" if hint else ""}') from e


@contextmanager
def exit_on_user_error(program: str) -> Iterator[None]:
    """End a command with one sentence and a non-zero exit status where its input is wrong."""
    try:
        yield
    except (UserError, OSError) as e:
        sys.exit(f'{program}: error: {e}')
    except KeyboardInterrupt:
        sys.exit(130)
