"""A request that an endpoint answers while its caller waits."""

from __future__ import annotations

import time
from typing import Any

from dalle.errors import AwsError
from infra.aws.client import Aws
from infra.aws.project import Project
from infra.aws.request import Request

JSON = "application/json"
COPY_POLL_SECONDS = 20.0
NO_COPY = "has no capacity"
"""In the platform's refusal of a request to a model that has no copy yet."""


def invocation(operation: str, name: str, **parameters: Any) -> Request:
    """Return a request to an endpoint, of JSON and for JSON unless `Accept` says otherwise."""
    given = {"EndpointName": name, "ContentType": JSON, "Accept": JSON, **parameters}
    return Request("sagemaker-runtime", operation, **given)


def of_component(component: str) -> dict[str, str]:
    """Return the parameter that names one of an endpoint's models; none for its only one."""
    return {"InferenceComponentName": component} if component else {}


def invoke_component(
    project: Project, name: str, component: str, body: bytes, timeout: float
) -> bytes:
    """Return the reply of one of an endpoint's models; wait for its first copy where it has none.

    The platform refuses a request that meets no copy, and its alarm starts one. Raises AwsError
    when none has come in time.
    """
    ends, is_told = time.monotonic() + timeout, False
    while True:
        try:
            return invoke_sync(project.aws, name, body, component)
        except AwsError as error:
            if NO_COPY not in str(error) or time.monotonic() > ends:
                raise
        if not is_told:
            project.output.line(
                f"{component} has no copy; the request starts one, which takes minutes"
            )
        is_told = True
        project.aws.pause(COPY_POLL_SECONDS)


def invoke_sync(aws: Aws, name: str, body: bytes, component: str = "") -> bytes:
    """Return the reply of a real-time or serverless endpoint, which has 60 s for it."""
    request = invocation("InvokeEndpoint", name, **of_component(component), Body=body)
    answer = aws.call(request, answer={"Body": []})
    return b"".join(aws.chunks(answer["Body"], request))
