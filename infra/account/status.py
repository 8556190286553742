"""`status`: what the project has, or one job or endpoint closely."""

from __future__ import annotations

import argparse
from typing import Any

from dalle.errors import UserError
from infra.account import inventory
from infra.aws import project
from infra.aws.output import count_words, size_words
from infra.aws.project import OUTPUTS, Project
from infra.aws.request import Call
from infra.endpoint.standing_cost import standing
from infra.jobs import progress

NEWEST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a training job or an endpoint")
    project.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    opened = project.open_project(options)
    if options.name:
        return show_one(opened, options.name)
    stack = opened.stack()
    if stack is None:
        opened.console.say(f"project {opened.name} has no stack; `python -m infra bootstrap`")
        return opened.console.finish(project=opened.name, stack=None)
    outputs = {o["OutputKey"]: o["OutputValue"] for o in stack.get("Outputs", [])}
    opened.console.item(f"stack {opened.name}", stack["StackStatus"])
    found: dict[str, Any] = {"project": opened.name, "stack": stack["StackStatus"]}
    if all(key in outputs for key in OUTPUTS):
        found |= _storage(opened, outputs["Bucket"], outputs["Repository"])
    found["endpoints"] = _endpoints(opened)
    found["jobs"] = _jobs(opened)
    return opened.console.finish(**found)


def show_one(opened: Project, name: str) -> int:
    """A training job with its losses, or an endpoint with its cost. Raises UserError."""
    asked = Call("sagemaker", "DescribeTrainingJob", {"TrainingJobName": name})
    job = opened.aws.find(asked)
    if job is not None:
        return _show_job(opened, name, job)
    endpoint = standing(opened, name)
    if endpoint is None and not opened.aws.dry_run:
        raise UserError(
            f"there is no training job or endpoint {name}; `python -m infra status` shows those "
            "there are"
        )
    if endpoint is not None:
        opened.console.item(f"endpoint {name}", f"{endpoint.mode}, {endpoint.hosts}")
        opened.console.item("  costs", endpoint.cost)
        return opened.console.finish(
            name=name,
            kind="endpoint",
            mode=endpoint.mode,
            instances=endpoint.instances,
            usd_per_month=endpoint.usd_per_month,
        )
    return opened.console.finish()


def _show_job(opened: Project, name: str, job: dict[str, Any]) -> int:
    console = opened.console
    console.item(f"training job {name}", progress.ended(job))
    reason = job.get("FailureReason")
    if reason:
        console.say(f"  {reason}")
    metrics = progress.courses(opened, name)
    rows = progress.loss_rows(metrics)
    if rows:
        console.say()
        console.table(("loss", "first", "last", "course"), rows)
    model = job.get("ModelArtifacts", {}).get("S3ModelArtifacts")
    if model:
        console.say(f"\nmodel: {model}")
    return console.finish(
        name=name,
        kind="training job",
        status=job["TrainingJobStatus"],
        failure=reason,
        metrics={key: values[-1] for key, values in metrics.items()},
        model=model,
    )


def _storage(opened: Project, bucket: str, repository: str) -> dict[str, Any]:
    number, num_bytes = inventory.stored(opened, bucket)
    opened.console.item(
        f"bucket {bucket}", f"{count_words(number, 'object')}, {size_words(num_bytes)}"
    )
    images = inventory.images(opened, repository)
    words = count_words(len(images), "image")
    if images:
        words += f", newest {images[0]['imageDigest'][:19]}"
    opened.console.item(f"repository {repository}", words)
    return {
        "bucket": bucket,
        "objects": number,
        "stored_bytes": num_bytes,
        "images": [image["imageDigest"] for image in images],
    }


def _endpoints(opened: Project) -> list[dict[str, Any]]:
    found = []
    for thing in inventory.things(opened, inventory.ENDPOINT):
        stands = standing(opened, thing.name)
        if stands is None:
            continue
        opened.console.item(
            f"endpoint {thing.name}", f"{thing.status}, {stands.mode}, {stands.hosts}"
        )
        opened.console.item("  costs", stands.cost)
        found.append(
            {
                "name": thing.name,
                "status": thing.status,
                "mode": stands.mode,
                "instances": stands.instances,
                "usd_per_month": stands.usd_per_month,
            }
        )
    return found


def _jobs(opened: Project) -> list[dict[str, str]]:
    found = []
    for kind in inventory.JOBS:
        for number, thing in enumerate(inventory.things(opened, kind)):
            if number == NEWEST:
                opened.console.say(f"older {kind.words}s are not shown")
                break
            opened.console.item(f"{kind.words} {thing.name}", thing.status)
            found.append({"kind": kind.words, "name": thing.name, "status": thing.status})
    return found
