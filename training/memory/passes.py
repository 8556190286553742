"""The forward and backward pass of one of a job's stages, traced at a few sizes for all others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dalle.models.clip import ClipConfig
from dalle.models.dvae import DVAEConfig
from dalle.models.transformer import TransformerConfig
from training.config.models import Config
from training.memory.synthetic import random_batch, synthetic_stage
from training.memory.tracer import FAKE_DEVICE, Passes, trace_passes

BATCHES = (2, 4)
CLIP_BATCHES = (2, 4, 6)
"""CLIP compares all pairs of a batch: that grows with its square."""

FEW_LAYERS, MORE_LAYERS = 1, 2
"""Deeper models are traced at these depths, and what a layer adds is added for the rest."""


@dataclass(frozen=True)
class Formats:
    """In what a stage is computed: number formats, None for fp32, and whether activations that can
    be are computed a second time instead of kept."""

    forward: torch.dtype | None = None
    weights: torch.dtype | None = None
    checkpoints_activations: bool = False


class StagePasses:
    """What a stage's passes hold, beside its weights, at every batch size and in all formats."""

    def __init__(self, config: Config, dvae: DVAEConfig | None, *, is_for_gpu: bool) -> None:
        """dvae: of the frozen one that a transformer's images go through."""
        self._config = config
        self._dvae = dvae
        self._is_for_gpu = is_for_gpu
        self._traces: dict[Formats, list[tuple[float, Passes]]] = {}

    def activations(self, batch_size: int, formats: Formats) -> int:
        """The most bytes held at once beside weights and gradients."""
        traces = self._traced(formats)
        return round(sum(times * passes.activations(batch_size) for times, passes in traces))

    def with_gradients(self, batch_size: int, formats: Formats) -> int:
        """Likewise with the gradients, which come while activations go."""
        traces = self._traced(formats)
        return round(sum(times * passes.with_gradients(batch_size) for times, passes in traces))

    def _traced(self, formats: Formats) -> list[tuple[float, Passes]]:
        """Traces, and how much of each is to be added up."""
        if formats not in self._traces:
            self._traces[formats] = [
                (times, self._trace(each, formats)) for times, each in self._depths()
            ]
        return self._traces[formats]

    def _trace(self, config: Config, formats: Formats) -> Passes:
        return trace_passes(
            lambda: synthetic_stage(
                config,
                FAKE_DEVICE,
                dvae=self._dvae,
                checkpoints_activations=formats.checkpoints_activations,
            ),
            lambda size: random_batch(config, size, dvae=self._dvae),
            CLIP_BATCHES if isinstance(config, ClipConfig) else BATCHES,
            autocast=formats.forward,
            dtype=formats.weights,
            is_for_gpu=self._is_for_gpu,
        )

    def _depths(self) -> list[tuple[float, Config]]:
        """The config itself, or two shallow ones from which a line goes through its depth."""
        config = self._config
        few: Config
        more: Config
        if isinstance(config, TransformerConfig):
            depth = config.num_layers
            if len({kind == "full" for kind in config.attention_kinds}) > 1:
                return [(1.0, config)]  # layers with a mask and without take unlike memory
            few = replace(config, num_layers=FEW_LAYERS)
            more = replace(config, num_layers=MORE_LAYERS)
        elif isinstance(config, ClipConfig) and config.vision_layers == config.text_layers:
            depth = config.text_layers
            few = replace(config, vision_layers=FEW_LAYERS, text_layers=FEW_LAYERS)
            more = replace(config, vision_layers=MORE_LAYERS, text_layers=MORE_LAYERS)
        else:
            return [(1.0, config)]
        if depth <= MORE_LAYERS:
            return [(1.0, config)]
        times = (depth - FEW_LAYERS) / (MORE_LAYERS - FEW_LAYERS)
        return [(1 - times, few), (times, more)]
