"""`logs`: the log of a training job, a transform job, an endpoint or a model on one."""

from __future__ import annotations

import argparse
from collections import deque

from dalle.errors import PlanError, UserError
from infra.aws.project import Project, add_project_arguments, open_project
from infra.aws.request import describe, newest_first
from infra.jobs.progress import (
    COMPONENT_LOGS,
    ENDED,
    ENDPOINT_LOGS,
    TRAINING_LOGS,
    TRANSFORM_LOGS,
    Log,
)

POLL_SECONDS = 5.0
KINDS = (
    ("TrainingJob", TRAINING_LOGS),
    ("TransformJob", TRANSFORM_LOGS),
    ("Endpoint", ENDPOINT_LOGS),
    ("InferenceComponent", COMPONENT_LOGS),
)
LASTING = ("Endpoint", "InferenceComponent")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", help="a job, an endpoint or ENDPOINT--MODEL; default: the newest job"
    )
    parser.add_argument("--follow", action="store_true", help="print new lines until the job ends")
    parser.add_argument("--tail", type=int, default=100, help="last lines to print; default: 100")
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.tail < 0:
        raise PlanError(f"--tail must be 0 or more, got {options.tail}")
    project = open_project(options)
    name = options.name or newest_job(project)
    kind, group = kind_of(project, name)
    # Each endpoint and each of its models has a log group; jobs share one, with streams named
    # after them.
    log = Log(project, f"{group}/{name}") if kind in LASTING else Log(project, group, f"{name}/")
    lines = list(deque(log.lines(), maxlen=options.tail))
    for line in lines:
        project.output.line(line)
    if not lines:
        project.output.line(f"{name} has written no log yet")
    while options.follow and not project.aws.dry_run and not has_ended(project, kind, name):
        project.aws.pause(POLL_SECONDS)
        for line in log.lines():
            project.output.line(line)
            lines.append(line)
    return project.output.finish(name=name, kind=kind, lines=lines)


def newest_job(project: Project) -> str:
    """Return the training job that was started last. Raises UserError when there is none."""
    jobs = project.aws.items(
        newest_first("TrainingJob", f"{project.name}-"),
        "TrainingJobSummaries",
        answer=[{"TrainingJobName": "<newest training job>"}],
    )
    for job in jobs:
        return str(job["TrainingJobName"])
    raise UserError(f"project {project.name} has no training job yet")


def kind_of(project: Project, name: str) -> tuple[str, str]:
    """Return the kind of a job or endpoint and the log group of that kind. Raises UserError."""
    for kind, group in KINDS:
        if project.aws.find(describe(kind, name), answer={}) is not None:
            return kind, group
    raise UserError(f"there is no job or endpoint {name}; `python -m infra status` lists them")


def has_ended(project: Project, kind: str, name: str) -> bool:
    if kind in LASTING:
        return False
    found = project.aws.call(describe(kind, name))
    return found[f"{kind}Status"] in ENDED
