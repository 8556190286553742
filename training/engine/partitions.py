"""Partitions of a DeepSpeed engine: fp32 weights and AdamW state, read and written by parameter.

ZeRO keeps them as flat tensors, of which each rank has a part. Reading gathers a whole parameter
from all ranks on every rank; writing takes the whole parameter on every rank, and each keeps its
part. So every rank must make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
"""Key of the EMA of the weights, beside AdamW's two moments."""


class Partitions:
    """Partitions of one engine, after `deepspeed.initialize` with torch's AdamW.

    parameters: all parameters of DeepSpeed's model by name; each is trained. is_averaged: keep an
    EMA of the weights, which begins with the present weights.
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], *, is_averaged: bool
    ) -> None:
        self._parameters = parameters
        self._stage = int(engine.zero_optimization_stage())
        self._optimizer = engine.optimizer
        self._state: Any = engine.basic_optimizer.state
        self.flat: list[Tensor] = self._flat_weights()
        # AdamW makes its state in the first step; resuming needs it before.
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
        """This rank's part of the EMA, in the order of `flat`."""
        return [self._state[weights][AVERAGE] for weights in self.flat]

    @property
    def num_steps(self) -> int:
        """Number of steps that AdamW has taken."""
        return int(self._state[self.flat[0]]["step"])

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        for weights in self.flat:
            self._state[weights]["step"].fill_(number)

    def whole(self, name: str, key: str | None = None) -> Tensor:
        """Return a parameter's weights, or with `key` its moment or average, in fp32.

        On the engine's device. Do not change it: it may be the engine's tensor.
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
        """Write a parameter's weights, or with `key` its moment or average.

        The low-precision copy of the forward pass is not changed: it has these weights already.
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
            # The functions for full tensors fail where the ranks' parts are padded.
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
        # ZeRO 1 with bf16 gradients summed in fp32 uses another optimizer class.
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        (name,) = (name for name in names if hasattr(self._optimizer, name))
        return list(getattr(self._optimizer, name))


def _own_part(value: Tensor, size: int) -> Tensor:
    """Return this rank's part [size] of a tensor, padded to a multiple of the ranks."""
    flat = value.flatten()
    part = flat.new_zeros(size)
    own = flat[dist.get_rank() * size :][:size]
    part[: len(own)] = own
    return part
