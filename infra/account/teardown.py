"""`teardown`: everything the project made is found, priced, deleted, and looked for again.

The order is by what costs most: running jobs and endpoints first, the bucket and the stack last. It
works after a crash in the middle of anything, its own included, because nothing is remembered: each
run looks at what there is.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from dalle.errors import AwsError, UserError
from infra.account import inventory
from infra.account.inventory import RUNNING, Thing
from infra.aws import project
from infra.aws.output import count_words, size_words
from infra.aws.project import Project
from infra.aws.request import Call
from infra.endpoint.deploy import VARIANT
from infra.endpoint.standing_cost import Standing, standing
from infra.setup import bootstrap, upload

POLL_SECONDS = 5.0
IMAGES_TOGETHER = 100


@dataclass
class Found:
    """What there is to delete. bucket, repository: None when the stack has none."""

    running: list[Thing]
    warm_pools: list[Thing]
    endpoints: list[Thing]
    configs: list[Thing]
    models: list[Thing]
    scaling: list[dict[str, str]]
    alarms: list[str]
    log_groups: list[str]
    stack: dict[str, Any] | None
    bucket: str | None
    repository: str | None

    @property
    def hosting(self) -> list[tuple[str, str]]:
        """Everything but bucket, repository and role: a kind and a name each."""
        named = [
            *self.running,
            *self.warm_pools,
            *self.endpoints,
            *self.configs,
            *self.models,
        ]
        return [
            *((thing.kind.words, thing.name) for thing in named),
            *(("scaling", where["ResourceId"]) for where in self.scaling),
            *(("alarm", name) for name in self.alarms),
            *(("log group", name) for name in self.log_groups),
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.add_argument(
        "--keep-storage",
        action="store_true",
        help="delete what costs by the hour; keep bucket, images and role",
    )
    project.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    opened = project.open_project(options)
    console = opened.console
    found = look(opened)
    storage = found.stack is not None and not options.keep_storage
    if opened.aws.dry_run:
        return console.finish()
    if not found.hosting and not storage:
        console.say(f"project {opened.name} has nothing to delete")
        return console.finish(project=opened.name, deleted=[], usd_per_month_stopped=0.0)
    costs = show(opened, found, storage=storage)
    if not options.yes:
        confirm(opened)
    deleted = [list(pair) for pair in found.hosting]
    end_hosting(opened, found)
    if storage:
        empty(opened, found.bucket)
        delete_images(opened, found.repository)
        delete_stack(opened)
        deleted.append(["stack", opened.name])
    verify(opened, found.bucket if storage else None, storage=storage)
    known = [cost.usd_per_month for cost in costs.values() if cost.usd_per_month is not None]
    console.say(f"\nnothing is left{'' if storage else ' but bucket, images and role'}")
    return console.finish(
        project=opened.name,
        deleted=deleted,
        usd_per_month_stopped=sum(known),
        unpriced=[name for name, cost in costs.items() if cost.usd_per_month is None],
    )


def look(opened: Project) -> Found:
    """Everything of the project that is there now."""
    stack = opened.stack()
    endpoints = list(inventory.things(opened, inventory.ENDPOINT))
    configs = list(inventory.things(opened, inventory.CONFIG))
    names = inventory.endpoint_names(endpoints, configs)
    outputs = {o["OutputKey"]: o["OutputValue"] for o in (stack or {}).get("Outputs", [])}
    return Found(
        running=inventory.running(opened),
        warm_pools=inventory.warm_pools(opened),
        endpoints=endpoints,
        configs=configs,
        models=list(inventory.things(opened, inventory.MODEL)),
        scaling=inventory.scaling(opened, names, VARIANT),
        alarms=inventory.alarms(opened, names),
        log_groups=inventory.log_groups(opened, names),
        stack=stack,
        bucket=outputs.get("Bucket"),
        repository=outputs.get("Repository"),
    )


def show(opened: Project, found: Found, *, storage: bool) -> dict[str, Standing]:
    """Print what would go and what it costs; returns the costs by endpoint."""
    console = opened.console
    console.say(f"project {opened.name} has in {opened.aws.region}:")
    costs = {}
    for thing in found.endpoints:
        cost = standing(opened, thing.name)
        if cost is not None:
            costs[thing.name] = cost
    for kind, name in found.hosting:
        about = f"  {costs[name].cost}" if kind == "endpoint" and name in costs else ""
        console.say(f"  {kind:<14} {name}{about}")
    if storage and found.bucket:
        number, num_bytes = inventory.stored(opened, found.bucket)
        size = f"{count_words(number, 'object')}, {size_words(num_bytes)}: data, models, results"
        console.say(f"  {'bucket':<14} {found.bucket}  {size}")
        console.say(f"  {'stack':<14} {opened.name}  bucket, images, role")
    total = sum(cost.usd_per_month or 0.0 for cost in costs.values())
    unknown = [name for name, cost in costs.items() if cost.usd_per_month is None]
    more = f", and what {', '.join(unknown)} costs" if unknown else ""
    console.say(f"deleting it stops {total:,.2f} USD a month{more}, storage not counted")
    return costs


def confirm(opened: Project) -> None:
    """Ask for the project's name on a terminal. Raises UserError otherwise."""
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted; give --yes to delete without being asked")
    opened.console.say(f"\ndelete all of it? Type the project's name, {opened.name}:")
    if input().strip() != opened.name:
        raise UserError("nothing was deleted")


