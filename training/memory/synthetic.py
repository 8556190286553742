"""A stage without a data set, on batches that nobody photographed.

For measuring what training takes before, or instead of, training.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from dalle.models.clip import Clip
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.transformer import Dalle, TransformerConfig
from training.config.models import Config
from training.data.batching.batches import Batch
from training.loop.stages import ClipStage, DVAEStage, StageData, TransformerStage

SyntheticStage = DVAEStage | TransformerStage | ClipStage


def synthetic_stage(
    config: Config,
    device: torch.device,
    *,
    dvae: DVAEConfig | None = None,
    checkpoints_activations: bool = False,
) -> SyntheticStage:
    """A stage with an untrained model, as a job would build it, where torch makes tensors now.

    device: where the stage is to take its batches.
    dvae: of the transformer, whose images go through an untrained one in every step.
    """
    data = StageData(cast(Any, SimpleNamespace(dataset=None)), None, device)
    if isinstance(config, DVAEConfig):
        return DVAEStage(DiscreteVAE(config), data)
    if isinstance(config, TransformerConfig):
        assert dvae is not None, "a transformer's image tokens come from a dVAE"
        model = Dalle(config)
        model.checkpoints_activations = checkpoints_activations
        frozen = DiscreteVAE(dvae).eval().requires_grad_(False)
        return TransformerStage(model, frozen, data)
    return ClipStage(Clip(config), data)


def random_batch(config: Config, size: int, *, dvae: DVAEConfig | None = None) -> Batch:
    """So many pairs of random pixels and random text tokens, on the CPU; dvae: as above."""
    text_tokens = None
    if isinstance(config, DVAEConfig):
        image_size = config.image_size
    elif isinstance(config, TransformerConfig):
        assert dvae is not None, "a transformer's image tokens come from a dVAE"
        image_size = dvae.image_size
        text_tokens = torch.randint(1, config.text_vocab_size, (size, config.text_length))
    else:
        image_size = config.image_size
        # The model has one token more than the tokenizer, and room for it.
        shape = (size, config.text_length - 1)
        text_tokens = torch.randint(1, config.text_vocab_size - 1, shape)
    images = torch.rand(size, 3, image_size, image_size)
    return Batch(images, [""] * size, torch.arange(size), text_tokens)
