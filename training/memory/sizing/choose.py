"""How size=auto chooses: by the rules, the facts of the data and the speed of the device.

facts, speed --choose--> Choice: picture size, grid, codes, widths, batches, shares of the time
Knows configs and hyperparameters; measures by `Speed`, which tests replace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dalle.models.configs import ClipConfig, DVAEConfig, ImageTokenizerConfig, TransformerConfig
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.types import STAGES, StageName
from training.config.fields import Hyperparameters
from training.config.models import Config, TextSizes, dvae_config, stage_config
from training.loop.words import duration, thousands
from training.memory.sizing import rules
from training.memory.sizing.choice import Choice, is_by_hand, with_chosen
from training.memory.sizing.facts import Facts
from training.memory.sizing.speed import Speed
from training.memory.sizing.timing import Timing

ROUNDS = 3
"""Most rounds of choosing a transformer by a speed and measuring that transformer."""
HEAD_WIDTH = 32


@dataclass(frozen=True)
class Given:
    """What a job's channels bring, which is not chosen. Each None: trained here, or not there."""

    dvae: ImageTokenizerConfig | None = None
    transformer: TransformerConfig | LegacyTransformerConfig | None = None
    clip: ClipConfig | None = None


def choose(
    hyperparameters: Hyperparameters,
    facts: Facts,
    names: Sequence[StageName],
    speed: Speed,
    *,
    given: Given | None = None,
    num_ranks: int = 1,
    device_type: str = "cpu",
) -> Choice:
    """Return the choice for a job that trains these stages within its minutes.

    Raises HyperparameterError when they are too few, naming how many are needed, and for fields set
    by hand that do not fit together; Stopped.
    """
    minutes = hyperparameters.job_minutes
    assert minutes is not None, "size=auto chooses by the minutes of the job"
    timing = Timing(hyperparameters, facts, names, minutes, num_ranks, device_type)
    return Chooser(hyperparameters, facts, names, speed, given or Given(), timing).choice()


