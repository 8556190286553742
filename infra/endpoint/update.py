"""An endpoint is created, or moved to another configuration."""

from __future__ import annotations

from typing import Any

from dalle.errors import AwsError, PlanError
from infra.aws.deployment import Deployment
from infra.aws.project import KIND_WORDS, Project
from infra.aws.request import Request, describe
from infra.endpoint.described import is_shared
from infra.endpoint.monitoring import alarms
from infra.endpoint.rollout import Rollout

POLL_SECONDS = 15.0
RESTING = ("InService", "Failed")


def put_endpoint(
    project: Project,
    deployment: Deployment,
    config_name: str,
    tags: list[dict[str, str]],
    *,
    rollout: Rollout | None,
    wait: bool,
) -> str:
    """Create the endpoint, or change its configuration; return `made`, `updated`, `already there`.

    rollout: how it is changed; None for all at once, without alarms. Raises AwsError with the
    platform's reason when it does not come into service, and UserError when the endpoint of that
    name is not the project's.
    """
    output, name = project.output, deployment.name
    target = {"EndpointName": name, "EndpointConfigName": config_name}
    found = settled(project, "Endpoint", name, tags)
    if found is None:
        state = "made"
        project.aws.call(Request("sagemaker", "CreateEndpoint", **target, Tags=tags))
    elif found["EndpointConfigName"] == config_name:
        state = "already there"
    else:
        state = "updated"
        check_sharing(project, deployment, found)
        update(project, deployment, config_name, tags, rollout)
    if project.aws.dry_run and rollout:
        update(project, deployment, config_name, tags, rollout)  # what an endpoint that exists gets
    if not wait:
        output.item(f"endpoint {name}", f"{state}; not waited for")
        return state
    ready = in_service(project, "Endpoint", name)
    if not project.aws.dry_run and ready["EndpointConfigName"] != config_name:
        raise AwsError(
            f"endpoint {name} went back to configuration {ready['EndpointConfigName']}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    output.item(f"endpoint {name}", f"{state}, in service")
    return state


def settled(
    project: Project, kind: str, name: str, tags: list[dict[str, str]]
) -> dict[str, Any] | None:
    """Return an endpoint or component of ours once nothing changes it; None where there is none.

    kind: Endpoint or InferenceComponent. tags: that it is given if it lacks them. One that has
    failed can only be deleted, and is, so that a new one may take its name. Raises UserError for
    one that is not the project's.
    """
    output, words = project.output, f"{KIND_WORDS[kind]} {name}"
    found, status = project.find_ours(kind, name, tags), f"{kind}Status"
    if found is not None and found[status] not in RESTING:
        output.item(words, f"is {found[status]}; waiting")
        found = project.aws.wait(
            describe(kind, name),
            lambda answer: not answer[status].endswith("ing"),
            every_seconds=POLL_SECONDS,
        )
    if found is None or found[status] != "Failed":
        return found
    output.item(words, "had failed; deleted")
    project.aws.call(Request("sagemaker", f"Delete{kind}", **{f"{kind}Name": name}))
    project.aws.until_gone(f"the end of {words}", describe(kind, name), every_seconds=POLL_SECONDS)
    return None


def in_service(project: Project, kind: str, name: str) -> dict[str, Any]:
    """Wait until an endpoint or component rests, and return it. Raises AwsError with the reason."""
    status = f"{kind}Status"
    ready = project.aws.wait(
        describe(kind, name),
        lambda answer: not answer[status].endswith("ing"),
        every_seconds=POLL_SECONDS,
    )
    if not project.aws.dry_run and ready[status] != "InService":
        raise AwsError(
            f"{KIND_WORDS[kind]} {name} is {ready[status]}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    return ready


def update(
    project: Project,
    deployment: Deployment,
    config_name: str,
    tags: list[dict[str, str]],
    rollout: Rollout | None,
) -> None:
    """Start the change of an endpoint's configuration; with a rollout, its alarms come first."""
    target: dict[str, Any] = {
        "EndpointName": deployment.name,
        "EndpointConfigName": config_name,
    }
    if rollout:
        names = alarms.ensure_rollback(project, deployment.name, deployment.mode, tags)
        target["DeploymentConfig"] = rollout.config(names)
    project.aws.call(Request("sagemaker", "UpdateEndpoint", **target))


def check_sharing(
    project: Project, deployment: Deployment, endpoint: dict[str, Any]
) -> dict[str, Any]:
    """Return the present configuration of an endpoint that `deployment` is to change.

    Raises PlanError where it has one model and should have several, or the other way round.
    """
    config = project.aws.call(describe("EndpointConfig", endpoint["EndpointConfigName"]))
    if is_shared(config) != (deployment.copies is not None):
        what = "several models, named by --component" if is_shared(config) else "one model"
        raise PlanError(
            f"endpoint {deployment.name} has {what}, which an update cannot change; give --name "
            "for a further endpoint"
        )
    return config
