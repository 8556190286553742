"""One process of a job, from its signals to its exit code. Imports no torch until it trains.

A job on one device has one such process, the command itself; other jobs have one per device.
"""

from __future__ import annotations

import ctypes
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

from dalle.errors import DalleError, ForeignFileError
from dalle.platform.environment import Job, Paths
from dalle.platform.outputs import write_failure
from training.config.fields import Hyperparameters
from training.distributed.topology import Place, Timeouts
from training.stopping import Stopped

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MAX_KEPT_BLOCK_BYTES = 32 << 20  # larger blocks go back to the kernel at once, as by default
_MAX_KEPT_BYTES = 256 << 20


def keep_memory() -> None:
    """Make glibc keep freed memory: blocks below 32 MiB, and 256 MiB at the end of each arena.

    A step allocates the same blocks as the one before. By default glibc gives some of them back to
    the kernel in between, which hands them out again page by page, each filled with zeros: a
    transformer step of the rainbow recipe had 7,000 to 10,000 page faults and spent 36 to 62 ms in
    the kernel. With these settings it has 14 to 44 page faults and 8 to 18 ms, a tenth less time in
    all (two cores, in turns, 2026-11-26). Does nothing without glibc; is called before torch loads.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _MAX_KEPT_BLOCK_BYTES)
        set_option(_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES)


def configure_logging() -> None:
    """Log records from INFO on to stderr, with time and module."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def exit_code_of(work: Callable[[], int], paths: Paths) -> int:
    """Return the result of `work`, or `code_of` an error with its cause in the failure file."""
    try:
        return work()
    except Exception as error:
        cause = describe(error)
        logger.error("%s", cause, exc_info=not isinstance(error, DalleError))
        write_failure(paths, cause, traceback.format_exc())
        return code_of(error)


def code_of(error: Exception) -> int:
    """Return the exit code of a job that failed: 2 where published weights are refused, else 1."""
    return 2 if isinstance(error, ForeignFileError) else 1


def run_rank(
    job: Job,
    settings: Hyperparameters,
    place: Place,
    stop: threading.Event,
    *,
    port: int,
    listener: socket.socket | None = None,
    timeouts: Timeouts,
) -> int:
    """Train as one rank of the job and return the exit code.

    port, listener: of the first rank, see `Rendezvous.join`. Raises the errors of training when
    this is the only rank. One of several sends its error to the others and ends the process at
    once: an orderly end would wait for ranks that have ended.
    """
    keep_memory()
    # Imported here: torch takes seconds, which a job that cannot run need not wait for.
    import torch

    from training.engine.devices import choose_device
    from training.job.trainer import Trainer

    # Momenta of weights without a gradient decay to denormal numbers, on which a CPU is several
    # times slower. Set before torch starts its threads, which inherit it.
    torch.set_flush_denormal(True)
    device = choose_device(job.device, place.device)
    if place.size == 1:
        Trainer(job, settings, stop, device=device).run()
        return 0

    from training.distributed.rendezvous import Rendezvous

    try:
        rendezvous = Rendezvous.join(
            place,
            named_interface=job.network_interface_name,
            port=port,
            listener=listener,
            timeouts=timeouts,
            stop=stop,
            on_lost=lambda cause: _end(job.paths, cause),
        )
    except Stopped:
        logger.warning("stopped before all hosts had come")
        return 0
    try:
        ranks = rendezvous.begin(device)
        if not ranks.is_first:
            logger.info("this rank trains along; the first one writes the model and the metrics")
            logging.getLogger().setLevel(logging.WARNING)
        Trainer(job, settings, stop, device=device, ranks=ranks).run()
        rendezvous.leave()
    except Exception as error:
        cause, trace = describe(error), traceback.format_exc()
        logger.error("%s", cause, exc_info=not isinstance(error, DalleError))
        rendezvous.fail(error, cause)
        _end(job.paths, cause, trace, code_of(error))
    return 0


def leave(code: int) -> NoReturn:
    """Flush the output and end this process, whatever its threads are waiting for.

    For processes that have used torch.distributed. An ordinary exit stops each daemon thread that
    returns from a call of torch's store by unwinding its stack; C++ does not allow that there and
    aborts the process with `terminate called without an active exception`.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)


def describe(error: Exception) -> str:
    """Return the message of our own errors, and a description of all others."""
    if isinstance(error, DalleError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {error}; give the job a larger volume"
    # torch's own MemoryError is a RuntimeError.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "the machine's memory is too small; take a larger instance or a smaller batch_size"
    return f"internal error, {type(error).__name__}: {error}"


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and the first Ctrl-C set; a second Ctrl-C ends the program."""
    stop = threading.Event()

    def set_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, set_stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(paths: Paths, cause: str, trace: str = "", code: int = 1) -> NoReturn:
    """Write the failure file and end this process, whatever its threads are waiting for."""
    logger.error("ending: %s", cause)
    write_failure(paths, cause, trace)
    leave(code)
