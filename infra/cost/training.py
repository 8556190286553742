"""What a training job costs, from the arithmetic of `train --plan --json` and dated prices.

The time is estimated: the floating-point operations of all steps, at a share of what the GPUs of a
type can do. Nothing of it is measured. Small models wait for kernel launches and data, and so take
longer; a measured time can take the estimate's place. Knows nothing of pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle.errors import PriceMissing, UserError
from infra.cost.assumptions import assumed
from infra.cost.prices import Price, PriceTable
from training.memory import instances
from training.memory.instances import GPUS, Gpu

HEADROOM = 0.08
"""Share of a GPU's memory that `train --plan` leaves free."""


@dataclass(frozen=True, kw_only=True)
class TrainingAssumptions:
    """Values that are neither measured nor prices, each with its unit and meaning."""

    utilisation: float = assumed(
        instances.UTILISATION, "share", "of a GPU's operations by its data sheet that training "
        "reaches"
    )  # fmt: skip
    step_milliseconds: float = assumed(
        instances.STEP_MILLISECONDS, "ms", "added to every step: launches of kernels, the "
        "optimizer, batches"
    )  # fmt: skip
    start_minutes: float = assumed(
        instances.START_MINUTES, "minutes", "of image and data that are copied before the first "
        "step, and paid for"
    )  # fmt: skip
    spot_share: float = assumed(
        instances.SPOT_SHARE, "share", "of the on-demand price that spot capacity costs; AWS "
        "promises none, and says that up to 90 % are saved"
    )  # fmt: skip
    spot_repeated: float = assumed(
        instances.SPOT_REPEATED, "share", "of the time that interruptions repeat, from the last "
        "checkpoint on"
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("utilisation", "spot_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must be above 0, at most 1, got {getattr(self, name)}")
        for name in ("start_minutes", "spot_repeated", "step_milliseconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be 0 or more, got {value}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Memory(_Part):
    device: int


class _Way(_Part):
    precision: str
    num_devices: int = 1
    memory: _Memory


class PlannedStage(_Part):
    """One stage of `train --plan --json`. step_flops: operations of a step, on all devices."""

    stage: str
    size: str
    num_parameters: int
    batch_size: int | Literal["auto"]
    step_flops: float = Field(gt=0)
    budget: dict[str, float]
    job: _Way

    def seconds(self, flops_per_second: float, step_seconds: float, num_pairs: int | None) -> float:
        """Return how long the stage takes. Raises UserError for epochs without pairs."""
        if "max_minutes" in self.budget:
            return 60 * self.budget["max_minutes"]
        return self._steps(num_pairs) * (self.step_flops / flops_per_second + step_seconds)

    def _steps(self, num_pairs: int | None) -> float:
        if "max_steps" in self.budget:
            return self.budget["max_steps"]
        if num_pairs is None:
            raise UserError(
                f"the stage {self.stage} has a budget of {self.budget['epochs']:g} epochs: give "
                "--pairs, the number of pairs in the channel train"
            )
        if self.batch_size == "auto":
            raise UserError(f"the stage {self.stage} has batch_size=auto: plan with a number")
        return self.budget["epochs"] * math.ceil(num_pairs / self.batch_size)


class TrainingPlan(_Part):
    """What `train --plan --json` prints."""

    stages: list[PlannedStage] = Field(min_length=1)

    @property
    def device_bytes(self) -> int:
        """Memory that the largest stage needs on one GPU."""
        return max(stage.job.memory.device for stage in self.stages)


@dataclass(frozen=True)
class JobCost:
    """The cost of a job on one instance type.

    fits: whether the plan fits its GPUs; None for a type without one of GPUS. hours: with the
    start; None where nothing tells them. is_measured: they were given. price: None where none is
    known; then there are no dollars.
    """

    instance_type: str
    gpus: str
    fits: bool | None
    hours: float | None
    is_measured: bool
    price: Price | None
    on_demand_usd: float | None
    spot_usd: float | None


def load_plan(path: Path) -> TrainingPlan:
    """Read what `train --plan --json` printed. Raises UserError that names file and fault."""
    try:
        return TrainingPlan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"the plan {path} cannot be read: {error}") from error
    except ValidationError as error:
        raise UserError(f"{path} is not what `train --plan --json` prints: {error}") from error


def job_cost(
    plan: TrainingPlan,
    instance_type: str,
    table: PriceTable,
    assumptions: TrainingAssumptions,
    *,
    region: str,
    num_pairs: int | None = None,
    measured_hours: Mapping[str, float] | None = None,
) -> JobCost:
    """Return the cost of a job on one instance. Raises UserError, PriceMissing for an unknown type.

    num_pairs: in the channel train, for a budget in epochs. measured_hours: by instance type.
    """
    kind = table.instance_type(instance_type)
    gpu = GPUS.get(kind.gpu or "")
    hours = (measured_hours or {}).get(instance_type)
    fits, is_measured = None, hours is not None
    if gpu is not None:
        fits = plan.device_bytes <= gpu.memory_gib * 2**30 * (1 - HEADROOM)
        if hours is None:
            hours = sum(
                stage.seconds(
                    _flops_per_second(stage, gpu, kind.gpus, assumptions),
                    assumptions.step_milliseconds / 1000,
                    num_pairs,
                )
                for stage in plan.stages
            )
            hours = hours / 3600 + assumptions.start_minutes / 60
    try:
        price = table.hourly(instance_type, region, "Training")
    except PriceMissing:
        price = None
    on_demand = spot = None
    if price is not None and hours is not None:
        on_demand = hours * price.usd
        spot = on_demand * assumptions.spot_share * (1 + assumptions.spot_repeated)
    gpus = f"{kind.gpus} x {kind.gpu}" if kind.gpus else "no GPU"
    return JobCost(instance_type, gpus, fits, hours, is_measured, price, on_demand, spot)


def _flops_per_second(
    stage: PlannedStage, gpu: Gpu, number: int, assumptions: TrainingAssumptions
) -> float:
    peak = gpu.single_teraflops if stage.job.precision == "fp32" else gpu.half_teraflops
    return number * peak * 1e12 * assumptions.utilisation
