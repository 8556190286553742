"""The image on this machine, run as SageMaker runs it:

    python3 -m infra.local train --data DIR --out out/local --set size=tiny --set max_steps=20
    python3 -m infra.local serve --model out/local/model.tar.gz --port 8080
    python3 -m infra.local endpoint --model out/local/model.tar.gz --port 8081 --memory 4g --cpus 2

`train` creates the tree of /opt/ml, runs the image on it and packs model.tar.gz. `serve` unpacks
one, read-only, and serves it with limits on memory and processors. `endpoint` does so behind a
stand-in for SageMaker's runtime, for boto3's client. Ctrl-C stops a container as the platform does,
by SIGTERM first. Needs a Docker engine and the standard library.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from infra.docker import image_name, why_no_docker
from infra.local.endpoint import RuntimeFacade
from infra.local.opt_ml import STOP_TRAINING_SECONDS, OptMl, pack_model, start_training
from infra.local.pipes import Pipe, stream_of
from infra.local.serving import STOP_SERVING_SECONDS, Serving, unpacked

STREAMED = ("train", "validation")  # in Pipe mode; others are models
CALL = """\
import boto3

runtime = boto3.client(
    "sagemaker-runtime",
    region_name="us-east-1",
    endpoint_url="{url}",
    aws_access_key_id="any",
    aws_secret_access_key="any",
)
reply = runtime.invoke_endpoint(
    EndpointName="{name}",
    ContentType="text/plain",
    Accept="image/png",
    Body="big filled orange star",
)
with open("star.png", "wb") as file:
    file.write(reply["Body"].read())
"""
"""Printed by `endpoint`: a program that runs unchanged, with any credentials."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: remove the container
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    reason = why_no_docker(options.image)
    if reason:
        print(reason, file=sys.stderr)
        return 1
    limits = [
        f"--{name}={value}"
        for name in ("memory", "cpus", "gpus")
        if (value := getattr(options, name))
    ]
    for variable in options.env:
        limits += ["--env", variable]
    try:
        result: int = options.run(options, limits)
    except KeyboardInterrupt:  # before a container was started
        return 130
    return result


ALSO_CALLED = {"training": "train", "val": "validation", "valid": "validation"}
"""Other names of a folder -> the channel's name."""


def _train(options: argparse.Namespace, limits: list[str]) -> int:
    if not options.data.is_dir():
        print(f"{options.data} is not a directory", file=sys.stderr)
        return 1
    folders = {
        ALSO_CALLED.get(path.name, path.name): path
        for path in sorted(options.data.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    channels = folders if "train" in folders else {"train": options.data}
    tree = OptMl(options.out, "platform")
    tree.set_hyperparameters(**dict(options.set))
    if os.getuid() != 0:  # files that it writes belong to the caller
        limits = [*limits, "--user", f"{os.getuid()}:{os.getgid()}"]
    with ExitStack() as stack:
        mounted = {}
        for name, folder in channels.items():
            if options.input_mode == "Pipe" and name in STREAMED:
                content, wrapper = stream_of(folder, options.attributes)
                directory = tree.add_channel(
                    name, TrainingInputMode="Pipe", RecordWrapperType=wrapper
                )
                stack.enter_context(Pipe(directory, content))
            else:
                tree.add_channel(name)
                mounted[name] = folder
        container = stack.enter_context(
            start_training(tree, *limits, image=options.image, channels=mounted)
        )
        container.echo()
        try:
            status = container.wait(seconds=None)
        except KeyboardInterrupt:
            status = container.stop(STOP_TRAINING_SECONDS)
        if container.state()["OOMKilled"]:
            print("killed: the container exceeded --memory", file=sys.stderr)
    if status != 0:
        print(f"failed with exit status {status}", file=sys.stderr)
        return 1
    print(f"packed {pack_model(options.out / 'model', options.out / 'model.tar.gz')}")
    return 0


def _serve(options: argparse.Namespace, limits: list[str]) -> int:
    with _serving(options, options.port, limits) as serving:
        return _until_stopped(serving, f"http://127.0.0.1:{serving.port}/invocations")


def _endpoint(options: argparse.Namespace, limits: list[str]) -> int:
    with (
        _serving(options, 0, limits) as serving,
        RuntimeFacade({options.name: serving.port}, port=options.port) as facade,
    ):
        call = CALL.format(url=facade.url, name=options.name)
        return _until_stopped(
            serving,
            f"the endpoint {options.name}. For every client of the SageMaker runtime:\n\n"
            f"export AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME={facade.url}\n\n"
            f"A program that needs boto3 only:\n\n{call}",
        )


@contextmanager
def _serving(options: argparse.Namespace, port: int, limits: list[str]) -> Iterator[Serving]:
    if not options.model.exists():
        sys.exit(f"{options.model} does not exist; `python3 -m infra.local train` makes one")
    with (
        unpacked(options.model) as model,
        Serving(model, *limits, image=options.image, port=port) as serving,
    ):
        serving.echo()
        yield serving


def _until_stopped(serving: Serving, ready: str) -> int:
    """Print `ready` once the server is ready; return the container's exit status."""
    try:
        serving.wait_until_ready()
        print(f"ready after {time.monotonic() - serving.began:.1f} s: {ready}", flush=True)
        return serving.wait(seconds=None)
    except KeyboardInterrupt:
        return serving.stop(STOP_SERVING_SECONDS)


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m infra.local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train the image on a directory of pairs")
    train.add_argument(
        "--data",
        type=Path,
        required=True,
        help="holds pairs, or the channels train, validation, ...",
    )
    train.add_argument("--out", type=Path, required=True, help="becomes the container's /opt/ml")
    train.add_argument(
        "--set",
        action="append",
        type=_assignment,
        default=[],
        metavar="NAME=VALUE",
        help="a hyperparameter",
    )
    train.add_argument(
        "--input-mode",
        choices=("File", "Pipe"),
        default="File",
        help="Pipe streams train and validation through FIFOs (Linux): tar shards or a *.manifest",
    )
    train.add_argument(
        "--attributes",
        default="image-ref,caption",
        metavar="NAME,…",
        help="of a manifest in Pipe mode, the image's first; default %(default)s",
    )
    train.set_defaults(run=_train)
    serve = commands.add_parser("serve", help="serve a model.tar.gz or the directory of a model")
    serve.set_defaults(run=_serve)
    endpoint = commands.add_parser("endpoint", help="the same as an endpoint that boto3 can call")
    endpoint.add_argument("--name", default="dalle", help="the endpoint's; default %(default)s")
    endpoint.set_defaults(run=_endpoint)
    for command in (serve, endpoint):
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("--port", type=int, default=8080, help="on loopback; 0 for a free one")
    for command in (train, serve, endpoint):
        command.add_argument("--image", default=image_name(), help="default %(default)s")
        command.add_argument("--memory", default="", help="such as 4g; default no limit")
        command.add_argument("--cpus", default="", help="such as 2; default no limit")
        command.add_argument("--gpus", default="", help="such as all; default none")
        command.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