def end_hosting(opened: Project, found: Found) -> None:
    """Stop jobs, delete endpoints and all that belongs to them; configurations go last."""
    aws, console = opened.aws, opened.console
    for thing in found.running:
        if thing.status != "Stopping":
            aws.find(Call("sagemaker", thing.kind.ended_by, thing.identity))
        console.item(f"{thing.kind.words} {thing.name}", "stopping")
    for thing in found.warm_pools:
        ended = {**thing.identity, "ResourceConfig": {"KeepAlivePeriodInSeconds": 0}}
        aws.find(Call("sagemaker", "UpdateTrainingJob", ended))
        console.item(f"warm pool of {thing.name}", "ended")
    for where in found.scaling:
        aws.find(Call("application-autoscaling", "DeregisterScalableTarget", where))
        console.item(f"scaling of {where['ResourceId'].split('/')[1]}", "deleted")
    if found.alarms:
        aws.call(Call("cloudwatch", "DeleteAlarms", {"AlarmNames": found.alarms}))
        for name in found.alarms:
            console.item(f"alarm {name}", "deleted")
    for thing in found.endpoints:
        if thing.status != "Deleting":
            aws.find(Call("sagemaker", thing.kind.ended_by, thing.identity))
    for thing in found.endpoints:
        what = f"the end of endpoint {thing.name}"
        aws.until(what, partial(_is_gone, opened, thing), every_seconds=POLL_SECONDS)
        console.item(f"endpoint {thing.name}", "deleted")
    # A job that still stops may write into the bucket that is about to be emptied.
    for thing in found.running:
        what = f"the end of {thing.kind.words} {thing.name}"
        aws.until(what, partial(_has_ended, opened, thing), every_seconds=POLL_SECONDS)
        console.item(f"{thing.kind.words} {thing.name}", "stopped")
    for name in found.log_groups:
        aws.find(Call("logs", "DeleteLogGroup", {"logGroupName": name}))
        console.item(f"log group {name}", "deleted")
    for thing in [*found.models, *found.configs]:
        aws.find(Call("sagemaker", thing.kind.ended_by, thing.identity))
        console.item(f"{thing.kind.words} {thing.name}", "deleted")


def empty(opened: Project, bucket: str | None) -> None:
    """Delete every object in all its versions, which CloudFormation would not, and every unfinished
    upload."""
    if bucket is None:
        return
    call = Call("s3", "ListObjectVersions", {"Bucket": bucket})
    kinds = ("Versions", "DeleteMarkers")
    objects = [upload.identity(found) for key in kinds for found in opened.aws.items(call, key)]
    upload.delete(opened, bucket, objects)
    unfinished = Call("s3", "ListMultipartUploads", {"Bucket": bucket})
    for found in opened.aws.items(unfinished, "Uploads"):
        opened.aws.find(
            Call(
                "s3",
                "AbortMultipartUpload",
                {"Bucket": bucket, "Key": found["Key"], "UploadId": found["UploadId"]},
            )
        )
    opened.console.item(f"bucket {bucket}", f"{count_words(len(objects), 'object')} deleted")


def delete_images(opened: Project, repository: str | None) -> None:
    """Delete every image, which the deletion of a stack does not do everywhere."""
    if repository is None:
        return
    found = sorted({image["imageDigest"] for image in inventory.images(opened, repository)})
    for start in range(0, len(found), IMAGES_TOGETHER):
        some = [{"imageDigest": digest} for digest in found[start : start + IMAGES_TOGETHER]]
        call = {"repositoryName": repository, "imageIds": some}
        opened.aws.call(Call("ecr", "BatchDeleteImage", call))
    opened.console.item(f"repository {repository}", f"{count_words(len(found), 'image')} deleted")


def delete_stack(opened: Project) -> None:
    """Delete the stack and wait. Raises AwsError with CloudFormation's reason when it stays."""
    opened.aws.call(Call("cloudformation", "DeleteStack", {"StackName": opened.name}))
    what = f"the end of stack {opened.name}"
    opened.aws.until(what, partial(_stack_is_gone, opened), every_seconds=POLL_SECONDS)
    opened.console.item(f"stack {opened.name}", "deleted")


def _stack_is_gone(opened: Project) -> bool:
    stack = opened.stack()
    if stack is not None and stack["StackStatus"] == "DELETE_FAILED":
        bootstrap.wait(opened)
    return stack is None or stack["StackStatus"] == "DELETE_COMPLETE"


def verify(opened: Project, bucket: str | None, *, storage: bool) -> None:
    """Look for everything again. Raises AwsError that names what is still there.

    bucket: what should have gone with the stack.
    """
    left = look(opened)
    names = [f"{kind} {name}" for kind, name in left.hosting]
    if storage and left.stack is not None:
        names.append(f"stack {opened.name} ({left.stack['StackStatus']})")
    if bucket is not None and opened.aws.find(Call("s3", "HeadBucket", {"Bucket": bucket})):
        names.append(f"bucket {bucket}")
    if names:
        raise AwsError(
            f"still there after all: {', '.join(names)}; run the same command again, and look in "
            "the console when it stays"
        )


def _is_gone(opened: Project, thing: Thing) -> bool:
    return opened.aws.find(_describe(thing)) is None


def _has_ended(opened: Project, thing: Thing) -> bool:
    found = opened.aws.find(_describe(thing))
    return found is None or found[f"{thing.kind.name}Status"] not in RUNNING


def _describe(thing: Thing) -> Call:
    return Call("sagemaker", f"Describe{thing.kind.name}", thing.identity)
