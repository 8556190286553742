"""Steps that are done once: what was done, from what, and what may be reused by the next run.

A step's key says what its outcome depends on. A step whose key is the one it was done with, and
whose files are all there, is passed over. Knows nothing of what the steps do.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle.platform.disk import write_atomically


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to do.

    title: for people. seconds: about how long it takes.
    key: what the outcome depends on, as JSON values; asked for when all earlier steps are done.
    outputs: the files that prove it. action: does it; told whether an earlier run with the same
    key began and did not finish.
    """

    name: str
    title: str
    seconds: float
    key: Callable[[], object]
    outputs: Sequence[Path]
    action: Callable[[bool], None]


class Ledger:
    """A JSON file that says which steps were begun and done, with which keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._entries: dict[str, dict[str, object]] = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            self._entries = {}  # a damaged one costs a run, nothing else

    def is_done(self, step: Step, digest: str) -> bool:
        """Whether the step was finished with this key and all its files are still there."""
        done = self._entries.get(step.name) == {"key": digest, "is_done": True}
        return done and all(output.exists() for output in step.outputs)

    def begin(self, step: Step, digest: str) -> bool:
        """Note the beginning; returns whether the same was begun before and not finished."""
        is_continued = self._entries.get(step.name) == {"key": digest, "is_done": False}
        self._write(step.name, digest, is_done=False)
        return is_continued

    def end(self, step: Step, digest: str) -> None:
        """Note that the step is done."""
        self._write(step.name, digest, is_done=True)

    def _write(self, name: str, digest: str, *, is_done: bool) -> None:
        self._entries[name] = {"key": digest, "is_done": is_done}
        write_atomically(self._path, json.dumps(self._entries, indent=1) + "\n")


def run_steps(steps: Sequence[Step], ledger: Ledger, say: Callable[[str], None]) -> int:
    """Do all steps in order, each announced with the time left; returns how many were not reused.

    The time left counts every later step, reused or not: what one step changes, the next redoes.
    """
    num_done = 0
    for number, step in enumerate(steps):
        digest = digest_of(step.key())
        if ledger.is_done(step, digest):
            say(f"{step.title}: reused")
            continue
        left = sum(each.seconds for each in steps[number:])
        say(f"{step.title}; about {duration(left)} left in all")
        step.action(ledger.begin(step, digest))
        ledger.end(step, digest)
        num_done += 1
    return num_done


def announcer() -> Callable[[str], None]:
    """A function that prints a line with the time since now before it."""
    began = time.monotonic()

    def say(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"[{minutes:2}:{seconds:02}] {line}", flush=True)

    return say


def digest_of(key: object) -> str:
    """sha256 of JSON values; the order of an object's names makes no difference."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 of a file's bytes; of a missing one ""."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def duration(seconds: float) -> str:
    """`8 min 05 s` or `41 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
