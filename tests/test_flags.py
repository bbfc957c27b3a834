"""The table of training flags in docs/flags.md, row by row: each cell with --netaug is run again, and the others where
the environment variable NETAUG_TEST_FLAGS is set."""
import os
import re
import sys

import pytest

from conftest import ROOT
from timm_netaug.cli.train_flags import check_train_args, train_parser
from timm_netaug.config import NetAugConfig
from timm_netaug.errors import UserError

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


@pytest.mark.parametrize('flags, said', [
    ('--lr-noise 0.1 0.9 --lr-noise-pct 0', '--lr-noise-pct must be above 0'),  # timm's scheduler would never end
    ('--lr-noise 0.1 0.9 --lr-noise-std nan', '--lr-noise-std must be at least 0 and at most 1000'),
    ('--weight-decay -1', '--weight-decay must be at least 0'), ('--lr -1', '--lr must be at least 0'),
    ('--warmup-lr -1', '--warmup-lr must be at least 0'), ('--min-lr nan', '--min-lr must be at least 0'),
    ('--lr-base-size 0', '--lr-base-size must be at least 1'), ('--decay-epochs 0', '--decay-epochs must be above 0'),
    ('--decay-rate -1', '--decay-rate must be at least 0'), ('--lr-cycle-mul 0', '--lr-cycle-mul must be above 0'),
    ('--lr-k-decay -1', '--lr-k-decay must be above 0'), ('--layer-decay 0', '--layer-decay must be above 0'),
    ('--opt-eps inf', '--opt-eps must be at least 0 and at most 1'), ('--bn-eps 0', '--bn-eps must be above 0'),
    ('--head-init-bias 1e30', '--head-init-bias must be'), ('--scale -1 1', '--scale must be above 0'),
    ('--scale 0.1 1.5', '--scale must be at most 1, got 1.5'),
    ('--ratio 0 1', '--ratio must be above 0'), ('--ratio 2 1', '--ratio takes the smaller number first, got 2 1'),
    ('--cutmix-minmax 0.4 0.2', '--cutmix-minmax takes the smaller number first'),
    ('--lr inf', '--lr must be at least 0 and finite'),
    ('--color-jitter inf', '--color-jitter must be'), ('--recount -1', '--recount must be'),
    ('--aug-splits 1000000', '--aug-splits must be'), ('--workers 1000000', '--workers must be'),
    ('--seed 99999999999999999999', '--seed must be'), ('--poly-epsilon nan', '--poly-epsilon must be a finite number'),
    ('--bce-pos-weight -1', '--bce-pos-weight must be above 0'), ('--crop-pct 95', '--crop-pct must be'),
    ('--experiment ../run', '--experiment ../run leaves the folder of --output'),
    ('--experiment /run', '--experiment /run leaves the folder of --output'),
])
def test_numbers_out_of_range(flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        check_train_args(train_parser().parse_args(['--data-dir', 'DATA', *flags.split()]))


@pytest.mark.parametrize('fields', [dict(divisor=10 ** 12), dict(width_mults=(1, 1e30)), dict(expand_mults=(1, 1e30))])
def test_sub_networks_that_no_memory_holds_or_nothing_augments(fields):
    with pytest.raises(ValueError, match='must be at most 256|must have no number above 100'):
        NetAugConfig(**fields)
