"""`teardown`: find the project's resources, print their cost, delete them, and look for them again.

The order is by cost: running jobs and endpoints first, the bucket and the stack last. Nothing is
remembered between runs, each of which lists what exists. So it also works after a crash of another
command or of `teardown` itself.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from dalle.errors import AwsError, UserError
from infra.account import inventory
from infra.account.inventory import RUNNING, Resource
from infra.aws.output import count_words, size_words
from infra.aws.project import KIND_WORDS, Project, add_project_arguments, open_project
from infra.aws.request import Request
from infra.aws.stack import given_storage, outputs_of
from infra.endpoint import autoscaling
from infra.endpoint.idle_cost import IdleCost, idle_cost
from infra.endpoint.requests import VARIANT
from infra.registry import records
from infra.setup import bootstrap, upload

POLL_SECONDS = 5.0
IMAGES_TOGETHER = 100


@dataclass
class Inventory:
    """The resources to delete. bucket, repository: None when the stack has none.

    runs: ARN -> status of the pipeline's runs that have not ended.
    ended: jobs of which nothing is left but their records.
    records: pipeline and group of registered models.
    given: bucket and repository that `bootstrap` was given, which stay.
    """

    running: list[Resource]
    runs: dict[str, str]
    ended: list[Resource]
    warm_pools: list[Resource]
    components: list[Resource]
    endpoints: list[Resource]
    configs: list[Resource]
    models: list[Resource]
    scaling: list[dict[str, str]]
    alarms: list[str]
    dashboards: list[str]
    log_groups: list[str]
    stack: dict[str, Any] | None
    bucket: str | None
    repository: str | None
    records: list[str]
    given: dict[str, str]

    @property
    def hosting(self) -> list[tuple[str, str]]:
        """Kind and name of every resource but bucket, repository, role and records of jobs."""
        named = [*self.running, *self.warm_pools, *self.components, *self.endpoints]
        named += [*self.configs, *self.models]
        return [
            *((resource.kind.words, resource.name) for resource in named),
            *(("pipeline run", records.run_id(arn)) for arn in self.runs),
            *(("scaling", where["ResourceId"]) for where in self.scaling),
            *(("alarm", name) for name in self.alarms),
            *(("dashboard", name) for name in self.dashboards),
            *(("log group", name) for name in self.log_groups),
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="delete without a question")
    parser.add_argument(
        "--keep-storage",
        action="store_true",
        help="delete what is paid by the hour; keep bucket, images and role",
    )
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    project = open_project(options)
    output = project.output
    found = collect(project)
    storage = found.stack is not None and not options.keep_storage
    # A model in the bucket is found by the record of its job, so both are kept or neither.
    ended = [] if options.keep_storage else found.ended
    if project.aws.dry_run:
        return output.finish()
    registered = [] if options.keep_storage else found.records
    if not found.hosting and not storage and not ended and not registered:
        output.line(f"project {project.name} has nothing to delete")
        return output.finish(project=project.name, deleted=[], usd_per_month_stopped=0.0)
    costs = show(project, found, storage=storage)
    if not options.yes:
        confirm(project)
    deleted = [list(pair) for pair in found.hosting]
    end_hosting(project, found)
    if not options.keep_storage:
        deleted += delete_records(project, [*ended, *found.running], found.warm_pools)
    records.delete(project, registered)
    deleted += [[KIND_WORDS[kind], project.name] for kind in registered]
    if storage:
        empty(project, found.bucket)
        delete_images(project, found.repository)
        delete_stack(project)
        deleted.append(["stack", project.name])
    verify(project, found.bucket if storage else None, storage=storage)
    known = [cost.usd_per_month for cost in costs.values() if cost.usd_per_month is not None]
    stays = "" if storage else " but bucket, images and role"
    if found.given:
        # Its objects too: others may have put theirs beside the project's.
        stays = f" but {' and '.join(f'{k.lower()} {n}' for k, n in found.given.items())}"
        stays += ", which are not the project's" if len(found.given) > 1 else ", not the project's"
        stays += "" if storage else ", and the role"
    output.line(f"\nnothing is left{stays}")
    return output.finish(
        project=project.name,
        deleted=deleted,
        usd_per_month_stopped=sum(known),
        unpriced=[name for name, cost in costs.items() if cost.usd_per_month is None],
    )


def collect(project: Project) -> Inventory:
    """Return every resource of the project that exists now."""
    stack = project.stack()
    endpoints = list(inventory.resources(project, inventory.ENDPOINT))
    configs = list(inventory.resources(project, inventory.CONFIG))
    names = inventory.endpoint_names(endpoints, configs)
    components = list(inventory.resources(project, inventory.COMPONENT))
    parts = [component.name for component in components]
    given = given_storage(stack)
    outputs = {key: name for key, name in outputs_of(stack).items() if key not in given}
    return Inventory(
        running=inventory.running_jobs(project),
        runs=records.running(project),
        ended=inventory.ended_jobs(project),
        warm_pools=inventory.warm_pools(project),
        components=components,
        endpoints=endpoints,
        configs=configs,
        models=list(inventory.resources(project, inventory.MODEL)),
        scaling=inventory.scaling(project, names, parts, VARIANT),
        alarms=inventory.alarms(project, names, parts),
        dashboards=inventory.dashboards(project, names),
        log_groups=inventory.log_groups(project, names),
        stack=stack,
        bucket=outputs.get("Bucket"),
        repository=outputs.get("Repository"),
        records=records.find(project),
        given=given,
    )


def show(project: Project, found: Inventory, *, storage: bool) -> dict[str, IdleCost]:
    """Print the resources and their cost; return the costs by endpoint."""
    output = project.output
    output.line(f"project {project.name} has in {project.aws.region}:")
    costs = {}
    for resource in found.endpoints:
        cost = idle_cost(project, resource.name)
        if cost is not None:
            costs[resource.name] = cost
    for kind, name in found.hosting:
        about = f"  {costs[name].description}" if kind == "endpoint" and name in costs else ""
        output.line(f"  {kind:<14} {name}{about}")
    if found.ended:
        kept = "" if storage else ", kept with the bucket"
        output.line(f"  {'records':<14} {count_words(len(found.ended), 'job')} that ended{kept}")
    if storage and found.bucket:
        number, num_bytes = inventory.stored(project, found.bucket)
        size = f"{count_words(number, 'object')}, {size_words(num_bytes)}: data, models, results"
        output.line(f"  {'bucket':<14} {found.bucket}  {size}")
    for kind in found.records if storage else ():
        output.line(f"  {KIND_WORDS[kind]:<14} {project.name}")
    if storage:
        parts = ["bucket"] * bool(found.bucket) + ["images"] * bool(found.repository)
        output.line(f"  {'stack':<14} {project.name}  {', '.join([*parts, 'role'])}")
    total = sum(cost.usd_per_month or 0.0 for cost in costs.values())
    unknown = [name for name, cost in costs.items() if cost.usd_per_month is None]
    more = f", and the unknown cost of {', '.join(unknown)}" if unknown else ""
    output.line(f"deleting it stops {total:,.2f} USD a month{more}, storage not counted")
    return costs


def confirm(project: Project) -> None:
    """Read the project's name from a terminal. Raises UserError for any other input."""
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted; give --yes to delete without a question")
    project.output.line(f"\ndelete all of it? Type the project's name, {project.name}:")
    if input().strip() != project.name:
        raise UserError("nothing was deleted")


