"""`batch_size=auto`: the batch size of a stage, found before it is trained.

On a GPU, as many pairs as fit: the plan's figure for the free memory less some headroom, tried by
whole steps, and reduced a little while they run out of memory. On a CPU memory is seldom the limit,
and a larger batch soon takes longer in proportion: there the batch is doubled as long as that
brings a tenth more pairs a second. On both an epoch keeps some steps: a batch of half the data set
would train quickly and badly.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dalle.errors import DeviceError
from dalle.platform.limits import free_host_memory
from dalle.platform.stopwatch import timed
from dalle.types import StageName
from training.config.fields import MAX_BATCH_SIZE, StageHyperparameters
from training.engine.torch_engine import TorchEngine
from training.memory.estimate import RUNTIME_BYTES, Setting, StageMemory
from training.memory.passes import random_batch, synthetic_stage
from training.memory.plan import HEADROOM
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)

STEPS_PER_EPOCH = 16
"""Least steps in an epoch, where there are enough pairs."""

SMALLEST: dict[StageName, int] = {"dvae": 16, "transformer": 16, "clip": 64}
"""Where doubling begins on a CPU. CLIP's loss compares the pairs of a batch: it needs more."""

WORTH_DOUBLING = 1.1
SHRINK = 0.85


def find_share(
    memory: StageMemory,
    settings: StageHyperparameters,
    setting: Setting,
    device: torch.device,
    *,
    num_pairs: int,
    stop: Stop,
) -> int:
    """Return one device's share of a batch, at least 1: the pairs of all accumulation steps.

    num_pairs: of the training data. Raises DeviceError when not even one pair fits, Stopped.
    """
    parts = setting.num_parts
    at_most = min(MAX_BATCH_SIZE, num_pairs // STEPS_PER_EPOCH) // (setting.num_devices * parts)
    at_most = max(1, at_most)
    free = _free_memory(device)
    # This process has allocated its runtime already.
    budget = round(free * (1 - HEADROOM)) + RUNTIME_BYTES[memory.device_type]
    fitting = memory.largest_part(setting, budget, at_most=at_most)
    if fitting == 0:
        raise DeviceError(
            f"not even one pair of stage {memory.name} fits {device}, where {free / 2**30:.1f} GiB "
            "are free; `train --plan` says what would help"
        )
    trial = Trial(memory, settings, device)
    if setting.engine == "deepspeed":
        part, why = fitting, "by the plan's figures; engine=deepspeed is not tried"
    elif device.type == "cuda":
        part, why = _largest(trial, fitting, stop), "by trial"
    else:
        smallest = min(fitting, -(-SMALLEST[memory.name] // parts))
        part, why = _worthwhile(trial, smallest, fitting, stop)
    if part == at_most:
        why = f"more would leave fewer than {STEPS_PER_EPOCH} steps to an epoch"
    logger.info(
        "batch_size=auto: %s takes %d pairs at once on %s (%s; %d would fit %.1f GiB)",
        *(memory.name, part, device, why, fitting, free / 2**30),
    )
    return part * parts


def _largest(trial: Callable[[int], float | None], size: int, stop: Stop) -> int:
    """Return `size`, reduced until a trial no longer runs out of memory."""
    while size > 1 and trial(size) is None:
        if stop.is_set():
            raise Stopped
        size = max(1, int(size * SHRINK))
    return size


def _worthwhile(
    trial: Callable[[int], float | None], smallest: int, largest: int, stop: Stop
) -> tuple[int, str]:
    """Double `smallest` while that brings more pairs a second; return the size and why."""
    size, rate = smallest, trial(smallest) or 0.0
    while 2 * size <= largest:
        if stop.is_set():
            raise Stopped
        doubled = trial(2 * size)
        if doubled is None:
            return size, "twice as many ran out of memory"
        if doubled < WORTH_DOUBLING * rate:
            return size, f"{rate:,.1f} pairs/s, twice as many {doubled:,.1f}"
        size, rate = 2 * size, doubled
    return size, "twice as many would not fit"


@dataclass(frozen=True)
class Trial:
    """Times some training steps of an untrained copy of the stage's model on random pairs."""

    memory: StageMemory
    settings: StageHyperparameters
    device: torch.device

    def __call__(self, size: int) -> float | None:
        """Return the pairs a second at a size; None when it does not fit."""
        try:
            return self._run(size)
        except (torch.OutOfMemoryError, MemoryError):
            return None
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(self, size: int) -> float:
        config, dvae = self.memory.config, self.memory.dvae
        with self.device:
            stage = synthetic_stage(
                config,
                self.device,
                dvae=dvae,
                checkpoints_activations=self.settings.activation_checkpointing,
            )
        stage.model.train()
        settings = self.settings.model_copy(update={"gradient_accumulation_steps": 1})
        engine = TorchEngine(stage, settings, self.device)
        batch = random_batch(config, size, dvae=dvae)

        def step() -> None:
            loss, _ = engine.loss(batch, 0.0)
            engine.backward(loss)
            engine.step(0, 0.0)

        step()  # warm-up
        return size / min(timed(step, self.device) for _ in range(2))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return free_host_memory()
