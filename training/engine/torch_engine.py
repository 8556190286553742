"""Training step on one device in plain torch: autocast, backward pass, clipping, update.

Knows a stage's loss and its model's parameters; knows nothing of data, time or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from training.config.fields import FitHyperparameters
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine.devices import autocast, check_precision
from training.engine.ema import ModelEma
from training.engine.interface import Trainable
from training.engine.optimizer import ModelOptimizers


class TorchEngine:
    """The default engine: a whole model on each rank's device.

    Raises HyperparameterError for a precision that the device does not have.
    """

    def __init__(
        self,
        stage: Trainable,
        hyperparameters: FitHyperparameters,
        device: torch.device,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        precision = hyperparameters.precision
        check_precision(hyperparameters, device)
        self._model = model = stage.model
        self._loss = ranks.parallel(_Loss(stage))
        self._ranks = ranks
        self.device = device
        self._num_parts = hyperparameters.gradient_accumulation_steps
        self._parts_done = 0
        self._precision = precision
        self._clipping = hyperparameters.gradient_clipping
        self.gradient_norm: Tensor | None = None
        self._optimizers = ModelOptimizers(
            model,
            learning_rate=hyperparameters.learning_rate,
            muon_learning_rate=hyperparameters.muon_learning_rate,
            weight_decay=hyperparameters.weight_decay,
            warmup_steps=hyperparameters.warmup_steps,
        )
        # Small fp16 gradients vanish unless the loss is scaled up first; bf16 has fp32's range.
        self._scaler = GradScaler(device.type, enabled=precision == "fp16")
        decay = hyperparameters.ema_decay
        self._average = ModelEma(model, decay) if decay else None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon and AdamW, or one of them."""
        return self._optimizers.optimizers

    def begin(self, state: dict[str, Any] | None) -> None:
        state = self._ranks.share(state)
        if state is None:
            return
        self._model.load_state_dict(state["model"])
        self._optimizers.load_state_dict(state["optimisers"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["loss_scaling"])
        if self._average is not None:
            self._average.load_state(state["average"])

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        is_last = self._parts_done == self._num_parts - 1
        # The ranks exchange gradients once a step, in the last micro-batch.
        exchange = nullcontext() if is_last else self._ranks.without_exchange(self._loss)
        with autocast(self._precision, self.device), exchange:
            loss: tuple[Tensor, Mapping[str, Tensor]] = self._loss(batch, progress)
        return loss

    def backward(self, loss: Tensor) -> None:
        self._parts_done += 1
        torch.autograd.backward(self._scaler.scale(loss / self._num_parts))

    def step(self, step: int, progress: float) -> float:
        share = self._optimizers.schedule(step, progress)
        self._parts_done = 0
        is_finite = True
        self.gradient_norm = None
        if self._scaler.is_enabled():
            for optimizer in self._optimizers.optimizers:
                self._scaler.unscale_(optimizer)
            # Too large a scale overflows now and then: skip the step in both optimizers. The
            # scaler by itself would decide for each one alone.
            norm = self._clip_gradients()
            is_finite = bool(torch.isfinite(norm))
            self.gradient_norm = norm if is_finite else None
        elif self._clipping:
            self.gradient_norm = self._clip_gradients()
        if is_finite:
            for optimizer in self._optimizers.optimizers:
                self._scaler.step(optimizer)
        self._scaler.update()
        self._optimizers.zero_grad()
        if self._average is not None:
            self._average.update(self._model, step + 1)
        return share

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients down to gradient_clipping and return their norm before."""
        largest = self._clipping or float("inf")
        return nn.utils.clip_grad_norm_(self._model.parameters(), largest)

    def whole_model(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.applied_to(self._model)

    def state(self) -> dict[str, Any]:
        return {
            "model": self._model.state_dict(),
            "optimisers": self._optimizers.state_dict(),
            "loss_scaling": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state(),
        }

    def finish(self) -> None:
        if self._average is not None:
            self._average.copy_to(self._model)
        # Other processors may round differently; later stages need equal models on all ranks.
        self._ranks.copy_first(self._model.state_dict().values())


class _Loss(nn.Module):
    """Module whose forward pass is a stage's loss, with the parameters of the stage's model."""

    def __init__(self, stage: Trainable) -> None:
        super().__init__()
        self.model = stage.model
        self._stage = stage

    def forward(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self._stage.loss(batch, progress)
