"""The command `train`: read the job, check it, run it, and say why when it fails.

Logging, signals and exit codes are set up here and nowhere else. Whatever can be wrong with the
job's description is found before torch is even imported.
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dalle.contract import DEFAULT_ROOT, Job, Paths, prepare_outputs, read_job, write_failure
from dalle.errors import DalleError, JobError
from dalle.threads import spin_briefly
from training import channels, hyperparameters
from training.hyperparameters import Hyperparameters

logger = logging.getLogger(__name__)

HELP = """\
Train the models of a SageMaker training job, or of a directory that is laid out like one:

  ROOT/input/config/hyperparameters.json   {"stage": "all", "max_minutes": "10", ...}; optional
  ROOT/input/data/train/                   image-text pairs: name.png + name.txt
  ROOT/input/data/validation/              likewise; optional
  ROOT/input/data/artefact/                an earlier job's model, to be completed; optional
  ROOT/model/                              the trained artefact
  ROOT/output/data/                        report.html, metrics.jsonl
  ROOT/checkpoints/                        where an interrupted job continues from

Environment: DALLE_DEVICE=auto|cpu|cuda, SM_CHANNEL_TRAIN=DIR (and likewise for other channels).
SIGTERM (or Ctrl-C) saves a checkpoint and the model, and ends with 0.
Exit code: 0 finished or stopped, 1 failed (the cause is in ROOT/output/failure), 2 wrong usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse_arguments(arguments)
    if options.list_hyperparameters:
        print(hyperparameters.render_table())
        return 0
    spin_briefly()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    root: Path = options.root
    paths = Paths(root.absolute())
    with _stopped_by_signals() as stop:
        try:
            paths.failure.unlink(missing_ok=True)  # an earlier run's
            job, settings = _checked(root)
            prepare_outputs(job.paths)
            _run(job, settings, stop)
        except Exception as error:
            cause = _cause(error)
            logger.error("%s", cause, exc_info=not isinstance(error, DalleError))
            write_failure(paths, cause, traceback.format_exc())
            return 1
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=DEFAULT_ROOT,
        metavar="DIR",
        help="where the job's directories are (default: %(default)s)",
    )
    parser.add_argument(
        "--list-hyperparameters",
        action="store_true",
        help="print every hyperparameter with its range and default, then end",
    )
    options = parser.parse_args(arguments)
    if not options.list_hyperparameters and not options.root.is_dir():
        parser.error(f"--root {options.root} is not a directory")
    return options


def _checked(root: Path) -> tuple[Job, Hyperparameters]:
    """The job and its typed hyperparameters. Raises JobError with everything that is wrong."""
    job = read_job(root)
    problems: list[JobError] = []
    settings = None
    try:
        settings = hyperparameters.parse(job.hyperparameters)
    except JobError as error:
        problems.append(error)
    try:
        channels.check(job)
    except JobError as error:
        problems.append(error)
    if len(job.hosts) > 1:
        hosts = ", ".join(job.hosts)
        problems.append(JobError(f"this version trains on one host; the job has {hosts}"))
    if len(problems) == 1:
        raise problems[0]
    if settings is None or problems:
        raise JobError("\n".join(str(problem) for problem in problems))
    return job, settings


def _run(job: Job, settings: Hyperparameters, stop: threading.Event) -> None:
    # Imported here: torch takes seconds, which a job that cannot run need not wait for.
    from training import worker, workshop

    worker.run(job, settings, stop, workshop.open_workshop)


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
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


def _cause(error: Exception) -> str:
    """What to do about it for errors raised on purpose, and what it was for all others."""
    if isinstance(error, DalleError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {error}; give the job a larger volume"
    if isinstance(error, MemoryError):
        return "the machine's memory is too small; take a larger instance or a smaller batch_size"
    return f"internal error, {type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
