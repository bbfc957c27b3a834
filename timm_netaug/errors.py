"""Errors in a user's input, and how a command reports them."""
import difflib
import sys
from contextlib import contextmanager
from typing import Iterator, Type

from timm.models import is_model, list_models

__all__ = ['UserError', 'check_model_name', 'exit_on_user_error', 'first_line', 'rewording']


class UserError(Exception):
    """An error in a user's input. A command prints the message alone, without a traceback."""


def check_model_name(name: str) -> None:
    """Refuse a model name that neither timm nor this package registers.

    Raises:
        UserError: The name is unknown. The message has the nearest name that is registered, if one is near.
    """
    if ':' not in name and not is_model(name):
        near = difflib.get_close_matches(name.split('.')[0], list_models(), 1)
        hint = f'the nearest name is {near[0]}' if near else 'timm.list_models() lists the names that there are'
        raise UserError(f'Unknown model {name}; {hint}.')


def first_line(error: BaseException) -> str:
    """Return the first sentence of another library's error, which may have more text, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split('. ')[0].rstrip('.')


@contextmanager
def rewording(subject: str, *errors: Type[BaseException], hint: str = '', whole: bool = False) -> Iterator[None]:
    """Turn errors of another library into one message: what failed, the text of the error, and what to do.

    Args:
        subject: What failed. A colon and the text of the error follow it.
        errors: Types of errors that are turned. Without any, all errors are.
        hint: A sentence about what to do.
        whole: Keep the whole text of the error, not only its first sentence.

    Raises:
        UserError: An error of one of these types was raised. A `UserError` passes unchanged.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except errors or Exception as e:
        text = ' '.join(str(e).split()) if whole else first_line(e)[:300]
        raise UserError(f'{subject}: {text.rstrip(".")}.{f" {hint}" if hint else ""}') from e


@contextmanager
def exit_on_user_error(program: str) -> Iterator[None]:
    """End a command with a message and a non-zero exit status if its input is wrong."""
    try:
        yield
    except (UserError, OSError) as e:
        sys.exit(f'{program}: error: {e}')
    except KeyboardInterrupt:
        sys.exit(130)
