"""Engine that partitions a model's training state among the ranks by DeepSpeed's ZeRO.

DeepSpeed adds hooks to the modules it trains, so it trains a copy of the stage's model. The stage's
model has no weights meanwhile; it gets all of them, in fp32, for validation and at the end. Needs
neither a compiler nor MPI.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dalle.errors import HyperparameterError
from training.config.deepspeed import configuration
from training.config.fields import Hyperparameters, StageHyperparameters
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine.devices import AUTOCAST_TYPES, autocast, check_precision
from training.engine.ema import ema_decay_at
from training.engine.interface import Trainable
from training.engine.optimizer import ModelOptimizers
from training.engine.partitions import AVERAGE, MOMENTS, Partitions

LOSS_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's dynamic loss scale."""


class DeepSpeedEngine:
    """Weights, gradients and AdamW state of one stage's model, partitioned by ZeRO.

    Raises HyperparameterError for a precision that the device does not have, and for a
    `deepspeed_config` that DeepSpeed refuses.
    """

    def __init__(
        self,
        stage: Trainable,
        hyperparameters: Hyperparameters,
        settings: StageHyperparameters,
        device: torch.device,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        check_precision(settings, device)
        self._model = stage.model
        self._stage = stage
        self._settings = settings
        self.device = device
        self._ranks = ranks
        self._zero_stage = hyperparameters.zero_stage
        self._config = configuration(
            hyperparameters,
            settings,
            num_ranks=ranks.size,
            num_parameters=sum(parameter.numel() for parameter in stage.model.parameters()),
            is_on_cpu=device.type == "cpu",
        )
        self.gradient_norm: Tensor | None = None

    def begin(self, state: dict[str, Any] | None) -> None:
        # The tensors of a large model are sent one by one.
        small = None if state is None else {k: state[k] for k in ("num_steps", "loss_scaling")}
        small = self._ranks.share(small)
        names = [name for name, _ in self._model.named_parameters()]
        if small is not None:
            self._model.load_state_dict(
                {
                    name: self._ranks.share(None if state is None else state["model"][name])
                    for name in self._model.state_dict()
                }
            )
        self._initialise()
        if small is None:
            return
        for kind, key in self._kinds().items():
            for name in names:
                value = self._ranks.share(None if state is None else state[kind][name])
                self._partitions.put(name, value, key)
        self._partitions.num_steps = small["num_steps"]
        for name, value in small["loss_scaling"].items():
            setattr(self._engine.optimizer.loss_scaler, name, value)

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss: Tensor = self._engine(batch, progress)
        return loss, self._loss.scalars

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the part

    def step(self, step: int, progress: float) -> float:
        share = self._optimizers.schedule(step, progress)
        clipping = self._settings.gradient_clipping
        self.gradient_norm = None
        if clipping and self._zero_stage == 0:
            self.gradient_norm = nn.utils.clip_grad_norm_(self._trained.parameters(), clipping)
        self._engine.step()
        if clipping and self._zero_stage and self._engine.was_step_applied():
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
            # DeepSpeed returns -1 for a gradient that is not finite.
            self.gradient_norm = torch.where(norm < 0, torch.nan, norm)
        if self._settings.ema_decay:
            weight = 1 - ema_decay_at(self._settings.ema_decay, step + 1)
            with torch.no_grad():
                torch._foreach_lerp_(self._partitions.averages, self._partitions.flat, weight)
        return share

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        self._fill()
        try:
            yield
        finally:
            _empty(self._model)

    def state(self) -> dict[str, Any]:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        named = [name for name, _ in self._trained.named_parameters()]
        state: dict[str, Any] = {
            "num_steps": self._partitions.num_steps,
            "loss_scaling": {name: getattr(scaler, name) for name in LOSS_SCALING}
            if self._settings.precision == "fp16"
            else {},
            "model": {
                name: value.cpu()
                for name, value in self._trained.state_dict().items()
                if name not in named
            },
        }
        for kind, key in self._kinds().items():
            values = state.setdefault(kind, {})
            for name in named:
                value = self._partitions.whole(name, key)
                if self._ranks.is_first:  # only its host's memory holds all of them
                    values[name] = value.to("cpu", copy=True)
        return state

    def finish(self) -> None:
        self._fill()
        self._ranks.copy_first(self._model.state_dict().values())
        self._engine.destroy()
        for parameter in self._trained.parameters():
            # DeepSpeed keeps references to modules: free their memory.
            parameter.data = parameter.new_empty(0)
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.data = parameter.new_empty(0)
        del self._engine, self._partitions, self._optimizers, self._trained, self._loss

    def _kinds(self) -> dict[str, str | None]:
        """Return what a state holds of each parameter: name in the state -> key in `Partitions`."""
        beside = (*MOMENTS, AVERAGE) if self._settings.ema_decay else MOMENTS
        return {"model": None, **{key: key for key in beside}}

    def _initialise(self) -> None:
        """Move the model's weights into a copy, and give that to DeepSpeed."""
        deepspeed = _deepspeed(self.device)
        for module in self._model.modules():  # ZeRO 3 moves only parameters
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._trained = copy.deepcopy(self._model, {id(tensor): tensor for tensor in tensors})
        self._trained.train()
        _empty(self._model)
        precision = self._settings.precision
        self._loss = _Loss(self._stage, self._trained, self.device, precision)
        # Before ZeRO 3 removes the shapes, which decide on weight decay.
        self._optimizers = ModelOptimizers(
            self._trained,
            learning_rate=self._settings.learning_rate,
            weight_decay=self._settings.weight_decay,
            warmup_steps=self._settings.warmup_steps,
        )
        (adam,) = self._optimizers.optimizers
        if self._zero_stage == 3:
            # Partitioned one by one from host memory, so that no device holds all of them.
            for parameter in self._trained.parameters():
                parameter.data = parameter.data.to(AUTOCAST_TYPES.get(precision, torch.float32))
            deepspeed.zero.Init(module=self._loss, config_dict_or_path=self._config)
        with redirect_stdout(sys.stderr):  # it prints; stdout is for metrics
            self._engine, *_ = deepspeed.initialize(
                model=self._loss, optimizer=adam, config=self._config, dist_init_required=False
            )
        self._partitions = Partitions(
            self._engine,
            dict(self._trained.named_parameters()),
            is_averaged=bool(self._settings.ema_decay),
        )

    def _fill(self) -> None:
        """Give the stage's model the weights to be saved."""
        key = AVERAGE if self._settings.ema_decay else None
        for name, parameter in list(self._model.named_parameters()):
            value = self._partitions.whole(name, key)
            _set(self._model, name, nn.Parameter(value.clone(), parameter.requires_grad))


class _Loss(nn.Module):
    """Loss of a stage, computed with another model."""

    def __init__(
        self, stage: Trainable, model: nn.Module, device: torch.device, precision: str
    ) -> None:
        super().__init__()
        self.model = model
        self.scalars: Mapping[str, Tensor] = {}
        own: Any = copy.copy(stage)
        own.model = model
        self._stage: Trainable = own
        self._device = device
        self._precision = precision

    def forward(self, batch: Any, progress: float) -> Tensor:
        # Autocast computes norms and the loss in fp32, though the weights are not.
        loss: Tensor
        with autocast(self._precision, self._device):
            loss, self.scalars = self._stage.loss(batch, progress)
        return loss


def check_config(config: dict[str, Any], device: torch.device) -> None:
    """Raise HyperparameterError for values that DeepSpeed refuses."""
    deepspeed = _deepspeed(device)
    try:
        deepspeed.DeepSpeedConfig(config)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise HyperparameterError(
            f"deepspeed_config: DeepSpeed does not take it: {error}"
        ) from error


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, which takes seconds, and set it up for this process."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    if not dist.is_initialized():
        # A job of one rank has no process group, and DeepSpeed needs one.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=HashStore(),
            rank=0,
            world_size=1,
        )
    # On import it calls torch.compile, which looks up the user's name; a container's user may
    # have only a number.
    os.environ.setdefault("LOGNAME", str(os.getuid()))
    import deepspeed
    import deepspeed.ops

    # Its operations in C++ would be compiled now, and one of them assumes that all ranks are on
    # this host. None of them is needed.
    deepspeed.ops.__compatible_ops__ = {}
    # With the present process group: otherwise it would look for MPI.
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own_name = name.rpartition(".")
    model.get_submodule(owner)._parameters[own_name] = parameter


def _empty(model: nn.Module) -> None:
    """Replace a model's parameters by meta tensors."""
    for name, parameter in list(model.named_parameters()):
        nothing = torch.empty_like(parameter, dtype=torch.float32, device="meta")
        _set(model, name, nn.Parameter(nothing, parameter.requires_grad))
