"""Runs scripts in forks of one process that has imported what they import, which takes seconds each time otherwise.

Reads a JSON object a line, and answers each with a line of JSON. An object with `argv` (with `cwd`, variables to add to
the environment, and files for standard output and error) starts a run, and is answered with its process ID. An object
with `wait`, such an ID, is answered with the exit status, or with null where `block` is false and the run goes on.
"""
import atexit
import gc
import json
import os
import runpy
import signal
import sys
import traceback

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

import timm_netaug
import timm_netaug.cli.convert
import timm_netaug.cli.export
import timm_netaug.cli.hub
import timm_netaug.cli.info
import timm_netaug.cli.train
import timm_netaug.cli.train_detection
import timm_netaug.cli.validate
import timm_netaug.cli.validate_detection  # noqa: F401


def next_run() -> dict:
    """Fork for every run, and return its request in the fork."""
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            pid, status = os.waitpid(request['wait'], 0 if request['block'] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
            os.setpgid(answer, answer)  # a test may stop the run together with the processes that it starts
        print(json.dumps(answer), flush=True)
    os._exit(0)


def write_nothing(summary: str, out: str, *_) -> None:
    open(out, 'wb').close()


Image.init()
for name in ('test_efficientnet', 'netaug_mbv2_tiny'):  # most runs with NetAug are of these, and need not trace them
    with torch.device('meta'):
        timm_netaug.augment(timm.create_model(name, num_classes=10))
gc.freeze()  # a collection would write to the memory that forks share
run = next_run()
np.random.seed()  # as a new process has it
signal.alarm(600)
for number, path in enumerate((os.devnull, run['stdout'], run['stderr'])):
    file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, number)
    os.close(file)
os.chdir(run['cwd'])
os.environ.update(run['env'])
if not run['draw']:
    # Drawing the curves takes as long as an epoch of few images, most of it before the figure is saved.
    timm_netaug.cli.train.write_curves = write_nothing
    Figure.savefig = lambda *args, **kwargs: None
status = 0
try:
    first, *rest = run['argv']
    if first == '-c':
        sys.argv = ['-c', *rest[1:]]
        sys.path[0] = ''
        exec(rest[0], {'__name__': '__main__'})
    elif first == '-m':
        sys.argv = rest
        sys.path[0] = run['cwd']
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = run['argv']
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name='__main__')
except SystemExit as e:
    status = e.code
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
except BaseException:
    traceback.print_exc()
    status = 1
# What an interpreter does at its end, but for freeing all that has been imported.
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status or 0)
