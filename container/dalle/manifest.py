"""`manifest.json` of an artefact: format, training history, sha256 of every file. No torch."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dalle.errors import ArtefactError
from dalle.platform.json_file import read_json
from dalle.types import COMPONENTS, StageName

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
STAGING = ".staging"
"""Directory within an artefact's where a new artefact is written before it replaces the old."""
FORMER = ".former"
"""Directory within an artefact's that holds the old artefact while the new one is put in place."""


class StageRecord(BaseModel):
    """One training run of a stage."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    stage: StageName
    job_name: str
    finished_at: str
    """ISO 8601, UTC."""
    steps: int
    is_finished: bool
    """False when the job was stopped before the end of its budget."""
    wall_seconds: float
    cpu_seconds: float
    """Of all threads of the training process; without processes that only load images."""
    hyperparameters: dict[str, Any]
    metrics: dict[str, float]
    """Of the last validation of these weights; empty without held-out pairs."""
    kept_step: int | None = None
    """Step whose weights these are: that of the best validation; None for the last one."""
    notes: list[str] = []
    """Sentences on how the training went, such as that it overfitted."""
    dataset_fingerprint: str
    dataset_counts: dict[str, int]
    trained_on_from: str = ""
    """sha256 of the weights that it began with, which a channel brought; empty for random ones. The
    record before it of this stage, if there is one, is theirs."""


class ImportedModel(BaseModel):
    """A published model that came into the artefact."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    what: str
    """Its kind, and how it differs from the models beside it."""
    files: dict[str, str]
    """Name of each file that it came from -> sha256."""


class SamplingSettings(BaseModel):
    """How images are sampled for a request that does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(default=1.0, ge=0, le=10)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    guidance_scale: float = Field(default=1.0, ge=0, le=100)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self if value is not None)


class TriedSampling(BaseModel):
    """Settings that were tried on held-out captions, and what they gave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: SamplingSettings
    own_caption: float
    """Share of the images, 0 to 1, that CLIP finds nearest to their own of the captions."""
    nats: float
    """Of the held-out images' codes, each in the mean, by a mixture of settings and model."""
    spread: float
    """1 - cosine by CLIP of two images of one caption, in the mean."""


class ChosenSampling(BaseModel):
    """The settings that were chosen for a model after its training, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: SamplingSettings
    num_captions: int
    """Held-out captions, with two images each."""
    own_caption_of_real: float
    """As `TriedSampling.own_caption`, of the real images."""
    tried: list[TriedSampling]
    """The first are those of a model without a choice: temperature 1, no filter, no guidance."""


class Manifest(BaseModel):
    """Content of `manifest.json`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format_version: int = FORMAT_VERSION
    library_version: str = ""
    git_revision: str = ""
    licence: str = ""
    stages: list[StageRecord] = []
    """Oldest first; the last record of a stage is that of the component."""
    imported: dict[StageName, ImportedModel] = {}
    """Component -> the published model that it is, or was trained on from."""
    captions: list[str] = []
    """A few captions of the transformer's data, held-out ones if there are any. `serve` compares
    number formats by the images of these captions."""
    sampling: ChosenSampling | None = None
    """How `serve` samples for a silent request; None as ever, at temperature 1."""
    chosen: list[str] = []
    """Sentences on what size=auto chose in the newest job that had it, and why."""
    files: dict[str, str] = {}
    """Path within the artefact -> sha256."""

    @field_validator("files")
    @classmethod
    def _files_of_components(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            parts = PurePosixPath(name).parts
            if len(parts) < 2 or parts[0] not in COMPONENTS or ".." in parts or "\0" in name:
                raise ValueError(f"{name[:80]!r} is not a path within {', '.join(COMPONENTS)}")
        return files

    def components(self) -> set[str]:
        """Return the names of the components that the artefact has."""
        return {name.partition("/")[0] for name in self.files}

    @property
    def sampling_settings(self) -> SamplingSettings:
        """How images are sampled where nobody says."""
        return SamplingSettings() if self.sampling is None else self.sampling.settings

    def lineage(self, stage: StageName) -> list[StageRecord]:
        """Return the records of a component, newest first; each was trained on from the next."""
        lineage = []
        for record in reversed([each for each in self.stages if each.stage == stage]):
            lineage.append(record)
            if not record.trained_on_from:
                break
        return lineage

    def newest_records(self) -> dict[StageName, StageRecord]:
        """Return the last record of each stage that was trained."""
        return {record.stage: record for record in self.stages}


def is_hidden(path: str) -> bool:
    """Return whether a name, or a folder of a path, is hidden.

    Macs, file managers and notebooks leave such files beside others: ._x, .DS_Store,
    .ipynb_checkpoints.
    """
    return any(part.startswith(".") for part in path.split("/"))


def deeper_manifest(directory: Path) -> str:
    """Return words on the manifest of a folder in a directory; empty without one."""
    found = sorted(path.parent.name for path in directory.glob(f"[!.]*/{MANIFEST}"))
    return f"; it is one folder deeper, in {found[0]}/" if found else ""


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of the artefact in a directory, without a check of the files.

    Raises ArtefactError naming what is wrong with the manifest.
    """
    path = directory / MANIFEST
    try:
        content = read_json(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        deeper = deeper_manifest(directory) or " (was its writing interrupted?)"
        raise ArtefactError(
            f"{directory} is not an artefact: {MANIFEST} is missing{deeper}"
        ) from None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ArtefactError(f"{path} {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ArtefactError(f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ArtefactError(f"{path} is not a manifest: {error}") from error