@dataclass(eq=False)
class Chooser:
    """State of one choice. stages: the fields that are chosen so far."""

    hyperparameters: Hyperparameters
    facts: Facts
    names: Sequence[StageName]
    speed: Speed
    given: Given
    timing: Timing
    stages: dict[StageName, dict[str, Any]] = field(
        default_factory=lambda: {name: {} for name in STAGES}
    )

    def __post_init__(self) -> None:
        self.text_length = self.hyperparameters.text_length
        if not is_by_hand(self.hyperparameters, None, "text_length"):
            self.text_length = rules.rounded_text_length(self.facts.longest_caption)
        self.operations_per_second = 0.0

    def choice(self) -> Choice:
        """Choose everything, in the order in which one thing depends on another."""
        timing = self.timing
        self.measure_probe()
        self._choose_pictures()
        if "transformer" in self.names and self.given.transformer is None:
            self._choose_transformer()
        if "dvae" in self.names:
            self._choose_dvae()
        if "clip" in self.names:
            self._choose_clip()
        timing.settle_reserve()
        timing.require_enough(self.speed.device)
        for name in self.names:
            batch_size = timing.full_batch(name) * timing.num_ranks
            self.stages[name]["batch_size"] = batch_size
            self.stages[name]["warmup_steps"] = rules.warmup_steps(timing.steps(name, batch_size))
        settings = {"text_length": self.text_length, "num_validations": timing.num_validations()}
        return Choice(
            minutes=timing.minutes,
            job=settings,
            stages=self.stages,
            shares=timing.shares,
            reserve_seconds=timing.reserve_seconds,
            why=self._why(),
        )

    # --- pictures ---

    def _choose_pictures(self) -> None:
        """Choose size, grid and codes of the pictures, unless a channel brings a tokenizer."""
        if self.given.dvae is not None:
            return
        settings = self.hyperparameters.dvae
        size = settings.image_size
        if size is None and settings.size != "auto":
            size = dvae_config(self.hyperparameters).image_size
        if size is None:
            size = next(filter(self._is_affordable_size, reversed(self.sizes())), self.sizes()[0])
        num_downsamples = settings.num_downsamples or 0
        if size >= 256 and settings.num_downsamples is None and not self.facts.is_drawing:
            num_downsamples = 1
        is_large = self.facts.num_pairs >= rules.PAIRS_FOR_LARGE_CODEBOOK
        self.stages["dvae"].update(
            image_size=size,
            num_downsamples=num_downsamples,
            patch_size=next(rules.patch_sizes(size, num_downsamples)),
            num_codebooks=rules.NUM_CODEBOOKS,
            codebook_size=rules.LARGE_CODEBOOK_SIZE if is_large else rules.CODEBOOK_SIZE,
        )
        if self.facts.is_drawing and self._may_split_ground():
            for name, values in rules.DRAWINGS.items():
                self.stages[name].update(values)

    def _may_split_ground(self) -> bool:
        """Return whether the image tokenizer, as it is so far, can have ground_split."""
        settings = self.hyperparameters.dvae
        dvae = dvae_config(self._settled())
        is_split = settings.colour_split is not None or settings.ground_split is not None
        is_possible = dvae.num_codebooks > 1 and dvae.patch_size > 1 and not dvae.num_downsamples
        return is_possible and not is_split

    def sizes(self) -> list[int]:
        """Return the sizes that the pictures have enough pixels for, the smallest at least."""
        sizes = [size for size in rules.IMAGE_SIZES if size <= self.facts.side]
        return sizes or [rules.IMAGE_SIZES[0]]

    def _is_affordable_size(self, size: int) -> bool:
        weights = [
            rules.layer_weights(width, layers)
            for width, layers in rules.LADDER
            if self._is_affordable(self._config_of(size, width, layers))
        ]
        return max(weights, default=0) >= rules.ENOUGH * self._deserved(size)

    def _deserved(self, size: int) -> float:
        """Return the weights that pictures of a size deserve, where the data bear them."""
        codes = rules.GRID_SIDES[size] ** 2 * rules.NUM_CODEBOOKS
        return min(rules.WEIGHTS_FOR_SIZE[size], rules.data_weights(self.facts.num_pairs, codes))

    def seconds_for(self, size: int) -> float:
        """Return the seconds of a job whose pictures of a size get what they deserve."""
        _, operations = self.work_for(size)
        seconds = operations / self.operations_per_second
        return seconds / rules.SHARES["transformer"] + self.timing.overhead

    def work_for(self, size: int) -> tuple[float, float]:
        """Return the pairs, repeats included, and the operations of the transformer for that."""
        rungs = [
            (width, layers)
            for width, layers in rules.LADDER
            if rules.layer_weights(width, layers) <= 1.05 * self._deserved(size)
        ]
        config = self._config_of(size, *(rungs or rules.LADDER)[-1 if rungs else 0])
        weights = rules.layer_weights(config.width, config.num_layers)
        pairs = rules.POSITIONS_PER_WEIGHT * weights / config.grid_size**2
        return pairs, pairs * rules.pair_operations(config)

    # --- transformer ---

    def _config_of(self, size: int, width: int, layers: int) -> TransformerConfig:
        """Return the config of a transformer for pictures of a size."""
        return TransformerConfig(
            text_vocab_size=self.facts.text_vocab_size,
            text_length=self.text_length,
            grid_size=rules.GRID_SIDES[size],
            codebook_size=rules.CODEBOOK_SIZE,
            num_codebooks=rules.NUM_CODEBOOKS,
            width=width,
            num_layers=layers,
            num_heads=width // HEAD_WIDTH,
        )

    def _is_affordable(self, config: TransformerConfig) -> bool:
        """Return whether a transformer sees enough positions in its time."""
        seconds = self.timing.seconds("transformer")
        pairs = seconds * self.operations_per_second / rules.pair_operations(config)
        weights = rules.layer_weights(config.width, config.num_layers)
        wanted = rules.ALMOST * rules.POSITIONS_PER_WEIGHT * weights
        return pairs * config.grid_size**2 >= wanted

    def measure_probe(self) -> None:
        """Measure a transformer of middling size, or the one that a channel brings."""
        self._measure_transformer(self.given.transformer or self._config_of(64, 192, 4))

    def _measure_transformer(self, config: TransformerConfig | LegacyTransformerConfig) -> None:
        # Image tokens are drawn by the smallest tokenizer: a job has them in memory.
        dvae = DVAEConfig(
            image_size=config.grid_size,
            patch_size=1,
            num_downsamples=0,
            width=8,
            num_blocks=0,
            codebook_size=config.codebook_size,
            num_codebooks=config.num_codebooks,
            code_width=1,
            quantiser="vq",
        )
        batch = self.timing.batch("transformer")
        settings = self._settled().transformer
        seconds = self.speed.step_seconds("transformer", config, settings, batch, dvae)
        self.timing.measured("transformer", seconds)
        pair_seconds = self.timing.pair_seconds["transformer"]
        self.operations_per_second = rules.pair_operations(config) / pair_seconds

    def _choose_transformer(self) -> None:
        """Choose width and depth, and measure what is chosen."""
        if self._has_size_by_hand():
            self._measure_transformer(self._transformer_config())
            return
        rung = -1
        for _ in range(ROUNDS):
            before, rung = rung, self._rung()
            self._set_rung(rung)
            if rung == before:
                return
            self._measure_transformer(self._transformer_config())
        while rung > 0 and math.isinf(self.timing.pair_seconds["transformer"]):  # out of memory
            rung -= 1
            self._set_rung(rung)
            self._measure_transformer(self._transformer_config())

    def _has_size_by_hand(self) -> bool:
        """Return whether width or depth are set, and choose heads that fit a width."""
        width = self.hyperparameters.transformer.width
        if width is not None:
            heads = range(1, max(1, width // HEAD_WIDTH) + 1)
            self.stages["transformer"].update(
                num_heads=max(number for number in heads if width % number == 0),
                **rules.learning_rates("transformer", width),
            )
        names = ("width", "num_layers", "num_heads")
        return any(is_by_hand(self.hyperparameters, "transformer", name) for name in names)

    def _set_rung(self, rung: int) -> None:
        width, layers = rules.LADDER[rung]
        rates = rules.learning_rates("transformer", width)
        sizes = {"width": width, "num_layers": layers, "num_heads": width // HEAD_WIDTH}
        self.stages["transformer"].update(sizes | rates)

    def _rung(self) -> int:
        """Return the number of the largest transformer that time and data allow, at least 0."""
        best = 0
        for number, (width, layers) in enumerate(rules.LADDER):
            self._set_rung(number)
            config = self._transformer_config()
            if rules.layer_weights(width, layers) > 1.2 * self._data_weights():
                break
            if self._is_affordable(config):
                best = number
        return best

    def _data_weights(self) -> float:
        dvae = self._dvae_config()
        return rules.data_weights(self.facts.num_pairs, dvae.grid_size**2 * dvae.num_codebooks)

    def _transformer_config(self) -> TransformerConfig:
        config = self._config("transformer")
        assert isinstance(config, TransformerConfig), "a published one is not chosen"
        return config

    # --- image tokenizer and CLIP ---

    def _choose_dvae(self) -> None:
        """Choose the widest image tokenizer that makes enough steps."""
        width = self.hyperparameters.dvae.width
        if is_by_hand(self.hyperparameters, "dvae", "width"):
            self.stages["dvae"].update(rules.learning_rates("dvae", width or 192))
            self._measure("dvae")
            return
        is_wide = self._dvae_config().image_size >= rules.WIDE_FROM_SIZE
        for width in reversed(rules.DVAE_WIDTHS if is_wide else rules.DVAE_WIDTHS[:-1]):
            self.stages["dvae"].update(width=width, **rules.learning_rates("dvae", width))
            self._measure("dvae")
            if self.timing.steps("dvae") >= rules.DVAE_STEPS:
                return

    def _choose_clip(self) -> None:
        """Choose the largest CLIP that makes enough steps and is worth its time."""
        if self.given.clip is not None:
            self._measure("clip")
            return
        others = {"patch_size": rules.clip_patch_size(self._dvae_config().image_size)}
        others |= self.stages["clip"]
        worth = zip(rules.CLIP_SIZES, rules.CLIP_PAIRS, strict=True)
        sizes = [values for values, least in worth if self.facts.num_pairs >= least]
        for values in reversed(sizes):
            rates = rules.learning_rates("clip", values["vision_width"])
            self.stages["clip"] = others | values | rates
            self._measure("clip")
            if self.timing.steps("clip") >= rules.CLIP_STEPS:
                return

    def _measure(self, name: StageName) -> None:
        settings, batch = self._settled().of(name), self.timing.batch(name)
        dvae = self._dvae_config()
        seconds = self.speed.step_seconds(name, self._config(name), settings, batch, dvae)
        self.timing.measured(name, seconds)

    # --- configs and words ---

    def _settled(self) -> Hyperparameters:
        return with_chosen(self.hyperparameters, self.stages)

    def _dvae_config(self) -> ImageTokenizerConfig:
        return self.given.dvae or dvae_config(self._settled())

    def _config(self, name: StageName) -> Config:
        if name == "clip" and self.given.clip is not None:
            return self.given.clip
        text = TextSizes(self.facts.text_vocab_size, self.text_length)
        return stage_config(name, self._settled(), text, self._dvae_config())

    def _why(self) -> list[str]:
        """Return sentences for the log on what is chosen and why."""
        facts, timing, dvae = self.facts, self.timing, self._dvae_config()
        drawing = " They are drawings of few colours on an even ground." if facts.is_drawing else ""
        lines = [
            f"{facts.num_pairs:,} pairs; the median picture has {facts.side} pixels, the longest "
            f"caption {facts.longest_caption} tokens, of {self.text_length} that models read."
            f"{drawing}",
            f"{self.speed.device} reaches {self.operations_per_second / 1e9:,.0f} GFLOP/s in "
            "training steps of the transformer.",
            f"Pictures of {dvae.image_size} pixels, {dvae.grid_size} x {dvae.grid_size} positions "
            f"of {dvae.num_codebooks} codes out of {dvae.codebook_size}; "
            f"{self._why_pictures(dvae.image_size)}.",
        ]
        if "transformer" in self.names and self.given.transformer is None:
            config = self._transformer_config()
            times = timing.pairs("transformer") / facts.num_pairs
            lines.append(
                f"A transformer of width {config.width} with {config.num_layers} layers, "
                f"{thousands(rules.layer_weights(config.width, config.num_layers))} weights; the "
                f"data bear {thousands(self._data_weights())}, and it sees each pair {times:,.0f} "
                "times."
            )
        settled = self._settled()
        parts = []
        for name in timing.shares:
            size = settled.of(name).batch_size
            steps = timing.steps(name, None if size == "auto" else size)
            parts.append(f"{name} {timing.seconds(name) / 60:.1f} (some {steps:,.0f} steps)")
        parts.append(f"{timing.overhead / 60:.1f} to load, choose and report")
        return [*lines, f"Of {timing.minutes:g} minutes: {', '.join(parts)}."]

    def _why_pictures(self, size: int) -> str:
        if self.given.dvae is not None:
            return "the channels bring the image tokenizer"
        if is_by_hand(self.hyperparameters, "dvae", "image_size"):
            return "the size is set by hand"
        larger = [each for each in self.sizes() if each > size]
        if not larger:
            return "a larger size would enlarge them"
        seconds = self.seconds_for(larger[0])
        return f"{larger[0]} pixels would take some {duration(seconds)} on this device"
