"""What an endpoint of the project is now, by SageMaker's description of it."""

from __future__ import annotations

from typing import Any

from dalle.errors import UserError
from infra.aws.deployment import Mode
from infra.aws.project import Project
from infra.aws.request import Request, describe, placeholder


def endpoint_config(project: Project, name: str) -> dict[str, Any]:
    """Return an endpoint's configuration. Raises UserError when there is none of that name."""
    found = project.aws.find(
        describe("Endpoint", name),
        answer={"EndpointConfigName": placeholder(f"configuration of {name}")},
    )
    if found is None:
        raise UserError(
            f"there is no endpoint {name}; `python -m infra status` lists them, and "
            "`python -m infra deploy` creates one"
        )
    return project.aws.call(
        describe("EndpointConfig", found["EndpointConfigName"]),
        answer={"ProductionVariants": [{}]},
    )


def mode_of(config: dict[str, Any]) -> Mode:
    """Return the mode of an endpoint with this configuration."""
    if config.get("AsyncInferenceConfig"):
        return "async"
    return "serverless" if config["ProductionVariants"][0].get("ServerlessConfig") else "realtime"


def is_shared(config: dict[str, Any]) -> bool:
    """Return whether models share the hosts of an endpoint with this configuration."""
    return not config["ProductionVariants"][0].get("ModelName")


def component_names(project: Project, endpoint: str) -> list[str]:
    """Return the names of the models that share an endpoint's hosts, sorted."""
    request = Request("sagemaker", "ListInferenceComponents", EndpointNameEquals=endpoint)
    found = project.aws.items(request, "InferenceComponents")
    return sorted(each["InferenceComponentName"] for each in found)
