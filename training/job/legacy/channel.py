"""The channel `legacy`: a model of DALLE-pytorch, and what it needs beside its own file.

dalle.pt, or a folder of DeepSpeed's    the model
NAME.json                               its tokenizer, where CLIP's byte pairs do not fit
vae/                                    its VAE's files, where the model's file has none
legacy.json                             what the file does not tell: {"attn_types": …}
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle.artefact import Artefact
from dalle.errors import ForeignFileError
from dalle.manifest import is_hidden
from dalle.models.configs import ImageTokenizerConfig
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.models.legacy.transformer import LegacyTransformer
from dalle.platform.json_file import read_json
from training.job.legacy.config.choices import Choices
from training.job.legacy.config.versions import parse_version
from training.job.legacy.describe import describe_saved
from training.job.legacy.importer import Beside, import_saved, read_model
from training.job.pretrained.weights_file import WEIGHTS_SUFFIXES

logger = logging.getLogger(__name__)

OPTIONS, VAE = "legacy.json", "vae"


class _Options(BaseModel):
    """Content of legacy.json, by the names of the command's options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    attn_types: str | list[str] | None = None
    dalle_pytorch_version: str | None = None
    heads: Annotated[int, Field(ge=1)] | None = None
    stable: bool | None = None
    hidden_padding: bool | None = None

    def choices(self) -> Choices:
        """Return the choices. Raises ValueError for a version that is none."""
        kinds = self.attn_types
        if isinstance(kinds, str):
            kinds = kinds.split(",")
        if self.dalle_pytorch_version is not None:
            parse_version(self.dalle_pytorch_version)
        return Choices(
            None if kinds is None else tuple(each.strip() for each in kinds),
            self.dalle_pytorch_version,
            self.heads,
            self.stable,
            self.hidden_padding,
        )


def load_legacy(directory: Path) -> Artefact:
    """Return the artefact of a channel's model, on the CPU, and log the notes of `inspect`.

    Raises ForeignFileError.
    """
    try:
        entries = sorted(each for each in directory.iterdir() if not is_hidden(each.name))
    except OSError as error:
        raise ForeignFileError(f"{directory} cannot be read: {error.strerror}") from error
    models = [
        each
        for each in entries
        if (each.is_dir() and each.name != VAE) or each.name.endswith(WEIGHTS_SUFFIXES)
    ]
    tokenizers = [each for each in entries if each.suffix == ".json" and each.name != OPTIONS]
    if len(models) != 1 or len(tokenizers) > 1:
        names = ", ".join(each.name for each in entries[:5]) or "no file"
        raise ForeignFileError(
            f"the channel legacy, {directory}, must hold one model of DALLE-pytorch "
            f"({', '.join(WEIGHTS_SUFFIXES)}, or a folder of DeepSpeed's), at most one "
            f"tokenizer.json, and {VAE}/ where the model's file has no VAE; it has {names}"
        )
    vae = directory / VAE
    beside = Beside(str(tokenizers[0]) if tokenizers else None, vae if vae.is_dir() else None)
    path, choices = models[0], _choices(directory / OPTIONS)
    saved = read_model(path)
    artefact = import_saved(saved, path, choices, beside)
    for note in describe_saved(path.name, saved, choices).notes:
        logger.info("%s: %s", path.name, note)
    return artefact


def load_configs(directory: Path) -> tuple[LegacyTransformerConfig, ImageTokenizerConfig]:
    """Return the configs of a channel's transformer and image tokenizer. Raises as above."""
    artefact = load_legacy(directory)
    transformer = artefact.require("transformer")
    assert isinstance(transformer, LegacyTransformer), "the importer builds no other"
    return transformer.config, artefact.require("dvae").config


def _choices(path: Path) -> Choices:
    if not path.exists():
        return Choices()
    try:
        return _Options.model_validate(read_json(path)).choices()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"])
        raise ForeignFileError(f"{path.name}: {where}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise ForeignFileError(f"{path.name}: {error}") from error
