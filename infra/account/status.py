"""`status`: the project's storage, endpoints and jobs, or one job or endpoint in detail."""

from __future__ import annotations

import argparse
from typing import Any

from dalle.errors import UserError
from infra.account import inventory
from infra.aws.output import count_words, size_words
from infra.aws.project import Project, add_project_arguments, open_project
from infra.aws.request import describe
from infra.aws.stack import OUTPUTS, given_storage, outputs_of
from infra.endpoint import components
from infra.endpoint.idle_cost import IdleCost, idle_cost
from infra.jobs import progress
from infra.registry import records

GIVEN = "given to `bootstrap`, and not counted: others may use it too"
NEWEST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a training job or an endpoint")
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    project = open_project(options)
    if options.name:
        return show_one(project, options.name)
    stack = project.stack()
    if stack is None:
        project.output.line(f"project {project.name} has no stack; `python -m infra bootstrap`")
        return project.output.finish(project=project.name, stack=None)
    outputs = outputs_of(stack)
    project.output.item(f"stack {project.name}", stack["StackStatus"])
    found: dict[str, Any] = {"project": project.name, "stack": stack["StackStatus"]}
    if all(key in outputs for key in OUTPUTS):
        bucket, repository = outputs["Bucket"], outputs["Repository"]
        given = given_storage(stack)
        found |= _bucket(project, bucket, is_given="Bucket" in given)
        found |= _repository(project, repository, is_given="Repository" in given)
    found["endpoints"] = _endpoints(project)
    found["components"] = _components(project)
    found["jobs"] = _jobs(project)
    runs = records.running(project)
    found["pipeline_runs"] = [records.run_id(arn) for arn in runs]
    for arn, status in runs.items():
        project.output.item(f"pipeline run {records.run_id(arn)}", status)
    return project.output.finish(**found)


def show_one(project: Project, name: str) -> int:
    """Print a training job with its losses, or an endpoint with its cost. Raises UserError."""
    job = project.aws.find(describe("TrainingJob", name))
    if job is not None:
        return _show_job(project, name, job)
    endpoint = idle_cost(project, name)
    if endpoint is None and not project.aws.dry_run:
        raise UserError(
            f"there is no training job or endpoint {name}; `python -m infra status` lists them"
        )
    if endpoint is not None:
        project.output.item(f"endpoint {name}", f"{endpoint.mode}, {endpoint.hosts}")
        project.output.item("  costs", endpoint.description)
        return project.output.finish(name=name, kind="endpoint", **_cost(endpoint))
    return project.output.finish()


def _show_job(project: Project, name: str, job: dict[str, Any]) -> int:
    output = project.output
    output.item(f"training job {name}", progress.ended(job))
    reason = job.get("FailureReason")
    if reason:
        output.line(f"  {reason}")
    metrics = progress.metric_history(project, name)
    rows = progress.loss_rows(metrics)
    if rows:
        output.line()
        output.table(("loss", "first", "last", "course"), rows)
    model = job.get("ModelArtifacts", {}).get("S3ModelArtifacts")
    if model:
        output.line(f"\nmodel: {model}")
    return output.finish(
        name=name,
        kind="training job",
        status=job["TrainingJobStatus"],
        failure=reason,
        metrics={key: values[-1] for key, values in metrics.items()},
        model=model,
    )


def _bucket(project: Project, name: str, *, is_given: bool) -> dict[str, Any]:
    if is_given:
        project.output.item(f"bucket {name}", GIVEN)
        return {"bucket": name}
    number, num_bytes = inventory.stored(project, name)
    project.output.item(
        f"bucket {name}", f"{count_words(number, 'object')}, {size_words(num_bytes)}"
    )
    return {"bucket": name, "objects": number, "stored_bytes": num_bytes}


def _repository(project: Project, name: str, *, is_given: bool) -> dict[str, Any]:
    if is_given:
        project.output.item(f"repository {name}", GIVEN)
        return {"repository": name}
    images = inventory.images(project, name)
    words = count_words(len(images), "image")
    if images:
        words += f", newest {images[0]['imageDigest'][:19]}"
    project.output.item(f"repository {name}", words)
    return {"images": [image["imageDigest"] for image in images]}


def _endpoints(project: Project) -> list[dict[str, Any]]:
    found = []
    for resource in inventory.resources(project, inventory.ENDPOINT):
        cost = idle_cost(project, resource.name)
        if cost is None:
            continue
        project.output.item(
            f"endpoint {resource.name}", f"{resource.status}, {cost.mode}, {cost.hosts}"
        )
        project.output.item("  costs", cost.description)
        found.append({"name": resource.name, "status": resource.status, **_cost(cost)})
    return found


def _components(project: Project) -> list[dict[str, str]]:
    """Print the models that share hosts, with their copies."""
    found = []
    for resource in inventory.resources(project, inventory.COMPONENT):
        copies = components.copies_in_words(project, resource.name)
        project.output.item(resource.label, f"{resource.status}, {copies}")
        found.append({"name": resource.name, "status": resource.status, "copies": copies})
    return found


def _cost(cost: IdleCost) -> dict[str, Any]:
    return {
        "mode": cost.mode,
        "instances": cost.instances,
        "usd_per_month": cost.usd_per_month,
    }


def _jobs(project: Project) -> list[dict[str, str]]:
    found = []
    for kind in inventory.JOBS:
        for number, resource in enumerate(inventory.resources(project, kind)):
            if number == NEWEST:
                project.output.line(f"older {kind.words}s are not shown")
                break
            project.output.item(resource.label, resource.status)
            found.append({"kind": kind.words, "name": resource.name, "status": resource.status})
    return found
