"""Several models on the hosts of one real-time endpoint, each with copies that scale to none.

SageMaker calls such a model an inference component. Without a copy of any the endpoint has no host
and costs nothing; requests are refused until one has started. An asynchronous endpoint keeps them
instead, but takes one model alone, as a serverless one does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from dalle.errors import PlanError
from infra.aws.deployment import Copies, Deployment
from infra.aws.limits import has_gpu
from infra.cost.prices import load_prices

NAME_PATTERN = r"[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*"
MAX_NAME = 63
MEMORY_MB = 4096
CPUS = 2.0
"""Of a host without a GPU. With one, a copy takes a GPU and no share of the cores."""
LEAST_MEMORY_MB = 128
LEAST_CPUS = 0.25
_OPTIONS = {
    "copy_memory_mb": "--copy-memory-mb",
    "copy_cpus": "--copy-cpus",
    "max_copies": "--max-copies",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several models on one endpoint (realtime)")
    group.add_argument(
        "--component",
        metavar="NAME",
        help="the model is one of several on the endpoint's hosts, and is called "
        "ENDPOINT--NAME; its copies scale to none, and the hosts with them",
    )
    group.add_argument(
        "--copy-memory-mb",
        type=int,
        metavar="MIB",
        help=f"of a host's memory, for each copy; default: {MEMORY_MB}",
    )
    group.add_argument(
        "--copy-cpus",
        type=float,
        metavar="CORES",
        help=f"for each copy; default: {CPUS:g}, none of its own on a host with a GPU",
    )
    group.add_argument("--max-copies", type=int, metavar="N", help="default: 1")


def read(
    options: argparse.Namespace, endpoint: str, instance_type: str | None, min_instances: int
) -> Copies | None:
    """Return the copies that the options describe; None for an endpoint of one model.

    Raises PlanError for options of copies without --component, and for a name that cannot be.
    """
    if options.component is None:
        given = [option for name, option in _OPTIONS.items() if getattr(options, name) is not None]
        if given:
            raise PlanError(f"{', '.join(given)}: for a model of several, named by --component")
        return None
    is_gpu = instance_type is not None and has_gpu(instance_type)
    cpus, memory, most = options.copy_cpus, options.copy_memory_mb, options.max_copies
    return Copies(
        name=component_name(endpoint, options.component),
        memory_mb=MEMORY_MB if memory is None else memory,
        cpus=cpus if cpus is not None or is_gpu else CPUS,
        gpus=1 if is_gpu else None,
        least=min(1, max(0, min_instances)),
        most=1 if most is None else most,
    )


def component_name(endpoint: str, name: str) -> str:
    """Return the name at AWS of a model on an endpoint. `name` may begin with the endpoint's.

    `name` itself has no two dashes, so that models of two endpoints cannot have one name. Raises
    PlanError.
    """
    short = name.removeprefix(f"{endpoint}--")
    if not re.fullmatch(NAME_PATTERN, short):
        raise PlanError(
            f"--component is letters and digits, with single dashes between them, got {name!r}"
        )
    full = f"{endpoint}--{short}"
    if len(full) > MAX_NAME:
        raise PlanError(f"a component's name has at most {MAX_NAME} characters, got {full}")
    return full


def problems(deployment: Deployment) -> Iterator[str]:
    """Yield why the platform would not put these copies on the hosts."""
    copies = deployment.copies
    if copies is None:
        return
    if deployment.mode != "realtime":
        yield f"--component is for --mode realtime: one of --mode {deployment.mode} has one model"
        return
    if copies.memory_mb < LEAST_MEMORY_MB:
        yield f"--copy-memory-mb must be {LEAST_MEMORY_MB} or more, got {copies.memory_mb}"
    if copies.cpus is not None and copies.cpus < LEAST_CPUS:
        yield f"--copy-cpus must be {LEAST_CPUS} or more, got {copies.cpus:g}"
    if copies.most < 1:
        yield f"--max-copies must be 1 or more, got {copies.most}"
    for kind in deployment.pool or (str(deployment.instance_type),):
        yield from _too_large(copies, kind)


def _too_large(copies: Copies, instance_type: str) -> Iterator[str]:
    """Yield what a copy needs and a host has not; nothing for a type that is not known here."""
    host = load_prices().instance_types.get(instance_type)
    if host is None:
        return
    memory = round(host.memory_gib * 1024)
    if copies.memory_mb >= memory:
        yield (
            f"{instance_type} has {memory:,} MiB of memory, of which the platform needs some: "
            f"--copy-memory-mb must be less, got {copies.memory_mb:,}"
        )
    if copies.cpus is not None and copies.cpus > host.vcpus:
        yield f"{instance_type} has {host.vcpus} cores, and a copy would need {copies.cpus:g}"


def variant_fields(deployment: Deployment) -> dict[str, Any]:
    """Return the production variant's field by which the platform starts and ends hosts.

    It starts them for the copies of all models, and ends those without a copy.
    """
    bounds = {
        "MinInstanceCount": deployment.min_instances,
        "MaxInstanceCount": deployment.max_instances,
    }
    return {"ManagedInstanceScaling": {"Status": "ENABLED", **bounds}}
