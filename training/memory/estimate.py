"""Memory of one device while a stage is trained, by engine, ZeRO stage and number format.

Activations are traced (training.memory.passes); the rest is counted from the weights:

    torch       everything is on every device, the exponential moving average too
    ZeRO 1      master weights, moments and average are partitioned among the devices
    ZeRO 2      the gradients too         ZeRO 3   the weights too
    offload     the device's partition of the optimiser, or of the weights, is in host memory

ZeRO: Rajbhandari et al. 2020, §5 and §7. Sizes are in bytes; P: number of weights, N: devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from dalle.models.configs import ImageTokenizerConfig
from dalle.models.uninitialised import without_memory
from dalle.types import StageName
from training.config.deepspeed import BUCKET_ELEMENTS, TRAINED_BY_DEEPSPEED
from training.config.fields import EngineName, Hyperparameters
from training.config.models import Config
from training.engine.optimizer import hidden_matrices, muon_update_elements
from training.memory.passes import Formats, StagePasses, SyntheticStage, synthetic_stage

PrecisionName = Literal["fp32", "bf16", "fp16"]

RUNTIME_BYTES = {"cuda": 1 << 30, "cpu": 1 << 29}
"""The CUDA context and the libraries' workspaces; Python and torch themselves."""

LIVE_PARAMETERS = 1_000_000_000
"""Most weights that ZeRO 3 has fetched at one time: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Setting:
    """How a stage is trained, as far as memory depends on it. num_parts: accumulation steps."""

    engine: EngineName = "torch"
    precision: PrecisionName = "fp32"
    zero_stage: int = 0
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    num_parts: int = 1
    num_devices: int = 1
    has_muon: bool = True
    has_average: bool = False

    @classmethod
    def of(cls, hyperparameters: Hyperparameters, stage: StageName, *, num_devices: int) -> Setting:
        """Return the setting of a job's hyperparameters."""
        settings = hyperparameters.of(stage)
        setting = cls(
            precision=settings.precision,
            activation_checkpointing=settings.activation_checkpointing,
            num_parts=settings.gradient_accumulation_steps,
            num_devices=num_devices,
            has_muon=settings.muon_learning_rate > 0,
            has_average=settings.ema_decay > 0,
        )
        if hyperparameters.engine == "torch" or stage not in TRAINED_BY_DEEPSPEED:
            return setting
        return replace(
            setting,
            engine="deepspeed",
            zero_stage=hyperparameters.zero_stage,
            offload_optimizer=hyperparameters.offload_optimizer,
            offload_parameters=hyperparameters.offload_parameters,
            has_muon=False,
        )

    @property
    def label(self) -> str:
        """`ZeRO 2, checkpointing, offload, 4 parts`"""
        words = ["torch" if self.engine == "torch" else f"ZeRO {self.zero_stage}"]
        if self.activation_checkpointing:
            words.append("checkpointing")
        if self.offload_optimizer:
            words.append("offload all" if self.offload_parameters else "offload")
        if self.num_parts > 1:
            words.append(f"{self.num_parts} parts")
        return ", ".join(words)

    @property
    def formats(self) -> Formats:
        """Number formats of the passes; bf16 stands for fp16 too, which is as large."""
        half = None if self.precision == "fp32" else torch.bfloat16
        weights = None if self.engine == "torch" else half
        return Formats(half, weights, self.activation_checkpointing)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes on one device during a step. host: of host memory, for this device.

    activations: of the forward and backward pass; or of the update, or with DeepSpeed of a
        validation, if that is more.
    exchange: buffers of the communication between devices.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    exchange: int = 0
    runtime: int
    host: int = 0

    @property
    def device(self) -> int:
        """Everything but `host`."""
        kept = self.weights + self.gradients + self.optimiser
        return kept + self.activations + self.exchange + self.runtime


