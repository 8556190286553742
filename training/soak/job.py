"""A small training job on this machine that can be interrupted at chosen moments.

The moments come from its files: checkpoints, finished and half-written, and the log. Knows nothing
of models, and imports no torch.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dalle.manifest import STAGING
from dalle.platform.environment import Paths
from dalle.types import STAGES
from training import rainbow
from training.distributed.topology import LOOPBACK

PAUSE = 0.0005  # seconds between two polls; a step takes milliseconds
PATIENCE = 300.0  # seconds for any wait; on a busy machine a start takes a minute
SETTINGS: dict[str, Any] = {
    "size": "tiny",
    "image_size": 16,
    "tokenizer_kind": "word",
    "text_length": 8,
    "batch_size": 8,
    "warmup_steps": 2,
    "num_validations": 2,
    # A checkpoint after every step; logged metrics cover several steps.
    "checkpoint_minutes": 1e-6,
    "log_every": 4,
    # Everything that uses random numbers or keeps a state.
    "dropout": 0.1,
    "caption_dropout": 0.1,
    "token_noise": 0.1,
    "ema_decay": 0.9,
}


class SoakError(Exception):
    """A job failed a check after an interruption."""


Process = Any  # subprocess.Popen, or what has its poll, wait and send_signal
Start = Callable[[list[str], Path], Process]
"""Starts `train` with these arguments; both output streams are appended to a file."""


def start_command(arguments: list[str], log: Path) -> Process:
    """Start the real command with one thread, which is enough for tiny models."""
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "training", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DALLE_DEVICE": "cpu"},
        )


class SmallJob:
    """A job of all three stages on hosts that are loopback addresses of this machine.

    steps: of each stage. `directory` must be new; each host has a directory like /opt/ml in it.
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
        """Return the steps of all stages together; a position is one of them, from 0."""
        return len(STAGES) * self.steps

    @contextmanager
    def run(self) -> Iterator[Run]:
        """Start the job; kill what still runs at the end."""
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
        """Remove everything but the first host's checkpoints, as on a new machine."""
        for number, paths in enumerate(self.paths):
            lost = (paths.model, paths.output) + ((paths.checkpoints,) if number else ())
            for directory in lost:
                shutil.rmtree(directory, ignore_errors=True)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint of all stages."""
        found = self.paths[0].checkpoints.glob("*/step-*.pt")
        return max(found, key=lambda path: (STAGES.index(path.parent.name), path), default=None)

    def checkpoint_bytes(self) -> int:
        """Return the size of the newest complete checkpoint; 0 without one."""
        newest = self.newest()
        try:
            return 0 if newest is None else newest.stat().st_size
        except FileNotFoundError:  # newer ones replaced it
            return self.checkpoint_bytes()

    def position(self) -> int:
        """Return how many steps of all stages are in the checkpoints."""
        newest = self.newest()
        if newest is None:
            return 0
        return STAGES.index(newest.parent.name) * self.steps + int(newest.stem.split("-")[1])

    def unfinished(self) -> dict[Path, os.stat_result]:
        """Return checkpoints and model that are, or were left, half-written."""
        first = self.paths[0]
        found = {}
        for path in (*first.checkpoints.glob("*/*.tmp"), first.model / STAGING):
            with suppress(FileNotFoundError):  # renamed, or absent
                found[path] = path.stat()
        return found


@dataclass(eq=False)
class Run:
    """One start of a job, until it ends or is interrupted. older: half-written before it began."""

    job: SmallJob
    logs: list[Path]
    processes: list[Process]
    older: Mapping[Path, os.stat_result]

    def wait_until(self, is_so: Callable[[], object], *, pause: float = PAUSE) -> bool:
        """Poll until a condition holds; return False when a host ended before.

        Raises SoakError when neither happens.
        """
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if any(process.poll() is not None for process in self.processes):
                return bool(is_so())
            if time.monotonic() >= deadline:
                raise SoakError(f"no progress within {PATIENCE:g} s; see {self.logs}")
            time.sleep(pause)
        return True

    def half_written(self) -> list[int]:
        """Return the bytes so far of the checkpoints that this run is writing."""
        return [stat.st_size for path, stat in self._unfinished() if path.suffix == ".tmp"]

    def is_half_saved(self) -> bool:
        """Return whether this run is writing the model."""
        return any(path.name == STAGING for path, _ in self._unfinished())

    def _unfinished(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path, stat in self.job.unfinished().items():
            last = self.older.get(path)
            # A file of the same name may have been made, or changed, since.
            if last is None or (stat.st_ino, stat.st_mtime_ns) != (last.st_ino, last.st_mtime_ns):
                yield path, stat

    def resumed_from(self) -> dict[str, Path]:
        """Return stage -> the checkpoint that it resumed from, by the log."""
        log = self.logs[0].read_text("utf-8", errors="replace")
        found = map(Path, re.findall(r"resuming from (\S+\.pt)", log))
        return {path.parent.name: path for path in found}

    def statuses(self) -> list[int]:
        """Wait for all hosts; return their exit statuses, negative where a signal killed one.

        Raises SoakError when one does not end.
        """
        try:
            return [process.wait(timeout=PATIENCE) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise SoakError(f"a host still ran after {PATIENCE:g} s; see {self.logs}") from error

    def failure(self, host: int) -> str:
        """Return a host's failure file; empty without one."""
        path = self.job.paths[host].failure
        return path.read_text("utf-8") if path.exists() else ""


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
