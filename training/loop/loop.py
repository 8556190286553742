"""Training loop of a stage: steps, reports, validations and checkpoints until the budget is spent.

The order of the data and all random numbers are functions of the seed, the step and the rank, so
that a run resumed at step k has the same losses from there on as an uninterrupted one. That holds
for budgets in steps and epochs; with max_minutes the schedules follow the clock. Knows nothing of
models, images or captions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.config.fields import Hyperparameters
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine.interface import Engine
from training.loop.budget import Budget
from training.loop.checkpoints import Checkpoints, seed_everything
from training.loop.divergence import DivergenceCheck
from training.loop.interface import FitResult, Stage
from training.loop.metrics import Metrics, Progress
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)


def fit(
    stage: Stage,
    hyperparameters: Hyperparameters,
    *,
    engine: Engine,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
    stop: Stop,
    ranks: ProcessGroup = SINGLE_PROCESS,
    clock: Callable[[], float] = time.monotonic,
) -> FitResult:
    """Train a stage's model until its budget is spent or any rank is stopped.

    Resumes from the first rank's newest checkpoint. metrics: None on the ranks that report nothing.
    Afterwards the model has the weights to be saved: the averaged ones when ema_decay is set.
    Raises DivergenceError naming the step, CheckpointError when the checkpoints are another
    run's, DiskFullError.
    """
    return _Fit(stage, hyperparameters, engine, checkpoints, metrics, ranks, clock).run(stop)


@dataclass(eq=False)
class _Fit:
    """State of one call of `fit`."""

    stage: Stage
    hyperparameters: Hyperparameters
    engine: Engine
    checkpoints: Checkpoints
    metrics: Metrics | None
    ranks: ProcessGroup
    clock: Callable[[], float]
    step: int = 0
    seconds_before: float = 0.0
    cpu_seconds_before: float = 0.0
    saved_step: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    # A stop interrupted a validation: a resumed run begins with it.
    owes_validation: bool = False
    # Scalars of the steps since the last report, still on the device.
    pending: list[dict[str, Tensor]] = field(default_factory=list)
    # By step, likewise; the engine may compute none.
    gradient_norms: dict[int, Tensor] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)
    reported_at: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        self.settings = self.hyperparameters.of(self.stage.name)
        self.divergence = DivergenceCheck(self.stage.name, self.settings)
        self.budget = Budget.of(self.settings, self.stage.batches.num_per_epoch)
        self.is_on_cpu = self.engine.device.type == "cpu"
        self.started = self.saved_at = self.clock()
        self.cpu_started = time.process_time()

    @property
    def seconds(self) -> float:
        """Seconds spent on this stage by this run and the ones it resumes."""
        return self.seconds_before + self.clock() - self.started

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds likewise, of all threads of this process."""
        return self.cpu_seconds_before + time.process_time() - self.cpu_started

    @property
    def progress(self) -> float:
        return self.budget.progress(self.step, self.seconds)

    def run(self, stop: Stop) -> FitResult:
        self._resume()
        self.stage.model.train()
        bar = Progress(
            self.stage.name,
            total=self.budget.total,
            done=self.budget.done(self.step, self.seconds),
            unit=self.budget.unit,
            is_shown=self.ranks.is_first,
        )
        with closing(bar):
            if self.owes_validation and not self.ranks.any(stop.is_set()):
                self._validate()
                self.saved_step = 0  # the checkpoint of this step lacks the validation
            # Clocks and signals differ between ranks, so that the ranks agree on what follows.
            progress, is_stopping, _ = self.ranks.agree(self.progress, stop.is_set())
            while progress < 1 and not is_stopping:
                share = self._train_one_step(progress)
                before = progress
                progress, is_stopping, is_saving = self.ranks.agree(
                    self.progress, stop.is_set(), self._checkpoint_is_due()
                )
                if self.step % self.hyperparameters.log_every == 0 or progress >= 1:
                    self._report(share)
                if self._validation_is_due(before, progress):
                    self._validate()
                    progress, is_stopping, is_saving = self.ranks.agree(
                        progress, stop.is_set(), self._checkpoint_is_due()
                    )
                if is_saving:
                    self._save()
                bar.show(self.budget.done(self.step, self.seconds), self.reported)
        self._save()
        self.engine.finish()
        self.divergence.check_weights(self.step, self.stage.model.state_dict())
        self.stage.model.eval()
        is_finished = progress >= 1 and not self.owes_validation
        return FitResult(self.step, self.seconds, self.cpu_seconds, is_finished, self.validation)

    def _train_one_step(self, progress: float) -> float:
        """Train one step and return the schedule's share of the full learning rate."""
        batch = self.stage.batches.batch(self.step)
        # After the batch: a loader that starts its workers uses a random number too.
        seed_everything(self.hyperparameters.seed, self.step, self.ranks.rank)
        num_parts = self.settings.gradient_accumulation_steps
        scalars: list[dict[str, Tensor]] = []
        for part in batch.micro_batches(num_parts) if num_parts > 1 else [batch]:
            loss, beside = self.engine.loss(part, progress)
            scalars.append({"loss": loss.detach(), **beside})
            if len(scalars) == num_parts:
                self.pending.append(self.ranks.means(_means(scalars)))
                if self.is_on_cpu:  # on a GPU reading a number waits: once per report
                    self._check_losses(newest=1)
            self.engine.backward(loss)
        share = self.engine.step(self.step, progress)
        self.step += 1
        if self.engine.gradient_norm is not None:
            self.gradient_norms[self.step] = self.engine.gradient_norm
            if self.is_on_cpu:
                self._check_losses(newest=0)
        return share

    def _check_losses(self, newest: int | None = None) -> None:
        """Check the pending losses, or the newest few, and the new gradient norms."""
        first = 0 if newest is None else len(self.pending) - newest
        losses = [scalars["loss"] for scalars in self.pending[first:]]
        # Pending are consecutive steps; the first of them follows the last report.
        self.divergence.check_losses(self.reported_at[0] + first + 1, losses, self.gradient_norms)
        self.gradient_norms.clear()

    def _report(self, share: float) -> None:
        """Report the means since the last report."""
        self._check_losses()
        seconds = self.seconds
        last_step, last_seconds = self.reported_at
        self.reported = {
            name: torch.stack([scalars[name].float() for scalars in self.pending]).mean().item()
            for name in self.pending[0]
        }
        num_samples = (self.step - last_step) * self.settings.pairs_per_step
        speed = num_samples / max(seconds - last_seconds, 1e-9)
        values = {
            **self.reported,
            "learning_rate": share * self.settings.learning_rate,
            "samples_per_second": speed,
            "epoch": self.step / self.stage.batches.num_per_epoch,
        }
        if self.metrics is not None:
            left = self.budget.seconds_left(self.step, seconds)
            self.metrics.report(self.stage.name, self.step, seconds, values, seconds_left=left)
        self.pending.clear()
        self.reported_at = (self.step, seconds)

    def _validation_is_due(self, before: float, now: float) -> bool:
        """Return whether a validation is due: num_validations over the budget, one at its end."""
        parts = self.hyperparameters.num_validations
        return int(now * parts) > int(before * parts)

    def _checkpoint_is_due(self) -> bool:
        return self.clock() - self.saved_at >= 60 * self.hyperparameters.checkpoint_minutes

    def _validate(self) -> None:
        model = self.stage.model
        self.owes_validation = False
        with torch.no_grad(), self.engine.whole_model():
            model.eval()
            try:
                self.validation = dict(self.stage.validate())
            except Stopped:
                self.owes_validation = True
        model.train()
        if self.metrics is not None and self.validation and not self.owes_validation:
            self.metrics.report(self.stage.name, self.step, self.seconds, self.validation)

    def _save(self) -> None:
        """Write a checkpoint on the first rank, unless the newest one is of this step."""
        if self.step == self.saved_step:
            return
        self._check_losses()
        engine_state = self.engine.state()
        if self.ranks.is_first:
            self._write(engine_state)
        # The other ranks wait here: an engine's collectives may have a shorter timeout.
        self.ranks.any(False)
        self.saved_step = self.step
        self.saved_at = self.clock()

    def _write(self, engine_state: Mapping[str, Any]) -> None:
        self.divergence.check_weights(self.step, engine_state["model"])
        num_per_epoch = self.stage.batches.num_per_epoch
        state = {
            "stage": self.stage.name,
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "budget": (self.budget.total, self.budget.unit),
            # The order of the data is a function of these and the step.
            "data": {"seed": self.hyperparameters.seed, "epoch": self.step // num_per_epoch},
            "engine": engine_state,
            "validation": self.validation,
            "owes_validation": self.owes_validation,
            "pending": self.pending,
            "reported_at": list(self.reported_at),
            "records": [] if self.metrics is None else self.metrics.records(self.stage.name),
        }
        self.checkpoints.save(self.step, state)

    def _resume(self) -> None:
        """Load the first rank's newest checkpoint, if there is one, on every rank.

        Another host's directory may hold an older one, or none.
        """
        state = self.checkpoints.load_newest() if self.ranks.is_first else None
        self.engine.begin(None if state is None else state.pop("engine"))
        state = self.ranks.share(state)
        if state is None:
            return
        device = self.engine.device
        self.step = self.saved_step = state["step"]
        self.seconds_before = state["seconds"]
        self.cpu_seconds_before = state["cpu_seconds"]
        self.validation = state["validation"]
        self.owes_validation = state["owes_validation"]
        self.pending = [
            {name: value.to(device) for name, value in scalars.items()}
            for scalars in state["pending"]
        ]
        self.reported_at = tuple(state["reported_at"])
        if self.metrics is not None:
            self.metrics.restore(self.stage.name, state["records"])
        logger.info("%s continues at step %d", self.stage.name, self.step)


def _means(scalars: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each scalar over the micro-batches of a step."""
    if len(scalars) == 1:
        return dict(scalars[0])
    return {
        name: torch.stack([each[name].float() for each in scalars]).mean() for name in scalars[0]
    }