@dataclass(eq=False)
class StageMemory:
    """The memory of one stage's model at every setting and batch size.

    dvae: of the frozen one that encodes a transformer's images.
    """

    name: StageName
    config: Config
    _: KW_ONLY
    dvae: ImageTokenizerConfig | None = None
    device_type: Literal["cpu", "cuda"]

    def __post_init__(self) -> None:
        self._passes = StagePasses(self.config, self.dvae, is_for_gpu=self.device_type == "cuda")

    @cached_property
    def _model(self) -> SyntheticStage:
        with without_memory():
            return synthetic_stage(self.config, torch.device("meta"), dvae=self.dvae)

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        return [each for each in self._model.model.parameters() if each.requires_grad]

    @property
    def num_parameters(self) -> int:
        """Weights of the model, including those that are not trained by gradient."""
        return sum(each.numel() for each in self._model.model.parameters())

    def at(self, setting: Setting, part_size: int) -> Memory:
        """Return the memory of a step. part_size: pairs that one device computes at once."""
        if setting.engine == "torch":
            return self._with_torch(setting, part_size)
        return self._with_deepspeed(setting, part_size)

    def operations(self, setting: Setting, part_size: int) -> float:
        """Return the floating-point operations of the passes over so many pairs at once."""
        return self._passes.operations(part_size, setting.formats)

    def largest_part(self, setting: Setting, device_bytes: int, *, at_most: int) -> int:
        """Return how many pairs one device can compute at once in so many bytes, 0 to `at_most`."""
        low, high = 0, at_most + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.at(setting, middle).device <= device_bytes:
                low = middle
            else:
                high = middle
        return low

    def _with_torch(self, setting: Setting, part_size: int) -> Memory:
        weights = _num_bytes(self._model.model.parameters()) + self._resident
        gradients = _num_bytes(self._trained)
        hidden = hidden_matrices(self._model.model) if setting.has_muon else []
        optimiser = 2 * gradients - _num_bytes(hidden)  # Muon has one moment where AdamW has two
        if setting.has_average:
            optimiser += _num_bytes(self._model.model.parameters())
        update = 4 * muon_update_elements(hidden)
        if setting.num_devices == 1 and setting.num_parts == 1:
            # Gradients are allocated while activations are freed.
            peak = self._passes.with_gradients(part_size, setting.formats)
            activations = max(0, max(peak, gradients + update) - gradients)
        else:
            activations = max(self._passes.activations(part_size, setting.formats), update)
        return Memory(
            weights=weights,
            gradients=gradients,
            optimiser=optimiser,
            activations=activations,
            runtime=RUNTIME_BYTES[self.device_type],
        )

    def _with_deepspeed(self, setting: Setting, part_size: int) -> Memory:
        N, zero = setting.num_devices, setting.zero_stage
        P = sum(each.numel() for each in self._trained)
        width = 4 if setting.precision == "fp32" else 2
        bucket = width * min(BUCKET_ELEMENTS, P)
        activations = self._passes.activations(part_size, setting.formats)
        validated = 4 * self.num_parameters  # the whole model in fp32, during a validation
        average = 4 if setting.has_average else 0
        memory = Memory(
            weights=4 * P + self._resident,
            gradients=4 * P,
            optimiser=(8 + average) * P,
            activations=max(activations, validated),
            exchange=bucket if N > 1 else 0,
            runtime=RUNTIME_BYTES[self.device_type],
        )
        if zero == 0:
            return memory
        share = -(-P // N)
        weights = width * P
        gradients = width * P
        exchange = bucket
        if zero >= 2:
            # Sums over accumulation steps are kept in fp32.
            gradients = (4 if setting.num_parts > 1 else width) * share
            exchange += bucket
        host = 0
        if zero == 3:
            # The layers being computed, and some that are fetched ahead.
            exchange += width * min(P, LIVE_PARAMETERS) + bucket
            weights = width * share
            if setting.offload_parameters:
                host, weights = weights, 0
        # fp32 weights to update, two moments, the average; and the share's gradients in fp32.
        optimiser = (4 + 8 + average) * share
        update = 4 * share
        if setting.offload_optimizer:
            host += optimiser + update
            optimiser = update = 0
            if zero >= 2:
                gradients = 0
        return replace(
            memory,
            weights=weights + self._resident,
            gradients=gradients,
            optimiser=optimiser,
            activations=max(activations, update, validated),
            exchange=exchange,
            host=host,
        )

    @cached_property
    def _resident(self) -> int:
        """Bytes of buffers, and of the frozen models beside the trained one."""
        trained = self._model.model
        models = [each for each in vars(self._model).values() if isinstance(each, nn.Module)]
        frozen = [p for each in models if each is not trained for p in each.parameters()]
        return _num_bytes([*frozen, *(buffer for each in models for buffer in each.buffers())])


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
