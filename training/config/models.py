"""Model configs from a job's hyperparameters: a named size, the changes to it, shared sizes.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from dalle.errors import HyperparameterError
from dalle.models.configs import (
    ClipConfig,
    DVAEConfig,
    ImageTokenizerConfig,
    TransformerConfig,
)
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.models.sizes import CLIP_SIZES, DVAE_SIZES, TRANSFORMER_SIZES
from dalle.types import StageName
from training.config.fields import Hyperparameters

Config = DVAEConfig | TransformerConfig | LegacyTransformerConfig | ClipConfig

_OF_TRAINING = frozenset(
    {"dropout", "caption_dropout", "word_dropout", "token_noise", "text_loss_weight"}
)
"""Fields of a transformer's config that act in training only."""


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the tokenizer, for the models that read captions."""

    vocab_size: int
    text_length: int


def dvae_config(hyperparameters: Hyperparameters) -> DVAEConfig:
    """Return the dVAE's config. Raises HyperparameterError when it is invalid; so do the others."""
    settings = hyperparameters.dvae
    with _named("dvae"):
        return DVAEConfig(**DVAE_SIZES[settings.base_size] | settings.overrides())


def stage_config(
    stage: StageName,
    hyperparameters: Hyperparameters,
    text: TextSizes,
    dvae: ImageTokenizerConfig,
) -> Config:
    """Return the config of a stage's model. dvae: the one whose images or tokens it is to read."""
    settings = hyperparameters.of(stage)
    if stage == "dvae":
        return dvae_config(hyperparameters)
    with _named(stage):
        if stage == "clip":
            known = {
                "image_size": dvae.image_size,
                # An end mark above all ids of the tokenizer, and room for it.
                "text_vocab_size": text.vocab_size + 1,
                "text_length": text.text_length + 1,
            }
            return ClipConfig(**CLIP_SIZES[settings.base_size] | settings.overrides() | known)
        known = {
            "text_vocab_size": text.vocab_size,
            "text_length": text.text_length,
            "grid_size": dvae.grid_size,
            "codebook_size": dvae.codebook_size,
            "num_codebooks": dvae.num_codebooks,
        }
        return TransformerConfig(
            **TRANSFORMER_SIZES[settings.base_size] | settings.overrides() | known
        )


def trained_on_config(
    stage: StageName, hyperparameters: Hyperparameters, config: Config | None
) -> Config:
    """Return the config of a model that is trained on. config: of the one that a channel brings.

    Raises HyperparameterError where none does, and for a hyperparameter that only a new
    transformer can have.
    """
    overrides = hyperparameters.of(stage).overrides()
    match config:
        case TransformerConfig() | LegacyTransformerConfig():
            if wrong := sorted(overrides.keys() - _OF_TRAINING):
                raise HyperparameterError(
                    f"transformer: {', '.join(wrong)} can be set of a new transformer only, and "
                    "this job trains on from one that a channel brings; leave it out"
                )
            return replace(config, **overrides)
        case ClipConfig():
            weight = hyperparameters.clip.likelihood_weight
            return config if weight is None else replace(config, likelihood_weight=weight)
    channels = "the channel clip" if stage == "clip" else "the channel legacy"
    raise HyperparameterError(
        f"train_on={stage} trains on from a {stage}, and no channel brings one: give one in "
        f"{channels}, or an artefact that has one"
    )


@contextmanager
def _named(stage: StageName) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise HyperparameterError(f"{stage}: {error}") from error
