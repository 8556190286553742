"""Processes of this host's devices, when there are several: started, stopped and waited for.

They are ranks like those of other hosts. The process that starts them does not train: it passes a
stop on, waits, and returns one exit code.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NoReturn

from dalle.platform.environment import Job, Paths
from dalle.platform.outputs import write_failure
from training.config.fields import Hyperparameters
from training.distributed.topology import LOCAL_WORLD_SIZE, LOOPBACK, Place, Timeouts
from training.job import process

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_on_devices(
    job: Job,
    settings: Hyperparameters,
    *,
    num_devices: int,
    port: int,
    timeouts: Timeouts,
    stop: threading.Event,
) -> int:
    """Start a rank for each device, wait for all of them, and return this host's exit code.

    port: on which the first host listens; a job of one host takes a free one. On the CPU the
    processes share its threads.
    """
    listener = None
    if len(job.hosts) == 1:
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = []
    for device in range(num_devices):
        place = Place(job.hosts, job.current_host, num_devices, device)
        run_rank = partial(process.run_rank, job, settings, place, port=port, timeouts=timeouts)
        if device == 0:
            run_rank = partial(run_rank, listener=listener)
        arguments = (run_rank, job.paths, num_devices)
        processes.append(
            context.Process(target=_run_device, args=arguments, name=f"device {device}")
        )
    # SIGTERM would kill a process that is still starting: the processes begin with both signals
    # blocked and unblock them when their handlers are set. multiprocessing's resource tracker must
    # run before: starting it unblocks the signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        for each in processes:
            each.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if listener is not None:
        listener.close()  # the first device has its own copy
    _wait_for(processes, stop)
    killed = [each for each in processes if each.exitcode is not None and each.exitcode < 0]
    if killed:
        names = ", ".join(
            f"{each.name} by {signal.Signals(-(each.exitcode or 0)).name}" for each in killed
        )
        cause = f"the processes of these devices were killed: {names}"
        if any(each.exitcode == -signal.SIGKILL for each in killed):
            cause += (
                ". After SIGKILL the machine's memory is probably too small: take a larger "
                "instance or a smaller batch_size"
            )
        logger.error("%s", cause)
        write_failure(job.paths, cause)
    codes = {each.exitcode for each in processes}
    return 2 if 2 in codes else int(codes != {0})


def _wait_for(processes: Sequence[BaseProcess], stop: threading.Event) -> None:
    """Wait until all processes have ended; terminate them once when `stop` is set."""
    is_passed_on = False
    while running := [each for each in processes if each.is_alive()]:
        wait([each.sentinel for each in running], timeout=POLL_SECONDS)
        if stop.is_set() and not is_passed_on:
            for each in running:
                each.terminate()
            is_passed_on = True


def _run_device(run_rank: Callable[..., int], paths: Paths, num_devices: int) -> NoReturn:
    """Main function of the process of one device. run_rank: of `process`, without its `stop`."""
    process.configure_logging()
    os.environ[LOCAL_WORLD_SIZE] = str(num_devices)  # their loaders share /dev/shm
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with process.stopped_by_signals() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

        def work() -> int:
            import torch

            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_devices))
            return run_rank(stop=stop)

        code = process.exit_code_of(work, paths)
    process.leave(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
