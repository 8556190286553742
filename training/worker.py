"""What one process of a job does: the stages in order, each built, trained and kept.

Knows the order of stages and where their checkpoints go. What a stage is made of (data, model,
loss) is behind `Workshop`, so that nothing here imports a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import Protocol

import torch

from dalle.contract import Job
from dalle.errors import ArtefactError, DeviceError
from training.checkpoints import Checkpoints
from training.engine import TorchEngine, choose_device
from training.hyperparameters import Hyperparameters, StageName, without_effect
from training.loop import FitResult, Stage, Stop, fit
from training.metrics import Metrics

logger = logging.getLogger(__name__)

ORDER: tuple[StageName, ...] = ("dvae", "transformer", "clip")


class Workshop(Protocol):
    """The data and models of one job, opened before the first stage and finished after the last.

    It is given the job's `Stop` when it is opened, and ends its own long work early once that is
    set: 20 seconds after SIGTERM everything must be on the disk.
    """

    @property
    def present(self) -> Collection[StageName]:
        """Stages whose component an input channel brought along, trained."""
        ...

    def check(self, names: Sequence[StageName]) -> None:
        """Find what is wrong with these stages before any of them is trained.

        Raises HyperparameterError, or what the data raises, with everything that was found.
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


OpenWorkshop = Callable[[Job, Hyperparameters, torch.device, Stop], Workshop]


def run(
    job: Job, hyperparameters: Hyperparameters, stop: Stop, open_workshop: OpenWorkshop
) -> None:
    """Train what the job asks for and write the artefact.

    After a stop the artefact holds what there is by then, and the checkpoints allow to go on.
    Raises the errors of its parts; DeviceError when the device's memory is too small.
    """
    device = choose_device(job.device)
    try:
        workshop = open_workshop(job, hyperparameters, device, stop)
        names = stages_to_train(hyperparameters.stage, workshop.present)
        for name in without_effect(hyperparameters, names):
            logger.warning("hyperparameter %s has no effect: this job trains %s", name, names)
        workshop.check(names)
        with Metrics(job.paths.output_data / "metrics.jsonl", job.paths.tensorboard) as metrics:
            for name in names:
                stage = None if stop.is_set() else workshop.build(name)
                if stage is None:
                    break
                with closing(stage.batches):
                    result = _train(stage, job, hyperparameters, device, metrics, stop)
                workshop.keep(stage, result)
        workshop.finish()
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the memory of {device} is too small; set a smaller batch_size, precision=bf16, "
            "a smaller size, or take a larger instance"
        ) from error


def stages_to_train(wanted: str, present: Collection[StageName]) -> list[StageName]:
    """The stages in order; `all` is what is not present. Raises ArtefactError if it cannot be."""
    if "transformer" in present and "dvae" not in present:
        raise ArtefactError(
            "the artefact has a transformer without the dvae whose tokens it was trained on; "
            "give the channel `artefact` a model that has both, or neither"
        )
    if wanted == "all":
        missing = [name for name in ORDER if name not in present]
        if not missing:
            raise ArtefactError(
                "stage=all trains what the artefact lacks, but it has dvae, transformer and clip; "
                "set stage to the one to train anew"
            )
        return missing
    (name,) = (name for name in ORDER if name == wanted)
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
    metrics: Metrics,
    stop: Stop,
) -> FitResult:
    settings = hyperparameters.of(stage.name)
    num_parameters = sum(parameter.numel() for parameter in stage.model.parameters())
    logger.info("training %s, %s parameters", stage.name, f"{num_parameters:,}")
    result = fit(
        stage,
        hyperparameters,
        engine=TorchEngine(stage.model, settings, device),
        checkpoints=Checkpoints(
            job.paths.checkpoints / stage.name,
            identity={"seed": hyperparameters.seed, **settings.identity(), **stage.identity()},
            kept=hyperparameters.checkpoints_kept,
        ),
        metrics=metrics,
        stop=stop,
    )
    end = "finished" if result.is_finished else "stopped"
    logger.info("%s %s after %d steps, %.0f s", stage.name, end, result.step, result.seconds)
    return result
