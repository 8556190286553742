"""One training step's arithmetic on one device, in plain torch: precision, backward, update.

Knows a stage's loss and its model's parameters, and nothing of data, time or files.
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
from training.engine.devices import AUTOCAST_TYPES, check_precision
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
        self._device = device
        self._num_parts = hyperparameters.gradient_accumulation_steps
        self._parts_done = 0
        self._autocast_type = AUTOCAST_TYPES.get(precision)
        self._clipping = hyperparameters.gradient_clipping
        self._gradient_norm: Tensor | None = None
        self._optimisers = ModelOptimizers(
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
    def device(self) -> torch.device:
        return self._device

    @property
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon and AdamW, or one of them."""
        return self._optimisers.optimisers

    def begin(self, state: dict[str, Any] | None) -> None:
        state = self._ranks.share(state)
        if state is None:
            return
        self._model.load_state_dict(state["model"])
        self._optimisers.load_state_dict(state["optimisers"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["loss_scaling"])
        if self._average is not None:
            self._average.load_state(state["average"])

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        precision = (
            nullcontext()
            if self._autocast_type is None
            else torch.autocast(self._device.type, dtype=self._autocast_type)
        )
        is_last = self._parts_done == self._num_parts - 1
        # The ranks' gradients are exchanged once a step, with those of the last part.
        exchange = nullcontext() if is_last else self._ranks.without_exchange(self._loss)
        with precision, exchange:
            loss: tuple[Tensor, Mapping[str, Tensor]] = self._loss(batch, progress)
        return loss

    def backward(self, loss: Tensor) -> None:
        self._parts_done += 1
        torch.autograd.backward(self._scaler.scale(loss / self._num_parts))

    def step(self, step: int, progress: float) -> float:
        share = self._optimisers.schedule(step, progress)
        self._parts_done = 0
        is_finite = True
        self._gradient_norm = None
        if self._scaler.is_enabled():
            for optimiser in self._optimisers.optimisers:
                self._scaler.unscale_(optimiser)
            # Too large a scale overflows now and then: leave out the step in both optimisers
            # alike. The scaler by itself would decide for each alone.
            norm = self._clip_gradients()
            is_finite = bool(torch.isfinite(norm))
            self._gradient_norm = norm if is_finite else None
        elif self._clipping:
            self._gradient_norm = self._clip_gradients()
        if is_finite:
            for optimiser in self._optimisers.optimisers:
                self._scaler.step(optimiser)
        self._scaler.update()
        self._optimisers.zero_grad()
        if self._average is not None:
            self._average.update(self._model, step + 1)
        return share

    @property
    def gradient_norm(self) -> Tensor | None:
        return self._gradient_norm

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients down to the norm that is allowed; returns the norm before."""
        largest = self._clipping or float("inf")
        return nn.utils.clip_grad_norm_(self._model.parameters(), largest)

    def whole_model(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.applied_to(self._model)

    def state(self) -> dict[str, Any]:
        return {
            "model": self._model.state_dict(),
            "optimisers": self._optimisers.state_dict(),
            "loss_scaling": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state(),
        }

    def finish(self) -> None:
        if self._average is not None:
            self._average.copy_to(self._model)
        # Processors of another kind may round otherwise; what builds on this model must not differ.
        self._ranks.copy_first(self._model.state_dict().values())


class _Loss(nn.Module):
    """A stage's loss as the forward pass of a module that has the model's parameters."""

    def __init__(self, stage: Trainable) -> None:
        super().__init__()
        self.model = stage.model
        self._stage = stage

    def forward(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self._stage.loss(batch, progress)
