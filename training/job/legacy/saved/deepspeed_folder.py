"""A folder that train_dalle.py writes under DeepSpeed, NAME-ds-cp/ -> `SavedModel`.

    auxiliary.pt                                   hyperparameters
    latest                                         name of the newest step's folder
    global_step*/mp_rank_00_model_states.pt        weights, under `module`
    global_step*/zero_pp_rank_*_model_states.pt    under ZeRO-3: names and shapes, empty weights,
    global_step*/zero_pp_rank_*optim_states.pt     and each rank's share of the flat weights

DeepSpeed itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dalle.errors import ForeignFileError
from training.job.legacy.saved.saved_model import (
    KNOWN_BY,
    SavedModel,
    require_finite,
    settings_of,
    unwrapped,
)
from training.job.pretrained.unpickler import num_values_of
from training.job.pretrained.weights_file import Weights, read_weights

_FLAT = "optimizer_state_dict.fp32_flat_groups."
# One number, or one of each group of weights.
_COUNT = re.compile(r"optimizer_state_dict\.partition_count(\.\d+)?")
_MINDALLE = "stage2_last.ckpt"


def read_deepspeed_folder(folder: Path) -> SavedModel:
    """Return what the folder's newest step holds. Raises ForeignFileError naming what is wrong."""
    step = _newest_step(folder)
    states = sorted(step.glob("*model_states.pt"), key=_rank_of)
    if not states:
        raise ForeignFileError(f"{folder.name}: {step.name} has no *model_states.pt")
    if len({match[1] for each in states if (match := re.search(r"mp_rank_(\d+)", each.name))}) > 1:
        raise ForeignFileError(
            f"{folder.name}: {step.name} has the parts of several mp_rank; only whole layers are "
            "supported"
        )
    content = read_weights(states[0])
    auxiliary = folder / "auxiliary.pt"
    settings = read_weights(auxiliary) if auxiliary.is_file() else content
    try:
        state = _module(content)
        if any(value.numel() == 0 for value in state.values()):
            state = _consolidated(content, state, step) | _frozen(content, states)
        names = frozenset(name.partition(".")[0] for name in settings.values)
        require_finite(state)
        return settings_of(settings, state, "deepspeed", names)
    except ValueError as error:
        raise ForeignFileError(f"{folder.name}: {error}") from error


def _newest_step(folder: Path) -> Path:
    """Return the folder of the newest step: what `latest` names, or the greatest number."""
    latest = folder / "latest"
    steps = [each for each in folder.glob("global_step*") if each.is_dir()]
    if latest.is_file():
        with latest.open("rb") as file:
            name = file.read(200).decode("utf-8", errors="replace").strip()
        named = [each for each in steps if each.name == name]
        if not named:
            raise ForeignFileError(f"{folder.name}: latest names {name!r}, which is not there")
        return named[0]
    if not steps and (folder / _MINDALLE).is_file():
        raise ForeignFileError(
            f"{folder.name} is a folder of minDALL-E's: give the file {_MINDALLE} in it"
        )
    if not steps:
        raise ForeignFileError(
            f"{folder.name} has no global_step*: it is no folder of a DeepSpeed checkpoint"
        )
    return max(steps, key=lambda each: int("".join(re.findall(r"\d+", each.name)) or 0))


def _rank_of(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)", path.name)
    return int(match[1]) if match else -1


def _module(content: Weights) -> dict[str, Tensor]:
    state = unwrapped(content.part("module."))
    if not any(name.startswith(KNOWN_BY) for name in state):
        raise ValueError("its module holds no DALLE of DALLE-pytorch")
    return state


