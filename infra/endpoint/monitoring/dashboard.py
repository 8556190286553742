"""A CloudWatch dashboard of one endpoint: latency, errors, requests and queue, memory."""

from __future__ import annotations

import json
from typing import Any

from dalle.errors import UserError
from infra.aws.deployment import Mode
from infra.aws.project import PROJECT_TAG, Project
from infra.aws.request import Request
from infra.endpoint.monitoring.alarms import HOSTS, INVOCATIONS
from infra.endpoint.requests import VARIANT

WIDTH, HEIGHT = 12, 6


def body(endpoint: str, mode: Mode, region: str, project: str) -> dict[str, Any]:
    """Return the dashboard in CloudWatch's form. Its first widget names the project."""
    variant = ["EndpointName", endpoint, "VariantName", VARIANT]
    queue = (
        [
            [INVOCATIONS, name, "EndpointName", endpoint, {"stat": "Average"}]
            for name in ("ApproximateBacklogSize", "ApproximateBacklogSizePerInstance")
        ]
        if mode == "async"
        else [[INVOCATIONS, "ConcurrentRequestsPerModel", *variant, {"stat": "Maximum"}]]
    )
    graphs: list[tuple[str, list[list[Any]]]] = [
        (
            "Latency in microseconds",
            [
                [INVOCATIONS, "ModelLatency", *variant, {"stat": "p50"}],
                [INVOCATIONS, "ModelLatency", *variant, {"stat": "p95"}],
                [INVOCATIONS, "OverheadLatency", *variant, {"stat": "p95"}],
            ],
        ),
        (
            "Requests and errors in a minute",
            [
                [INVOCATIONS, name, *variant, {"stat": "Sum"}]
                for name in ("Invocations", "Invocation4XXErrors", "Invocation5XXErrors")
            ],
        ),
        ("Requests that wait or are in progress", queue),
        (
            "Memory of a host in percent",
            [
                [HOSTS, name, *variant, {"stat": "Maximum"}]
                for name in ("MemoryUtilization", "GPUMemoryUtilization", "DiskUtilization")
            ],
        ),
    ]
    title = {
        "type": "text",
        "x": 0,
        "y": 0,
        "width": 2 * WIDTH,
        "height": 1,
        "properties": {"markdown": f"Endpoint {endpoint}; {_mark(project)}"},
    }
    widgets = [
        {
            "type": "metric",
            "x": WIDTH * (number % 2),
            "y": 1 + HEIGHT * (number // 2),
            "width": WIDTH,
            "height": HEIGHT,
            "properties": {
                "title": name,
                "metrics": metrics,
                "region": region,
                "period": 60,
                "view": "timeSeries",
            },
        }
        for number, (name, metrics) in enumerate(graphs)
    ]
    return {"widgets": [title, *widgets]}


def ensure(project: Project, endpoint: str, mode: Mode) -> None:
    """Create or change the endpoint's dashboard. Raises UserError for one that is not ours."""
    text = json.dumps(body(endpoint, mode, project.aws.region, project.name))
    there = find(project, endpoint)
    is_same = there is not None and json.loads(there) == json.loads(text)
    if not is_same:
        request = {"DashboardName": endpoint, "DashboardBody": text}
        project.aws.call(Request("cloudwatch", "PutDashboard", **request))
    state = "already there" if is_same else "changed" if there else "made"
    project.output.item(f"dashboard {endpoint}", state)


def find(project: Project, endpoint: str) -> str | None:
    """Return the body of the endpoint's dashboard; None when there is none.

    Raises UserError for a dashboard of that name which is not the project's.
    """
    there = project.aws.find(Request("cloudwatch", "GetDashboard", DashboardName=endpoint))
    if there is None:
        return None
    if not is_ours(there["DashboardBody"], project.name):
        raise UserError(
            f"dashboard {endpoint} is not project {project.name}'s and is left alone: it does not "
            f"say {_mark(project.name)}"
        )
    return str(there["DashboardBody"])


def is_ours(text: str, project: str) -> bool:
    """Return whether a dashboard names the project: its tags cannot be read everywhere."""
    return f'{_mark(project)}"' in text


def _mark(project: str) -> str:
    return f"{PROJECT_TAG} = {project}"
