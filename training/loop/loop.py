"""fit(): the one training loop. Knows steps, time and checkpoints; not models, images or captions.

Order of data and all random numbers are functions of the seed, the step and the rank, so that a
run resumed at step k has the same losses from there on as one that was never interrupted. That
holds for budgets in steps and epochs; with max_minutes the schedules follow the clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle.errors import DivergenceError
from dalle.types import StageName
from training.config.fields import Hyperparameters
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine.interface import Engine
from training.loop.budget import Budget
from training.loop.checkpoints import Checkpoints, seed_everything
from training.loop.metrics import Metrics, NoMetrics, Progress
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """One rank's share of batches whose order is a function of the seed and the step alone."""

    @property
    def num_per_epoch(self) -> int:
        """Batches in one pass over the pairs, at least 1."""
        ...

    def batch(self, step: int) -> Any:
        """The batch of one step, counted from 0 over all epochs, wherever the stage wants it.

        One that is to be computed in parts (gradient_accumulation_steps) has `parts`.
        """
        ...

    def close(self) -> None:
        """End what is under way for later steps."""
        ...


class Stage(Protocol):
    """One model to train: what the loop needs of dvae, transformer and clip alike."""

    @property
    def name(self) -> StageName: ...

    @property
    def model(self) -> nn.Module:
        """`muon_parameters()` names its hidden matrices, if it has it.

        On the engine's device already, or where the engine takes it from.
        """
        ...

    @property
    def batches(self) -> Batches: ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The scalar to minimise, and detached scalars to report beside it.

        progress: share of the budget done, in [0, 1). Runs inside the engine's autocast, with
        the model in training mode. The loop reports the first as `loss`, and the means of all
        ranks' numbers.
        """
        ...

    def validate(self) -> Mapping[str, float]:
        """Numbers to report, `validation_loss` among them; may be empty.

        Runs in evaluation mode without gradients, with the averaged weights when there are any,
        on every rank, each by itself.
        Random numbers drawn here do not disturb training. Raises Stopped when a stop was asked
        for in the midst of it.
        """
        ...

    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide what is computed beyond the hyperparameters.

        The model's config, the data's fingerprint, the hashes of frozen models. A checkpoint with
        other values is refused.
        """
        ...


@dataclass(frozen=True)
class FitResult:
    """How a stage's training ended.

    step: steps in all, those before an interruption included; seconds and cpu_seconds likewise,
    of this process.
    is_finished: the budget is spent and the last validation done; otherwise a stop was asked for.
    validation: the last numbers of `validate`.
    """

    step: int
    seconds: float
    cpu_seconds: float
    is_finished: bool
    validation: dict[str, float]


def fit(
    stage: Stage,
    hyperparameters: Hyperparameters,
    *,
    engine: Engine,
    checkpoints: Checkpoints,
    metrics: Metrics | NoMetrics,
    stop: Stop,
    ranks: ProcessGroup = SINGLE_PROCESS,
    clock: Callable[[], float] = time.monotonic,
) -> FitResult:
    """Train a stage's model until its budget is spent or a stop is asked for on any rank.

    Resumes from the first rank's newest checkpoint. Leaves the weights to be saved in the model:
    the averaged ones when ema_decay is set. Raises DivergenceError naming the step,
    CheckpointError when the checkpoints are another run's, DiskFullError.
    """
    return _Fit(stage, hyperparameters, engine, checkpoints, metrics, ranks, clock).run(stop)


