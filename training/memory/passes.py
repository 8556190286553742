"""A stage without a data set, and the memory of its passes at every batch size and number format.

For measuring what training takes before, or instead of, training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch

from dalle.models.clip import Clip, ClipConfig
from dalle.models.configs import ImageTokenizerConfig
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.legacy.build import build_transformer
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.models.tokenizers.build import build_tokenizer
from dalle.models.transformer import TransformerConfig
from training.config.models import Config
from training.data.batching.batches import Batch
from training.loop.stages import ClipStage, DVAEStage, StageData, TransformerStage
from training.memory.tracer import FAKE_DEVICE, Passes, trace_passes

BATCH_SIZES = (2, 4)
CLIP_BATCH_SIZES = (2, 4, 6)
"""CLIP compares all pairs of a batch, which grows with its square."""

FEW_LAYERS, MORE_LAYERS = 1, 2
"""Deeper models are traced at these depths, and extrapolated by the difference."""

SyntheticStage = DVAEStage | TransformerStage | ClipStage


def synthetic_stage(
    config: Config,
    device: torch.device,
    *,
    dvae: ImageTokenizerConfig | None = None,
    checkpoints_activations: bool = False,
) -> SyntheticStage:
    """Make a stage with an untrained model, as a job does, on torch's current device.

    device: where the stage takes its batches.
    dvae: for a transformer, whose images are encoded by an untrained one in every step.
    """
    data = StageData(cast(Any, SimpleNamespace(dataset=None)), None, device)
    if isinstance(config, DVAEConfig):
        return DVAEStage(DiscreteVAE(config), data)
    if isinstance(config, TransformerConfig | LegacyTransformerConfig):
        assert dvae is not None, "a transformer's image tokens come from a dVAE"
        model = build_transformer(config)
        model.checkpoints_activations = checkpoints_activations
        frozen = build_tokenizer(dvae).eval().requires_grad_(False)
        return TransformerStage(model, frozen, data)
    return ClipStage(Clip(config), data)


def random_batch(config: Config, size: int, *, dvae: ImageTokenizerConfig | None = None) -> Batch:
    """Make a batch of random pixels and random text tokens, on the CPU. dvae: as above."""
    text_tokens = None
    if isinstance(config, TransformerConfig | LegacyTransformerConfig):
        assert dvae is not None, "a transformer's image tokens come from a dVAE"
        image_size = dvae.image_size
        text_tokens = torch.randint(1, config.text_vocab_size, (size, config.text_length))
    else:
        image_size = config.image_size
    if isinstance(config, ClipConfig):
        # A model of ours has one token more than its tokenizer, and room for it.
        shape = (size, config.text_length - (config.tokenizer == "artefact"))
        text_tokens = torch.randint(1, config.text_vocab_size - 1, shape)
    images = torch.rand(size, 3, image_size, image_size)
    return Batch(images, [""] * size, torch.arange(size), text_tokens)


@dataclass(frozen=True)
class Formats:
    """How a stage is computed: number formats, None for fp32, and activation checkpointing."""

    forward: torch.dtype | None = None
    weights: torch.dtype | None = None
    checkpoints_activations: bool = False


class StagePasses:
    """Memory of a stage's passes, beside its weights. Traced at a few sizes, for all others."""

    def __init__(
        self, config: Config, dvae: ImageTokenizerConfig | None, *, is_for_gpu: bool
    ) -> None:
        """dvae: of the frozen one that a transformer's images go through."""
        self._config = config
        self._dvae = dvae
        self._is_for_gpu = is_for_gpu
        self._traced = cache(self._trace)

    def activations(self, batch_size: int, formats: Formats) -> int:
        """Return the most bytes held at once beside weights and gradients."""
        traces = self._traced(formats)
        return round(sum(factor * passes.activations(batch_size) for factor, passes in traces))

    def with_gradients(self, batch_size: int, formats: Formats) -> int:
        """Return the same with the gradients, which are allocated while activations are freed."""
        traces = self._traced(formats)
        return round(sum(factor * passes.with_gradients(batch_size) for factor, passes in traces))

    def operations(self, batch_size: int, formats: Formats) -> float:
        """Return the floating-point operations of both passes over so many pairs."""
        traces = self._traced(formats)
        return sum(factor * passes.operations(batch_size) for factor, passes in traces)

    def _trace(self, formats: Formats) -> list[tuple[float, Passes]]:
        """Return traces, and the factor of each in their sum."""

        def trace(config: Config) -> Passes:
            return trace_passes(
                lambda: synthetic_stage(
                    config,
                    FAKE_DEVICE,
                    dvae=self._dvae,
                    checkpoints_activations=formats.checkpoints_activations,
                ),
                lambda size: random_batch(config, size, dvae=self._dvae),
                CLIP_BATCH_SIZES if isinstance(config, ClipConfig) else BATCH_SIZES,
                autocast=formats.forward,
                dtype=formats.weights,
                is_for_gpu=self._is_for_gpu,
            )

        return [(factor, trace(config)) for factor, config in self._depths()]

    def _depths(self) -> list[tuple[float, Config]]:
        """Return the config, or two shallow ones whose weighted sum extrapolates to its depth."""
        config = self._config
        if isinstance(config, TransformerConfig | LegacyTransformerConfig):
            if len({kind == "full" for kind in config.attention_kinds}) > 1:
                return [(1.0, config)]  # layers with a mask and without differ in memory
            depth, fields = config.num_layers, ["num_layers"]
        elif isinstance(config, ClipConfig) and config.vision_layers == config.text_layers:
            depth, fields = config.text_layers, ["vision_layers", "text_layers"]
        else:
            return [(1.0, config)]
        if depth <= MORE_LAYERS:
            return [(1.0, config)]
        factor = (depth - FEW_LAYERS) / (MORE_LAYERS - FEW_LAYERS)
        few: dict[str, Any] = dict.fromkeys(fields, FEW_LAYERS)
        more: dict[str, Any] = dict.fromkeys(fields, MORE_LAYERS)
        return [(1 - factor, replace(config, **few)), (factor, replace(config, **more))]
