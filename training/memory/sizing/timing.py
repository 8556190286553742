"""How the minutes of a job are shared, and how many steps its stages make in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dalle.errors import HyperparameterError
from dalle.types import StageName
from training.config.fields import BUDGETS, Hyperparameters
from training.loop.words import duration
from training.memory.sizing import rules
from training.memory.sizing.choice import is_by_hand
from training.memory.sizing.facts import Facts

START_SECONDS = 15.0
"""Of a start, before the first step: files, tokenizer, models, and the choice itself."""
REPORT_SECONDS = 8.0
"""Of a report, beside what its models compute: pages, charts, the artefact and its hashes."""
REPORT_CANDIDATES = 128
CANDIDATE_STEPS = 2.0
"""A candidate drawn takes so much longer than a pair of a training step: its positions come one
after another, so that a device is less well used, but there is no backward pass."""
REPORT_PAIRS = 512
VALIDATION_PAIRS = 512
FORWARD_SHARE = 0.35
"""Of a training step, for the same pairs forward only."""
SEVERAL_DEVICES = 0.9
"""Share of the speed of several devices that their communication leaves."""


@dataclass(eq=False)
class Timing:
    """Time of a job's stages.

    shares: of the time for training, by stage; those with a budget set by hand have none.
    pair_seconds: of a training step, divided by its pairs on all devices; as far as measured.
    overhead: seconds in which nothing is trained.
    """

    hyperparameters: Hyperparameters
    facts: Facts
    names: Sequence[StageName]
    minutes: float
    num_ranks: int
    device_type: str
    pair_seconds: dict[StageName, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shared = [name for name in self.names if not self._has_budget(name)]
        total = sum(rules.SHARES[name] for name in self.shared)
        self.shares = {name: rules.SHARES[name] / total for name in self.shared}
        self.reserve_seconds = REPORT_SECONDS + 0.05 * 60 * self.minutes  # before it is known

    @property
    def overhead(self) -> float:
        return START_SECONDS + self.facts.load_seconds + self.reserve_seconds

    def batch(self, name: StageName) -> int:
        """Return one device's pairs of a step: what is set, or the smallest that is used."""
        settings = self.hyperparameters.of(name)
        if settings.batch_size != "auto" and is_by_hand(self.hyperparameters, name, "batch_size"):
            return max(1, settings.batch_size // self.num_ranks)
        parts = settings.gradient_accumulation_steps
        most = max(1, self.facts.num_pairs // (rules.BATCHES_PER_EPOCH * self.num_ranks))
        batch = min(rules.BATCHES[self.device_type][name], most)
        return -(-batch // parts) * parts

    def full_batch(self, name: StageName) -> int:
        """Return one device's pairs of a step: the transformer's doubled while steps are many."""
        batch = self.batch(name)
        if name != "transformer" or is_by_hand(self.hyperparameters, name, "batch_size"):
            return batch
        most = self.facts.num_pairs // (rules.BATCHES_PER_EPOCH * self.num_ranks)
        most = min(rules.LARGEST_TRANSFORMER_BATCH[self.device_type], most)
        pairs = self.steps(name) * batch
        while 2 * batch <= most and pairs / batch > 1.5 * rules.TRANSFORMER_STEPS:
            batch *= 2
        return batch

    def measured(self, name: StageName, step_seconds: float) -> None:
        """Take note of the seconds of a step of `batch` pairs on one device."""
        seconds = step_seconds / self.batch(name)
        if self.num_ranks > 1:
            seconds /= self.num_ranks * SEVERAL_DEVICES
        self.pair_seconds[name] = seconds

    def training_seconds(self) -> float:
        """Return the seconds that the stages share, at least 1."""
        return max(1.0, 60 * self.minutes - self.overhead - self._seconds_by_hand())

    def seconds(self, name: StageName) -> float:
        """Return the seconds of a stage; of the transformer also in a job of other stages."""
        if name in self.shares:
            return self.shares[name] * self.training_seconds()
        minutes = self.hyperparameters.of(name).max_minutes
        if name in self.names and minutes is not None:
            return 60 * minutes
        # One with a budget in steps or epochs has sizes as if it had its share.
        trained = sum(rules.SHARES[each] for each in self.names)
        return rules.SHARES[name] / trained * self.training_seconds()

    def pairs(self, name: StageName) -> float:
        """Return the pairs that a stage sees in its time, repeats included."""
        return self.seconds(name) / self.pair_seconds[name]

    def steps(self, name: StageName, batch_size: int | None = None) -> float:
        """Return the steps of a stage in its time. batch_size: of all devices together."""
        return self.pairs(name) / (batch_size or self.batch(name) * self.num_ranks)

    def settle_reserve(self) -> None:
        """Calculate the seconds of the last validation and of the report, from what is measured."""
        transformer = self.pair_seconds["transformer"]
        seconds = REPORT_SECONDS + REPORT_CANDIDATES * CANDIDATE_STEPS * transformer
        for name in ("dvae", "clip"):
            pair = self.pair_seconds.get(name, transformer / 4)
            seconds += REPORT_PAIRS * FORWARD_SHARE * pair
        last = self.pair_seconds[self.names[-1]]
        self.reserve_seconds = seconds + VALIDATION_PAIRS * FORWARD_SHARE * last

    def num_validations(self) -> int:
        """Return how many validations take a small share of every stage's time."""
        least, most = rules.NUM_VALIDATIONS
        numbers = [
            rules.VALIDATION_SHARE * self.pairs(name) / (FORWARD_SHARE * VALIDATION_PAIRS)
            for name in self.shares
        ]
        return int(max(least, min([most, *numbers])))

    def require_enough(self, device: str) -> None:
        """Raise HyperparameterError when a stage would make too few steps for anything."""
        needed = self.overhead + self._seconds_by_hand()
        if self.shares:
            needed += max(
                rules.MIN_STEPS[name] * self.batch(name) * self.num_ranks
                * self.pair_seconds[name] / self.shares[name]
                for name in self.shares
            )  # fmt: skip
        if math.isinf(needed):
            raise HyperparameterError(
                f"the memory of {device} is too small for the smallest models of size=auto; take "
                "a larger instance"
            )
        if 60 * self.minutes < needed:
            steps = ", ".join(f"{rules.MIN_STEPS[name]} steps of {name}" for name in self.shares)
            raise HyperparameterError(
                f"max_minutes={self.minutes:g} is too few: on {device}, with "
                f"{self.facts.num_pairs:,} pairs, the smallest models need {duration(needed)}: "
                f"{duration(self.overhead)} to load, choose and report, and {steps}; set "
                f"max_minutes={math.ceil(needed / 6) / 10:g} or more"
            )

    def _has_budget(self, name: StageName) -> bool:
        """Return whether a stage has a budget of its own."""
        return any(f"{name}_{budget}" in self.hyperparameters.given for budget in BUDGETS)

    def _seconds_by_hand(self) -> float:
        return sum(
            60 * (self.hyperparameters.of(name).max_minutes or 0.0)
            for name in self.names
            if name not in self.shared
        )
