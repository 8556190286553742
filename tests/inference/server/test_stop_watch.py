"""Processes that are stopped by a signal."""

import signal
import subprocess

import psutil  # type: ignore[import-untyped]
import pytest

from inference.server.stop_watch import StopWatch


@pytest.fixture
def process():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def stop(process: psutil.Process) -> None:
    """Send SIGSTOP, and wait until the kernel has acted on it."""
    process.send_signal(signal.SIGSTOP)
    while process.status() != psutil.STATUS_STOPPED:
        pass


def test_a_process_is_stopped_when_two_looks_in_a_row_find_it_so(process):
    watch = StopWatch(process.pid)
    assert not watch.is_stopped()
    stop(process)
    assert [watch.is_stopped() for _ in range(3)] == [False, True, True]


def test_a_process_that_goes_on_is_not(process):
    watch = StopWatch(process.pid)
    stop(process)
    assert not watch.is_stopped()
    process.send_signal(signal.SIGCONT)
    while process.status() == psutil.STATUS_STOPPED:
        pass
    assert not watch.is_stopped()
    stop(process)
    assert not watch.is_stopped()


def test_nor_is_one_that_has_ended(process):
    watch = StopWatch(process.pid)
    process.kill()
    process.wait()
    assert [watch.is_stopped() for _ in range(2)] == [False, False]
