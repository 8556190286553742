"""The options of `deploy`, and the deployment that they describe with each mode's defaults."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dalle.errors import PlanError
from infra.aws.deployment import MODES, Deployment, Mode
from infra.aws.limits import default_ami, has_gpu
from infra.aws.project import IMAGE_TAG, Image, add_pairs
from infra.aws.team.names import topic_arn
from infra.endpoint.fleet import copies, pool

NAME_PATTERN = r"[a-zA-Z0-9]+(-+[a-zA-Z0-9]+)*"
DEFAULT_INSTANCE: dict[Mode, str | None] = {
    "realtime": "ml.c7i.2xlarge",
    "async": "ml.g5.xlarge",
    "serverless": None,
    "batch": "ml.g5.xlarge",
}
DEFAULT_CONCURRENT: dict[Mode, int] = {"realtime": 4, "async": 1, "serverless": 1, "batch": 2}
# The server's limits are a little below the platform's, so that its error reply arrives before the
# platform cuts the request off.
DEADLINES: dict[Mode, int] = {"realtime": 55, "serverless": 55, "async": 890, "batch": 590}
REPLY_MB: dict[Mode, int] = {"realtime": 5, "serverless": 3, "async": 100, "batch": 90}
PROJECTS_TOPIC = "project"
DEFAULT_MEMORY_MB = 6144
DEFAULT_CONCURRENCY = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, default="async", help="default: async")
    parser.add_argument(
        "--name", help="for a further endpoint of the project, which is called PROJECT--NAME"
    )
    parser.add_argument(
        "--model", metavar="URI", help="s3://…/model.tar.gz; default: of the newest completed job"
    )
    parser.add_argument(
        "--registered",
        action="store_true",
        help="the newest approved model of the Model Registry, with its image (`register`)",
    )
    parser.add_argument("--tag", default=IMAGE_TAG, help=f"the image's tag; default: {IMAGE_TAG}")
    add_pairs(parser, "--env", "for the server (`serve --help` lists the names); repeatable")
    parser.add_argument("--isolate", action="store_true", help="give the container no network")
    parser.add_argument(
        "--no-wait", dest="wait", action="store_false", help="return before it is in service"
    )
    hosts = parser.add_argument_group("instances (realtime, async, batch)")
    hosts.add_argument(
        "--instance-type",
        help=f"default: {DEFAULT_INSTANCE['async']}, for realtime {DEFAULT_INSTANCE['realtime']}",
    )
    hosts.add_argument(
        "--min-instances",
        type=int,
        help="default: 1, and 0 for async and with --component, which then cost nothing",
    )
    hosts.add_argument("--max-instances", type=int, help="default: 1, or --min-instances")
    hosts.add_argument(
        "--concurrent",
        type=int,
        help="requests in progress for each instance; default: 4, async 1, batch 2",
    )
    hosts.add_argument(
        "--ami", help="InferenceAmiVersion; default: one with a driver for the image's CUDA"
    )
    hosts.add_argument("--startup-seconds", type=int, default=600, help="default: 600")
    hosts.add_argument("--download-seconds", type=int, default=600, help="default: 600")
    hosts.add_argument("--volume-gb", type=int, help="default: the platform's")
    pool.add_arguments(hosts)
    copies.add_arguments(parser)
    share = parser.add_argument_group("serverless")
    share.add_argument("--memory-mb", type=int, help=f"default: {DEFAULT_MEMORY_MB}")
    share.add_argument("--max-concurrency", type=int, help=f"default: {DEFAULT_CONCURRENCY}")
    share.add_argument("--provisioned-concurrency", type=int, help="always warm; default: none")
    work = parser.add_argument_group("batch")
    work.add_argument("--captions", type=Path, help="a text file, one caption a line")
    work.add_argument("--out", type=Path, help="a folder for the images; default: out/batch")
    told = parser.add_argument_group("async")
    for option, what in (("--success-topic", "a reply"), ("--error-topic", "a failure")):
        told.add_argument(
            option,
            type=topic,
            default="",
            metavar="ARN",
            help=f"an SNS topic that is told of {what}; `{PROJECTS_TOPIC}`: that of "
            "`bootstrap --mail`",
        )
    parser.add_argument(
        "--invocation-seconds", type=int, help="for one request; default: 60, async and batch 900"
    )


def topic(text: str) -> str:
    """Return the ARN of a topic, or the word for the project's. For argparse."""
    return text if text == PROJECTS_TOPIC else topic_arn(text)


