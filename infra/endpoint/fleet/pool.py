"""Hosts of several types for one endpoint: the platform takes the first that has capacity.

The order is given, or is that of dollars per 1,000 pictures in what `compare --out` has written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle.errors import PlanError, UserError
from infra.aws.deployment import Deployment
from infra.aws.limits import check_instance_type, default_ami, has_gpu, has_own_disk
from infra.aws.team.names import reservation_arn

MAX_TYPES = 5
PROVISION_SECONDS = range(300, 3600 + 1)
ONLY_RESERVED = "capacity-reservations-only"


def add_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--fallback-types",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="TYPE,…",
        help="taken in this order where --instance-type has no capacity (realtime, async)",
    )
    group.add_argument(
        "--cheapest-of",
        type=Path,
        metavar="FILE",
        help="of `compare --out`: its measured types, by dollars per 1,000 pictures, in place of "
        "--instance-type and --fallback-types",
    )
    group.add_argument(
        "--provision-seconds", type=int, help="to find capacity; default: the platform's"
    )
    group.add_argument(
        "--reservation",
        type=reservation_arn,
        default="",
        metavar="ARN",
        help="reserved capacity of SageMaker's, and no other (realtime, async)",
    )


def chosen(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the types that the options name in their order; none for the mode's default.

    Raises UserError for a file that is not of `compare`, PlanError for types named twice.
    """
    first = (options.instance_type,) if options.instance_type else ()
    if options.cheapest_of is None:
        if options.fallback_types and not first:
            raise PlanError("--fallback-types needs --instance-type, which is tried first")
        return (*first, *options.fallback_types)
    if first or options.fallback_types:
        raise PlanError(
            "--cheapest-of chooses the types: leave --instance-type and --fallback-types out"
        )
    return cheapest(options.cheapest_of)


def cheapest(path: Path) -> tuple[str, ...]:
    """Return the measured instance types of a comparison, the cheapest 1,000 pictures first.

    Types that a deployment cannot mix with the cheapest are left out: those with another kind of
    processor, or that need other host software. Raises UserError.
    """
    try:
        options = json.loads(path.read_text("utf-8"))["options"]
        found = [
            (each["busy"]["usd_per_1000_images"], each["stands_for"])
            for each in options
            if str(each["stands_for"]).startswith("ml.") and not each["problem"]
        ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what `compare --out` writes") from error
    types = list(dict.fromkeys(kind for _, kind in sorted(found)))
    if not types:
        raise UserError(f"{path} has no instance type that was measured; `compare` lists why")
    alike = [kind for kind in types if _software(kind) == _software(types[0])]
    return tuple(alike[:MAX_TYPES])


def problems(deployment: Deployment) -> Iterator[str]:
    """Yield why the platform would not give these hosts."""
    pool, reserved = deployment.pool, deployment.reservation
    if not (pool or reserved or deployment.provision_seconds):
        return
    if deployment.mode not in ("realtime", "async"):
        yield f"several types and reserved capacity are not for --mode {deployment.mode}"
        return
    if pool and reserved:
        yield "--reservation is capacity of one type: leave --fallback-types out"
    if len(pool) > MAX_TYPES:
        yield f"an endpoint has at most {MAX_TYPES} types of instances, got {len(pool)}"
    if len(set(pool)) != len(pool):
        yield f"every type once was expected, got {', '.join(pool)}"
    for kind in pool[1:]:
        yield from check_instance_type(kind)
        if _software(kind) != _software(pool[0]):
            yield (
                f"{pool[0]} and {kind} need different host software or devices, and an endpoint "
                "has one; take types with GPUs of neighbouring generations, or without GPUs"
            )
        if deployment.volume_gb is not None and has_own_disk(kind):
            yield f"{kind} has a built-in disk: --volume-gb cannot be chosen for it"
    seconds = deployment.provision_seconds
    if seconds is not None and seconds not in PROVISION_SECONDS:
        yield f"--provision-seconds must be 300 to 3600, got {seconds}"


def variant_fields(deployment: Deployment) -> dict[str, Any]:
    """Return the fields of the production variant that say which hosts it has."""
    found: dict[str, Any] = {"InstanceType": deployment.instance_type}
    if deployment.pool:
        found = {
            "InstancePools": [
                {"InstanceType": kind, "Priority": place}
                for place, kind in enumerate(deployment.pool, 1)
            ]
        }
    if deployment.provision_seconds is not None:
        found["VariantInstanceProvisionTimeoutInSeconds"] = deployment.provision_seconds
    if deployment.reservation:
        found["CapacityReservationConfig"] = {
            "CapacityReservationPreference": ONLY_RESERVED,
            "MlReservationArn": deployment.reservation,
        }
    return found


def types_of(variant: dict[str, Any]) -> list[str]:
    """Return the types of a production variant in their order, as SageMaker describes it."""
    pools = sorted(variant.get("InstancePools", []), key=lambda pool: int(pool["Priority"]))
    return [str(pool["InstanceType"]) for pool in pools] or [str(variant["InstanceType"])]


def _software(instance_type: str) -> tuple[bool, str | None]:
    return has_gpu(instance_type), default_ami(instance_type)
