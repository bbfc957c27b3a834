"""Tables of the flags of detection, made of those of `train.py` and `validate.py` that mean the same there."""
import argparse
from dataclasses import replace
from typing import Any, Mapping, Sequence, Tuple

from .flags import Flag, Group, all_flags

__all__ = ['detection_flags', 'with_defaults']


def detection_flags(
        whole: Sequence[Group],
        names: Sequence[str],
        own: Sequence[Flag],
        defaults: Mapping[str, Any],
        help: Mapping[str, str],
) -> Tuple[Group, ...]:
    """Return a table of some flags of another one, behind a group of flags of its own.

    Args:
        whole: The other table.
        names: The flags to take, by their names among the parsed arguments.
        own: Flags that the other table does not have.
        defaults: Of flags whose default is another one here.
        help: Of flags that mean something narrower here.
    """
    unknown = {*names, *defaults, *help} - {flag.dest for flag in all_flags(whole)}
    assert not unknown, unknown  # a fault of this program, not of a user
    groups = [Group('Detection', tuple(own))]
    for group in whole:
        taken = [replace(flag, default=defaults.get(flag.dest, flag.default), help=help.get(flag.dest, flag.help))
                 for flag in group.flags if flag.dest in names]
        if taken:
            groups.append(Group(group.title, tuple(taken)))
    return tuple(groups)


def with_defaults(whole: Sequence[Group], args: argparse.Namespace, **values: Any) -> None:
    """Give a namespace the defaults of the flags that a command line does not have, or the given values of them."""
    for flag in all_flags(whole):
        if not hasattr(args, flag.dest):
            setattr(args, flag.dest, values.get(flag.dest, flag.default))
