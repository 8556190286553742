"""Processes for tests that need not import torch, which takes seconds: forks of one that has.

They are as real as others: they have their own memory, signals, exit status and log. One server for
the whole session imports what `train` and `serve` need, and never does more than that before it
forks.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

import torch

PIPE = subprocess.PIPE
CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "training.distributed.rendezvous",
        "training.job.trainer",
        "training.job.components",
        "matplotlib.backends.backend_svg",
        "torch._dynamo",  # which the first optimiser imports
        "inference.engine.model_runner",
        "inference.server.app",
        "inference.server.server",
        "tests.inference.served",
        "tests.training.two_hosts",
    ]
)


class Forked:
    """A process that calls `work(*arguments)` and exits with what that returns.

    work: a function of a module, which is imported by its name. log: a file for both of its
    streams, or PIPE: `output` is then what to read them from; without one they are those of the
    first test that forked. environment: its variables; without them those of the tests. folder:
    its working directory. Has what tests use of `subprocess.Popen`.
    """

    def __init__(self, work, *arguments, log=None, environment=None, folder=None):
        variables = dict(environment or os.environ) | {"OMP_NUM_THREADS": "1"}
        self.output = None
        with ExitStack() as stack:
            if log is PIPE:
                ours, its = CONTEXT.Pipe(duplex=False)
                with ours:
                    self.output = os.fdopen(os.dup(ours.fileno()))
                log = stack.enter_context(its)
            given = (work, arguments, log, variables, folder or os.getcwd())
            self._process = CONTEXT.Process(target=_begin, args=given)
            self._process.start()
        self.pid = self._process.pid
        # After a test that failed it may run on; multiprocessing would wait for it at the end.
        util.Finalize(None, self.kill, exitpriority=1)

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


def _begin(work, arguments, log, environment, folder):
    gc.freeze()  # a collection would look at all that torch has imported
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)  # the variable came too late for it
    if log is not None:
        with log if isinstance(log, Connection) else open(log, "ab") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    raise SystemExit(work(*arguments))  # from a fork it is `os._exit`, with the output flushed
