"""`logs`: the log of a training job, a transform job or an endpoint."""

from __future__ import annotations

import argparse
from collections import deque

from dalle.errors import UserError
from infra.aws import project
from infra.aws.project import Project
from infra.aws.request import Call
from infra.jobs.progress import ENDED, ENDPOINT_LOGS, TRAINING_LOGS, TRANSFORM_LOGS, Log

POLL_SECONDS = 5.0
KINDS = (
    ("TrainingJob", TRAINING_LOGS),
    ("TransformJob", TRANSFORM_LOGS),
    ("Endpoint", ENDPOINT_LOGS),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a job or an endpoint; default: the newest job")
    parser.add_argument("--follow", action="store_true", help="go on until the job ends")
    parser.add_argument("--tail", type=int, default=100, help="lines to begin with; default: 100")
    project.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    opened = project.open_project(options)
    name = options.name or newest_job(opened)
    kind, group = kind_of(opened, name)
    # An endpoint has a log group of its own; jobs share one, with streams named after them.
    own = kind == "Endpoint"
    log = Log(opened, f"{group}/{name}") if own else Log(opened, group, f"{name}/")
    lines = list(deque(log.lines(), maxlen=options.tail))
    for line in lines:
        opened.console.say(line)
    if not lines:
        opened.console.say(f"{name} has written no log yet")
    while options.follow and not opened.aws.dry_run and not has_ended(opened, kind, name):
        opened.aws.pause(POLL_SECONDS)
        for line in log.lines():
            opened.console.say(line)
            lines.append(line)
    return opened.console.finish(name=name, kind=kind, lines=lines)


def newest_job(opened: Project) -> str:
    """The training job that was started last. Raises UserError when there is none."""
    request = {
        "NameContains": f"{opened.name}-",
        "SortBy": "CreationTime",
        "SortOrder": "Descending",
    }
    jobs = opened.aws.items(
        Call("sagemaker", "ListTrainingJobs", request),
        "TrainingJobSummaries",
        answer=[{"TrainingJobName": "<newest training job>"}],
    )
    for job in jobs:
        return str(job["TrainingJobName"])
    raise UserError(f"project {opened.name} has no training job yet")


def kind_of(opened: Project, name: str) -> tuple[str, str]:
    """What a name belongs to, and the log group of its kind. Raises UserError for no such thing."""
    for kind, group in KINDS:
        call = Call("sagemaker", f"Describe{kind}", {f"{kind}Name": name})
        if opened.aws.find(call, answer={}) is not None:
            return kind, group
    raise UserError(
        f"there is no job or endpoint {name}; `python -m infra status` shows those there are"
    )


def has_ended(opened: Project, kind: str, name: str) -> bool:
    if kind == "Endpoint":
        return False
    found = opened.aws.call(Call("sagemaker", f"Describe{kind}", {f"{kind}Name": name}))
    return found[f"{kind}Status"] in ENDED
