"""The model configs that a job's hyperparameters mean.

A named size, the author's changes to it, and what each model takes over from the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dalle.errors import HyperparameterError
from dalle.models.clip import ClipConfig
from dalle.models.dvae import DVAEConfig
from dalle.models.sizes import CLIP_SIZES, DVAE_SIZES, TRANSFORMER_SIZES
from dalle.models.transformer import TransformerConfig
from dalle.types import StageName
from training.config.fields import Hyperparameters

Config = DVAEConfig | TransformerConfig | ClipConfig


@dataclass(frozen=True)
class TextSizes:
    """What the models that read captions take over from the tokenizer."""

    vocab_size: int
    text_length: int


def dvae_config(hyperparameters: Hyperparameters) -> DVAEConfig:
    """Raises HyperparameterError when such a model cannot be built; the others likewise."""
    settings = hyperparameters.dvae
    with _named("dvae"):
        return DVAEConfig(**DVAE_SIZES[settings.size] | settings.overrides())


def transformer_config(
    hyperparameters: Hyperparameters, text: TextSizes, dvae: DVAEConfig
) -> TransformerConfig:
    """For the image tokens of a dVAE."""
    settings = hyperparameters.transformer
    known = {
        "text_vocab_size": text.vocab_size,
        "text_length": text.text_length,
        "grid_size": dvae.grid_size,
        "codebook_size": dvae.codebook_size,
        "num_codebooks": dvae.num_codebooks,
    }
    with _named("transformer"):
        return TransformerConfig(**TRANSFORMER_SIZES[settings.size] | settings.overrides() | known)


def clip_config(hyperparameters: Hyperparameters, text: TextSizes, image_size: int) -> ClipConfig:
    """For images of a size, in pixels."""
    settings = hyperparameters.clip
    known = {
        "image_size": image_size,
        # An end mark above all ids of the tokenizer, and room for it.
        "text_vocab_size": text.vocab_size + 1,
        "text_length": text.text_length + 1,
    }
    with _named("clip"):
        return ClipConfig(**CLIP_SIZES[settings.size] | settings.overrides() | known)


@contextmanager
def _named(stage: StageName) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise HyperparameterError(f"{stage}: {error}") from error
