"""Models of a job's stages: checked, their batch sizes found, and built.

Knows models and devices; the channels are in `training.job.inputs`, the losses in
`training.loop.stages`, the order of the stages in `training.job.trainer`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dalle.errors import CheckpointError, HyperparameterError
from dalle.models.clip import Clip, ClipConfig
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.legacy.build import build_transformer
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.models.legacy.transformer import LegacyTransformer
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.models.uninitialised import without_memory
from dalle.platform.limits import free_host_memory
from dalle.types import StageName
from training.config.fields import Hyperparameters, StageHyperparameters
from training.config.models import Config
from training.engine.devices import check_precision, is_emulated
from training.engine.select import device_of_new, engine_of
from training.job.inputs import Inputs
from training.loop.budget import Budget
from training.loop.checkpoints import stored_run
from training.loop.interface import Stage
from training.loop.stages import ClipStage, DVAEStage, TransformerStage, weights_hash
from training.report.job import unfinished
from training.stopping import Stopped

logger = logging.getLogger(__name__)

_MODELS: dict[type, type[nn.Module]] = {
    DVAEConfig: DiscreteVAE,
    TransformerConfig: Dalle,
    LegacyTransformerConfig: LegacyTransformer,
    ClipConfig: Clip,
}


def settings_identity(hyperparameters: Hyperparameters, name: StageName) -> dict[str, Any]:
    """Return the hyperparameters that decide what a stage computes, for its checkpoints."""
    return {
        "engine": engine_of(hyperparameters, name),
        "seed": hyperparameters.seed,
        **hyperparameters.of(name).identity(),
    }


class Components:
    """The models that a job trains, one per stage."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def check(self, names: Sequence[StageName]) -> None:
        """Check the settings of all stages before the first one is trained.

        Logs a warning for each component of the channel artefact whose training was stopped.
        Raises HyperparameterError with all problems, CaptionTooLong; Stopped.
        """
        inputs = self._inputs
        settings = {name: inputs.hyperparameters.of(name) for name in names}
        if inputs.ranks.is_first:
            for sentence in unfinished(inputs.artefact, besides=names):
                logger.warning("%s", sentence)
            for name in names:
                if name in inputs.present and not inputs.trains_on(name):
                    logger.warning(
                        "the channel artefact brings a trained %s; stage=%s does not train it on: "
                        "a new one, from random weights, replaces it%s",
                        name,
                        name,
                        "" if name == "dvae" else f". train_on={name} would train it on",
                    )
            if any(is_emulated(each.precision, inputs.device) for each in settings.values()):
                logger.warning(
                    "precision=bf16 is slower than fp32 on this CPU, which has no instructions "
                    "for it (avx512_bf16 or amx_bf16)"
                )
        problems: list[str] = []
        try:
            inputs.check_image_size()
        except HyperparameterError as error:
            problems.append(str(error))
        for name in names:
            try:
                check_precision(settings[name], inputs.device)
            except HyperparameterError as error:
                problems.append(f"{name}: {error}")
            try:
                device = device_of_new(inputs.hyperparameters, name, inputs.device)
                _check_memory(name, inputs.config(name), device)
            except HyperparameterError as error:
                problems.append(str(error))
        if problems:
            raise HyperparameterError("\n".join(problems))
        if set(names) - {"dvae"}:
            inputs.check_captions()

    def check_checkpoints(self, names: Sequence[StageName]) -> None:
        """Compare all checkpoints with the job, before a stage adds to its own.

        After `settle_batch_sizes`. Raises CheckpointError for checkpoints of another run, and where
        a larger budget would train the dVAE on under a transformer that was trained on its tokens.
        """
        inputs = self._inputs
        if not inputs.ranks.is_first:
            return
        for name in names:
            stored = stored_run(inputs.job.paths.checkpoints / name)
            if stored is not None:
                stored.require(self._known_identity(name))
        if "dvae" in names:
            self._require_finished_dvae()

    def _known_identity(self, name: StageName) -> dict[str, Any]:
        """Return the part of a stage's identity that is known before any stage is trained."""
        inputs = self._inputs
        known = settings_identity(inputs.hyperparameters, name) | {
            "data": inputs.train.totals.fingerprint,
            "num_pairs": inputs.train.totals.num_pairs,
            f"{name}_config": asdict(inputs.config(name)),
        }
        if name != "dvae":
            known["tokenizer"] = inputs.reader(name).identity()
        if inputs.trains_on(name):
            begun: nn.Module = getattr(inputs.artefact, name)
            known["trained_on_from"] = weights_hash(begun)
        if name == "transformer" and inputs.artefact.dvae is not None:
            known["dvae_weights"] = weights_hash(inputs.artefact.dvae)
        return known

    def _require_finished_dvae(self) -> None:
        """Raise CheckpointError when this job would train on a dVAE that a transformer reads."""
        inputs = self._inputs
        checkpoints = inputs.job.paths.checkpoints
        dvae, reader = stored_run(checkpoints / "dvae"), stored_run(checkpoints / "transformer")
        if dvae is None or reader is None:
            return
        settings = inputs.hyperparameters.dvae
        num_batches = max(1, inputs.train.totals.num_pairs // settings.pairs_per_step)
        budget = Budget.of(settings, num_batches)
        if dvae.is_finished and budget.progress(dvae.step, dvae.seconds) < 1:
            total, unit = dvae.budget or (dvae.step, "step")
            before = f"max_steps={total:g}" if unit == "step" else f"max_minutes={total / 60:g}"
            raise CheckpointError(
                f"the larger budget would train the dvae on from step {dvae.step:,}, and "
                f"{reader.path} was trained on the image tokens of that dvae. Nothing is changed: "
                f"set dvae_{before} to prolong the other stages alone, or give the job an empty "
                "checkpoint directory to train all of them anew"
            )

    def settle_batch_sizes(self, names: Sequence[StageName]) -> Hyperparameters:
        """Replace every batch_size=auto of these stages by a number and return the settings.

        The number is the same on every rank, and that of the checkpoints if there are any. See
        `training.memory.auto_batch`. Raises DeviceError when not one pair fits; Stopped on every
        rank when one of them is stopped.
        """
        inputs = self._inputs
        for name in names:
            settings = inputs.hyperparameters.of(name)
            if settings.batch_size != "auto":
                continue
            directory = inputs.job.paths.checkpoints / name
            stored = stored_run(directory) if inputs.ranks.is_first else None
            batch_size = inputs.ranks.share(stored and stored.identity.get("batch_size"))
            if batch_size is None:
                try:
                    share = self._find_share(name, settings)
                except Stopped:
                    share = 0  # the other ranks read it below
                shares = inputs.ranks.gather(torch.tensor([float(share)]))
                batch_size = int(shares.min()) * inputs.ranks.size
                if batch_size == 0:
                    raise Stopped
            if inputs.ranks.is_first:
                logger.info("%s: batch_size is %d", name, batch_size)
            settled = settings.model_copy(update={"batch_size": batch_size})
            inputs.hyperparameters = inputs.hyperparameters.model_copy(update={name: settled})
        return inputs.hyperparameters

    def _find_share(self, name: StageName, settings: StageHyperparameters) -> int:
        # Imported here: torch's fake tensors take seconds, which other jobs need not wait for.
        from training.memory.auto_batch import find_share
        from training.memory.estimate import Setting, StageMemory

        inputs = self._inputs
        memory = StageMemory(
            name,
            inputs.config(name),
            dvae=inputs.dvae_config(),
            device_type="cuda" if inputs.device.type == "cuda" else "cpu",
        )
        return find_share(
            memory,
            settings,
            Setting.of(inputs.hyperparameters, name, num_devices=inputs.ranks.size),
            inputs.device,
            num_pairs=inputs.train.totals.num_pairs,
            stop=inputs.stop,
        )

    def share_minutes(self, names: Sequence[StageName]) -> Hyperparameters:
        """Return the settings with the minutes of the next stage; names: it and those after it."""
        inputs = self._inputs
        inputs.hyperparameters = inputs.auto_size.share_minutes(inputs.hyperparameters, names)
        return inputs.hyperparameters

    def log_end(self) -> None:
        """Log the time that the job took of the minutes it was given, if it shared them out."""
        self._inputs.auto_size.log_end()

    def build(self, name: StageName) -> Stage | None:
        """Return a stage with its untrained model and its data; None after a stop."""
        try:
            stage = self._build(name)
        except Stopped:
            return None
        return None if self._inputs.stop.is_set() else stage

    def _build(self, name: StageName) -> Stage:
        inputs = self._inputs
        torch.manual_seed(inputs.hyperparameters.seed)
        settings = inputs.hyperparameters.of(name)
        device = device_of_new(inputs.hyperparameters, name, inputs.device)
        match inputs.config(name):
            case DVAEConfig() as config:
                dvae = DiscreteVAE(config).to(device)
                return DVAEStage(dvae, inputs.data(settings))
            case TransformerConfig() | LegacyTransformerConfig() as config:
                trained = inputs.artefact.require("dvae", "the stage transformer")
                model, begun = build_transformer(config).to(device), ""
                if inputs.trains_on("transformer"):
                    before = inputs.artefact.require("transformer", "train_on=transformer")
                    model.load_state_dict(before.state_dict())
                    begun = weights_hash(before)
                model.checkpoints_activations = settings.activation_checkpointing
                pairs = inputs.pairs_with_tokens(settings, trained)
                data = inputs.data(settings, tokenizer=inputs.tokenizer(), train_pairs=pairs)
                return TransformerStage(model, trained, data, trained_on_from=begun)
            case ClipConfig() as config:
                data = inputs.data(settings, tokenizer=inputs.reader("clip"))
                if not inputs.trains_on("clip"):
                    return ClipStage(Clip(config).to(device), data)
                clip = inputs.artefact.require("clip").requires_grad_(True).to(device)
                clip.config = config
                return ClipStage(clip, data, trained_on_from=weights_hash(clip))


def _check_memory(name: StageName, config: Config, device: torch.device) -> None:
    """Raise HyperparameterError for a model whose weights alone do not fit into this machine.

    `train --plan` tells what a whole step takes.
    """
    with without_memory():
        model = _MODELS[type(config)](config)
    num_bytes = sum(value.nbytes for value in model.state_dict().values())
    if device.type == "cuda":
        _, limit = torch.cuda.mem_get_info(device)
    else:
        limit = free_host_memory()
    if num_bytes > limit:
        raise HyperparameterError(
            f"{name}: the weights alone take {num_bytes / 1e9:,.1f} GB, and {limit / 1e9:,.1f} GB "
            "of memory are free; set a smaller size, width or num_layers, or take a larger "
            "instance"
        )
