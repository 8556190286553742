"""A model of DALLE-pytorch -> an `Artefact` with transformer, image tokenizer and tokenizer."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from dalle.artefact import Artefact, sha256
from dalle.errors import ForeignFileError
from dalle.manifest import ImportedModel
from dalle.models.legacy.transformer import LegacyTransformer
from training.job.legacy.config.choices import Choices
from training.job.legacy.config.resolve import resolve
from training.job.legacy.saved.deepspeed_folder import read_deepspeed_folder
from training.job.legacy.saved.saved_model import SavedModel, read_saved_model
from training.job.legacy.tokenizer import load_tokenizer
from training.job.legacy.vae import load_vae
from training.job.legacy.weights import convert
from training.job.pretrained.fill import fill_model
from training.job.pretrained.weights_file import missing_words


@dataclass(frozen=True)
class Beside:
    """What a model needs beside its own file."""

    tokenizer: str | None = None
    """Path of a tokenizer.json, or `clip`; None for clip where it fits."""
    vae: Path | None = None
    """File or folder of the image tokenizer; None for the one in the model's file."""


def read_model(path: Path) -> SavedModel:
    """Return what a file, or a folder of DeepSpeed's, holds. Raises ForeignFileError."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ForeignFileError(f"{path.name:.80} cannot be read: {reason}") from error
    if is_folder:
        return read_deepspeed_folder(path)
    return read_saved_model(path)


def import_model(path: Path, choices: Choices, beside: Beside) -> Artefact:
    """Return the artefact of a model, on the CPU, in evaluation mode, without gradients.

    Raises ForeignFileError naming the file at fault and what would be right.
    """
    return import_saved(read_model(path), path, choices, beside)


def import_saved(saved: SavedModel, path: Path, choices: Choices, beside: Beside) -> Artefact:
    """Return the artefact of what a file holds, as `import_model` does. path: the file."""
    try:
        resolved = resolve(saved, choices)
        state = convert(saved, resolved)
        transformer = fill_model(lambda: LegacyTransformer(resolved.config), state)
        config = resolved.config
        tokenizer = load_tokenizer(
            beside.tokenizer, config, resolved.versions, is_kobiso=saved.kind == "kobiso"
        )
        dvae = load_vae(saved, config, resolved.versions, beside.vae)
    except LookupError as error:
        raise ForeignFileError(f"{path.name}: {missing_words(error)}") from error
    except ValueError as error:
        raise ForeignFileError(f"{path.name}: {error}") from error
    artefact = Artefact(dvae=dvae, transformer=transformer, tokenizer=tokenizer)
    artefact.manifest.imported["transformer"] = ImportedModel(
        what=f"transformer of DALLE-pytorch {resolved.versions}",
        files={path.name: sha256(path)} if path.is_file() else {},
    )
    return artefact
