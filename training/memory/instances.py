"""What a training job would take on named instances: an estimate, from data sheets. No torch.

The time is estimated by floating-point operations at a share of what GPUs can do by their data
sheets. Small models wait for kernel launches and data, hence the milliseconds of each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dalle.errors import HyperparameterError
from dalle.platform.json_file import read_json

UTILISATION = 0.3
"""Share of a GPU's operations by its data sheet that training reaches."""
STEP_MILLISECONDS = 20.0
"""Added to every step: launches of kernels, the optimizer, batches."""
START_MINUTES = 5.0
"""Of image and data that are copied before the first step, and paid for."""
SPOT_SHARE = 0.4
"""Share of the on-demand price that spot capacity costs; AWS promises none."""
SPOT_REPEATED = 0.05
"""Share of the time that interruptions repeat, from the last checkpoint on."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet. teraflops: of dense products in 16 bits, and in fp32."""

    memory_gib: float
    half_teraflops: float
    single_teraflops: float


GPUS: dict[str, Gpu] = {
    "NVIDIA T4": Gpu(15, 65, 8.1),
    "NVIDIA A10G": Gpu(22, 70, 35),
    "NVIDIA L4": Gpu(22, 121, 30.3),
    "NVIDIA L40S": Gpu(44, 362, 91.6),
    "NVIDIA A100": Gpu(39, 312, 19.5),
    "NVIDIA H100": Gpu(79, 989, 67),
    "NVIDIA B200": Gpu(178, 2250, 80),
}
"""Memory as the driver offers it; operations a second of NVIDIA's data sheets, without sparsity."""

SHOWN = {
    "ml.g5.xlarge": "NVIDIA A10G",
    "ml.g6.xlarge": "NVIDIA L4",
    "ml.p5.4xlarge": "NVIDIA H100",
}
"""Instances of one GPU that `train --plan` estimates for."""

REGION = "us-east-1"
PRICES = Path(__file__).parents[2] / "infra" / "cost" / "prices.json"
"""infra's price table where there is a checkout; the image has none."""


def estimated_seconds(gpu: Gpu, operations: float, steps: float, *, is_half: bool) -> float:
    """Return the seconds of a job with so many operations in all its steps, with its start."""
    peak = gpu.half_teraflops if is_half else gpu.single_teraflops
    computing = operations / (peak * 1e12 * UTILISATION)
    return computing + steps * STEP_MILLISECONDS / 1000 + 60 * START_MINUTES


def hourly_prices(path: Path) -> dict[str, float]:
    """Return instance type -> USD an hour of training in REGION, of infra's price table.

    Raises HyperparameterError for a file that is none.
    """
    try:
        rows = read_json(path)["prices"]
        return {
            row["item"]: float(row["usd"])
            for row in rows
            if row["component"] == "Training" and row["region"] == REGION
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HyperparameterError(
            f"--prices {path} is not a price table ({error!r}); give what "
            "`python -m infra prices refresh` writes"
        ) from error


def spot(on_demand: float) -> float:
    """Return the dollars of spot capacity, with what interruptions repeat."""
    return on_demand * SPOT_SHARE * (1 + SPOT_REPEATED)
