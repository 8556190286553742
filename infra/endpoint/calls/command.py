"""`invoke`: a caption to an endpoint, and the images as files.

The request is checked here before it is sent. The endpoint's configuration decides how it is sent:
as one request, as a stream with --stream, or through S3 to an asynchronous endpoint.
"""

from __future__ import annotations

import argparse
import base64
import json
from dataclasses import asdict
from pathlib import Path

from dalle.errors import PlanError, UserError
from inference.api.parsing import parse_request
from inference.api.schema import GenerateRequest, Limits
from infra.aws.client import Aws
from infra.aws.deployment import Mode
from infra.aws.limits import check_payload
from infra.aws.output import Output
from infra.aws.project import Project, add_project_arguments, open_project
from infra.endpoint import components
from infra.endpoint.calls import results
from infra.endpoint.calls.asynchronous import invoke_async, presign
from infra.endpoint.calls.direct import invoke_component, invoke_sync
from infra.endpoint.calls.openai_chat import invoke_openai
from infra.endpoint.calls.streamed import invoke_stream
from infra.endpoint.described import endpoint_config, is_shared, mode_of
from infra.endpoint.fleet.copies import component_name
from infra.endpoint.options import endpoint_name

MAX_PRESIGN_HOURS = 7 * 24
"""By the signature, whose end is at most a week away."""
LOCAL_PORT = 8080
# Checks everything but the endpoint's limits, which are not known here.
NO_LIMITS = Limits(max_candidates=1 << 30, max_images=1 << 30, max_request_bytes=1 << 40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("caption", help="what the images should show")
    parser.add_argument("--endpoint", metavar="NAME", help="default: named as the project")
    parser.add_argument(
        "--component",
        metavar="NAME",
        help="one of the models that share the endpoint; default: where there is one, that",
    )
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
        "--timeout",
        type=float,
        default=1800.0,
        help="seconds to wait for an async reply, or for the first copy of a model; 1800",
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
    mode, component = _route(project, name, options)
    check_payload(mode, len(body))
    if options.openai:
        if mode != "realtime":
            raise PlanError(f"--openai is for a realtime endpoint, and {name} is {mode}")
        return invoke_openai(project, name, component, json.loads(body), options.out)
    if options.stream:
        if mode in ("async", "serverless"):
            raise PlanError(f"endpoint {name} is {mode}, and only a realtime one can stream")
        return invoke_stream(project, name, component, body, options.out)
    if hours is not None:
        if mode != "async" and not project.aws.dry_run:
            raise PlanError(f"--presign-hours is for an async endpoint, and {name} is {mode}")
        return presign(project, name, body, hours)
    if mode == "async":
        reply = invoke_async(project, project.stack_outputs(), name, body, options.timeout)
    elif component:
        reply = invoke_component(project, name, component, body, options.timeout)
    else:
        reply = invoke_sync(project.aws, name, body)
    if project.aws.dry_run:
        return project.output.finish()
    read = results.read_reply(reply)
    images = results.save_images(read, options.out, options.format or "png")
    results.show(project.output, images)
    project.output.line(
        f"seed {read.seed}, {read.completed_candidates} of {read.num_candidates} candidates, "
        f"ranked by {read.ranked_by}, {results.sampled(read.sampling)}"
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
        sampling=read.sampling.model_dump(),
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


def _route(project: Project, name: str, options: argparse.Namespace) -> tuple[Mode, str]:
    """Return an endpoint's mode, and which of its models is asked; empty where it has one model.

    Raises UserError for a model that must be named, PlanError for one that cannot be.
    """
    given = component_name(name, options.component) if options.component else ""
    if options.local:
        return "realtime", ""
    config = endpoint_config(project, name)
    mode = mode_of(config)
    if project.aws.dry_run or not is_shared(config):
        if given and not project.aws.dry_run:
            raise PlanError(f"endpoint {name} has one model: leave --component out")
        return mode, given
    return mode, given or components.only(project, name)
