"""A request to an asynchronous endpoint, which leaves its reply in the bucket."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Any

from dalle.errors import AwsError
from infra.aws.limits import INLINE_BYTES
from infra.aws.project import Project, split_uri
from infra.aws.request import Request, digest
from infra.aws.stack import StackOutputs
from infra.endpoint.calls import results
from infra.endpoint.calls.direct import JSON, invocation

POLL_SECONDS = 2.0


def invoke_async(
    project: Project, outputs: StackOutputs, name: str, body: bytes, timeout: float
) -> bytes:
    """Return the reply of an asynchronous endpoint, which it leaves in the bucket.

    Raises AwsError with the endpoint's error message, and when no reply came in time.
    """
    reply, failure = send_async(project, outputs, name, body)
    if project.aws.dry_run:
        return b""
    ends = time.monotonic() + timeout
    while True:
        content = project.aws.read(*split_uri(reply))
        if content is not None:
            return content
        content = project.aws.read(*split_uri(failure)) if failure else None
        if content is not None:
            message = results.error_message(content) or content.decode("utf-8", "replace")[:500]
            raise AwsError(f"endpoint {name} could not answer: {message}")
        if time.monotonic() > ends:
            raise AwsError(
                f"no reply within {timeout:.0f} s; it will be at {reply} when it comes, and "
                f"`python -m infra logs {name}` shows the endpoint's log"
            )
        project.aws.pause(POLL_SECONDS)


def presign(project: Project, name: str, body: bytes, hours: float) -> int:
    """Send a request, print where its reply and failure will be, and do not wait for them.

    Whoever has an address may read there until it ends. Raises as `invoke_async`.
    """
    reply, failure = send_async(project, project.stack_outputs(), name, body)
    if project.aws.dry_run:
        return project.output.finish()
    seconds = round(hours * 3600)
    found = {
        kind: project.aws.presigned(*split_uri(uri), seconds)
        for kind, uri in (("reply", reply), ("failure", failure))
        if uri
    }
    for kind, address in found.items():
        project.output.item(f"{kind}, for {hours:g} h", address)
    return project.output.finish(endpoint=name, mode="async", **found)


def send_async(
    project: Project, outputs: StackOutputs, name: str, body: bytes
) -> tuple[str, str | None]:
    """Send a request, and return the addresses in S3 at which its reply or its failure will be.

    A small request is sent with the call, a larger one by the bucket.
    """
    if len(body) <= INLINE_BYTES:
        request: dict[str, Any] = {"Body": body}
    else:
        key = f"async/{name}/requests/{digest(body.decode())}.json"
        upload = {"Bucket": outputs.bucket, "Key": key, "Body": body, "ContentType": JSON}
        project.aws.call(Request("s3", "PutObject", **upload))
        request = {"InputLocation": f"s3://{outputs.bucket}/{key}"}
    answer = project.aws.call(
        invocation("InvokeEndpointAsync", name, Filename=_reply_name(), **request)
    )
    if project.aws.dry_run:
        return "", None
    project.output.line(
        f"endpoint {name} has the request; without an instance it starts one, which takes minutes"
    )
    return answer["OutputLocation"], answer.get("FailureLocation")


def _reply_name() -> str:
    """Return a new name of at most 32 characters for a reply, so that no older one is read."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(5)}.json"
