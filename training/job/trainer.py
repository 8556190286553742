"""What one process of a job does: the stages in order, each built, trained and kept.

Knows the order of stages and where their checkpoints go. What a stage is made of (data, model,
loss) is behind `Workshop`, so that nothing here imports a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch

from dalle.errors import ArtefactError, DeviceError, HyperparameterError, JobError
from dalle.platform.environment import Job
from dalle.types import STAGES, ComponentName, StageName
from training.config.hyperparameters import Hyperparameters, without_effect
from training.distributed.process_group import ALONE, Ranks
from training.engine.select import check_engine, choose_engine, engine_of
from training.loop.checkpoints import Checkpoints
from training.loop.loop import FitResult, Stage, fit
from training.loop.metrics import Metrics, NoMetrics
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)


class Workshop(Protocol):
    """The data and models of one job, opened before the first stage and finished after the last.

    Every rank has one, and reads and prepares the same; only the first rank's writes anything.
    It is given the job's `Stop` when it is opened, and ends its own long work early once that is
    set: 20 seconds after SIGTERM everything must be on the disk. Opening it and `check` raise
    Stopped then: nothing has been trained yet.
    """

    @property
    def present(self) -> Collection[ComponentName]:
        """Components that an input channel brought along."""
        ...

    def check(self, names: Sequence[StageName]) -> None:
        """Find what is wrong with these stages before any of them is trained.

        Raises HyperparameterError, or what the data raises, with everything that was found.
        """
        ...

    def settle(self, names: Sequence[StageName]) -> Hyperparameters:
        """The job's hyperparameters with a number for every batch_size=auto of these stages.

        The same on every rank, and that of the checkpoints where there are any. Raises
        DeviceError when not even one pair fits; Stopped on every rank when one is stopped.
        """
        ...

    def build(self, name: StageName) -> Stage | None:
        """The stage's data and its untrained model, on the device.

        Uses the components that are present or kept (the transformer's dVAE). None when a stop
        was asked for while it was being prepared.
        """
        ...

    def keep(self, stage: Stage, result: FitResult) -> None:
        """Take the trained model (stage.model, in evaluation mode) into the artefact."""
        ...

    def finish(self) -> None:
        """Write the artefact into the model directory, and the report if no stop was asked for."""
        ...


OpenWorkshop = Callable[[Job, Hyperparameters, torch.device, Stop, Ranks], Workshop]


def run(
    job: Job,
    hyperparameters: Hyperparameters,
    stop: Stop,
    open_workshop: OpenWorkshop,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> None:
    """Train what the job asks for and write the artefact, as one of the job's ranks.

    After a stop the artefact holds what there is by then, and the checkpoints allow to go on.
    Raises the errors of its parts; DeviceError when the device's memory is too small.
    """
    try:
        try:
            workshop = open_workshop(job, hyperparameters, device, stop, ranks)
            names = _prepared(workshop, hyperparameters, ranks)
        except Stopped:
            names = None
        # One rank may be stopped where another is just done; they go on together or not at all.
        if ranks.any(names is None) or names is None:
            logger.warning("stopped before there was anything to train")
            return
        try:
            hyperparameters = workshop.settle(names)
        except Stopped:  # of all ranks alike
            logger.warning("stopped before there was anything to train")
            return
        require_equal_shares(hyperparameters, names, ranks.size)  # those of checkpoints are new
        check_engine(hyperparameters, names, device, ranks.size)
        with _metrics(job, ranks) as metrics:
            for name in names:
                stage = None if ranks.any(stop.is_set()) else workshop.build(name)
                if ranks.any(stage is None) or stage is None:
                    break
                with closing(stage.batches):
                    result = _train(stage, job, hyperparameters, device, metrics, stop, ranks)
                workshop.keep(stage, result)
        workshop.finish()
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the memory of {device} is too small; set a smaller batch_size, precision=bf16, "
            "a smaller size, or take a larger instance"
        ) from error


def _prepared(
    workshop: Workshop, hyperparameters: Hyperparameters, ranks: Ranks
) -> list[StageName]:
    """The stages to train, with all that is wrong with them found. Raises Stopped."""
    names = stages_to_train(hyperparameters.stage, workshop.present)
    if ranks.is_first:
        for name, why in without_effect(hyperparameters, names, workshop.present).items():
            logger.warning("hyperparameter %s has no effect: %s", name, why)
    require_equal_shares(hyperparameters, names, ranks.size)
    workshop.check(names)
    return names


def require_equal_shares(
    hyperparameters: Hyperparameters, names: Sequence[StageName], num_ranks: int
) -> None:
    """Raises HyperparameterError for batches that cannot be shared out among the ranks."""
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
        raise HyperparameterError("\n".join(problems), field="batch_size")


def require_equal_everywhere(identity: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises JobError when this rank would compute something else than the first."""
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


def stages_to_train(wanted: str, present: Collection[ComponentName]) -> list[StageName]:
    """The stages in order; `all` is what is not present. Raises ArtefactError if it cannot be."""
    if "transformer" in present and "dvae" not in present:
        raise ArtefactError(
            "the artefact has a transformer without the dvae whose tokens it was trained on; "
            "give the channel `artefact` a model that has both, or neither"
        )
    if wanted == "all":
        missing = [name for name in STAGES if name not in present]
        if not missing:
            raise ArtefactError(
                "stage=all trains what the artefact lacks, but it has dvae, transformer and clip; "
                "set stage to the one to train anew"
            )
        return missing
    (name,) = (name for name in STAGES if name == wanted)
    if name == "transformer" and "dvae" not in present:
        raise ArtefactError(
            "stage=transformer needs a trained dvae; give one in the channel `artefact`, "
            "or set stage=all"
        )
    if name == "dvae" and "transformer" in present:
        raise ArtefactError(
            "stage=dvae would leave the artefact's transformer without the tokens it was trained "
            "on; leave out the channel `artefact`"
        )
    return [name]


def _train(
    stage: Stage,
    job: Job,
    hyperparameters: Hyperparameters,
    device: torch.device,
    metrics: Metrics | NoMetrics,
    stop: Stop,
    ranks: Ranks,
) -> FitResult:
    settings = hyperparameters.of(stage.name)
    num_parameters = sum(parameter.numel() for parameter in stage.model.parameters())
    logger.info("training %s, %s parameters", stage.name, f"{num_parameters:,}")
    identity = {
        "engine": engine_of(hyperparameters, stage.name),
        "seed": hyperparameters.seed,
        **settings.identity(),
        **stage.identity(),
    }
    require_equal_everywhere(identity, ranks)
    result = fit(
        stage,
        hyperparameters,
        engine=choose_engine(stage, stage.name, hyperparameters, device, ranks),
        checkpoints=Checkpoints(
            job.paths.checkpoints / stage.name,
            identity=identity,
            kept=hyperparameters.checkpoints_kept,
        ),
        metrics=metrics,
        stop=stop,
        ranks=ranks,
    )
    end = "finished" if result.is_finished else "stopped"
    logger.info("%s %s after %d steps, %.0f s", stage.name, end, result.step, result.seconds)
    return result


def _metrics(job: Job, ranks: Ranks) -> Metrics | NoMetrics:
    if not ranks.is_first:
        return NoMetrics()
    return Metrics(job.paths.output_data / "metrics.jsonl", job.paths.tensorboard)
