"""One process of a job, from its signals to its exit code. Imports no torch until it trains.

A job on one device has one such process, the command itself; other jobs have one per device.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dalle.errors import DalleError
from dalle.platform.environment import Job, Paths, write_failure
from training.config.hyperparameters import Hyperparameters
from training.distributed.topology import Patience, Place
from training.memory.allocator import keep_memory
from training.stopping import Stopped

logger = logging.getLogger(__name__)


def configure_logging() -> None:
    """Everything from INFO on to stderr, with time and module."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def exit_code_of(work: Callable[[], int], paths: Paths) -> int:
    """What the work returns, or 1 with the cause in the failure file when it raises."""
    try:
        return work()
    except Exception as error:
        cause = describe(error)
        logger.error("%s", cause, exc_info=not isinstance(error, DalleError))
        write_failure(paths, cause, traceback.format_exc())
        return 1


def run_rank(
    job: Job,
    settings: Hyperparameters,
    place: Place,
    stop: threading.Event,
    *,
    port: int,
    listener: socket.socket | None = None,
    patience: Patience,
) -> int:
    """Train as one rank of the job, alone or together with all others. Returns the exit code.

    port, listener: of the first rank, see `Meeting.join`. Raises the errors of training when this
    is the only rank. One of several tells the others of its error and ends the process at once:
    no orderly end is possible once they do not take part in what it would wait for.
    """
    keep_memory()
    # Imported here: torch takes seconds, which a job that cannot run need not wait for.
    import torch

    from training.engine.devices import choose_device
    from training.job import components as workshop
    from training.job import trainer as worker

    # Momenta of weights without a gradient fade into denormal numbers, on which a CPU takes several
    # times as long. Before torch starts the threads that take this over.
    torch.set_flush_denormal(True)
    device = choose_device(job.device, place.device)
    if place.size == 1:
        worker.run(job, settings, stop, workshop.open_workshop, device=device)
        return 0

    from training.distributed.rendezvous import Meeting

    try:
        meeting = Meeting.join(
            place,
            named_interface=job.network_interface_name,
            port=port,
            listener=listener,
            patience=patience,
            stop=stop,
            on_lost=lambda cause: _end(job.paths, cause),
        )
    except Stopped:
        logger.warning("stopped before all hosts had come")
        return 0
    try:
        ranks = meeting.begin(device)
        if not ranks.is_first:
            logger.info("this rank trains along; the first one writes and reports what comes of it")
            logging.getLogger().setLevel(logging.WARNING)
        worker.run(job, settings, stop, workshop.open_workshop, device=device, ranks=ranks)
        meeting.leave()
    except Exception as error:
        cause, trace = describe(error), traceback.format_exc()
        logger.error("%s", cause, exc_info=not isinstance(error, DalleError))
        meeting.fail(error, cause)
        _end(job.paths, cause, trace)
    return 0


def leave(code: int) -> NoReturn:
    """Flush the output and end this process, whatever its threads are waiting for.

    For processes that have used torch.distributed. Where Python ends by itself, a daemon thread
    that then returns from a call of torch's store is unwound through C++ that must not be, and
    the process dies of `terminate called without an active exception`.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)


def describe(error: Exception) -> str:
    """What to do about it for errors raised on purpose, and what it was for all others."""
    if isinstance(error, DalleError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {error}; give the job a larger volume"
    if isinstance(error, MemoryError):
        return "the machine's memory is too small; take a larger instance or a smaller batch_size"
    return f"internal error, {type(error).__name__}: {error}"


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first Ctrl-C set; a second Ctrl-C ends the program at once."""
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, ask_to_stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(paths: Paths, cause: str, trace: str = "") -> NoReturn:
    """End this process with 1 and the failure file, whatever its threads are waiting for."""
    logger.error("ending: %s", cause)
    write_failure(paths, cause, trace)
    leave(1)