def check_given(options: argparse.Namespace) -> None:
    """Raise PlanError for options of another mode, a missing one, and a name that cannot be."""
    if options.registered and options.model:
        raise PlanError("--registered and --model both name a model; leave one of them out")
    if options.registered and options.tag != IMAGE_TAG:
        raise PlanError(
            f"--registered serves the image that trained its model: leave --tag {options.tag} out"
        )
    if options.name and not re.fullmatch(NAME_PATTERN, options.name):
        raise PlanError(
            f"--name is letters and digits, with dashes between them, got {options.name!r}"
        )
    if options.concurrent is not None and options.concurrent < 1:
        raise PlanError(f"--concurrent must be 1 or more, got {options.concurrent}")
    for name in ("min_instances", "max_instances", "concurrent"):
        if options.mode == "serverless" and getattr(options, name) is not None:
            raise PlanError(
                f"--{name.replace('_', '-')} is for instances, and a serverless endpoint has none; "
                "--max-concurrency is its limit"
            )
    if options.mode == "batch" and options.captions is None:
        raise PlanError("--mode batch needs --captions, a text file with one caption a line")
    if options.mode != "batch":
        for name in ("captions", "out"):
            if getattr(options, name) is not None:
                raise PlanError(f"--{name} is for --mode batch alone")


def endpoint_name(project_name: str, name: str | None) -> str:
    """Return the endpoint's name at AWS. `name` may begin with the project's name or not.

    The two dashes are in no project's name. So an endpoint of `dalle` cannot have the name of one
    of `dalle-rt`.
    """
    if not name or name == project_name:
        return project_name
    return name if name.startswith(f"{project_name}--") else f"{project_name}--{name}"


def read(
    options: argparse.Namespace, project_name: str, image: Image, model_data: str
) -> Deployment:
    """Return the deployment that the options describe, with the mode's defaults."""
    mode: Mode = options.mode
    types = pool.chosen(options)
    kind = types[0] if types else DEFAULT_INSTANCE[mode]
    is_gpu = kind is not None and has_gpu(kind)
    seconds = options.invocation_seconds
    is_long = mode in ("async", "batch")
    environment = {
        # With an unusable GPU the start fails; a GPU's price is never paid for a CPU's speed.
        "DALLE_DEVICE": "cuda" if is_gpu else "cpu",
        "DALLE_DEADLINE_SECONDS": str(max(1, seconds - 10) if seconds else DEADLINES[mode]),
        "DALLE_MAX_REPLY_MB": str(REPLY_MB[mode]),
        **dict(options.env),
    }
    if options.min_instances is not None:
        least = options.min_instances
    else:
        least = 0 if mode == "async" or options.component is not None else 1
    serverless = mode == "serverless"
    memory, most = options.memory_mb, options.max_concurrency
    name = endpoint_name(project_name, options.name)
    return Deployment(
        name=name,
        mode=mode,
        image_uri=image.uri,
        model_data=model_data,
        image_bytes=image.num_bytes,
        compressed_bytes=image.compressed_bytes,
        instance_type=kind,
        min_instances=least,
        max_instances=max(1, least) if options.max_instances is None else options.max_instances,
        concurrent_per_instance=options.concurrent or DEFAULT_CONCURRENT[mode],
        memory_mb=DEFAULT_MEMORY_MB if serverless and memory is None else memory,
        max_concurrency=DEFAULT_CONCURRENCY if serverless and most is None else most,
        provisioned_concurrency=options.provisioned_concurrency,
        ami=options.ami or (default_ami(kind) if kind and mode != "batch" else None),
        startup_seconds=options.startup_seconds,
        download_seconds=options.download_seconds,
        invocation_seconds=seconds or (900 if is_long else 60),
        volume_gb=options.volume_gb,
        environment=environment,
        isolate=options.isolate,
        pool=types if len(types) > 1 else (),
        provision_seconds=options.provision_seconds,
        reservation=options.reservation,
        success_topic=options.success_topic,
        error_topic=options.error_topic,
        copies=copies.read(options, name, kind, least),
    )
