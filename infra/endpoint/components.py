"""A model as one of several on an endpoint's hosts: created, replaced, and found again."""

from __future__ import annotations

import argparse
from typing import Any

from dalle.errors import PlanError, UserError
from infra.aws.deployment import Copies, Deployment
from infra.aws.project import Project
from infra.aws.request import Request, describe, includes
from infra.endpoint.described import component_names
from infra.endpoint.fleet import pool
from infra.endpoint.requests import VARIANT, start_limits
from infra.endpoint.update import check_sharing, in_service, settled

KIND = "InferenceComponent"


def component_request(
    deployment: Deployment, copies: Copies, model_name: str, tags: list[dict[str, str]]
) -> Request:
    """Return the request that puts the model on the endpoint's hosts."""
    return Request(
        "sagemaker",
        "CreateInferenceComponent",
        InferenceComponentName=copies.name,
        EndpointName=deployment.name,
        VariantName=VARIANT,
        Specification={
            "ModelName": model_name,
            "StartupParameters": start_limits(deployment),
            "ComputeResourceRequirements": _needs(copies),
        },
        # One at least, as with instances: the scaling removes it without requests.
        RuntimeConfig={"CopyCount": max(1, copies.least)},
        Tags=tags,
    )


def put_component(project: Project, request: Request) -> str:
    """Create the component, or change its model and needs; return which. Waits for the end.

    Raises AwsError with the platform's reason when it does not come into service, and UserError
    when the component of that name is not the project's.
    """
    wanted = request.parameters
    name, specification = wanted[f"{KIND}Name"], wanted["Specification"]
    found = settled(project, KIND, name, wanted["Tags"])
    if found is None:
        state = "made"
        project.aws.call(request)
    else:
        is_same = includes(found["Specification"], specification)
        state = "already there" if is_same else "updated"
        if not is_same:
            change = {f"{KIND}Name": name, "Specification": specification}
            project.aws.call(Request("sagemaker", f"Update{KIND}", **change))
    in_service(project, KIND, name)
    project.output.item(f"component {name}", f"{state}, in service")
    return state


def on_present_hosts(
    project: Project, options: argparse.Namespace, deployment: Deployment
) -> tuple[argparse.Namespace, str]:
    """Return the options with those of the hosts that the endpoint has, and its configuration.

    Unchanged, and without a configuration, where the hosts are to be made: there is no endpoint
    yet, or the options name types. Raises PlanError for an endpoint of one model, and for options
    that differ from the hosts there are, without a type.
    """
    found = project.find_ours("Endpoint", deployment.name)
    if found is None:
        return options, ""
    config = check_sharing(project, deployment, found)
    if pool.chosen(options):
        return options, ""
    (variant,) = config["ProductionVariants"]
    bounds = variant.get("ManagedInstanceScaling", {})
    bounds = {
        "min_instances": bounds.get("MinInstanceCount", 0),
        "max_instances": bounds.get("MaxInstanceCount", 1),
    }
    present = bounds | {
        "ami": variant.get("InferenceAmiVersion"),
        "volume_gb": variant.get("VolumeSizeInGB"),
        "provision_seconds": variant.get("VariantInstanceProvisionTimeoutInSeconds"),
        "isolate": config.get("EnableNetworkIsolation", False),
        "reservation": variant.get("CapacityReservationConfig", {}).get("MlReservationArn"),
    }
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in present.items()
        if (wanted := getattr(options, name)) not in (None, False, "") and wanted != value
    ]
    if given:
        raise PlanError(
            f"{', '.join(given)} would change the hosts of endpoint {deployment.name}, on which "
            "there are models already: give --instance-type with it"
        )
    first, *others = pool.types_of(variant)
    hosts = {
        "instance_type": first,
        "fallback_types": tuple(others),
        **bounds,
    }
    return argparse.Namespace(**{**vars(options), **hosts}), str(config["EndpointConfigName"])


def only(project: Project, endpoint: str) -> str:
    """Return the one component of an endpoint. Raises UserError where there is none, or several."""
    found = component_names(project, endpoint)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"endpoint {endpoint} has no model yet; `python -m infra deploy` puts one")
    raise UserError(
        f"endpoint {endpoint} has several models: give --component, one of {', '.join(found)}"
    )


def copies_in_words(project: Project, name: str) -> str:
    """Return how many copies a component has, and how many it should have."""
    found = project.aws.find(describe(KIND, name)) or {}
    runtime = found.get("RuntimeConfig", {})
    return f"{runtime.get('CurrentCopyCount', 0)} of {runtime.get('DesiredCopyCount', 0)} copies"


def _needs(copies: Copies) -> dict[str, Any]:
    needs = {
        "MinMemoryRequiredInMb": copies.memory_mb,
        "NumberOfCpuCoresRequired": copies.cpus,
        "NumberOfAcceleratorDevicesRequired": copies.gpus,
    }
    return {key: value for key, value in needs.items() if value is not None}