def _consolidated(content: Weights, state: Mapping[str, Tensor], step: Path) -> dict[str, Tensor]:
    """Return whole weights from the ranks' shares, and what was whole before.

    Each weight is cut into as many equal parts as there are ranks, the last ones padded; a rank's
    flat weights are its parts one after another.
    """
    shapes = _shapes(content)
    paths = sorted(step.glob("*optim_states.pt"), key=_rank_of)
    if not paths or not shapes:
        raise ValueError(
            "its weights are empty, as under ZeRO-3, and the shards *optim_states.pt of all ranks "
            f"are not beside them in {step.name}"
        )
    shards = _shards(paths)
    whole = {name: value for name, value in state.items() if value.numel()}
    offset = 0
    for name, shape in shapes.items():
        try:
            num_values = num_values_of(shape)
        except ForeignFileError as error:
            raise ValueError(f"param_shapes, the weight {name}: {error}") from None
        part = -(-num_values // len(shards))
        if any(offset + part > len(shard) for shard in shards):
            raise ValueError(f"the shards end before the weight {name}: some ranks are missing")
        parts = [shard[offset : offset + part] for shard in shards]
        whole[name] = torch.cat(parts)[:num_values].reshape(shape)
        offset += part
    if any(bool(shard[offset:].any()) for shard in shards):
        raise ValueError(
            f"the shards go on after the last weight of param_shapes: {offset:,} values of each "
            "are read, and the rest is no padding"
        )
    for name, value in state.items():
        if name not in whole and not name.startswith("vae."):
            raise ValueError(f"the weight {name} is in no shard")
        whole.setdefault(name, value)
    return whole


def _shards(paths: Sequence[Path]) -> list[Tensor]:
    """Return the flat weights of all ranks. Raises ValueError for others than all of one save."""
    ranks = [_rank_of(path) for path in paths]
    if ranks != [*range(len(paths))]:
        raise ValueError(
            f"the ranks of the shards *optim_states.pt must be 0, 1, 2, …, found {ranks[:20]}"
        )
    return [_flat(path, len(paths)) for path in paths]


def _flat(path: Path, num_ranks: int) -> Tensor:
    """Return a rank's flat weights. Raises ValueError where it has none, or is of other ranks."""
    content = read_weights(path)
    counts = [
        value
        for name, value in content.values.items()
        if _COUNT.fullmatch(name) and isinstance(value, int)
    ]
    if max(counts, default=0) != num_ranks:
        raise ValueError(
            f"{path.name} has the partition_count {counts[:5] or 'of none'}, and there are "
            f"{num_ranks} shards *optim_states.pt: they must be all of one save, and no others"
        )
    groups = [value for name, value in content.tensors.items() if name.startswith(_FLAT)]
    if not groups:
        raise ValueError(f"{path.name} has no fp32_flat_groups, the shares of ZeRO-3")
    return torch.cat([group.flatten() for group in groups])


def _frozen(content: Weights, states: Sequence[Path]) -> dict[str, Tensor]:
    """Return the weights that were not trained, the VAE's: each rank has a part of each.

    Empty where the version of DeepSpeed did not keep them.
    """
    shapes = _shapes(content, "frozen_param_shapes")
    ranks = [read_weights(path).part("frozen_param_fragments.") for path in states if shapes]
    whole = {}
    for name, shape in shapes.items():
        try:
            num_values = num_values_of(shape)
        except ForeignFileError as error:
            raise ValueError(f"frozen_param_shapes, the weight {name}: {error}") from None
        values = torch.cat(
            [torch.empty(0), *(rank[name].flatten() for rank in ranks if name in rank)]
        )
        if len(values) < num_values:
            raise ValueError(
                f"frozen_param_fragments end before the weight {name}: some ranks are missing"
            )
        whole[name] = values[:num_values].reshape(shape)
    return whole


def _shapes(content: Weights, where: str = "param_shapes") -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights in the order of the shards."""
    found: dict[str, list[int]] = {}
    for name, value in content.values.items():
        match = re.fullmatch(rf"{where}\.(?:\d+\.)?(.+)\.\d+", name)
        if match and isinstance(value, int):
            found.setdefault(match[1].removeprefix("module."), []).append(value)
    return {name: tuple(shape) for name, shape in found.items()}
