"""Command `train`: read the job, check it, run it on all of this host's devices.

The job's description is checked before torch is imported.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dalle.errors import DalleError, JobError
from dalle.platform.environment import (
    DEFAULT_ROOT,
    TRAIN_VARIABLES,
    Job,
    Paths,
    read_job,
    unknown_variables,
)
from dalle.platform.outputs import prepare_outputs, release_outputs
from dalle.platform.threads import spin_briefly
from dalle.platform.user import name_user
from training.config import hyperparameters
from training.config.fields import Hyperparameters
from training.config.with_channels import with_channels
from training.distributed.topology import RENDEZVOUS_PORT, Place, Timeouts
from training.job import channels, process
from training.memory import command as plan_command

logger = logging.getLogger("training")

DEFAULT_TIMEOUTS = Timeouts()

HELP = """\
Train the models of a SageMaker training job, or of a directory that is laid out like one:

  ROOT/input/config/hyperparameters.json   {"max_minutes": "60", ...}; optional
  ROOT/input/data/train/                   image-text pairs: name.png + name.txt
  ROOT/input/data/validation/              likewise; optional
  ROOT/input/data/artefact/                an earlier job's model, to be completed; optional
  ROOT/input/data/tokenizer_model/         a published image tokenizer, as it is; optional
  ROOT/input/data/legacy/                  a model of DALLE-pytorch, to be trained on; optional
  ROOT/model/                              the trained artefact
  ROOT/output/data/                        report.html, metrics.jsonl
  ROOT/checkpoints/                        where an interrupted job continues from

A job trains on every CUDA device of its host, or on the CPU; on several hosts, `train` is started
on each, with ROOT/input/config/resourceconfig.json naming them, and the first one writes.

`train --plan` prints what each device would hold in memory, for this job and for other engines,
ZeRO stages and savings, and what fits. It writes nothing, and reads pairs only with max_minutes and
size=auto, for which it says what would be chosen, and the time of each size of pictures.

Environment: DALLE_DEVICE=auto|cpu|cuda, SM_CHANNEL_TRAIN=DIR (and likewise for other channels).
SIGTERM (or Ctrl-C) saves a checkpoint and the model, and ends with 0.
Exit code: 0 finished or stopped, 1 failed (the cause is in ROOT/output/failure), 2 wrong usage or
a refused file of published weights; of --plan: 0 it fits, 1 it does not or the job is wrong, 2 as
above.
"""


def main(arguments: Sequence[str] | None = None, *, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> int:
    """Run the command and return its exit code. timeouts: with a job's other hosts."""
    options = _parse_arguments(arguments)
    if options.list_hyperparameters:
        print(hyperparameters.render_table())
        return 0
    if options.plan:
        return _plan(options)
    spin_briefly()
    name_user()
    process.configure_logging()
    for sentence in unknown_variables(os.environ, TRAIN_VARIABLES):
        logger.warning("%s", sentence)
    paths = Paths(options.root.absolute())
    with process.stopped_by_signals() as stop:

        def work() -> int:
            paths.failure.unlink(missing_ok=True)  # an earlier run's
            job, settings = _checked(options.root)
            prepare_outputs(job.paths)
            return _run(job, settings, stop, options.rendezvous_port, timeouts)

        try:
            return process.exit_code_of(work, paths)
        finally:
            release_outputs(paths)


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
        "--rendezvous-port",
        type=int,
        default=RENDEZVOUS_PORT,
        metavar="PORT",
        help="where the first of several hosts awaits the others (default: %(default)s)",
    )
    parser.add_argument(
        "--list-hyperparameters",
        action="store_true",
        help="print every hyperparameter with its range and default, then end",
    )
    plan_command.add_plan_options(parser)
    options = parser.parse_args(arguments)
    plan_command.check_plan_options(parser, options)
    if not options.list_hyperparameters and not options.root.is_dir():
        parser.error(f"--root {options.root} is not a directory")
    return options


def _plan(options: argparse.Namespace) -> int:
    """Print the memory plan; reads the hyperparameters and what channels of models bring."""
    try:
        job = read_job(options.root)
        settings = with_channels(hyperparameters.parse(job.hyperparameters), job.channels)
        tokenizer = None
        legacy = None
        if hyperparameters.LEGACY in job.channels:
            from training.job.legacy.channel import load_configs

            legacy, tokenizer = load_configs(job.channels[hyperparameters.LEGACY].directory)
        if hyperparameters.TOKENIZER_MODEL in job.channels:
            from training.job.pretrained.image_tokenizer import load_image_tokenizer

            directory = job.channels[hyperparameters.TOKENIZER_MODEL].directory
            tokenizer = load_image_tokenizer(directory, settings.dvae.image_size).config
        clip = None
        if "clip" in job.channels:
            from training.job.pretrained.clip import find_clip, load_clip

            clip = load_clip(*find_clip(job.channels["clip"].directory)).config
        return plan_command.run_plan(job, settings, options, tokenizer, clip, legacy)
    except DalleError as error:
        print(error, file=sys.stderr)
        return process.code_of(error)


def _checked(root: Path) -> tuple[Job, Hyperparameters]:
    """Return the job and its typed hyperparameters. Raises JobError with all problems."""
    job = read_job(root)
    problems: list[JobError] = []
    settings = None
    try:
        settings = with_channels(hyperparameters.parse(job.hyperparameters), job.channels)
    except JobError as error:
        problems.append(error)
    try:
        channels.check(job)
    except JobError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if settings is None or problems:
        raise JobError("\n".join(str(problem) for problem in problems))
    return job, settings


def _run(
    job: Job, settings: Hyperparameters, stop: threading.Event, port: int, timeouts: Timeouts
) -> int:
    # Imported here: torch takes seconds, which a wrong job should not wait for.
    from training.engine.devices import count_devices
    from training.job import launch

    num_devices = count_devices(job.device)
    if num_devices > 1:
        return launch.run_on_devices(
            job, settings, num_devices=num_devices, port=port, timeouts=timeouts, stop=stop
        )
    place = Place(job.hosts, job.current_host)
    return process.run_rank(job, settings, place, stop, port=port, timeouts=timeouts)


if __name__ == "__main__":
    process.leave(main())
