"""Training loop of a stage: steps, reports, validations and checkpoints until the budget is spent.

The order of the data and all random numbers are functions of the seed, the step and the rank, so
that a run resumed at step k has the same losses from there on as an uninterrupted one. That holds
for budgets in steps and epochs; with max_minutes the schedules follow the clock. Knows nothing of
models, images or captions.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.config.fields import Hyperparameters
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine.interface import Engine
from training.loop.best_weights import BestWeights
from training.loop.budget import Budget
from training.loop.checkpoints import Checkpoints, seed_everything
from training.loop.divergence import DivergenceCheck
from training.loop.interface import FitResult, Stage, Validation
from training.loop.metrics import Metrics, Progress
from training.loop.words import duration
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)

SAID_EVERY = 60.0
"""Seconds between two lines of progress in words, where no terminal shows a bar."""


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
    Afterwards the model has the weights to be saved: the averaged ones when ema_decay is set, and
    those of the best validation where a later one was worse, with keep=best.
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
    best: Validation | None = None
    newest: Validation | None = None
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
        self.best_weights = BestWeights(self.checkpoints.directory)
        self.is_on_cpu = self.engine.device.type == "cpu"
        self.started = self.saved_at = self.said_at = self.clock()
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
                if not bar.is_on_terminal:
                    self._say_progress()
        self._save()
        self.engine.finish()
        kept_step = self._take_best()
        self.divergence.check_weights(self.step, self.stage.model.state_dict())
        self.stage.model.eval()
        return FitResult(
            self.step,
            self.seconds,
            self.cpu_seconds,
            is_finished=progress >= 1 and not self.owes_validation,
            kept_step=kept_step,
            best=self.best,
            newest=self.newest,
        )

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

    def _say_progress(self) -> None:
        """Log how far the stage is, and the time that is left, once a minute."""
        if not self.ranks.is_first or self.clock() - self.said_at < SAID_EVERY:
            return
        self.said_at = self.clock()
        logger.info(
            "%s: %.0f %% done after %s and %s steps; about %s left of this stage",
            self.stage.name,
            100 * self.progress,
            duration(self.seconds),
            f"{self.step:,}",
            duration(self.budget.seconds_left(self.step, self.seconds)),
        )

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
                numbers = dict(self.stage.validate())
            except Stopped:
                numbers, self.owes_validation = {}, True
            if numbers:
                epoch = self.step / self.stage.batches.num_per_epoch
                self.newest = Validation(self.step, epoch, numbers)
                self._keep_if_best(self.newest)
        model.train()
        # The other ranks wait here, as in `_save`.
        self.ranks.any(False)
        if self.metrics is not None and numbers:
            self.metrics.report(self.stage.name, self.step, self.seconds, numbers)

    def _keep_if_best(self, validation: Validation) -> None:
        """Remember a validation that is better than all before it, and write its weights."""
        loss = validation.loss(self.stage.name)
        before = math.inf if self.best is None else self.best.loss(self.stage.name)
        if not loss < before:  # nor where it is NaN
            return
        self.best = validation
        if self.ranks.is_first and self.settings.keep == "best":
            self.best_weights.save(self.step, self.stage.model.state_dict())
            self.best_weights.keep_for(self.checkpoints.steps())

    def _take_best(self) -> int:
        """Give the model the weights of the best validation where a later one was worse.

        Steps after the newest validation count as its own: nothing speaks against them. Returns
        the step of the model's weights.
        """
        step = self.step
        if self.ranks.is_first and self.settings.keep == "best" and self.best is not None:
            weights = None
            if self.newest is not None and self.best.step < self.newest.step:
                weights = self.best_weights.load(self.best.step)
            if weights is not None:
                step = self.best.step
                self.stage.model.load_state_dict(weights)
        step = int(self.ranks.share(step))
        if step < self.step:
            self.ranks.copy_first(self.stage.model.state_dict().values())
        return step

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
            "best": None if self.best is None else asdict(self.best),
            "newest": None if self.newest is None else asdict(self.newest),
            "owes_validation": self.owes_validation,
            "pending": self.pending,
            "reported_at": list(self.reported_at),
            "records": [] if self.metrics is None else self.metrics.records(self.stage.name),
        }
        self.checkpoints.save(self.step, state)
        self.best_weights.keep_for(self.checkpoints.steps())

    def _resume(self) -> None:
        """Load the first rank's newest checkpoint, if there is one, on every rank.

        Another host's directory may hold an older one, or none.
        """
        state = self.checkpoints.load_newest() if self.ranks.is_first else None
        if self.ranks.is_first:
            self.best_weights.remove_after(0 if state is None else state["step"])
        self.engine.begin(None if state is None else state.pop("engine"))
        state = self.ranks.share(state)
        if state is None:
            return
        device = self.engine.device
        self.step = self.saved_step = state["step"]
        self.seconds_before = state["seconds"]
        self.cpu_seconds_before = state["cpu_seconds"]
        self.best, self.newest = (
            None if each is None else Validation(**each)
            for each in (state.get("best"), state.get("newest"))
        )
        self._require_best_weights()
        self.owes_validation = state["owes_validation"]
        self.pending = [
            {name: value.to(device) for name, value in scalars.items()}
            for scalars in state["pending"]
        ]
        self.reported_at = tuple(state["reported_at"])
        if self.metrics is not None:
            self.metrics.restore(self.stage.name, state["records"])
        logger.info("%s continues at step %d", self.stage.name, self.step)

    def _require_best_weights(self) -> None:
        """Forget the best validation where its weights are gone, or an earlier run kept none."""
        best = self.best
        if best is None or self.settings.keep != "best" or not self.ranks.is_first:
            return
        if self.best_weights.load(best.step) is None:
            logger.warning(
                "%s: the weights of the best validation, at step %d, cannot be read; the best of "
                "the validations from here on are kept",
                self.stage.name,
                best.step,
            )
            self.best = None


def _means(scalars: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each scalar over the micro-batches of a step."""
    if len(scalars) == 1:
        return dict(scalars[0])
    return {
        name: torch.stack([each[name].float() for each in scalars]).mean() for name in scalars[0]
    }