class _Fit:
    """One call of `fit`: what it was given, and how far it is."""

    def __init__(
        self,
        stage: Stage,
        hyperparameters: Hyperparameters,
        engine: Engine,
        checkpoints: Checkpoints,
        metrics: Metrics | NoMetrics,
        ranks: ProcessGroup,
        clock: Callable[[], float],
    ) -> None:
        settings = hyperparameters.of(stage.name)
        self.stage = stage
        self.hyperparameters = hyperparameters
        self.settings = settings
        self.engine = engine
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.ranks = ranks
        self.clock = clock
        self.budget = Budget.of(settings, stage.batches.num_per_epoch)
        self.is_on_cpu = engine.device.type == "cpu"
        self.step = 0
        self.seconds_before = 0.0
        self.cpu_seconds_before = 0.0
        self.started = clock()
        self.cpu_started = time.process_time()
        self.saved_step = 0
        self.saved_at = self.started
        self.validation: dict[str, float] = {}
        # A stop came in the midst of a validation: a resumed run begins with it.
        self.owes_validation = False
        # Scalars of the steps since the last report, still on the device.
        self.pending: list[dict[str, Tensor]] = []
        # By step, likewise; those that the engine computed.
        self.gradient_norms: dict[int, Tensor] = {}
        self.reported: dict[str, float] = {}
        self.reported_at = (0, 0.0)

    @property
    def seconds(self) -> float:
        """Time spent on this stage by this run and the ones it resumes."""
        return self.seconds_before + self.clock() - self.started

    @property
    def cpu_seconds(self) -> float:
        """Likewise, of all threads of this process."""
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
        try:
            if self.owes_validation and not self.ranks.any(stop.is_set()):
                self._validate()
                self.saved_step = 0  # the checkpoint of this step does not have it yet
            # Clocks and signals differ between ranks: what follows from them is agreed upon.
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
        finally:
            bar.close()
        self._save()
        self.engine.finish()
        self._require_finite_weights(self.stage.model.state_dict())
        self.stage.model.eval()
        is_finished = progress >= 1 and not self.owes_validation
        return FitResult(self.step, self.seconds, self.cpu_seconds, is_finished, self.validation)

    def _train_one_step(self, progress: float) -> float:
        """Returns the schedule's share of the full learning rate."""
        batch = self.stage.batches.batch(self.step)
        # After the batch: a loader that starts its workers draws a number too.
        seed_everything(self.hyperparameters.seed, self.step, self.ranks.rank)
        num_parts = self.settings.gradient_accumulation_steps
        scalars: list[dict[str, Tensor]] = []
        for part in batch.micro_batches(num_parts) if num_parts > 1 else [batch]:
            loss, beside = self.engine.loss(part, progress)
            scalars.append({"loss": loss.detach(), **beside})
            if len(scalars) == num_parts:
                self.pending.append(self.ranks.means(_means(scalars)))
                if self.is_on_cpu:  # elsewhere a look at it waits for the device: once per report
                    self._require_finite(newest=1)
            self.engine.backward(loss)
        share = self.engine.step(self.step, progress)
        self.step += 1
        if self.engine.gradient_norm is not None:
            self.gradient_norms[self.step] = self.engine.gradient_norm
            if self.is_on_cpu:
                self._require_finite(newest=0)
        return share

    def _require_finite(self, newest: int | None = None) -> None:
        """Look at the pending losses, or the newest few, and at the gradients not looked at yet.

        Raises DivergenceError naming the first step at fault.
        """
        first = 0 if newest is None else len(self.pending) - newest
        # Pending are consecutive steps, the first of them the one after the last report.
        looks = [
            (step, "loss", scalars["loss"])
            for step, scalars in enumerate(self.pending[first:], self.reported_at[0] + first + 1)
        ]
        looks += [(step, "gradient norm", norm) for step, norm in self.gradient_norms.items()]
        self.gradient_norms.clear()
        if not looks:
            return
        looks.sort(key=lambda look: look[0])  # stable: a loss comes before its gradient
        wrong = torch.stack([value.float() for *_, value in looks]).isfinite().logical_not()
        if wrong.any():
            step, what, value = looks[int(wrong.nonzero()[0])]
            raise self._divergence(f"the {what} of stage {self.stage.name} is {value.item()}", step)

    def _require_finite_weights(self, state: Mapping[str, Tensor]) -> None:
        """Look at a model's state dict. Raises DivergenceError naming the step."""
        named = [(name, value) for name, value in state.items() if value.is_floating_point()]
        are_finite = torch.stack([value.isfinite().all() for _, value in named])
        if not are_finite.all():
            name, _ = named[int(are_finite.logical_not().nonzero()[0])]
            raise self._divergence(
                f"the weights {name} of stage {self.stage.name} are not finite", self.step
            )

    def _divergence(self, what: str, step: int) -> DivergenceError:
        return DivergenceError(
            f"{what} at step {step}; "
            f"try a smaller learning_rate (now {self.settings.learning_rate}), "
            f"more warmup_steps (now {self.settings.warmup_steps}) or "
            f"another precision (now {self.settings.precision})"
        )

    def _report(self, share: float) -> None:
        """Means since the last report, to the log and the files."""
        self._require_finite()
        seconds = self.seconds
        last_step, last_seconds = self.reported_at
        self.reported = {
            name: torch.stack([scalars[name].float() for scalars in self.pending]).mean().item()
            for name in self.pending[0]
        }
        num_samples = (self.step - last_step) * self.settings.pairs_per_step
        speed = num_samples / max(seconds - last_seconds, 1e-9)
        self.metrics.report(
            self.stage.name,
            self.step,
            seconds,
            {
                **self.reported,
                "learning_rate": share * self.settings.learning_rate,
                "samples_per_second": speed,
                "epoch": self.step / self.stage.batches.num_per_epoch,
            },
        )
        self.pending.clear()
        self.reported_at = (self.step, seconds)

    def _validation_is_due(self, before: float, now: float) -> bool:
        """At every n-th part of the budget; the end of it is the last."""
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
        if self.validation and not self.owes_validation:
            self.metrics.report(self.stage.name, self.step, self.seconds, self.validation)

    def _save(self) -> None:
        """Write a checkpoint, as the first rank, unless the newest is of this step."""
        if self.step == self.saved_step:
            return
        self._require_finite()
        engine_state = self.engine.state()
        if self.ranks.is_first:
            self._write(engine_state)
        # The others wait here: in an engine's own exchange their patience might be shorter.
        self.ranks.any(False)
        self.saved_step = self.step
        self.saved_at = self.clock()

    def _write(self, engine_state: Mapping[str, Any]) -> None:
        self._require_finite_weights(engine_state["model"])
        num_per_epoch = self.stage.batches.num_per_epoch
        state = {
            "stage": self.stage.name,
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            # The order of the data is a function of these; the loader itself needs the step alone.
            "data": {"seed": self.hyperparameters.seed, "epoch": self.step // num_per_epoch},
            "engine": engine_state,
            "validation": self.validation,
            "owes_validation": self.owes_validation,
            "pending": self.pending,
            "reported_at": list(self.reported_at),
            "records": self.metrics.records(self.stage.name),
        }
        self.checkpoints.save(self.step, state)

    def _resume(self) -> None:
        """Go back to the newest checkpoint; begins with everything as it is when there is none.

        To the first rank's: what lies in another host's directory may be older, or nothing.
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
        step, seconds = state["reported_at"]
        self.reported_at = (step, seconds)
        self.metrics.restore(self.stage.name, state["records"])
        logger.info("%s continues at step %d", self.stage.name, self.step)


def _means(scalars: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each scalar over the parts of a step, all of which have the same names."""
    if len(scalars) == 1:
        return dict(scalars[0])
    return {
        name: torch.stack([each[name].float() for each in scalars]).mean() for name in scalars[0]
    }
