"""`invoke --openai`: a caption to an endpoint's path for OpenAI's clients, with a bearer token.

The request is the one that OpenAI's own clients send. It shows that an endpoint answers them, and
needs none of them.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dalle.errors import AwsError
from inference.openai.replies import ChatCompletion
from infra.aws.client import READ_SECONDS, Aws
from infra.aws.project import Project
from infra.aws.request import Request
from infra.endpoint.calls import results

TOKEN_SECONDS = 300  # until it expires; it is made for one request
_NAMES = {"format": "output_format"}  # of a chat, where an invocation has another


def chat_body(fields: Mapping[str, Any]) -> bytes:
    """Return the body of a chat that asks for the pictures of a request with these fields."""
    settings = {_NAMES.get(name, name): value for name, value in fields.items()}
    messages = [{"role": "user", "content": settings.pop("caption")}]
    return json.dumps({"model": "", "messages": messages, **settings}, ensure_ascii=False).encode()


def invoke_openai(
    project: Project, name: str, component: str, fields: Mapping[str, Any], out: Path
) -> int:
    """Write the pictures of a chat's reply, and return the exit code. Raises AwsError.

    component: one of the endpoint's models; empty where it has one.
    """
    model = f"/inference-components/{component}" if component else ""
    path = f"/endpoints/{name}{model}/openai/v1/chat/completions"
    body = chat_body(fields)
    if project.aws.dry_run:
        project.output.request(Request("sagemaker-runtime", f"POST {path}", Body=body))
        return project.output.finish()
    reply = _read(_post(project.aws, path, body))
    images = []
    for part in (each for choice in reply.choices for each in choice.message.content):
        file = out / f"rank-{part.rank}.{fields.get('format', 'png')}"
        state = results.write(file, _picture(part.image_url.url))
        images.append(results.SavedImage.of(part, str(file), state))
    results.show(project.output, images)
    project.output.line(
        f"seed {reply.seed}, {reply.completed_candidates} of {reply.num_candidates} candidates, "
        f"ranked by {reply.ranked_by}"
    )
    results.show_warnings(project.output, reply.warnings)
    return project.output.finish(
        endpoint=name,
        mode="openai",
        warnings=reply.warnings,
        seed=reply.seed,
        num_candidates=reply.num_candidates,
        completed_candidates=reply.completed_candidates,
        ranked_by=reply.ranked_by,
        images=[asdict(image) for image in images],
    )


def _post(aws: Aws, path: str, body: bytes) -> bytes:
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {aws.bearer_token(TOKEN_SECONDS)}",
    }
    request = urllib.request.Request(aws.runtime_url + path, body, headers, method="POST")  # noqa: S310 - AWS's own address
    try:
        status, content = _send(request)
    except (OSError, http.client.HTTPException) as error:
        raise AwsError(
            f"{request.host} did not answer ({error}); check the network, the proxy settings and "
            "the region's name"
        ) from error
    if status != 200:
        message = results.error_message(content) or content.decode("utf-8", "replace")[:500]
        raise AwsError(f"the endpoint answered {status}: {message}")
    return content


def _send(request: urllib.request.Request) -> tuple[int, bytes]:
    """Return status and body of the reply. Raises OSError and HTTPException for a broken one."""
    try:
        with urllib.request.urlopen(request, timeout=READ_SECONDS) as response:  # noqa: S310
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _read(body: bytes) -> ChatCompletion:
    try:
        return ChatCompletion.model_validate_json(body)
    except ValidationError as error:
        shown = body[:200].decode("utf-8", "replace")
        raise AwsError(f"the endpoint's reply is no chat with pictures: {shown!r}") from error


def _picture(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise AwsError(f"a picture in the endpoint's reply is not base64: {error}") from error
