"""Selection of a stage's engine: torch's, or DeepSpeed's for the transformer on request."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from dalle.types import StageName
from training.config.deepspeed import TRAINED_BY_DEEPSPEED, configuration
from training.config.fields import EngineName, Hyperparameters
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine.interface import Engine, Trainable
from training.engine.torch_engine import TorchEngine

logger = logging.getLogger(__name__)


def engine_of(hyperparameters: Hyperparameters, stage: StageName) -> EngineName:
    """Return the name of the engine that trains a stage of the job."""
    return hyperparameters.engine if stage in TRAINED_BY_DEEPSPEED else "torch"


def device_of_new(
    hyperparameters: Hyperparameters, stage: StageName, device: torch.device
) -> torch.device:
    """Return where to make a stage's model: with ZeRO 3 it may be too large for the device."""
    is_by_deepspeed = engine_of(hyperparameters, stage) == "deepspeed"
    is_shared_out = is_by_deepspeed and hyperparameters.zero_stage == 3
    return torch.device("cpu") if is_shared_out else device


def check_engine(
    hyperparameters: Hyperparameters,
    stages: Sequence[StageName],
    device: torch.device,
    num_ranks: int,
) -> None:
    """Raise HyperparameterError when DeepSpeed refuses its configuration, before any training."""
    for stage in stages:
        if engine_of(hyperparameters, stage) == "deepspeed":
            from training.engine.deepspeed_engine import check_config

            config = configuration(
                hyperparameters,
                hyperparameters.of(stage),
                num_ranks=num_ranks,
                num_parameters=1,
                is_on_cpu=device.type == "cpu",
            )
            check_config(config, device)


def select_engine(
    stage: Trainable,
    name: StageName,
    hyperparameters: Hyperparameters,
    device: torch.device,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Engine:
    """Return the engine for one stage of a job. Raises HyperparameterError."""
    settings = hyperparameters.of(name)
    if engine_of(hyperparameters, name) == "deepspeed":
        # Imported here: only the engine needs DeepSpeed's own import, which takes seconds.
        from training.engine.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(stage, hyperparameters, settings, device, ranks)
    if hyperparameters.engine == "deepspeed":
        logger.info("%s is trained by torch's engine; DeepSpeed is for the transformer", name)
    return TorchEngine(stage, settings, device, ranks)