def end_hosting(project: Project, found: Inventory) -> None:
    """Stop jobs, delete endpoints and what belongs to them; configurations last."""
    aws, output = project.aws, project.output
    for resource in found.running:
        if resource.status != "Stopping":
            aws.find(resource.end)
        output.item(resource.label, "stopping")
    records.stop(project, found.runs)
    for resource in found.warm_pools:
        ended = {**resource.identity, "ResourceConfig": {"KeepAlivePeriodInSeconds": 0}}
        aws.find(Request("sagemaker", "UpdateTrainingJob", **ended))
        output.item(f"warm pool of {resource.name}", "ended")
    for where in found.scaling:
        aws.find(Request(autoscaling.SERVICE, "DeregisterScalableTarget", **where))
        output.item(f"scaling of {where['ResourceId'].split('/')[1]}", "deleted")
    if found.alarms:
        aws.call(Request("cloudwatch", "DeleteAlarms", AlarmNames=found.alarms))
        for name in found.alarms:
            output.item(f"alarm {name}", "deleted")
    if found.dashboards:
        names = {"DashboardNames": found.dashboards}
        aws.call(Request("cloudwatch", "DeleteDashboards", **names))
        for name in found.dashboards:
            output.item(f"dashboard {name}", "deleted")
    for some in (found.components, found.endpoints):  # an endpoint ends without components alone
        _delete(project, some)
    # A stopping job may still write into the bucket that is emptied next.
    for resource in found.running:
        what = f"the end of {resource.label}"
        aws.until(what, partial(_has_ended, project, resource), every_seconds=POLL_SECONDS)
        output.item(resource.label, "stopped")
    if found.runs:
        what = f"the end of the runs of pipeline {project.name}"
        aws.until(what, lambda: not records.running(project), every_seconds=POLL_SECONDS)
    for name in found.log_groups:
        aws.find(Request("logs", "DeleteLogGroup", logGroupName=name))
        output.item(f"log group {name}", "deleted")
    for resource in [*found.models, *found.configs]:
        aws.find(resource.end)
        output.item(resource.label, "deleted")


