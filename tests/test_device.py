"""What the scripts set up of the machine."""
import sys

import pytest

from conftest import run_python


@pytest.mark.skipif(sys.platform != 'linux', reason='mallopt is of glibc')
def test_memory_is_kept():
    """A large tensor's pages stay the process's when it is freed, and go back to the system without it."""
    code = (
        'import sys, torch\n'
        'from timm_netaug.cli.device import keep_memory\n'
        'def resident():\n'
        '    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))\n'
        'if sys.argv[1] == "keep": keep_memory()\n'
        'before = resident()\n'
        'x = torch.ones(64 * 2 ** 20 // 4)\n'
        'del x\n'
        'print(resident() - before)\n')
    kept, given_back = (int(run_python('-c', code, how, fork=False).stdout) for how in ('keep', 'as-ever'))
    assert kept > 60 * 1024 and given_back < 8 * 1024  # KiB
