"""Processes for tests that need not import torch, which takes seconds: forks of one that has.

They are as real as others: they have their own memory, signals, exit status and log. One server for
the whole session imports what `train` needs, and never does more than that before it forks.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext

import torch

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "training.distributed.rendezvous",
        "training.job.trainer",
        "training.job.components",
        "matplotlib.backends.backend_svg",
    ]
)


class Forked:
    """A process that calls `work(*arguments)` and exits with what that returns.

    work: a function of a module, which is imported by its name. log: a file for both of its
    streams; without one they are those of the tests. Has what tests use of `subprocess.Popen`.
    """

    def __init__(self, work, *arguments, log=None, environment=None):
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self._process = CONTEXT.Process(target=_begin, args=(work, arguments, log, dict(variables)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        """The exit status, or minus the number of the signal that killed it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _begin(work, arguments, log, environment):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # the variable came too late for it
    if log is not None:
        with open(log, "ab") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    raise SystemExit(work(*arguments))  # from a fork it is `os._exit`, with the output flushed
