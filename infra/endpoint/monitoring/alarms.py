"""Alarms of one endpoint: errors, latency, queue, memory of the model's hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.aws.deployment import Mode
from infra.aws.project import Project
from infra.aws.request import Request
from infra.endpoint import autoscaling
from infra.endpoint.requests import VARIANT

INVOCATIONS = "AWS/SageMaker"
HOSTS = "/aws/sagemaker/Endpoints"
MICROSECONDS = 1e6
LATENCY_SECONDS: dict[Mode, float] = {"realtime": 50, "serverless": 50, "async": 800, "batch": 800}
"""A little below what an invocation may take in each mode."""
KINDS = ("errors", "latency", "queue", "memory")
COPY_KINDS = ("errors", "latency")
"""Those that each of several models on an endpoint has; memory is that of the hosts."""
ROLLBACK_KINDS = ("errors", "latency")
"""Those by which an update is taken back: a queue and memory change slowly."""


@dataclass(frozen=True)
class Thresholds:
    """What rings. errors: 5xx replies in a minute. latency_seconds: the 95th percentile.

    queue: requests that wait at an asynchronous endpoint. memory_percent: of a host's.
    """

    errors: int = 1
    latency_seconds: float | None = None
    queue: int = 100
    memory_percent: float = 90.0


def alarm_name(endpoint: str, kind: str) -> str:
    return f"{endpoint}-{kind}"


def copy_alarm_name(component: str, kind: str) -> str:
    """Return the name of an alarm of a component, which no alarm of an endpoint has."""
    return f"{component}-copy--{kind}"


def kinds_of(mode: Mode, *, is_shared: bool = False) -> tuple[str, ...]:
    """Return the alarms that an endpoint of this mode has: a queue is at asynchronous ones.

    Where models share it, each has those of COPY_KINDS itself.
    """
    left_out = (() if mode == "async" else ("queue",)) + (COPY_KINDS if is_shared else ())
    return tuple(kind for kind in KINDS if kind not in left_out)


def alarm_request(
    endpoint: str,
    kind: str,
    mode: Mode,
    thresholds: Thresholds,
    tags: list[dict[str, str]],
    topic: str = "",
    component: str = "",
) -> Request:
    """Return the request that creates or changes one alarm.

    topic: who is told; '' for nobody. component: one of several models on the endpoint, for the
    kinds of COPY_KINDS.
    """
    by_endpoint = [{"Name": "EndpointName", "Value": endpoint}]
    by_variant = [*by_endpoint, {"Name": "VariantName", "Value": VARIANT}]
    of_component = [{"Name": "InferenceComponentName", "Value": component}]
    by_model = of_component if component else by_variant
    who = f"Component {component}" if component else f"Endpoint {endpoint}"
    seconds = thresholds.latency_seconds or LATENCY_SECONDS[mode]
    metric: Mapping[str, Any] = {
        "errors": {
            "AlarmDescription": f"{who} answers with errors (5xx).",
            "Namespace": INVOCATIONS,
            "MetricName": "Invocation5XXErrors",
            "Dimensions": by_model,
            "Statistic": "Sum",
            "Threshold": float(thresholds.errors),
            # Not one error alone: a full queue answers with 503, and the caller tries again.
            "EvaluationPeriods": 3,
            "DatapointsToAlarm": 2,
        },
        "latency": {
            "AlarmDescription": f"{who} takes {seconds:g} s and more (p95).",
            "Namespace": INVOCATIONS,
            "MetricName": "ModelLatency",
            "Dimensions": by_model,
            "ExtendedStatistic": "p95",
            "Threshold": seconds * MICROSECONDS,
            "EvaluationPeriods": 3,
            "DatapointsToAlarm": 2,
        },
        "queue": {
            "AlarmDescription": f"Requests wait at endpoint {endpoint}.",
            "Namespace": INVOCATIONS,
            "MetricName": "ApproximateBacklogSize",
            "Dimensions": by_endpoint,
            "Statistic": "Average",
            "Threshold": float(thresholds.queue),
            "EvaluationPeriods": 5,
        },
        "memory": {
            "AlarmDescription": f"Hosts of endpoint {endpoint} are short of memory.",
            "Namespace": HOSTS,
            "MetricName": "MemoryUtilization",
            "Dimensions": by_variant,
            "Statistic": "Maximum",
            "Threshold": thresholds.memory_percent,
            "EvaluationPeriods": 5,
        },
    }[kind]
    return Request(
        "cloudwatch",
        "PutMetricAlarm",
        AlarmName=copy_alarm_name(component, kind) if component else alarm_name(endpoint, kind),
        **metric,
        Period=60,
        ComparisonOperator="GreaterThanOrEqualToThreshold",
        TreatMissingData="notBreaching",
        AlarmActions=[topic] if topic else [],
        Tags=tags,
    )


def ensure(project: Project, wanted: Mapping[str, Request]) -> None:
    """Create or change alarms, by their names. Raises UserError for one that is not ours."""
    found = find(project, list(wanted))
    for name, request in wanted.items():
        there = found.get(name)
        fields = ("MetricName", "Threshold", "AlarmActions", "EvaluationPeriods")
        is_same = there is not None and all(
            there.get(field) == request.parameters[field] for field in fields
        )
        if not is_same:
            project.aws.call(request)
        state = "already there" if is_same else "changed" if there else "made"
        project.output.item(f"alarm {name}", state)


def find(project: Project, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the alarms of these names that exist. Raises UserError for one that is not ours."""
    request = Request("cloudwatch", "DescribeAlarms", AlarmNames=names)
    found = {alarm["AlarmName"]: alarm for alarm in project.aws.items(request, "MetricAlarms")}
    for name, alarm in found.items():
        project.check_owner(f"alarm {name}", autoscaling.alarm_tags(project, alarm))
    return found


def ensure_rollback(
    project: Project, endpoint: str, mode: Mode, tags: list[dict[str, str]]
) -> list[str]:
    """Create the alarms that take an update back, unless they exist; return their names.

    Those that `monitor` has made stay as they are. Raises UserError for one that is not ours.
    """
    names = [alarm_name(endpoint, kind) for kind in ROLLBACK_KINDS]
    there = find(project, names)
    for kind, name in zip(ROLLBACK_KINDS, names, strict=True):
        if name not in there:
            project.aws.call(alarm_request(endpoint, kind, mode, Thresholds(), tags))
            project.output.item(f"alarm {name}", "made")
    return names
