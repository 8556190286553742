"""A small training job on this machine that can be watched and interrupted at chosen moments.

Moments are told by what the job leaves on the disk: its checkpoints, finished and half-written, and
its log. Knows nothing of models, and imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dalle.manifest import STAGING
from dalle.platform.environment import Paths
from dalle.types import STAGES
from training import rainbow
from training.distributed.topology import LOOPBACK

PAUSE = 0.0005  # between two looks at a log or a directory; a step takes milliseconds
PATIENCE = 300.0  # seconds for anything that should come; on a busy machine a start takes a minute
SETTINGS: dict[str, Any] = {
    "size": "tiny",
    "image_size": 16,
    "tokenizer_kind": "word",
    "text_length": 8,
    "batch_size": 8,
    "warmup_steps": 2,
    "num_validations": 2,
    # A checkpoint after every step, and reports that take several into account.
    "checkpoint_minutes": 1e-6,
    "log_every": 4,
    # Whatever draws random numbers or keeps state of its own.
    "dropout": 0.1,
    "caption_dropout": 0.1,
    "token_noise": 0.1,
    "ema_decay": 0.9,
}


class SoakError(Exception):
    """A job did not survive an interruption as it should."""


class Process(Protocol):
    """What a soak needs of `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...


Start = Callable[[list[str], Path], Process]
"""Begins `train` with these arguments, and with both its streams appended to a file."""


def start_command(arguments: list[str], log: Path) -> Process:
    """The real command, with one thread: there is little to do."""
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "training", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DALLE_DEVICE": "cpu"},
        )


class SmallJob:
    """A job of three models, steps of each, on hosts that are addresses of this machine.

    Every host has a directory like /opt/ml under `directory`, which must be new.
    """

    def __init__(self, directory: Path, *, steps: int, num_hosts: int, start: Start) -> None:
        self.steps = steps
        self.hosts = [f"127.0.0.{number + 1}" for number in range(num_hosts)]
        self.paths = [Paths(directory / host) for host in self.hosts]
        self._start = start
        self._logs = directory / "logs"
        self._logs.mkdir(parents=True)
        self._num_runs = 0
        for paths, host in zip(self.paths, self.hosts, strict=True):
            _write_inputs(paths, host, self.hosts, SETTINGS | {"max_steps": steps})

    @property
    def num_steps(self) -> int:
        """Of all stages together; a position is one of them, counted from 0."""
        return len(STAGES) * self.steps

    @contextmanager
    def run(self) -> Iterator[Run]:
        """The job, begun; whatever still runs is killed at the end."""
        self._num_runs += 1
        logs = [self._logs / f"{self._num_runs:03}-{host}.txt" for host in self.hosts]
        with socket.create_server((LOOPBACK, 0)) as server:
            port = str(server.getsockname()[1])
        arguments = [["--root", str(each.root), "--rendezvous-port", port] for each in self.paths]
        for log in logs:
            log.touch()
        unfinished = self.unfinished()
        processes = [self._start(*each) for each in zip(arguments, logs, strict=True)]
        run = Run(self, logs, processes, unfinished)
        try:
            yield run
        finally:
            for process in run.processes:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def move(self) -> None:
        """Remove what a new machine would not have: everything but the first host's checkpoints."""
        for number, paths in enumerate(self.paths):
            lost = (paths.model, paths.output) + ((paths.checkpoints,) if number else ())
            for directory in lost:
                shutil.rmtree(directory, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, of whichever stage."""
        for stage in reversed(STAGES):
            found = sorted((self.paths[0].checkpoints / stage).glob("step-*.pt"))
            if found:
                return found[-1]
        return None

    def checkpoint_bytes(self) -> int:
        """The size of the newest complete checkpoint; 0 without one."""
        newest = self.newest()
        try:
            return 0 if newest is None else newest.stat().st_size
        except FileNotFoundError:  # younger ones have come
            return self.checkpoint_bytes()

    def position(self) -> int:
        """How many steps of all stages are in the checkpoints."""
        newest = self.newest()
        if newest is None:
            return 0
        return STAGES.index(newest.parent.name) * self.steps + int(newest.stem.split("-")[1])

    def unfinished(self) -> dict[Path, os.stat_result]:
        """Checkpoints, and the model, that are being written or were when their writer died."""
        first = self.paths[0]
        found = {}
        for path in (*first.checkpoints.glob("*/*.tmp"), first.model / STAGING):
            try:
                found[path] = path.stat()
            except FileNotFoundError:  # it has its name now, or there is none
                continue
        return found


class Run:
    """One start of a job, until it ends or is interrupted."""

    def __init__(
        self,
        job: SmallJob,
        logs: list[Path],
        processes: list[Process],
        unfinished: Mapping[Path, os.stat_result],
    ) -> None:
        self.job = job
        self.logs = logs
        self.processes = processes
        self._older = unfinished

    def wait_until(self, is_so: Callable[[], object], *, pause: float = PAUSE) -> bool:
        """Look again and again whether it is so; False when a host ended before it was.

        Raises SoakError when neither comes.
        """
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if any(process.poll() is not None for process in self.processes):
                return bool(is_so())
            if time.monotonic() >= deadline:
                raise SoakError(f"nothing came of it within {PATIENCE:g} s; see {self.logs}")
            time.sleep(pause)
        return True

    def half_written(self) -> list[int]:
        """The bytes so far of checkpoints that this run began to write and has not finished."""
        return [stat.st_size for path, stat in self._unfinished() if path.suffix == ".tmp"]

    def is_half_saved(self) -> bool:
        """Whether this run began to write the model and has not finished."""
        return any(path.name == STAGING for path, _ in self._unfinished())

    def _unfinished(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path, stat in self.job.unfinished().items():
            if path not in self._older or _version(stat) != _version(self._older[path]):
                yield path, stat

    def log(self, host: int = 0) -> str:
        return self.logs[host].read_text("utf-8", errors="replace")

    def resumed_from(self) -> dict[str, Path]:
        """Stage -> the checkpoint from which it went on, as the log says."""
        found = map(Path, re.findall(r"resuming from (\S+\.pt)", self.log()))
        return {path.parent.name: path for path in found}

    def signal(self, host: int, number: int) -> None:
        self.processes[host].send_signal(number)

    def statuses(self) -> list[int]:
        """Exit statuses of all hosts, negative where a signal killed one; waits for them.

        Raises SoakError when one does not end.
        """
        try:
            return [process.wait(timeout=PATIENCE) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise SoakError(f"a host still ran after {PATIENCE:g} s; see {self.logs}") from error

    def failure(self, host: int) -> str:
        """A host's failure file; empty without one."""
        path = self.job.paths[host].failure
        return path.read_text("utf-8") if path.exists() else ""


def _version(stat: os.stat_result) -> tuple[int, int]:
    """Another one for a file of the same name that was made or changed since."""
    return stat.st_ino, stat.st_mtime_ns


def _write_inputs(paths: Paths, host: str, hosts: list[str], settings: Mapping[str, Any]) -> None:
    samples = rainbow.samples()[::300]
    for channel, chosen in (("train", samples), ("validation", samples[:4])):
        directory = paths.input_data / channel
        directory.mkdir(parents=True)
        for number, sample in enumerate(chosen):
            Image.fromarray(sample.picture()).save(directory / f"{number:02}.png")
            (directory / f"{number:02}.txt").write_text(sample.caption, encoding="utf-8")
    paths.config.mkdir(parents=True)
    texts = {name: str(value) for name, value in settings.items()}
    paths.hyperparameters.write_text(json.dumps(texts), encoding="utf-8")
    place = {"current_host": host, "hosts": hosts}
    paths.resource_config.write_text(json.dumps(place), encoding="utf-8")
