"""The fp32 weights and the state of AdamW behind a DeepSpeed engine, whole parameter by parameter.

ZeRO keeps them as flat tensors, of which each rank has a part. What is read here is put together
from all ranks' parts, on every rank; what is written here is given whole to every rank, which
takes its part. So every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
"""What the running average of the weights is called beside AdamW's own two moments."""


class Partitions:
    """Of one engine, after `deepspeed.initialize` with torch's AdamW as its optimiser.

    parameters: all of the model's, as DeepSpeed has them by now, by name; each is trained.
    is_averaged: keep a running average of the weights, beginning with the weights as they are.
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], *, is_averaged: bool
    ) -> None:
        self._parameters = parameters
        self._stage = int(engine.zero_optimization_stage())
        self._optimizer = engine.optimizer
        self._state: Any = engine.basic_optimizer.state
        self.flat: list[Tensor] = self._flat_weights()
        # Before the first step AdamW has no state yet, and what is resumed needs a place to go.
        for weights in self.flat:
            state = {key: torch.zeros_like(weights) for key in MOMENTS}
            if is_averaged:
                state[AVERAGE] = weights.detach().clone()
            step = torch.zeros((), dtype=torch.float32, device=weights.device)
            self._state[weights] = state | {"step": step}
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def averages(self) -> list[Tensor]:
        """This rank's part of the running average, beside `flat`."""
        return [self._state[weights][AVERAGE] for weights in self.flat]

    @property
    def num_steps(self) -> int:
        """How many steps AdamW has taken."""
        return int(self._state[self.flat[0]]["step"])

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        for weights in self.flat:
            self._state[weights]["step"].fill_(number)

    def whole(self, name: str, key: str | None = None) -> Tensor:
        """A parameter's weights, or of `key` its moment or average: fp32, on the engine's device.

        Not to be changed: it may be the engine's own.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if self._stage == 0:
            own: Tensor = parameter.detach() if key is None else self._state[parameter][key]
            return own
        gathered: Tensor = (
            safe_get_full_fp32_param(parameter)
            if key is None
            else safe_get_full_optimizer_state(parameter, key)
        )
        return gathered

    @torch.no_grad()
    def put(self, name: str, value: Tensor, key: str | None = None) -> None:
        """Take over a parameter's weights, or with `key` its moment or average.

        The copy that the forward pass computes with is not changed: it has these weights already.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter = self._parameters[name]
        if self._stage == 0:
            (parameter if key is None else self._state[parameter][key]).copy_(value)
        elif self._stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        else:
            # Not the functions for a full one: they fail where the ranks' parts are padded.
            own = _own_part(value, parameter.ds_tensor.numel())  # type: ignore[attr-defined]
            if key is None:
                safe_set_local_fp32_param(parameter, own)
            else:
                safe_set_local_optimizer_state(parameter, own, key)

    def _flat_weights(self) -> list[Tensor]:
        match self._stage:
            case 0:
                return list(self._parameters.values())
            case 3:
                return list(self._optimizer.fp32_partitioned_groups_flat)
        # ZeRO 1 that adds up bf16 gradients in fp32 has an optimiser of its own.
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        (name,) = (name for name in names if hasattr(self._optimizer, name))
        return list(getattr(self._optimizer, name))


def _own_part(value: Tensor, size: int) -> Tensor:
    """This rank's part [size] of a tensor that is padded to a multiple of the ranks."""
    flat = value.flatten()
    part = flat.new_zeros(size)
    own = flat[dist.get_rank() * size :][:size]
    part[: len(own)] = own
    return part
