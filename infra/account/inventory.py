"""What a project has at AWS, found by name and tag: what `status` shows and `teardown` deletes.

Lists are asked by the project's name, and each thing by its tag, because another project's name may
begin alike. What carries no tag (scaling, alarms, log groups) is named after an endpoint; its
name is also in that of its configurations, which are therefore deleted last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infra.aws.project import Project
from infra.aws.request import DIGEST_CHARACTERS, Call
from infra.endpoint import autoscaling
from infra.jobs.progress import ENDPOINT_LOGS


@dataclass(frozen=True)
class Kind:
    """One kind of SageMaker's things: how it is listed, described, and what ends it."""

    name: str
    listed: str
    plural: str
    ended_by: str

    @property
    def name_key(self) -> str:
        return f"{self.name}Name"

    @property
    def words(self) -> str:
        return WORDS[self.name]


@dataclass(frozen=True)
class Thing:
    """One thing of SageMaker's. status: empty for kinds that have none."""

    kind: Kind
    name: str
    arn: str
    status: str

    @property
    def identity(self) -> dict[str, str]:
        return {self.kind.name_key: self.name}


WORDS = {
    "Endpoint": "endpoint",
    "EndpointConfig": "configuration",
    "Model": "model",
    "TrainingJob": "training job",
    "TransformJob": "transform job",
    "HyperParameterTuningJob": "tuning job",
}
ENDPOINT = Kind("Endpoint", "ListEndpoints", "Endpoints", "DeleteEndpoint")
CONFIG = Kind("EndpointConfig", "ListEndpointConfigs", "EndpointConfigs", "DeleteEndpointConfig")
MODEL = Kind("Model", "ListModels", "Models", "DeleteModel")
TRAINING = Kind("TrainingJob", "ListTrainingJobs", "TrainingJobSummaries", "StopTrainingJob")
TRANSFORM = Kind("TransformJob", "ListTransformJobs", "TransformJobSummaries", "StopTransformJob")
TUNING = Kind(
    "HyperParameterTuningJob",
    "ListHyperParameterTuningJobs",
    "HyperParameterTuningJobSummaries",
    "StopHyperParameterTuningJob",
)
JOBS = (TUNING, TRAINING, TRANSFORM)
RUNNING = ("InProgress", "Stopping")


def things(
    opened: Project,
    kind: Kind,
    *,
    also: Callable[[dict[str, Any]], bool] = lambda found: True,
    **filters: str,
) -> Iterator[Thing]:
    """All of one kind that are the project's, newest first.

    filters: of the list operation. also: whether one of its entries is wanted.
    """
    request = {
        "NameContains": opened.name,
        "SortBy": "CreationTime",
        "SortOrder": "Descending",
        **filters,
    }
    for found in opened.aws.items(Call("sagemaker", kind.listed, request), kind.plural):
        name = found[kind.name_key]
        is_named = name == opened.name or name.startswith(f"{opened.name}-")
        if not is_named or not also(found):
            continue
        thing = Thing(kind, name, found[f"{kind.name}Arn"], found.get(f"{kind.name}Status", ""))
        if opened.owns(thing.arn):
            yield thing


def running(opened: Project) -> list[Thing]:
    """Jobs that cost money now."""
    return [
        thing
        for kind in JOBS
        for status in RUNNING
        for thing in things(opened, kind, StatusEquals=status)
    ]


def warm_pools(opened: Project) -> list[Thing]:
    """Finished training jobs whose instances are still kept, and paid for."""
    return list(
        things(
            opened,
            TRAINING,
            also=lambda found: found.get("WarmPoolStatus", {}).get("Status") == "Available",
            WarmPoolStatusEquals="Available",
        )
    )


def endpoint_names(endpoints: list[Thing], configs: list[Thing]) -> list[str]:
    """Names of all endpoints that there are, or were when the configurations were made."""
    of_configs = {config.name[: -DIGEST_CHARACTERS - 1] for config in configs}
    return sorted({endpoint.name for endpoint in endpoints} | of_configs)


def scaling(opened: Project, endpoints: list[str], variant: str) -> list[dict[str, str]]:
    """The scalable targets of these endpoints, as the requests about them name them."""
    found = []
    for endpoint in endpoints:
        where = autoscaling.resource(endpoint, variant)
        call = Call(
            "application-autoscaling",
            "DescribeScalableTargets",
            {"ServiceNamespace": "sagemaker", "ResourceIds": [where["ResourceId"]]},
        )
        found += [where for _ in opened.aws.items(call, "ScalableTargets")]
    return found


def alarms(opened: Project, endpoints: list[str]) -> list[str]:
    """Names of the alarms that wake these endpoints."""
    if not endpoints:
        return []
    names = [autoscaling.alarm_name(endpoint) for endpoint in endpoints]
    call = Call("cloudwatch", "DescribeAlarms", {"AlarmNames": names})
    return [alarm["AlarmName"] for alarm in opened.aws.items(call, "MetricAlarms")]


def log_groups(opened: Project, endpoints: list[str]) -> list[str]:
    """Log groups that the platform made for these endpoints; they never expire by themselves."""
    found = []
    for endpoint in endpoints:
        name = f"{ENDPOINT_LOGS}/{endpoint}"
        call = Call("logs", "DescribeLogGroups", {"logGroupNamePrefix": name})
        found += [
            group["logGroupName"]
            for group in opened.aws.items(call, "logGroups")
            if group["logGroupName"] == name
        ]
    return found


def stored(opened: Project, bucket: str) -> tuple[int, int]:
    """How many objects a bucket holds, and their bytes."""
    call = Call("s3", "ListObjectsV2", {"Bucket": bucket})
    sizes = [found["Size"] for found in opened.aws.items(call, "Contents")]
    return len(sizes), sum(sizes)


def images(opened: Project, repository: str) -> list[dict[str, Any]]:
    """The images of the repository, newest first."""
    call = Call("ecr", "DescribeImages", {"repositoryName": repository})
    found = list(opened.aws.items(call, "imageDetails"))
    return sorted(found, key=lambda image: str(image.get("imagePushedAt", "")), reverse=True)
