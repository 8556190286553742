"""`monitor`: alarms and a dashboard of one endpoint.

They are named after the endpoint. A second run changes what differs, and `teardown` deletes them.
"""

from __future__ import annotations

import argparse
import math

from dalle.errors import PlanError, UserError
from infra.aws.deployment import Mode
from infra.aws.project import Project, add_project_arguments, open_project
from infra.aws.request import describe
from infra.aws.stack import all_tags, outputs_of
from infra.aws.team.names import topic_arn
from infra.endpoint.described import component_names, is_shared, mode_of
from infra.endpoint.monitoring import alarms, dashboard
from infra.endpoint.monitoring.alarms import Thresholds
from infra.endpoint.options import endpoint_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Thresholds()
    parser.add_argument("--endpoint", metavar="NAME", help="default: named as the project")
    parser.add_argument(
        "--errors",
        type=int,
        default=default.errors,
        help=f"5xx replies in a minute; default: {default.errors}",
    )
    parser.add_argument(
        "--latency-seconds", type=float, help="the 95th percentile; default: 50, async 800"
    )
    parser.add_argument(
        "--queue",
        type=int,
        help=f"requests that wait at an async endpoint; default: {default.queue}",
    )
    parser.add_argument(
        "--memory-percent",
        type=float,
        default=default.memory_percent,
        help=f"of a host's memory; default: {default.memory_percent:g}",
    )
    parser.add_argument(
        "--topic",
        type=topic_arn,
        metavar="ARN",
        help="an SNS topic that is told; default: that of `bootstrap --mail`, '' for none",
    )
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    thresholds = read(options)
    project = open_project(options)
    name = endpoint_name(project.name, options.endpoint)
    stack = project.stack()
    topic = options.topic
    if topic is None:
        topic = outputs_of(stack).get("TopicArn", "")
    mode, components = _mode_and_components(project, name)
    if options.queue is not None and mode != "async":
        raise PlanError(f"--queue is for an async endpoint, and {name} is {mode}")
    tags = all_tags(stack, project.tags)
    wanted = {
        alarms.alarm_name(name, kind): alarms.alarm_request(
            name, kind, mode, thresholds, tags, topic
        )
        for kind in alarms.kinds_of(mode, is_shared=bool(components))
    }
    wanted |= {
        alarms.copy_alarm_name(component, kind): alarms.alarm_request(
            name, kind, mode, thresholds, tags, topic, component
        )
        for component in components
        for kind in alarms.COPY_KINDS
    }
    for request in wanted.values():
        project.aws.check(request)
    alarms.ensure(project, wanted)
    dashboard.ensure(project, name, mode)
    if not topic:
        project.output.line(
            "nobody is told: `python -m infra bootstrap --mail ADDRESS`, or --topic ARN"
        )
    return project.output.finish(
        endpoint=name, alarms=list(wanted), dashboard=name, topic=topic or None
    )


def read(options: argparse.Namespace) -> Thresholds:
    """Return the thresholds. Raises PlanError for one that would ring always or never."""
    given = Thresholds(
        options.errors,
        options.latency_seconds,
        Thresholds().queue if options.queue is None else options.queue,
        options.memory_percent,
    )
    for option, value in (
        ("--errors", given.errors),
        ("--latency-seconds", given.latency_seconds),
        ("--queue", given.queue),
    ):
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"{option} must be more than 0, got {value:g}")
    if not 0 < given.memory_percent <= 100:
        raise PlanError(f"--memory-percent must be 1 to 100, got {given.memory_percent:g}")
    return given


def _mode_and_components(project: Project, name: str) -> tuple[Mode, list[str]]:
    """Return the mode of an endpoint of ours, and the models that share it; none for one model.

    Raises UserError when there is no such endpoint.
    """
    found = project.find_ours("Endpoint", name)
    if found is None and project.aws.dry_run:
        return "async", []  # as `deploy` makes one by itself; it has every alarm
    if found is None:
        raise UserError(
            f"there is no endpoint {name}; `python -m infra status` lists them, and "
            "`python -m infra deploy` creates one"
        )
    config = project.aws.call(describe("EndpointConfig", found["EndpointConfigName"]))
    return mode_of(config), component_names(project, name) if is_shared(config) else []
