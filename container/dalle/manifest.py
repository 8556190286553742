"""`manifest.json`: what an artefact is, how it came about, the sha256 of its files. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dalle.errors import ArtefactError
from dalle.types import StageName

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STAGING = ".staging"
"""The directory, in an artefact's own, where a new one is complete before it takes its place."""


class StageRecord(BaseModel):
    """One training run that made a component of the artefact."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    stage: StageName
    job_name: str
    finished_at: str
    """ISO 8601, UTC."""
    steps: int
    is_finished: bool
    """False when the job was stopped before its budget was spent."""
    wall_seconds: float
    cpu_seconds: float
    """Of all threads of the process that trained; not of those that only load images."""
    hyperparameters: dict[str, Any]
    metrics: dict[str, float]
    """The last validation; empty without held-out pairs."""
    dataset_fingerprint: str
    dataset_counts: dict[str, int]


class Manifest(BaseModel):
    """What `manifest.json` holds."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format_version: int = FORMAT_VERSION
    library_version: str = ""
    git_revision: str = ""
    licence: str = ""
    stages: list[StageRecord] = []
    """Oldest first; a stage that was trained anew has several, the last of which counts."""
    captions: list[str] = []
    """A few of the transformer's data, held-out ones if there were any: number formats are compared
    by what it draws for them."""
    files: dict[str, str] = {}
    """Path within the artefact -> sha256."""

    def newest_records(self) -> dict[StageName, StageRecord]:
        """For each stage that was trained, the run that the component comes from."""
        return {record.stage: record for record in self.stages}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the artefact in a directory, nothing checked against it.

    Raises ArtefactError naming what is wrong with it.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtefactError(
            f"{directory} is not an artefact: {MANIFEST} is missing (was its writing interrupted?)"
        ) from None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ArtefactError(f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ArtefactError(f"{path} is not a manifest: {error}") from error
