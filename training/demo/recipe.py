"""The hyperparameters of the demo, and how long each part of it takes.

A recipe is a JSON file of flat hyperparameters; the default is `training/recipes/rainbow_cpu.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from dalle.errors import UserError
from dalle.types import StageName
from training.config import hyperparameters

RECIPE = "rainbow_cpu.json"
RECIPE_MINUTES = 10.5  # of the whole demo on two quiet cores, with the budgets of the recipe

# Seconds on two quiet cores, for the estimate of the time left: of a step of the recipe, and of the
# other parts.
STEP_SECONDS: dict[StageName, float] = {"dvae": 0.11, "transformer": 0.23, "clip": 0.28}
DATA_SECONDS = 6.0
START_SECONDS = 25.0  # of `train`: importing, encoding the data, writing artefact and report
SERVE_SECONDS = 25.0
EVALUATE_SECONDS = 45.0
REPORT_SECONDS = 12.0
OTHER_SECONDS = DATA_SECONDS + START_SECONDS + SERVE_SECONDS + EVALUATE_SECONDS + REPORT_SECONDS


def read_recipe(path: Path | None, minutes: float) -> dict[str, str]:
    """Read a recipe; scale its training budgets so that the demo takes about `minutes` on two quiet
    cores.

    path: None for the default. Raises UserError or HyperparameterError.
    """
    recipe = read_recipe_file(path, RECIPE)
    scale = (60 * minutes - OTHER_SECONDS) / (60 * RECIPE_MINUTES - OTHER_SECONDS)
    if minutes != RECIPE_MINUTES:
        for name in recipe:
            if name.endswith("max_minutes"):
                recipe[name] = f"{float(recipe[name]) * scale:.3g}"
            elif name.endswith("max_steps"):
                recipe[name] = str(max(1, round(float(recipe[name]) * scale)))
    return recipe


def read_recipe_file(path: Path | None, name: str) -> dict[str, str]:
    """Read and check a recipe; without a path, the one of that name in `training/recipes`."""
    file = resources.files("training") / "recipes" / name if path is None else path
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a recipe: {error}") from error
    recipe = {str(name): str(value) for name, value in content.items()}
    hyperparameters.parse(recipe)
    return recipe


def training_seconds(recipe: Mapping[str, str]) -> float:
    """Return the time of all stages' budgets together, as far as they are in steps or minutes."""
    settings = hyperparameters.parse(recipe)
    return sum(
        60 * (settings.of(name).max_minutes or 0) + seconds * (settings.of(name).max_steps or 0)
        for name, seconds in STEP_SECONDS.items()
    )
