"""The metric lines that a job prints, and the regular expressions that read them.

    dvae_step=50; dvae_loss=0.1234; dvae_samples_per_second=812.5;

SageMaker applies each definition's regular expression to every line of the log; a tuning job does
the same for its objective. Standard library only, so that infra can publish the definitions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from dalle.types import STAGES

_NUMBER = r"(-?[0-9]+(?:[.][0-9]+)?(?:e[+-]?[0-9]+)?)"

METRIC_PATTERN = rf"\b([a-z][a-z0-9_]*)={_NUMBER};"
"""Fits every metric that `train` prints: its name, then its value."""

COMMON_METRICS = ("loss", "validation_loss", "learning_rate", "samples_per_second", "epoch")
"""What every stage prints; a stage adds its own, which `metric_definition` describes too."""


def metric_definition(name: str) -> dict[str, str]:
    """One entry of a training job's MetricDefinitions: `Name`, and `Regex` with one group."""
    return {"Name": name, "Regex": rf"\b{name}={_NUMBER};"}


METRIC_DEFINITIONS = tuple(
    metric_definition(f"{stage}_{metric}") for stage in STAGES for metric in COMMON_METRICS
)
"""The definitions to launch a job with; SageMaker takes at most 40."""


def render_metrics(values: Mapping[str, float]) -> str:
    """One line of `name=value;` pairs; values that are not finite are left out."""
    return " ".join(
        f"{name}={value:.6g};" for name, value in values.items() if math.isfinite(value)
    )


def read_metrics(line: str) -> dict[str, float]:
    """The metrics in one line of a log; empty when there are none."""
    return {name: float(value) for name, value in re.findall(METRIC_PATTERN, line)}
