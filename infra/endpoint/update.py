"""An endpoint is created, or moved to another configuration."""

from __future__ import annotations

from typing import Any

from dalle.errors import AwsError
from infra.aws.limits import Deployment
from infra.aws.project import Project
from infra.aws.request import Request, describe
from infra.endpoint.monitoring import alarms
from infra.endpoint.rollout import Rollout

POLL_SECONDS = 15.0


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
    request = describe("Endpoint", name)
    target = {"EndpointName": name, "EndpointConfigName": config_name}
    found = project.find_ours("Endpoint", name)
    if found is not None and found["EndpointStatus"] not in ("InService", "Failed"):
        output.item(f"endpoint {name}", f"is {found['EndpointStatus']}; waiting")
        found = project.aws.wait(request, _rests, every_seconds=POLL_SECONDS)
    if found is not None and found["EndpointStatus"] == "Failed":
        # A failed endpoint can only be deleted; a new one takes its name.
        output.item(f"endpoint {name}", "had failed; deleted")
        project.aws.call(Request("sagemaker", "DeleteEndpoint", EndpointName=name))
        project.aws.until_gone(f"the end of endpoint {name}", request, every_seconds=POLL_SECONDS)
        found = None
    if found is None:
        state = "made"
        project.aws.call(Request("sagemaker", "CreateEndpoint", **target, Tags=tags))
    elif found["EndpointConfigName"] == config_name:
        state = "already there"
    else:
        state = "updated"
        update(project, deployment, config_name, tags, rollout)
    if project.aws.dry_run and rollout:
        update(project, deployment, config_name, tags, rollout)  # what an endpoint that exists gets
    if not wait:
        output.item(f"endpoint {name}", f"{state}; not waited for")
        return state
    ready = project.aws.wait(request, _rests, every_seconds=POLL_SECONDS)
    if not project.aws.dry_run and ready["EndpointStatus"] != "InService":
        raise AwsError(
            f"endpoint {name} is {ready['EndpointStatus']}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    if not project.aws.dry_run and ready["EndpointConfigName"] != config_name:
        raise AwsError(
            f"endpoint {name} went back to configuration {ready['EndpointConfigName']}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    output.item(f"endpoint {name}", f"{state}, in service")
    return state


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


def _rests(answer: dict[str, Any]) -> bool:
    return not answer["EndpointStatus"].endswith("ing")
