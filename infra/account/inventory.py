"""The project's resources at AWS, found by name and tag, for `status` and `teardown`.

Lists are filtered by the project's name, and then by the tag of each resource, because another
project's name may begin alike. Scaling, alarms and log groups carry no tag and are named after an
endpoint; its name is also in that of its configurations, which are therefore deleted last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infra.aws.project import KIND_WORDS, PROJECT_TAG, Project, tag_value
from infra.aws.request import DIGEST_CHARACTERS, Request, describe, newest_first
from infra.endpoint import autoscaling
from infra.endpoint.monitoring import alarms as monitoring
from infra.endpoint.monitoring import dashboard
from infra.jobs.progress import COMPONENT_LOGS, ENDPOINT_LOGS


@dataclass(frozen=True)
class ResourceKind:
    """One kind of SageMaker resource.

    name: the API's. list_key: of the entries in a list's response.
    end_verb: of the operation that ends it, Delete or Stop.
    """

    name: str
    list_key: str
    end_verb: str

    @property
    def words(self) -> str:
        return KIND_WORDS[self.name]

    @property
    def name_key(self) -> str:
        return f"{self.name}Name"


@dataclass(frozen=True)
class Resource:
    """One SageMaker resource. status: empty for kinds that have none."""

    kind: ResourceKind
    name: str
    arn: str
    status: str

    @property
    def label(self) -> str:
        return f"{self.kind.words} {self.name}"

    @property
    def identity(self) -> dict[str, str]:
        return {self.kind.name_key: self.name}

    @property
    def description(self) -> Request:
        return describe(self.kind.name, self.name)

    @property
    def end(self) -> Request:
        return Request("sagemaker", f"{self.kind.end_verb}{self.kind.name}", **self.identity)

    @property
    def deletion(self) -> Request:
        """The request that deletes a resource, or the record of a job that has ended."""
        return Request("sagemaker", f"Delete{self.kind.name}", **self.identity)


ENDPOINT = ResourceKind("Endpoint", "Endpoints", "Delete")
CONFIG = ResourceKind("EndpointConfig", "EndpointConfigs", "Delete")
COMPONENT = ResourceKind("InferenceComponent", "InferenceComponents", "Delete")
MODEL = ResourceKind("Model", "Models", "Delete")
TRAINING = ResourceKind("TrainingJob", "TrainingJobSummaries", "Stop")
TRANSFORM = ResourceKind("TransformJob", "TransformJobSummaries", "Stop")
TUNING = ResourceKind("HyperParameterTuningJob", "HyperParameterTuningJobSummaries", "Stop")
JOBS = (TUNING, TRAINING, TRANSFORM)
RUNNING = ("InProgress", "Stopping")
ENDED = ("Completed", "Failed", "Stopped")
WITH_RECORDS = (TUNING, TRAINING)
"""Kinds of jobs whose records the API can delete."""


def resources(
    project: Project,
    kind: ResourceKind,
    *,
    also: Callable[[dict[str, Any]], bool] = lambda found: True,
    **filters: str,
) -> Iterator[Resource]:
    """Yield the project's resources of one kind, newest first.

    filters: of the list operation. also: whether to include an entry of the list.
    """
    request = newest_first(kind.name, project.name, **filters)
    for found in project.aws.items(request, kind.list_key):
        name = found[kind.name_key]
        is_named = name == project.name or name.startswith(f"{project.name}-")
        if not is_named or not also(found):
            continue
        status = found.get(f"{kind.name}Status", "")
        resource = Resource(kind, name, found[f"{kind.name}Arn"], status)
        if project.owns(resource.arn):
            yield resource


def running_jobs(project: Project) -> list[Resource]:
    """Return the jobs that run, and so cost money now."""
    return [
        resource
        for kind in JOBS
        for status in RUNNING
        for resource in resources(project, kind, StatusEquals=status)
    ]


def ended_jobs(project: Project) -> list[Resource]:
    """Return the jobs that have ended and whose records can be deleted."""
    return [
        resource
        for kind in WITH_RECORDS
        for status in ENDED
        for resource in resources(project, kind, StatusEquals=status)
    ]


def warm_pools(project: Project) -> list[Resource]:
    """Return finished training jobs whose instances are still kept, and paid for."""
    return list(
        resources(
            project,
            TRAINING,
            also=lambda found: found.get("WarmPoolStatus", {}).get("Status") == "Available",
            WarmPoolStatusEquals="Available",
        )
    )


def endpoint_names(endpoints: list[Resource], configs: list[Resource]) -> list[str]:
    """Return the names of the endpoints that exist or once belonged to a configuration."""
    of_configs = {config.name[: -DIGEST_CHARACTERS - 1] for config in configs}
    return sorted({endpoint.name for endpoint in endpoints} | of_configs)


def scaling(
    project: Project, endpoints: list[str], components: list[str], variant: str
) -> list[dict[str, str]]:
    """Return the scalable targets of these, as parameters of a request."""
    places = [autoscaling.scalable_target(endpoint, variant) for endpoint in endpoints]
    places += [autoscaling.scalable_copies(component) for component in components]
    return [where for where in places if autoscaling.bounds_of(project, where) is not None]


def alarms(project: Project, endpoints: list[str], components: list[str]) -> list[str]:
    """Return the names of the project's alarms on these endpoints and components."""
    groups = [
        [
            autoscaling.alarm_name(endpoint),
            *(monitoring.alarm_name(endpoint, kind) for kind in monitoring.KINDS),
        ]
        for endpoint in endpoints
    ]
    groups += [
        [
            autoscaling.copies_alarm_name(component),
            *(monitoring.copy_alarm_name(component, kind) for kind in monitoring.COPY_KINDS),
        ]
        for component in components
    ]
    found = []
    for names in groups:
        request = Request("cloudwatch", "DescribeAlarms", AlarmNames=names)
        found += [
            alarm["AlarmName"]
            for alarm in project.aws.items(request, "MetricAlarms")
            if tag_value(autoscaling.alarm_tags(project, alarm), PROJECT_TAG) == project.name
        ]
    return found


