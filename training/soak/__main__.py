"""Interrupt a training job many times, and check that its result is that of an undisturbed one.

    python -m training.soak --kills 50 --out out/soak

A small job of all three models is trained twice: undisturbed, and interrupted at random moments.
Most interruptions are SIGKILL: within a step, while a checkpoint or the model is written, at a
restart, and during a stop; some are SIGTERM alone. On several hosts one of them is hit, and the
others must end by themselves and name it. Every restart must resume from the newest complete
checkpoint, half of them with nothing else left, and both jobs must write the same weights and
metrics, bit for bit. The last line of stdout is one JSON object; exit status 1 is a failed check.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import secrets
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dalle.platform.user import name_user
from training.soak.job import Run, SmallJob, SoakError, Start, start_command

Kind = Literal["step", "checkpoint", "model", "restart", "stop", "stop and kill"]
KILLS: tuple[Kind, ...] = ("checkpoint", "step", "checkpoint", "restart", "model", "stop and kill")
"""Kinds of SIGKILL in turn. `checkpoint` hits while the file is half-written."""

IN_A_CHECKPOINT = "a half-written checkpoint"
KILLS_PER_STOP = 5
SHARE_MOVED = 0.5
CLOCK = ("seconds", "samples_per_second")  # metrics that differ between runs
DATED = ("manifest.json", "MODEL_CARD.md")  # files of the model that do


@dataclass(frozen=True)
class Interruption:
    """One interruption of a job.

    position: steps of all stages before it. share: of a step, or of a checkpoint's file, in [0, 1).
    host: which one is hit. moves: whether the job resumes on another machine, with nothing but the
    first host's checkpoints, as after a spot interruption.
    """

    kind: Kind
    position: int
    share: float
    host: int
    moves: bool

    def __str__(self) -> str:
        where = f"host {self.host}{', then elsewhere' if self.moves else ''}"
        return f"{self.kind} after step {self.position}, {self.share:.0%}, {where}"


@dataclass(frozen=True)
class Outcome:
    """The signal that hit, and where, by the files on the disk; None: the job had ended."""

    number: int | None
    where: str | None


def plan(seed: int, *, kills: int, num_steps: int, num_hosts: int) -> list[Interruption]:
    """Return random interruptions over all stages: `kills` SIGKILLs and some SIGTERMs."""
    chance = random.Random(seed)  # noqa: S311
    kinds: list[Kind] = [KILLS[number % len(KILLS)] for number in range(kills)]
    kinds += ["stop"] * -(-kills // KILLS_PER_STOP)
    chance.shuffle(kinds)
    positions = sorted(chance.randrange(num_steps) for _ in kinds)
    moments = []
    for kind, position in zip(kinds, positions, strict=True):
        share, host = chance.random(), chance.randrange(num_hosts)
        moments.append(Interruption(kind, position, share, host, chance.random() < SHARE_MOVED))
    return moments


def soak(
    out: Path,
    *,
    seed: int,
    kills: int,
    steps: int = 40,
    num_hosts: int = 1,
    start: Start = start_command,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Train both jobs under `out`, which must be new; compare them; return counts for JSON.

    steps: of each stage. start: how a host begins `train`. Raises SoakError.
    """
    began = time.monotonic()
    out = out.absolute()  # as `train` names its files
    whole = SmallJob(out / "undisturbed", steps=steps, num_hosts=num_hosts, start=start)
    finish(whole)
    job = SmallJob(out / "interrupted", steps=steps, num_hosts=num_hosts, start=start)
    hits: Counter[str] = Counter()
    num_kills = num_stops = 0
    ahead = plan(seed, kills=kills, num_steps=job.num_steps, num_hosts=num_hosts)
    while ahead or num_kills < kills:
        # A finished job writes its model again, so it can always be killed once more.
        each = ahead.pop(0) if ahead else Interruption("model", job.num_steps, 0.0, 0, False)
        outcome = interrupt(job, each)
        num_kills += outcome.number == signal.SIGKILL
        num_stops += outcome.number == signal.SIGTERM
        if outcome.where is not None:
            hits[outcome.where] += 1
            is_of_writer = each.kind == "checkpoint" and each.host == 0
            if is_of_writer and outcome.where != IN_A_CHECKPOINT:
                ahead.insert(0, each)  # it was quicker
        if each.moves:
            job.move()
        say(f"{num_kills}/{kills} {each}: {outcome.where or 'too late'}")
    finish(job)
    compare(whole, job)
    return {
        "seed": seed,
        "hosts": num_hosts,
        "steps": job.num_steps,
        "kills": num_kills,
        "stops": num_stops,
        "hits": dict(sorted(hits.items())),
        "is_equal": True,
        "seconds": round(time.monotonic() - began, 1),
    }


def finish(job: SmallJob) -> None:
    """Run a job to its end and check how it ended."""
    newest = job.newest()
    with job.run() as run:
        statuses = run.statuses()
    _require(set(statuses) == {0}, f"the hosts ended with {statuses}", run)
    _require_resumed(run, newest)
    _require(not job.unfinished(), f"{[*job.unfinished()]} are left", run)


