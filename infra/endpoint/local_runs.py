"""`train --local`, `deploy --local`: the same commands with the image on this machine.

They drive the SageMaker SDK's local mode, and need a Docker engine instead of an AWS account.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle.errors import PlanError, UserError
from infra.aws.output import Console
from infra.docker import why_no_docker
from infra.endpoint import batch
from infra.endpoint.options import endpoint_name
from infra.local import sdk_mode as sdk
from infra.local.endpoint import RuntimeFacade

CHANNELS = ("train", "validation")
LOCAL_ENVIRONMENT = {"DALLE_DEVICE": "auto"}


def train(options: argparse.Namespace) -> int:
    """Train by the SDK's local mode, stage after stage. Raises UserError, JobError."""
    if options.input_mode == "Pipe" or options.attributes or options.validation:
        raise PlanError(
            "the SDK's local mode has no Pipe mode and takes held-out pairs from --data; "
            "`python -m infra.local train --input-mode Pipe` streams to the image on this machine"
        )
    if options.distribution != "FullyReplicated":
        raise PlanError(
            "the SDK's local mode gives every host the whole channel; --distribution "
            f"{options.distribution} needs a job at AWS"
        )
    console = _open(options, options.image)
    folder = Path(options.data)
    if not folder.is_dir():
        raise UserError(f"--data is a folder when --local is given, and {folder} is none")
    found = {name: folder / name for name in CHANNELS if (folder / name).is_dir()}
    channels: dict[str, Path | str] = dict(found if "train" in found else {"train": folder})
    if options.artefact:
        channels["artefact"] = options.artefact
    if options.clip:
        channels["clip"] = options.clip
    archive = None
    for stage in options.stages:
        if archive is not None:
            channels["artefact"] = archive.parent
        out = options.out if len(options.stages) == 1 else options.out / stage
        with _stdout_for_the_result(options.json):
            archive = sdk.train(
                channels,
                out,
                hyperparameters={**dict(options.set), "stage": stage},
                image=options.image,
                instance_count=options.instance_count,
            )
        console.item(f"stage {stage}", str(archive))
    console.say(f"\nserve it: python -m infra deploy --local --model {archive}")
    return console.finish(model=str(archive), stages=list(options.stages))


def deploy(options: argparse.Namespace) -> int:
    """Serve the image until Ctrl-C or SIGTERM, or draw one batch."""
    console = _open(options, None)
    model = Path(options.model)
    if not model.exists():
        raise UserError(f"--model is a file or folder when --local is given, and {model} is none")
    environment = {**LOCAL_ENVIRONMENT, **dict(options.env)}
    if options.mode == "batch":
        return _draw(console, options, model, environment)
    name = endpoint_name(options.project, options.name)
    with (
        _stdout_for_the_result(options.json),
        sdk.hosted(model, environment=environment) as endpoint,
        RuntimeFacade({name: endpoint.port}, port=options.port) as facade,
    ):
        console.item(f"endpoint {name}", "in service on this machine; Ctrl-C ends it")
        port = "" if options.port == 8080 else f" --port {options.port}"
        console.say(f"\ndraw: python -m infra invoke 'a caption' --local{port}")
        console.say(f"or:   export AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME={facade.url}")
        _until_stopped()
    return console.finish(endpoint=name, state="ended")


def _draw(
    console: Console, options: argparse.Namespace, model: Path, environment: dict[str, str]
) -> int:
    out = options.out or batch.DEFAULT_OUT
    with (
        _stdout_for_the_result(options.json),
        tempfile.TemporaryDirectory(prefix="batch-") as scratch,
    ):
        requests = Path(scratch) / "in"
        requests.mkdir()
        (requests / batch.FILE).write_bytes(batch.requests(options.captions))
        (reply,) = sdk.transform(model, requests, Path(scratch) / "out", environment=environment)
        written, refused = batch.save(console, reply.read_bytes(), out)
    console.say(f"{written} pictures in {out}; {refused} captions refused")
    return console.finish(pictures=written, refused=refused, folder=str(out))


@contextmanager
def _stdout_for_the_result(as_json: bool) -> Iterator[None]:
    """Keep the containers' logs off stdout, where --json promises one object: to stderr."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _until_stopped() -> None:
    """Until Ctrl-C or SIGTERM, both of which let the container be cleared away."""
    stopped = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        stopped.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(options: argparse.Namespace, image: str | None) -> Console:
    """Raises PlanError for a dry run, UserError with what is missing to run the image."""
    if options.dry_run:
        raise PlanError("--dry-run is for requests to AWS, and --local makes none")
    reason = why_no_docker(image)
    if reason:
        raise UserError(reason)
    return Console(as_json=options.json)
