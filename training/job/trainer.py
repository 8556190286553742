"""Training of a job in one process: its stages in order, each built, trained and kept.

inputs -> components.build -> loop.fit -> output.keep, for each stage; then output.finish
Knows the order of the stages and where their checkpoints go; knows nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from dalle.errors import DeviceError, HyperparameterError, JobError
from dalle.platform.environment import Job
from dalle.types import StageName
from training.config.fields import Hyperparameters
from training.config.hyperparameters import without_effect
from training.config.with_channels import stages_to_train
from training.data.sharded import on_all_ranks
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.engine.select import check_engine, select_engine
from training.job.components import Components, settings_identity
from training.job.inputs import Inputs
from training.job.output import Output
from training.loop.checkpoints import Checkpoints
from training.loop.interface import FitResult, Stage
from training.loop.loop import fit
from training.loop.metrics import Metrics
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Trainer:
    """One rank of a job: trains what the job asks for and writes the artefact.

    After a stop the artefact holds the models there are by then, and the checkpoints allow to go
    on. `run` raises the errors of its parts; DeviceError when the device's memory is too small.
    """

    job: Job
    hyperparameters: Hyperparameters
    stop: Stop
    _: KW_ONLY
    device: torch.device
    ranks: ProcessGroup = SINGLE_PROCESS

    def run(self) -> None:
        """Train all stages of the job."""
        try:
            self._run()
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"the memory of {self.device} is too small; set a smaller batch_size, "
                "precision=bf16, a smaller size, or take a larger instance"
            ) from error

    def _run(self) -> None:
        ranks, device = self.ranks, self.device
        try:
            inputs, components, names = on_all_ranks(ranks, self._open)
            self.hyperparameters = components.settle_batch_sizes(names)
        except Stopped:  # on all ranks
            logger.warning("stopped before there was anything to train")
            return
        require_equal_shares(self.hyperparameters, names, ranks.size)  # those of checkpoints too
        check_engine(self.hyperparameters, names, device, ranks.size)
        output = Output(inputs, names)
        components.check_checkpoints(names)
        paths = self.job.paths
        with (
            Metrics(paths.output_data / "metrics.jsonl", paths.tensorboard)
            if ranks.is_first
            else nullcontext()
        ) as metrics:
            for name in names:
                stage = None if ranks.any(self.stop.is_set()) else components.build(name)
                if ranks.any(stage is None) or stage is None:
                    break
                self.hyperparameters = components.share_minutes(names[names.index(name) :])
                with closing(stage.batches):
                    result = self._train(stage, metrics)
                output.keep(stage, result)
        output.finish()
        components.log_end()

    def _open(self) -> tuple[Inputs, Components, list[StageName]]:
        """Return the channels and the stages to train, after all checks. Raises Stopped."""
        inputs = Inputs(self.job, self.hyperparameters, self.device, self.stop, self.ranks)
        components = Components(inputs)
        self.hyperparameters = inputs.hyperparameters  # with what size=auto has chosen
        kept = [each for each in inputs.present if not self.hyperparameters.trains_on(each)]
        names = stages_to_train(self.hyperparameters.stage, kept)
        if self.ranks.is_first:
            unused = without_effect(self.hyperparameters, names, inputs.present, self.job.channels)
            for name, why in unused.items():
                logger.warning("hyperparameter %s has no effect: %s", name, why)
        require_equal_shares(self.hyperparameters, names, self.ranks.size)
        components.check(names)
        return inputs, components, names

    def _train(self, stage: Stage, metrics: Metrics | None) -> FitResult:
        hyperparameters, name = self.hyperparameters, stage.name
        num_parameters = sum(parameter.numel() for parameter in stage.model.parameters())
        logger.info("training %s, %s parameters", name, f"{num_parameters:,}")
        identity = {**settings_identity(hyperparameters, name), **stage.identity()}
        require_equal_everywhere(identity, self.ranks)
        result = fit(
            stage,
            hyperparameters,
            engine=select_engine(stage, name, hyperparameters, self.device, self.ranks),
            checkpoints=Checkpoints(
                self.job.paths.checkpoints / name,
                identity=identity,
                kept=hyperparameters.checkpoints_kept,
            ),
            metrics=metrics,
            stop=self.stop,
            ranks=self.ranks,
        )
        end = "finished" if result.is_finished else "stopped"
        logger.info("%s %s after %d steps, %.0f s", name, end, result.step, result.seconds)
        if result.kept_step < result.step:
            logger.info("%s: the weights of step %d, the best validation", name, result.kept_step)
        return result


def require_equal_shares(
    hyperparameters: Hyperparameters, names: Sequence[StageName], num_ranks: int
) -> None:
    """Raise HyperparameterError for batches that do not divide evenly among the ranks."""
    problems = []
    for name in names:
        settings = hyperparameters.of(name)
        num_parts = settings.gradient_accumulation_steps
        if settings.batch_size == "auto":
            continue
        if settings.batch_size % (num_ranks * num_parts):
            times = "" if num_parts == 1 else f", times gradient_accumulation_steps {num_parts}"
            problems.append(
                f"{name}: batch_size must be a multiple of {num_ranks}, the number of devices on "
                f"all of the job's hosts{times}, got {settings.batch_size}"
            )
    if problems:
        raise HyperparameterError("\n".join(problems))


def require_equal_everywhere(identity: Mapping[str, Any], ranks: ProcessGroup) -> None:
    """Raise JobError when this rank would compute something else than the first one."""
    first = ranks.share(dict(identity))
    differences = [
        f"its {name} is {identity.get(name)!r}, the first host's is {first.get(name)!r}"
        for name in sorted({*identity, *first})
        if identity.get(name) != first.get(name)
    ]
    if differences:
        raise JobError(
            f"this host differs from the first one: {'; '.join(differences)}. All hosts need the "
            "same hyperparameters, and whole channels (S3DataDistributionType FullyReplicated) or "
            "parts that the job says to be parts (ShardedByS3Key)"
        )