def _delete(project: Project, some: list[Resource]) -> None:
    """Delete resources whose deletion takes minutes, at once, and wait for the end of each."""
    for resource in some:
        if resource.status != "Deleting":
            project.aws.find(resource.end)
    for resource in some:
        what = f"the end of {resource.label}"
        project.aws.until_gone(what, resource.description, every_seconds=POLL_SECONDS)
        project.output.item(resource.label, "deleted")


def delete_records(project: Project, jobs: list[Resource], warm: list[Resource]) -> list[list[str]]:
    """Delete what the platform keeps of jobs that have ended; return kind and name of each.

    warm: jobs whose pools were ended just now; a record stays as long as its pool does.
    """
    for resource in warm:
        what = f"the end of the warm pool of {resource.name}"
        project.aws.until(what, partial(_is_cold, project, resource), every_seconds=POLL_SECONDS)
    some = [each for each in jobs if each.kind in inventory.WITH_RECORDS]
    for resource in some:
        project.aws.find(resource.deletion)
    if some:
        project.output.item(f"records of {count_words(len(some), 'job')}", "deleted")
    return [[each.kind.words, each.name] for each in some]


def _is_cold(project: Project, resource: Resource) -> bool:
    found = project.aws.find(resource.description) or {}
    return found.get("WarmPoolStatus", {}).get("Status") not in ("Available", "InUse")


def empty(project: Project, bucket: str | None) -> None:
    """Delete all objects in all versions, which CloudFormation does not, and unfinished uploads."""
    if bucket is None:
        return
    request = Request("s3", "ListObjectVersions", Bucket=bucket)
    kinds = ("Versions", "DeleteMarkers")
    objects = [upload.identity(found) for key in kinds for found in project.aws.items(request, key)]
    upload.delete(project, bucket, objects)
    unfinished = Request("s3", "ListMultipartUploads", Bucket=bucket)
    for found in project.aws.items(unfinished, "Uploads"):
        identity = {"Key": found["Key"], "UploadId": found["UploadId"]}
        project.aws.find(Request("s3", "AbortMultipartUpload", Bucket=bucket, **identity))
    project.output.item(f"bucket {bucket}", f"{count_words(len(objects), 'object')} deleted")


def delete_images(project: Project, repository: str | None) -> None:
    """Delete every image, because deleting the stack does not do so everywhere."""
    if repository is None:
        return
    found = sorted({image["imageDigest"] for image in inventory.images(project, repository)})
    for start in range(0, len(found), IMAGES_TOGETHER):
        some = [{"imageDigest": digest} for digest in found[start : start + IMAGES_TOGETHER]]
        request = {"repositoryName": repository, "imageIds": some}
        project.aws.call(Request("ecr", "BatchDeleteImage", **request))
    project.output.item(f"repository {repository}", f"{count_words(len(found), 'image')} deleted")


def delete_stack(project: Project) -> None:
    """Delete the stack and wait. Raises AwsError with CloudFormation's reason when it stays."""
    project.aws.call(Request("cloudformation", "DeleteStack", StackName=project.name))
    what = f"the end of stack {project.name}"
    project.aws.until(what, partial(_stack_is_gone, project), every_seconds=POLL_SECONDS)
    project.output.item(f"stack {project.name}", "deleted")


def _stack_is_gone(project: Project) -> bool:
    stack = project.stack()
    if stack is not None and stack["StackStatus"] == "DELETE_FAILED":
        bootstrap.wait(project)
    return stack is None or stack["StackStatus"] == "DELETE_COMPLETE"


def verify(project: Project, bucket: str | None, *, storage: bool) -> None:
    """List the resources again. Raises AwsError that names those that still exist.

    bucket: the one that should have been deleted with the stack.
    """
    left = collect(project)
    names = [f"{kind} {name}" for kind, name in left.hosting]
    names += [f"{KIND_WORDS[kind]} {project.name}" for kind in left.records if storage]
    if storage and left.stack is not None:
        names.append(f"stack {project.name} ({left.stack['StackStatus']})")
    if bucket is not None and project.aws.find(Request("s3", "HeadBucket", Bucket=bucket)):
        names.append(f"bucket {bucket}")
    if names:
        raise AwsError(
            f"not deleted: {', '.join(names)}; run the same command again, and look in the AWS "
            "console when that does not help"
        )


def _has_ended(project: Project, resource: Resource) -> bool:
    found = project.aws.find(resource.description)
    return found is None or found[f"{resource.kind.name}Status"] not in RUNNING
