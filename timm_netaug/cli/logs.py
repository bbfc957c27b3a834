"""What the scripts log."""
import logging
import warnings

from timm.utils import setup_default_logging

__all__ = ['set_up_logging']

_QUIET = ('timm', 'httpx', 'httpx2')  # what they say at the level INFO is of no use to a user
_HARMLESS = ('This DataLoader will create', 'Grad strides do not match bucket view strides')


def set_up_logging() -> None:
    """Log what a user of the scripts wants to know, and leave out what libraries say besides."""
    setup_default_logging()
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HARMLESS:
        warnings.filterwarnings('ignore', message=message)
