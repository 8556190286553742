"""Models of the channels `artefact`, `legacy`, `clip` and `tokenizer_model`."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch

from dalle import archive
from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.errors import ArtefactError
from dalle.manifest import ImportedModel
from dalle.platform.environment import Job
from training.config.hyperparameters import LEGACY, TOKENIZER_MODEL
from training.job.legacy.channel import load_legacy
from training.job.pretrained.clip import description, find_clip, load_clip
from training.job.pretrained.image_tokenizer import load_image_tokenizer

logger = logging.getLogger(__name__)


def read_models(job: Job, device: torch.device, image_size: int | None) -> Artefact:
    """Return the components that the channels bring; none without the channels.

    image_size: of a published image tokenizer, None for the size that it was trained on.
    """
    artefact = Artefact()
    if "artefact" in job.channels:
        with tempfile.TemporaryDirectory() as scratch:
            directory = archive.locate(job.channels["artefact"].directory, Path(scratch))
            artefact = artefacts.load(directory, device)
    if LEGACY in job.channels:
        if artefact.components() or TOKENIZER_MODEL in job.channels:
            other = TOKENIZER_MODEL if TOKENIZER_MODEL in job.channels else "artefact"
            raise ArtefactError(
                f"the channels {other} and {LEGACY} both bring an image tokenizer; leave one out"
            )
        artefact = load_legacy(job.channels[LEGACY].directory)
        for model in (artefact.require("dvae"), artefact.require("transformer")):
            model.to(device)
    if "clip" in job.channels:
        if artefact.clip is not None:
            raise ArtefactError("the channels artefact and clip both bring a CLIP; leave one out")
        paths = find_clip(job.channels["clip"].directory)
        artefact.clip = load_clip(*paths).to(device)
        artefact.manifest.imported["clip"] = ImportedModel(
            what=description(artefact.clip.config),
            files={path.name: artefacts.sha256(path) for path in paths},
        )
    if TOKENIZER_MODEL in job.channels:
        if artefact.dvae is not None or artefact.transformer is not None:
            raise ArtefactError(
                f"the channels artefact and {TOKENIZER_MODEL} both bring an image tokenizer, or a "
                "transformer that knows another one's tokens; leave one of them out"
            )
        directory = job.channels[TOKENIZER_MODEL].directory
        tokenizer = load_image_tokenizer(directory, image_size).to(device)
        config = tokenizer.config
        logger.info(
            "image tokenizer of the channel %s: %s, images of %d pixels as %d x %d codes of %s",
            TOKENIZER_MODEL,
            config.kind,
            config.image_size,
            config.grid_size,
            config.grid_size,
            f"{config.codebook_size:,}",
        )
        artefact.dvae = tokenizer
    return artefact
