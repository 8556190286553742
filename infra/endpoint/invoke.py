"""`invoke`: a caption to an endpoint, and the images as files.

The request is checked here before it is sent. The endpoint's configuration decides how it is sent:
as one request, as a stream with --stream, or through S3 to an asynchronous endpoint.
"""

from __future__ import annotations

import argparse
import base64
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dalle.errors import AwsError, PlanError, UserError
from inference.api.parsing import parse_request
from inference.api.replies import CandidateLine, RankingLine
from inference.api.schema import GenerateRequest, Limits
from infra.aws.client import Aws
from infra.aws.limits import INLINE_BYTES, Mode, check_payload
from infra.aws.output import Output
from infra.aws.project import Project, add_project_arguments, open_project, split_uri
from infra.aws.request import Request, describe, digest, placeholder
from infra.aws.stack import StackOutputs
from infra.endpoint import results
from infra.endpoint.openai_chat import invoke_openai
from infra.endpoint.options import endpoint_name

JSON = "application/json"
JSON_LINES = "application/jsonlines"
STREAM_SECONDS = 500.0
"""A streamed reply may take 8 minutes."""
POLL_SECONDS = 2.0
MAX_PRESIGN_HOURS = 7 * 24
"""By the signature, whose end is at most a week away."""
LOCAL_PORT = 8080
# Checks everything but the endpoint's limits, which are not known here.
NO_LIMITS = Limits(max_candidates=1 << 30, max_images=1 << 30, max_request_bytes=1 << 40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("caption", help="what the images should show")
    parser.add_argument("--endpoint", metavar="NAME", help="default: named as the project")
    parser.add_argument(
        "--out", type=Path, default=Path("out/invoke"), help="folder for the files; out/invoke"
    )
    parser.add_argument(
        "--stream", action="store_true", help="write each candidate when it is finished (realtime)"
    )
    parser.add_argument(
        "--openai",
        action="store_true",
        help="send it as OpenAI's clients do, to /openai/v1 with a bearer token (realtime)",
    )
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds to wait for an async reply; 1800"
    )
    parser.add_argument(
        "--presign-hours",
        type=float,
        metavar="HOURS",
        help="do not wait: print addresses of the reply and of the failure that anybody may read "
        "for so long (async)",
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="send it to `python -m infra.local endpoint` on this machine",
    )
    parser.add_argument(
        "--port", type=int, default=LOCAL_PORT, help=f"with --local; default: {LOCAL_PORT}"
    )
    fields = parser.add_argument_group("fields of the request (inference/REFERENCE.md)")
    fields.add_argument("--num-candidates", type=int)
    fields.add_argument("--num-images", type=int)
    fields.add_argument("--seed", type=int, help="the same seed gives the same images")
    fields.add_argument("--temperature", type=float)
    fields.add_argument("--top-k", type=int)
    fields.add_argument("--top-p", type=float)
    fields.add_argument("--guidance-scale", type=float)
    fields.add_argument("--format", choices=("png", "jpeg", "webp"))
    fields.add_argument("--prime-image", type=Path, metavar="FILE")
    fields.add_argument("--prime-rows", type=int)
    fields.add_argument("--deadline-seconds", type=float)
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    body = request_body(options)
    hours = options.presign_hours
    if hours is not None and not 0 < hours <= MAX_PRESIGN_HOURS:
        raise PlanError(f"--presign-hours must be more than 0 and at most 168, got {hours:g}")
    for option in ("openai", "stream", "local"):
        if hours is not None and getattr(options, option):
            raise PlanError(f"--presign-hours is for an async endpoint: leave --{option} out")
    if options.openai and options.stream:
        raise PlanError("--openai and --stream cannot be given together")
    if options.local:
        output = Output(as_json=options.json, dry_run=options.dry_run)
        local = Aws(output, local_url=f"http://127.0.0.1:{options.port}")
        project = Project(options.project, local)
    else:
        project = open_project(options)
    name = endpoint_name(project.name, options.endpoint)
    mode = "realtime" if options.local else endpoint_mode(project, name)
    check_payload(mode, len(body))
    if options.openai:
        if mode != "realtime":
            raise PlanError(f"--openai is for a realtime endpoint, and {name} is {mode}")
        return invoke_openai(project, name, json.loads(body), options.out)
    if options.stream:
        if mode in ("async", "serverless"):
            raise PlanError(f"endpoint {name} is {mode}, and only a realtime one can stream")
        return invoke_stream(project, name, body, options.out)
    if hours is not None:
        if mode != "async" and not project.aws.dry_run:
            raise PlanError(f"--presign-hours is for an async endpoint, and {name} is {mode}")
        return presign(project, name, body, hours)
    if mode == "async":
        reply = invoke_async(project, project.stack_outputs(), name, body, options.timeout)
    else:
        reply = invoke_sync(project.aws, name, body)
    if project.aws.dry_run:
        return project.output.finish()
    read = results.read_reply(reply)
    images = results.save_images(read, options.out, options.format or "png")
    results.show(project.output, images)
    project.output.line(
        f"seed {read.seed}, {read.completed_candidates} of {read.num_candidates} candidates, "
        f"ranked by {read.ranked_by}"
    )
    results.show_warnings(project.output, read.warnings)
    return project.output.finish(
        endpoint=name,
        mode=mode,
        warnings=read.warnings,
        seed=read.seed,
        num_candidates=read.num_candidates,
        completed_candidates=read.completed_candidates,
        ranked_by=read.ranked_by,
        timings=read.timings.model_dump(),
        images=[asdict(image) for image in images],
    )


