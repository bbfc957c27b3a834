"""Parsing: a command line, and the YAML file of flags that it may name with `-c`."""
import argparse
import difflib
from typing import Any, List, Sequence

import yaml
from timm.utils import ParseKwargs

from ..errors import UserError, rewording
from .flags import flag_name

__all__ = ['parse_args']


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which no key may stand twice, spelled with dashes or underscores."""

    def construct_mapping(self, node, deep=False):
        keys = [str(key.value).replace('-', '_') for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key '{twice[0]}' stands there twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict:
    with rewording(f'Cannot read the config {path}', OSError, UnicodeDecodeError, yaml.YAMLError, whole=True), \
            open(path, encoding='utf-8') as f:
        config = yaml.load(f, _UniqueKeys) or {}
    if not isinstance(config, dict):
        raise UserError(f'The config {path} must map flags to values, it is a {type(config).__name__}.')
    return config


def _words(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> List[str]:
    """Return a value of YAML as words of a command line.

    Raises:
        ValueError: The flag does not take such a value.
    """
    flag = next((s for s in reversed(action.option_strings) if s.startswith('--')), '--data-dir')
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise ValueError(f'{flag} takes true or false')
        return [flag] if value else []
    if isinstance(value, dict) != isinstance(action, ParseKwargs) or isinstance(value, bool):
        raise ValueError(f'{flag} does not take such a value')
    if isinstance(value, dict):
        return [flag, *(f'{k}={v!r}' for k, v in value.items())]
    if isinstance(value, list) and action.nargs in (None, '?'):
        raise ValueError(f'{flag} takes one value')
    if value == [] or isinstance(value, list) and any(str(v).startswith('--') for v in value):
        raise ValueError(f'{flag} takes a list of values')
    values = [str(v) for v in (value if isinstance(value, list) else [value])]
    try:
        for v in values:
            parser._get_value(action, v)
    except argparse.ArgumentError as e:
        raise ValueError(str(e)) from e
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise ValueError(f'{flag} expected {action.nargs} values')
    if action.nargs in (None, '?') and values[0] != '':
        return [f'{flag}={values[0]}']  # a value may begin with a dash
    return [flag, *values]


def _config_to_argv(parser: argparse.ArgumentParser, path: str) -> List[str]:
    """Turn a YAML file into the command line that says the same, so that one parser judges both."""
    actions = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config')}
    argv = []
    for key, value in _read_yaml(path).items():
        dest = str(key).replace('-', '_')
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, 1, 0)
            raise UserError(f"Unknown key '{key}' (value {value!r}) in {path}; the nearest flag is"
                            f' {flag_name(near[0])}.')
        # timm's own args.yaml has empty lists and mappings for flags of its that were not given.
        if value is None or value in ([], {}) and not dest.startswith('netaug'):
            continue
        try:
            argv += _words(parser, actions[dest], value)
        except ValueError as e:
            raise UserError(f"Key '{key}' in {path} has the value {value!r}: {e}.") from e
    return argv


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line and the YAML file that it names; the command line overrides the file.

    Raises:
        UserError: A flag is unknown, or the file has a key or a value that the flags do not accept; the message names
            key, value and nearest flag.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument('-c', '--config')
    known, rest = finder.parse_known_args(argv)
    from_config = _config_to_argv(parser, known.config) if known.config else []
    # The file is parsed first and alone. Otherwise, a list at its end would swallow the command line's data folder.
    args, unknown = parser.parse_known_args(from_config)
    if not unknown:
        args, unknown = parser.parse_known_args(rest, args)
    if unknown:
        flags = [s for a in parser._actions for s in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split('=')[0], flags, 1, 0.75)
        hint = f'the nearest is {near[0]}' if near else '--help lists the flags'
        raise UserError(f'Unknown flag {unknown[0]}; {hint}.')
    typed = parser.parse_args(rest)
    if typed.data and typed.data_dir and typed.data != typed.data_dir:
        raise UserError(f'Two data sets given, {typed.data} and --data-dir {typed.data_dir}: leave one out.')
    args.config = known.config
    args.data_dir = args.data or args.data_dir
    args.device_given = any(a.split('=')[0] == '--device' for a in (*from_config, *rest))
    return args
