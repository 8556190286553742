"""How an endpoint moves to a new configuration: all at once or in steps, back when an alarm rings.

The platform starts new hosts beside the old ones, moves the requests over, and deletes the old ones
last. While it does, an alarm of AutoRollbackConfiguration moves everything back.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dalle.errors import PlanError
from infra.aws.deployment import Deployment

Kind = Literal["all-at-once", "canary", "linear", "rolling"]
STEP_PERCENT: dict[str, range] = {
    "canary": range(1, 50 + 1),
    "linear": range(10, 50 + 1),
    "rolling": range(5, 50 + 1),
}
"""Of the instances in one step, by the API's documentation."""
WAIT_SECONDS = range(3600 + 1)
MAX_ALARMS = 10
OWN_ALARMS = 2
"""Errors and latency, which `deploy --rollout` makes itself."""
_OPTIONS = {
    "step_percent": "--step-percent",
    "wait_seconds": "--step-seconds",
    "keep_seconds": "--keep-old-seconds",
    "alarms": "--rollback-alarm",
}
IN_STEPS = 2
"""Instances that an update in steps needs: half of them is the largest step."""


@dataclass(frozen=True)
class Rollout:
    """kind: of the update. step_percent: of the instances, in the first step or in each.

    wait_seconds: between steps, in which alarms may ring. keep_seconds: the old hosts after the
    last step. alarms: names of alarms that the account has already.
    """

    kind: Kind
    step_percent: int = 10
    wait_seconds: int = 300
    keep_seconds: int = 300
    alarms: tuple[str, ...] = ()

    def config(self, alarms: Sequence[str]) -> dict[str, Any]:
        """Return the API's DeploymentConfig. alarms: the endpoint's own, before those given."""
        rings = [{"AlarmName": name} for name in dict.fromkeys([*alarms, *self.alarms])]
        rollback = {"AutoRollbackConfiguration": {"Alarms": rings}}
        step = {"Type": "CAPACITY_PERCENT", "Value": self.step_percent}
        if self.kind == "rolling":
            rolling = {"MaximumBatchSize": step, "WaitIntervalInSeconds": self.wait_seconds}
            return {"RollingUpdatePolicy": rolling, **rollback}
        routing: dict[str, Any] = {
            "Type": self.kind.replace("-", "_").upper(),
            "WaitIntervalInSeconds": self.wait_seconds,
        }
        if self.kind == "canary":
            routing["CanarySize"] = step
        elif self.kind == "linear":
            routing["LinearStepSize"] = step
        policy = {
            "TrafficRoutingConfiguration": routing,
            "TerminationWaitInSeconds": self.keep_seconds,
        }
        return {"BlueGreenUpdatePolicy": policy, **rollback}

    def problems(self, deployment: Deployment) -> Iterator[str]:
        """Yield why the platform would not update this deployment so."""
        if deployment.mode not in ("realtime", "async"):
            yield f"--rollout is for --mode realtime and async, not for {deployment.mode}"
            return
        if deployment.copies:
            yield "--rollout is for an endpoint of one model: leave it or --component out"
            return
        allowed = STEP_PERCENT.get(self.kind)
        if allowed and self.step_percent not in allowed:
            yield (
                f"--step-percent must be {allowed[0]} to {allowed[-1]} for {self.kind}, "
                f"got {self.step_percent}"
            )
        if allowed and deployment.min_instances < IN_STEPS:
            yield (
                f"--rollout {self.kind} moves at most half of the instances in a step, and so "
                f"needs --min-instances {IN_STEPS} or more, got {deployment.min_instances}; "
                "all-at-once has no such limit"
            )
        waits = {"--step-seconds": self.wait_seconds, "--keep-old-seconds": self.keep_seconds}
        for option, seconds in waits.items():
            if seconds not in WAIT_SECONDS:
                yield f"{option} must be 0 to {WAIT_SECONDS[-1]}, got {seconds}"
        most = MAX_ALARMS - OWN_ALARMS
        if len(self.alarms) > most:
            yield f"--rollback-alarm is given at most {most} times, got {len(self.alarms)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("update of an endpoint (realtime, async)")
    group.add_argument(
        "--rollout",
        choices=get_args(Kind),
        help="move to the new hosts so, and back when errors or latency ring an alarm; "
        "default: all at once, without alarms",
    )
    group.add_argument("--step-percent", type=int, help="of the instances in a step; default: 10")
    group.add_argument("--step-seconds", type=int, help="between steps; default: 300")
    group.add_argument(
        "--keep-old-seconds", type=int, help="the old hosts after the last step; default: 300"
    )
    group.add_argument(
        "--rollback-alarm",
        action="append",
        default=[],
        metavar="NAME",
        help="a further alarm that moves everything back; repeatable",
    )


def read(options: argparse.Namespace) -> Rollout | None:
    """Return the rollout that the options describe; None for an update without one.

    Raises PlanError for options of a rollout without one.
    """
    parts = {
        "step_percent": options.step_percent,
        "wait_seconds": options.step_seconds,
        "keep_seconds": options.keep_old_seconds,
        "alarms": tuple(options.rollback_alarm) or None,
    }
    given = {name: value for name, value in parts.items() if value is not None}
    if options.rollout is None:
        if given:
            names = ", ".join(_OPTIONS[name] for name in given)
            raise PlanError(f"{names}: for an update with --rollout, which is missing")
        return None
    return Rollout(kind=options.rollout, **given)
