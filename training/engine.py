"""One training step's arithmetic on one device, in plain torch: precision, backward, update.

Knows a stage's loss and its model's parameters, and nothing of data, time or files. The loop calls
`loss`, `backward` and `step` of whatever engine it is given, so that another can stand beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from dalle.errors import DeviceError, HyperparameterError
from training.hyperparameter_fields import FitHyperparameters
from training.optimiser import OptimiserPair
from training.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(hyperparameters: FitHyperparameters, device: torch.device) -> None:
    """Raises HyperparameterError for a number format that the device cannot train in."""
    if hyperparameters.precision == "fp16" and device.type == "cpu":
        raise HyperparameterError(
            "precision=fp16 needs a GPU; on this CPU it must be fp32 or bf16", field="precision"
        )


class Trainable(Protocol):
    """What an engine needs of a stage."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]: ...


class Engine(Protocol):
    """What the training loop needs to turn a stage's loss into better weights."""

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The stage's loss of this rank's share of a batch, and what it reports beside it."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss; with several ranks, the mean of all ranks'."""
        ...

    def step(self, step: int, progress: float) -> float:
        """Update the weights, forget the gradients, return the schedule's share in [0, 1]."""
        ...

    @property
    def gradient_norm(self) -> Tensor | None:
        """Scalar: the norm of the gradient that the last step used, before clipping.

        None when nothing was clipped or the step was left out.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TorchEngine:
    """The default engine: a whole model on each rank's device.

    Raises HyperparameterError for a precision that the device does not have.
    """

    def __init__(
        self,
        stage: Trainable,
        hyperparameters: FitHyperparameters,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        precision = hyperparameters.precision
        check_precision(hyperparameters, device)
        self._model = model = stage.model
        self._loss = ranks.parallel(_Loss(stage))
        self._device = device
        self._autocast_type = AUTOCAST_TYPES.get(precision)
        self._clipping = hyperparameters.gradient_clipping
        self._gradient_norm: Tensor | None = None
        self._optimisers = OptimiserPair(
            model,
            learning_rate=hyperparameters.learning_rate,
            muon_learning_rate=hyperparameters.muon_learning_rate,
            weight_decay=hyperparameters.weight_decay,
            warmup_steps=hyperparameters.warmup_steps,
        )
        # Small fp16 gradients vanish unless the loss is scaled up first; bf16 has fp32's range.
        self._scaler = GradScaler(device.type, enabled=precision == "fp16")

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        precision = (
            nullcontext()
            if self._autocast_type is None
            else torch.autocast(self._device.type, dtype=self._autocast_type)
        )
        with precision:
            loss: tuple[Tensor, Mapping[str, Tensor]] = self._loss(batch, progress)
        return loss

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(self._scaler.scale(loss))

    def step(self, step: int, progress: float) -> float:
        share = self._optimisers.schedule(step, progress)
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
        return share

    @property
    def gradient_norm(self) -> Tensor | None:
        return self._gradient_norm

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients down to the norm that is allowed; returns the norm before."""
        largest = self._clipping or float("inf")
        return nn.utils.clip_grad_norm_(self._model.parameters(), largest)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimisers": self._optimisers.state_dict(),
            "loss_scaling": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimisers.load_state_dict(state["optimisers"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["loss_scaling"])


class _Loss(nn.Module):
    """A stage's loss as the forward pass of a module that has the model's parameters."""

    def __init__(self, stage: Trainable) -> None:
        super().__init__()
        self.model = stage.model
        self._stage = stage

    def forward(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self._stage.loss(batch, progress)


def count_devices(wanted: str) -> int:
    """How many devices of this host to train on, at least 1; `wanted` is auto, cpu or cuda."""
    if wanted == "cpu" or not torch.cuda.is_available():
        return 1
    return torch.cuda.device_count()


def choose_device(wanted: str, number: int = 0) -> torch.device:
    """The device to train on; `wanted` is auto, cpu or cuda. Logs the choice and its reason.

    number: which of several, from 0. Raises DeviceError when cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise DeviceError(f"DALLE_DEVICE=cuda, but {_why_no_cuda()}; choose a GPU instance or auto")
    if wanted == "cpu" or not has_cuda:
        reason = "DALLE_DEVICE=cpu" if wanted == "cpu" else _why_no_cuda()
        logger.info("training on the CPU with %d threads: %s", torch.get_num_threads(), reason)
        return torch.device("cpu")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    logger.info("training on %s", torch.cuda.get_device_name(device))
    return device


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no CUDA device (no GPU, or no driver for it)"
