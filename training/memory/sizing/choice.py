"""What size=auto has chosen: hyperparameters, shares of the time, and why; kept for restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dalle.errors import CheckpointError
from dalle.platform.disk import disk_errors, write_atomically
from dalle.platform.json_file import read_json
from dalle.types import StageName
from training.config.fields import Hyperparameters

FILE_NAME = "size-auto.json"
"""In the job's checkpoint directory, which outlives an interruption."""


class Choice(BaseModel):
    """What was chosen at the first start of a job.

    minutes: of the job then. job, stages: hyperparameters, of the job and by stage. shares: of the
    time for training, by stage; a stage with a budget set by hand has none. reserve_seconds: after
    the last stage, for its last validation and the report. why: sentences for the log.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: float
    job: dict[str, Any]
    stages: dict[StageName, dict[str, Any]]
    shares: dict[StageName, float]
    reserve_seconds: float
    why: list[str]

    def apply(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """Return the hyperparameters with what was chosen, where nothing was set by hand."""
        return with_chosen(hyperparameters, self.stages, self.job)

    def save(self, checkpoints: Path) -> None:
        """Write it into the checkpoint directory. Raises DiskFullError, PlatformError."""
        path = checkpoints / FILE_NAME
        with disk_errors(f"write {path}", if_full="give the job a larger volume", directory=path):
            checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, checkpoints: Path) -> Choice | None:
        """Return the choice of the job's first start, None without one. Raises CheckpointError."""
        path = checkpoints / FILE_NAME
        try:
            return cls.model_validate_json(json.dumps(read_json(path)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); give the job an empty checkpoint directory"
            ) from error


def with_chosen(
    hyperparameters: Hyperparameters,
    stages: dict[StageName, dict[str, Any]],
    job: dict[str, Any] | None = None,
) -> Hyperparameters:
    """Return the hyperparameters with values for fields that were not set by hand.

    Raises ValidationError for a value that a field does not take.
    """
    changes: dict[str, Any] = {
        name: value
        for name, value in (job or {}).items()
        if not is_by_hand(hyperparameters, None, name)
    }
    for stage, values in stages.items():
        settings = hyperparameters.of(stage)
        chosen = {
            name: value
            for name, value in values.items()
            if not is_by_hand(hyperparameters, stage, name)
        }
        changes[stage] = type(settings).model_validate(settings.model_dump() | chosen)
    return hyperparameters.model_copy(update=changes)


def is_by_hand(hyperparameters: Hyperparameters, stage: StageName | None, name: str) -> bool:
    """Return whether a field has a value from the job's author, by its name or by another one.

    DeepSpeed's JSON and clip_fine_tune set fields too.
    """
    if name in hyperparameters.given:
        return True
    if stage is None:
        return False
    settings = hyperparameters.of(stage)
    if settings.size != "auto" and name not in _OF_ANY_SIZE:
        return True
    default = type(settings).model_fields[name].default
    return f"{stage}_{name}" in hyperparameters.given or getattr(settings, name) != default


_OF_ANY_SIZE = frozenset({"max_minutes", "batch_size", "warmup_steps"})
"""Fields that are chosen for a stage with a named size too."""