def dashboards(project: Project, endpoints: list[str]) -> list[str]:
    """Return the names of the project's dashboards of these endpoints."""
    found = []
    for endpoint in endpoints:
        there = project.aws.find(Request("cloudwatch", "GetDashboard", DashboardName=endpoint))
        if there is not None and dashboard.is_ours(there["DashboardBody"], project.name):
            found.append(endpoint)
    return found


def log_groups(project: Project, endpoints: list[str]) -> list[str]:
    """Return the log groups of these endpoints and of models on them; they never expire.

    Those of models by the endpoint's name, so that they are found when the models are deleted.
    """
    found: list[str] = []
    for endpoint in endpoints:
        own, of_models = f"{ENDPOINT_LOGS}/{endpoint}", f"{COMPONENT_LOGS}/{endpoint}--"
        for prefix in (own, of_models):
            request = Request("logs", "DescribeLogGroups", logGroupNamePrefix=prefix)
            names = [each["logGroupName"] for each in project.aws.items(request, "logGroups")]
            found += [name for name in names if name == own or name.startswith(of_models)]
    return found


def stored(project: Project, bucket: str) -> tuple[int, int]:
    """Return the number of objects in a bucket, and their bytes."""
    request = Request("s3", "ListObjectsV2", Bucket=bucket)
    sizes = [found["Size"] for found in project.aws.items(request, "Contents")]
    return len(sizes), sum(sizes)


def images(project: Project, repository: str) -> list[dict[str, Any]]:
    """Return the images of the repository, newest first."""
    request = Request("ecr", "DescribeImages", repositoryName=repository)
    found = list(project.aws.items(request, "imageDetails"))
    return sorted(found, key=lambda image: str(image.get("imagePushedAt", "")), reverse=True)
