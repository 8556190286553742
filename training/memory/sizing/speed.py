"""The speed of this device: training steps of untrained models on random pairs, timed."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from dalle.models.configs import ImageTokenizerConfig
from dalle.platform.stopwatch import timed
from dalle.types import StageName
from training.config.fields import StageHyperparameters
from training.config.models import Config
from training.engine.torch_engine import TorchEngine
from training.loop.stages import TransformerStage
from training.memory.passes import random_batch, synthetic_stage
from training.stopping import Stop, Stopped

SECONDS = 0.8
"""Of timed steps; a slower step is timed once, after one that warms up."""
MOST_STEPS = 9


class Speed(Protocol):
    """Seconds of training steps on one device. Tests have one that calculates."""

    @property
    def device(self) -> str:
        """The device in words, such as `cpu with 2 threads`."""
        ...

    def step_seconds(
        self,
        stage: StageName,
        config: Config,
        settings: StageHyperparameters,
        batch_size: int,
        dvae: ImageTokenizerConfig,
    ) -> float:
        """Return the seconds of a step; infinity where the memory is too small. Raises Stopped.

        batch_size: pairs on this device. dvae: of the images or image tokens.
        """
        ...


@dataclass(frozen=True)
class MeasuredSpeed:
    """Speed of a device as it is now, with what else runs on it."""

    torch_device: torch.device
    stop: Stop

    @property
    def device(self) -> str:
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        number = torch.get_num_threads()
        return f"the CPU with {number} thread{'s' if number > 1 else ''}"

    def step_seconds(
        self,
        stage: StageName,
        config: Config,
        settings: StageHyperparameters,
        batch_size: int,
        dvae: ImageTokenizerConfig,
    ) -> float:
        if self.stop.is_set():
            raise Stopped
        try:
            return self._measure(config, settings, batch_size, dvae)
        except (torch.OutOfMemoryError, MemoryError):
            return math.inf
        finally:
            gc.collect()
            if self.torch_device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(
        self,
        config: Config,
        settings: StageHyperparameters,
        batch_size: int,
        dvae: ImageTokenizerConfig,
    ) -> float:
        device = self.torch_device
        with torch.random.fork_rng(devices=[]):  # what a job draws does not depend on this
            with device:
                stage = synthetic_stage(config, device, dvae=dvae)
            batch = random_batch(config, batch_size, dvae=dvae)
        stage.model.train()
        whole = settings.model_copy(update={"gradient_accumulation_steps": 1})
        engine = TorchEngine(stage, whole, device)

        def step() -> None:
            loss, _ = engine.loss(batch, 0.0)
            engine.backward(loss)
            engine.step(0, 0.0)

        step()  # warms up
        seconds: list[float] = []
        began = time.perf_counter()
        while not seconds or (time.perf_counter() - began < SECONDS and len(seconds) < MOST_STEPS):
            if self.stop.is_set():
                raise Stopped
            seconds.append(timed(step, device))
        encoding = 0.0
        if isinstance(stage, TransformerStage):
            # A job encodes a picture once, and not in every step, where the pictures fit memory.
            images = batch.images.to(device)
            with torch.no_grad():
                encoding = timed(lambda: stage.dvae.encode(images), device)
        return max(median(seconds) - encoding, 0.05 * median(seconds))
