"""The table of training flags in docs/flags.md, row by row: each cell with --netaug is run again, and the others where
the environment variable NETAUG_TEST_FLAGS is set."""
import os
import sys

import pytest

from conftest import ROOT
from timm_netaug.cli.train_flags import train_parser

sys.path.insert(0, str(ROOT / 'docs'))
import flags  # noqa: E402

QUICK = not os.environ.get('NETAUG_TEST_FLAGS')
PAGE = (ROOT / 'docs/flags.md').read_text()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flags')
    flags.set_up(folder)
    return folder


@pytest.fixture(scope='module')
def known():
    return {}


@pytest.mark.parametrize('before, flag, effect', flags.ROWS, ids=[f'{b} {f}'.strip() for b, f, _ in flags.ROWS])
def test_row(before, flag, effect, root, known):
    there = next(line for line in PAGE.splitlines() if line.startswith(flags.title(before, flag)))
    assert there == flags.row(before, flag, effect, root, known, there.split(' | ')[1] if QUICK else None)
    assert not any(word in there for word in (flags.CRASHED, flags.IGNORED, flags.SPOILED))


def test_every_flag_is_in_the_table():
    parser = train_parser()
    dests = {s: a.dest for a in parser._actions for s in a.option_strings}
    there = {dests[word] for _, flag, _ in flags.ROWS for word in flag.split() if word in dests}
    assert len(there) > 130 and not there & flags.ELSEWHERE
    assert {a.dest for a in parser._actions} - {'help'} == there | flags.ELSEWHERE
    rows, rules = (part.splitlines() for part in PAGE.split(flags.RULES))
    assert len([line for line in rows if line.startswith('| `')]) == len(flags.ROWS)
    assert [line for line in rules if line.startswith('| `')] == flags.rules()


def test_netaug_trains_in_channels_last_on_a_cpu(root):
    formats = {flag: flags.run(flag, root).seen['layout'].split()[0] for flag in ('', flags.NETAUG, '--channels-last')}
    assert formats == {'': 'True', flags.NETAUG: 'False', '--channels-last': 'False'}  # contiguous or not
