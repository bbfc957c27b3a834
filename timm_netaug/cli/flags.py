"""Command lines as tables: a `Flag` is one row, from which the parser, the checks and `docs/flags.md` are made."""
import argparse
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from timm.utils import ParseKwargs

from ..errors import UserError

__all__ = ['Flag', 'Group', 'all_flags', 'build_parser', 'check_at_least', 'check_flags', 'flag_name', 'given_flags',
           'refuse_for_detector']


class _KeyValues(ParseKwargs):
    """timm's action, with a sentence for what is not KEY=VALUE."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [value for value in values if value and '=' not in value]
        if wrong:
            raise UserError(f'{option_string} takes KEY=VALUE, got {wrong[0]}.')
        super().__call__(parser, namespace, values, option_string)


@dataclass(frozen=True)
class Flag:
    """A flag of a command line, and the rules for its value.

    Args:
        names: Its spellings, separated by spaces. A name without dashes is a positional argument.
        help: What the flag does. Default, choices and range are added to it.
        type: Converts a value. None: the flag is a switch, whose default is False.
        nargs: Number of values, as for argparse; a number above 1 is checked in YAML files too.
        const: Value of a flag that may stand without one (nargs '?').
        choices: The values that are allowed; '' and None always are where they are the default.
        range: Interval of the allowed numbers: '[0, 1)' is from 0 up to, but not including, 1. 'inf' has no limit.
        needs: Another flag, without which this one does nothing; several are separated by spaces, and one is enough.
        excludes: Flags that do not go together with this one, and why.
        refused: Why the flag is always refused. Such a flag is not in the help.
        refused_with_netaug: Why the flag does not go together with NetAug.
        free: Whether the value may change when a run is resumed.
    """
    names: str
    help: str
    type: Optional[Callable[[str], Any]] = None
    default: Any = None
    metavar: Optional[str] = None
    nargs: Union[int, str, None] = None
    const: Any = None
    choices: Sequence[str] = ()
    range: str = ''
    needs: str = ''
    excludes: Mapping[str, str] = field(default_factory=dict)
    refused: str = ''
    refused_with_netaug: str = ''
    free: bool = False

    def __post_init__(self) -> None:
        if self.type is None:
            assert self.default in (None, False), self.names  # a switch can only be switched on
            object.__setattr__(self, 'default', False)

    @property
    def name(self) -> str:
        """The flag's name in messages: its first long spelling."""
        return next((name for name in self.names.split() if name.startswith('--')), self.names)

    @property
    def dest(self) -> str:
        """The name of the value among the parsed arguments."""
        return self.name.lstrip('-').replace('-', '_')

    def add_to(self, group: Any) -> None:
        """Add the flag to a group of a parser."""
        kwargs: Dict[str, Any] = dict(help=argparse.SUPPRESS if self.refused else self.full_help())
        if self.type is None:
            kwargs.update(action='store_true', default=self.default)
        else:
            kwargs.update(default=self.default, metavar=self.metavar)
            kwargs.update({k: v for k, v in dict(nargs=self.nargs, const=self.const).items() if v is not None})
            kwargs.update(dict(action=_KeyValues) if self.type is ParseKwargs else dict(type=self.type))
        group.add_argument(*self.names.split(), **kwargs)

    def full_help(self) -> str:
        """Return the help with choices, range and default."""
        values, default = self.values_text(), self.default_text()
        notes = '; '.join([*([values] if values else []), *([f'default: {default}'] if default else [])])
        return f'{self.help} ({notes})'.replace('%', '%%') if notes else self.help.replace('%', '%%')

    def default_text(self) -> str:
        """Return the default as it is typed, '' where there is none to tell."""
        if isinstance(self.default, list):
            return ' '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in self.default)
        return '' if self.type is None or self.default in (None, '', {}) else str(self.default)

    def values_text(self) -> str:
        """Return choices or range in words."""
        if self.choices:
            return 'one of ' + ', '.join(c for c in self.choices if c)
        return range_text(self.range) if self.range else ''

    def check(self, value: Any) -> None:
        """Refuse a value that is none of the choices, or out of range.

        Raises:
            UserError: One sentence with the flag's name, what it takes and what was given.
        """
        if self.choices and value not in (*self.choices, self.default):
            raise UserError(f'{self.name} must be {self.values_text()}, got {value!r}.')
        if not self.range:
            return
        for number in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if not in_range(number, self.range):
                raise UserError(f'{self.name} must be {range_text(self.range)}, got {_text(number)}.')


