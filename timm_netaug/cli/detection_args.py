"""Command lines of detection, made of the flags of `train.py` and `validate.py` that mean the same there."""
import argparse
from typing import Any, Mapping, Sequence, Tuple

from .args import _parser

__all__ = ['detection_parser', 'with_defaults']


def detection_parser(
        whole: argparse.ArgumentParser,
        description: str,
        flags: Sequence[str],
        defaults: Mapping[str, Any],
        help: Mapping[str, str],
) -> Tuple[argparse.ArgumentParser, Any]:
    """Build a command line of some flags of another one.

    Args:
        whole: The other one; it is used up.
        flags: Names of the flags in the namespace.
        defaults: Of flags whose default is another one here.
        help: Of flags that mean something narrower here.

    Returns:
        The parser, and its group 'Detection' for flags of its own.
    """
    parser = _parser(description)
    own = parser.add_argument_group('Detection')
    found = set()
    for group in whole._action_groups:
        actions = [a for a in group._group_actions if a.dest in flags]
        if actions:
            new = parser.add_argument_group(group.title)
            for action in actions:
                action.default = defaults.get(action.dest, action.default)
                action.help = help.get(action.dest, action.help)
                new._add_action(action)
                found.add(action.dest)
    unknown = {*flags, *defaults, *help} - found
    assert not unknown, unknown  # a fault of this program, not of a user
    return parser, own


def with_defaults(whole: argparse.ArgumentParser, args: argparse.Namespace, **values: Any) -> None:
    """Give a namespace the defaults of the flags that a command line does not have, or the given values of them."""
    for action in whole._actions:
        if not hasattr(args, action.dest) and action.dest != 'help':
            setattr(args, action.dest, values.get(action.dest, action.default))
