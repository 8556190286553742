"""Metric lines that a job prints, and the regular expressions that read them.

    dvae_step=50; dvae_loss=0.1234; dvae_samples_per_second=812.5;

SageMaker applies the regular expression of each metric definition, and of a tuning job's objective,
to every line of the log. Standard library only, so that infra can publish the definitions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from dalle.types import STAGES

_NUMBER = r"(-?[0-9]+(?:[.][0-9]+)?(?:e[+-]?[0-9]+)?)"

METRIC_PATTERN = rf"\b([a-z][a-z0-9_]*)={_NUMBER};"
"""Matches every metric that `train` prints; groups: name, value."""

COMMON_METRICS = ("loss", "validation_loss", "learning_rate", "samples_per_second", "epoch")
"""Metrics of every stage; stages add others, which `metric_definition` describes too."""


def metric_definition(name: str) -> dict[str, str]:
    """Return an entry of a training job's MetricDefinitions: `Name`, and `Regex` with one group."""
    return {"Name": name, "Regex": rf"\b{name}={_NUMBER};"}


METRIC_DEFINITIONS = tuple(
    metric_definition(f"{stage}_{metric}") for stage in STAGES for metric in COMMON_METRICS
)
"""Definitions to launch a job with; SageMaker accepts at most 40."""


def render_metrics(values: Mapping[str, float]) -> str:
    """Return a line of `name=value;` pairs, without values that are not finite."""
    return " ".join(
        f"{name}={value:.6g};" for name, value in values.items() if math.isfinite(value)
    )


def read_metrics(line: str) -> dict[str, float]:
    """Return the metrics in one line of a log, {} without any."""
    return {name: float(value) for name, value in re.findall(METRIC_PATTERN, line)}
