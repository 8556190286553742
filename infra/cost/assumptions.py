"""Assumptions of the cost calculation: values that are neither measured nor prices.

Every one is a field with a unit and a meaning, so that a report prints them all and a reader can
change one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from dalle.errors import UserError

SECONDS_PER_DAY = 86_400.0


def assumed(value: float, unit: str, meaning: str) -> float:
    """Return a dataclass's field with a default value, its unit and its meaning."""
    default: float = field(default=value, metadata={"unit": unit, "meaning": meaning})
    return default


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Every assumption, with its unit and meaning."""

    hours_per_month: float = assumed(730, "hours", "in a month, as in AWS's calculator")
    peak_to_mean: float = assumed(
        3, "times", "the day's mean rate in the busy hours: 3 is all requests within 8 hours, 1 is "
        "evenly day and night; within those hours they arrive at random"
    )  # fmt: skip
    target_utilisation: float = assumed(
        0.7, "share", "of an instance's measured throughput in use; the rest keeps queues short"
    )
    volume_gb: float = assumed(20, "GB", "of disk per instance, for image and model")
    async_utilisation: float = assumed(
        0.9, "share", "the same for asynchronous endpoints, whose queue may be long"
    )
    async_cold_start_seconds: float = assumed(
        360, "seconds", "from an alarm on an empty endpoint to its first reply, paid for; 5 to 6 "
        "minutes were reported for large models, ours was not measured"
    )  # fmt: skip
    async_idle_tail_seconds: float = assumed(
        900, "seconds", "of an idle instance paid for before it is removed: a target-tracking "
        "policy waits for 15 minutes of low readings"
    )  # fmt: skip
    serverless_memory_gb: float = assumed(6, "GB", "of a serverless endpoint, the maximum")
    serverless_cold_start_seconds: float = assumed(
        30, "seconds", "added to a request without a warm instance; not paid for, not measured"
    )
    lambda_memory_gb: float = assumed(10, "GB", "of a Lambda function, the maximum")
    lambda_cold_start_seconds: float = assumed(
        30, "seconds", "added to a request without a warm instance; paid for, not measured"
    )
    keep_warm_seconds: float = assumed(
        300, "seconds", "that serverless and Lambda keep an idle instance; AWS guarantees none"
    )
    synchronous_limit_seconds: float = assumed(
        60, "seconds", "after which a real-time or serverless invocation fails"
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{each.name} must be 0 or more, got {value}", field=each.name)
            if each.metadata["unit"] == "share" and not 0 < value <= 1:
                raise UserError(f"{each.name} must be above 0, at most 1, got {value}")
        if self.hours_per_month == 0 or self.peak_to_mean < 1:
            raise UserError("hours_per_month must be above 0 and peak_to_mean at least 1")

    @property
    def days_per_month(self) -> float:
        return self.hours_per_month / 24

    def busy_rate(self, requests_per_day: float) -> float:
        """Return requests per second in the busy hours."""
        return requests_per_day / SECONDS_PER_DAY * self.peak_to_mean

    def with_values(self, changes: dict[str, float]) -> Assumptions:
        """Return the assumptions with some changed. Raises UserError for an unknown name."""
        known = {each.name for each in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise UserError(
                    f"there is no assumption {name!r}; there are {', '.join(sorted(known))}",
                    field=name,
                )
        return dataclasses.replace(self, **changes)