def interrupt(job: SmallJob, interruption: Interruption) -> Outcome:
    """Start the job, interrupt it, and check how it ended."""
    newest, victim = job.newest(), interruption.host
    with job.run() as run:
        if not _reach(run, interruption):
            _require(set(run.statuses()) == {0}, "it failed before the interruption", run)
            return Outcome(None, None)
        before = job.position()
        number = signal.SIGTERM if interruption.kind.startswith("stop") else signal.SIGKILL
        run.processes[victim].send_signal(number)
        if interruption.kind == "stop and kill":
            run.wait_until(lambda: run.is_half_saved() or run.half_written(), pause=0)
            number = signal.SIGKILL
            run.processes[victim].send_signal(number)
        statuses = run.statuses()
    _require_resumed(run, newest)
    _require(job.position() >= before, "a complete checkpoint is gone", run)
    if number == signal.SIGTERM or statuses[victim] == 0:  # or it was quicker than the kill
        _require(set(statuses) == {0}, f"the hosts ended with {statuses}", run)
        is_stop = interruption.kind.startswith("stop")
        return Outcome(signal.SIGTERM, "a stop") if is_stop else Outcome(None, None)
    _require(statuses[victim] == -number, f"the killed host ended with {statuses[victim]}", run)
    for host, status in enumerate(statuses):
        if host == victim:
            continue
        # A host that had finished before it noticed ends with 0.
        named = f"host {job.hosts[victim]} " in run.failure(host)
        _require(status == 0 or (status == 1 and named), f"host {host} ended with {status}", run)
    if run.half_written():
        return Outcome(number, IN_A_CHECKPOINT)
    if run.is_half_saved():
        return Outcome(number, "a half-written model")
    return Outcome(number, "a restart" if interruption.kind == "restart" else "a step")


def _reach(run: Run, interruption: Interruption) -> bool:
    """Wait for the moment of an interruption; return False when the job ended before it."""
    job = run.job
    if interruption.kind == "restart" and job.newest() is not None:
        return run.wait_until(run.resumed_from)
    if not run.wait_until(lambda: job.position() >= interruption.position):
        return False
    match interruption.kind:
        case "checkpoint":
            wanted = interruption.share * job.checkpoint_bytes()
            return run.wait_until(
                lambda: any(size >= wanted for size in run.half_written()), pause=0
            )
        case "model":
            return run.wait_until(run.is_half_saved, pause=0)
        case _:
            return _wait_for_part_of_step(run, interruption.share)


def _wait_for_part_of_step(run: Run, share: float) -> bool:
    """Wait for a share of the previous step's time after its checkpoint appears."""
    first = run.job.position()
    if not run.wait_until(lambda: run.job.position() > first):
        return False
    began, second = time.monotonic(), run.job.position()
    if not run.wait_until(lambda: run.job.position() > second):
        return False
    now = time.monotonic()
    return run.wait_until(lambda: time.monotonic() >= now + share * (now - began))


def compare(whole: SmallJob, job: SmallJob) -> None:
    """Raise SoakError unless both jobs wrote the same weights and metrics."""
    theirs, ours = (dict(_left(each)) for each in (whole, job))
    differing = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
    if differing:
        raise SoakError(f"the interrupted job left other {', '.join(differing)}")


def _left(job: SmallJob) -> Iterator[tuple[str, str]]:
    """Yield the results of a job by name: hashes of the model's files, metrics without times."""
    paths = job.paths[0]
    for path in sorted(paths.model.rglob("*")):
        if path.is_file() and path.name not in DATED:
            name = path.relative_to(paths.model).as_posix()
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
    yield "report.html", str((paths.output_data / "report.html").exists())
    lines = (paths.output_data / "metrics.jsonl").read_text("utf-8").splitlines()
    for record in map(json.loads, lines):
        name = f"metrics of {record['stage']}, step {record['step']}: {', '.join(record)}"
        yield name, json.dumps({key: record[key] for key in record if key not in CLOCK})


def _require_resumed(run: Run, newest: Path | None) -> None:
    """Check that the run resumed from the newest checkpoint, or was killed before it could."""
    if newest is None:
        return
    resumed = run.resumed_from().get(newest.parent.name)
    was_too_early = resumed is None and run.job.newest() == newest
    _require(resumed == newest or was_too_early, f"it resumed from {resumed}, not {newest}", run)


def _require(is_so: bool, otherwise: str, run: Run) -> None:
    if not is_so:
        logs = ", ".join(map(str, run.logs))
        raise SoakError(f"{otherwise}; see {logs} and the failure files")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    name_user()
    parser = argparse.ArgumentParser(prog="python -m training.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of each stage (%(default)s)")
    parser.add_argument("--hosts", type=int, default=1, help="of the job (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the moments (default: a new one)")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    again = f"--seed {seed} --kills {options.kills} --steps {options.steps} --hosts {options.hosts}"
    print(f"python -m training.soak --out {options.out} {again}", flush=True)
    out = options.out / f"seed-{seed}-hosts-{options.hosts}"
    shutil.rmtree(out, ignore_errors=True)
    try:
        numbers = {"kills": options.kills, "steps": options.steps, "num_hosts": options.hosts}
        done = soak(out, seed=seed, **numbers, say=partial(print, flush=True))
        # A writer may be quicker than a kill now and then, but not all of them every time.
        if IN_A_CHECKPOINT not in done["hits"]:
            raise SoakError("no kill hit the writing of a checkpoint: take more kills or steps")
    except SoakError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