@dataclass(frozen=True)
class Group:
    """Flags that stand together in the help."""
    title: str
    flags: Tuple[Flag, ...]


def _bounds(interval: str) -> Tuple[float, float, bool, bool]:
    low, high = (float(bound) for bound in interval[1:-1].split(','))
    return low, high, interval[0] == '[', interval[-1] == ']'


def in_range(number: float, interval: str) -> bool:
    """Tell whether a number lies in an interval such as '[0, 1)'."""
    low, high, with_low, with_high = _bounds(interval)
    return (number >= low if with_low else number > low) and (number <= high if with_high else number < high)


def _text(number: float) -> str:
    return str(int(number)) if math.isfinite(number) and number == int(number) and abs(number) < 1e15 else f'{number:g}'


def range_text(interval: str) -> str:
    """Return an interval in words."""
    low, high, with_low, with_high = _bounds(interval)
    if math.isinf(low) and math.isinf(high):
        return 'a finite number'
    lower = f'at least {low:g}' if with_low else f'above {low:g}'
    if math.isinf(high):
        return lower if with_high else f'{lower} and finite'
    return f'{lower} and {f"at most {_text(high)}" if with_high else f"below {_text(high)}"}'


def flag_name(dest: str) -> str:
    return f'--{dest.replace("_", "-")}'


def all_flags(groups: Sequence[Group]) -> List[Flag]:
    return [flag for group in groups for flag in group.flags]


def build_parser(description: str, groups: Sequence[Group]) -> argparse.ArgumentParser:
    """Make the parser of a command line from its table."""
    parser = argparse.ArgumentParser(
        description=description, usage='%(prog)s --data-dir DIR [flags]', allow_abbrev=False)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of flags; the command line overrides it')
    for group in groups:
        shown = any(not flag.refused for flag in group.flags)
        section = parser.add_argument_group(group.title) if shown else parser
        for flag in group.flags:
            flag.add_to(section)
    return parser


def given_flags(groups: Sequence[Group], args: argparse.Namespace) -> List[Flag]:
    """Return the flags whose value is not the default."""
    return [flag for flag in all_flags(groups) if getattr(args, flag.dest) != flag.default]


def check_flags(groups: Sequence[Group], args: argparse.Namespace, netaug: bool = False) -> None:
    """Check the rules of a table: what is refused, ranges and choices, what a flag needs and what it excludes.

    Raises:
        UserError: One sentence with the flag's name.
    """
    given = given_flags(groups, args)
    for flag in given:
        if flag.refused:
            raise UserError(f'{flag.name} is not supported: {flag.refused}.')
        if netaug and flag.refused_with_netaug:
            raise UserError(f'{flag.name} does not go together with --netaug: {flag.refused_with_netaug}.')
    for flag in all_flags(groups):
        flag.check(getattr(args, flag.dest))
    names = {flag.name: flag.dest for flag in all_flags(groups)}
    for flag in given:
        needed = flag.needs.split()
        if needed and not any(getattr(args, names[name]) for name in needed):
            raise UserError(f'{flag.name} does nothing without {" or ".join(needed)}.')
        for other, why in flag.excludes.items():
            if getattr(args, names[other]):
                raise UserError(f'{flag.name} and {other} do not go together: {why}.')


def check_at_least(args: argparse.Namespace, **limits: int) -> None:
    """Refuse numbers below a limit, where they are given.

    Args:
        limits: The limits, by the names of the numbers in `args`.

    Raises:
        UserError: A number is below its limit, or no number (nan).
    """
    for dest, least in limits.items():
        value = getattr(args, dest)
        if value is not None and not value >= least:
            raise UserError(f'{flag_name(dest)} must be at least {least}, got {value}.')


def refuse_for_detector(args: argparse.Namespace, *names: str) -> None:
    """Refuse flags that mean nothing for a detector.

    Args:
        names: Attributes of these flags in `args`.

    Raises:
        UserError: One of the flags is given.
    """
    given = [flag_name(name) for name in names if getattr(args, name)]
    if given:
        raise UserError(f'{", ".join(given)}: not for a detector. Leave {"it" if len(given) == 1 else "them"} out.')
