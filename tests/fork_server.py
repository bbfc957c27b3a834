"""Runs scripts in forks of one process that has imported torch and timm, which takes seconds each time otherwise.

Reads a JSON line for every run (argv, cwd, and files for standard output and error), and writes its exit status.
"""
import json
import os
import runpy
import signal
import sys

import numpy as np

import timm_netaug.cli.train
import timm_netaug.cli.train_detection
import timm_netaug.cli.validate
import timm_netaug.cli.validate_detection  # noqa: F401


def next_run() -> dict:
    """Fork for every request, and return it in the fork."""
    for line in sys.stdin:
        request, pid = json.loads(line), os.fork()
        if pid == 0:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


run = next_run()
np.random.seed()  # as a new process has it
signal.alarm(600)
for number, path in enumerate((os.devnull, run['stdout'], run['stderr'])):
    file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, number)
    os.close(file)
os.chdir(run['cwd'])
first, *rest = run['argv']
if first == '-m':
    sys.argv = rest
    sys.path[0] = run['cwd']
    runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
else:
    sys.argv = run['argv']
    sys.path[0] = os.path.dirname(os.path.abspath(first))
    runpy.run_path(first, run_name='__main__')