def request_body(options: argparse.Namespace) -> bytes:
    """Return the request as JSON. Raises UserError for an invalid field, before it is sent."""
    given = {name: getattr(options, name, None) for name in GenerateRequest.model_fields}
    fields = {name: value for name, value in given.items() if value is not None}
    if options.prime_image is not None:
        try:
            content = options.prime_image.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {options.prime_image}: {error.strerror}") from error
        fields["prime_image"] = base64.b64encode(content).decode()
    body = json.dumps(fields, ensure_ascii=False).encode()
    parse_request(body, limits=NO_LIMITS)
    return body


def endpoint_mode(project: Project, name: str) -> Mode:
    """Return an endpoint's mode. Raises UserError when there is none of that name."""
    found = project.aws.find(
        describe("Endpoint", name),
        answer={"EndpointConfigName": placeholder(f"configuration of {name}")},
    )
    if found is None:
        raise UserError(
            f"there is no endpoint {name}; `python -m infra status` lists them, and "
            "`python -m infra deploy` creates one"
        )
    config = project.aws.call(
        describe("EndpointConfig", found["EndpointConfigName"]),
        answer={"ProductionVariants": [{}]},
    )
    return mode_of(config)


def mode_of(config: dict[str, Any]) -> Mode:
    """Return the mode of an endpoint with this configuration."""
    if config.get("AsyncInferenceConfig"):
        return "async"
    return "serverless" if config["ProductionVariants"][0].get("ServerlessConfig") else "realtime"


def invocation(operation: str, name: str, **parameters: Any) -> Request:
    """Return a request to an endpoint, of JSON and for JSON unless `Accept` says otherwise."""
    given = {"EndpointName": name, "ContentType": JSON, "Accept": JSON, **parameters}
    return Request("sagemaker-runtime", operation, **given)


def invoke_sync(aws: Aws, name: str, body: bytes) -> bytes:
    """Return the reply of a real-time or serverless endpoint, which has 60 s for it."""
    request = invocation("InvokeEndpoint", name, Body=body)
    answer = aws.call(request, answer={"Body": []})
    return b"".join(aws.chunks(answer["Body"], request))


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


def invoke_stream(project: Project, name: str, body: bytes, out: Path) -> int:
    """Write every candidate when it arrives, then print the ranking; return the exit code."""
    request = invocation("InvokeEndpointWithResponseStream", name, Accept=JSON_LINES, Body=body)
    answer = project.aws.call(request, answer={"Body": []}, read_seconds=STREAM_SECONDS)
    if project.aws.dry_run:
        return project.output.finish()
    fields = GenerateRequest.model_validate_json(body)
    files: dict[int, str] = {}
    ranking: RankingLine | None = None
    for line in lines(project.aws.chunks(answer["Body"], request)):
        event = read_line(line)
        if isinstance(event, CandidateLine):
            path = out / f"candidate-{event.candidate}.{fields.format}"
            state = results.write(path, results.decode(event.image))
            files[event.candidate] = str(path)
            project.output.item(str(path), state)
        elif isinstance(event, RankingLine):
            ranking = event
    if ranking is None:
        raise AwsError(f"the stream of endpoint {name} ended without a ranking")
    shown = [
        results.SavedImage.of(each, files[each.candidate])
        for each in ranking.ranking
        if each.same_as is None or not fields.distinct
    ]
    results.show(project.output, shown[: fields.num_images])
    results.show_warnings(project.output, ranking.warnings)
    return project.output.finish(
        endpoint=name,
        mode="realtime",
        warnings=ranking.warnings,
        seed=ranking.seed,
        ranking=[{**each.model_dump(), "file": files[each.candidate]} for each in ranking.ranking],
    )


def lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield whole lines from chunks that are cut anywhere."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest


def read_line(line: bytes) -> CandidateLine | RankingLine | None:
    """Parse one line of a stream; return None for other events. Raises AwsError."""
    try:
        event = json.loads(line).get("event")
        if event == "candidate":
            return CandidateLine.model_validate_json(line)
        if event == "ranking":
            return RankingLine.model_validate_json(line)
    except (ValueError, AttributeError, ValidationError) as error:
        shown = line[:200].decode("utf-8", "replace")
        raise AwsError(f"the endpoint sent a line that cannot be read: {shown!r}") from error
    message = results.error_message(line)
    if message is not None:
        raise AwsError(f"the stream ended with an error: {message}")
    return None
