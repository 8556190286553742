"""Files of DALLE-pytorch, whoever wrote them -> weights by their names, and hyperparameters.

{hparams, vae_params, weights, …}   train_dalle.py; `version` from 1.1.6 on
{args, dalle}                       kobiso's release
{name: tensor}                      a bare state dict, the files of early 2021
NAME-ds-cp/                         a folder of DeepSpeed's, see `deepspeed_folder`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from dalle.artefact import not_finite
from dalle.errors import ForeignFileError
from training.job.legacy.saved.relatives import Relative, relative_in
from training.job.pretrained.weights_file import Weights, missing_words, read_weights

Value = bool | int | float | str | None
Hyperparameter = Value | tuple[Value, ...]
SavedKind = Literal["train_dalle", "kobiso", "bare", "deepspeed"]

KNOWN_BY = "image_emb."
"""What the name of some weight of every DALLE begins with."""


class RelativeError(ForeignFileError):
    """The file is of another model of the family, which is known and not imported."""

    def __init__(self, name: str, relative: Relative) -> None:
        super().__init__(f"{name}: it is {relative.kind}, which is not imported: {relative.why}")
        self.relative = relative


@dataclass(frozen=True)
class SavedModel:
    """What a file or folder holds of a DALLE."""

    kind: SavedKind
    weights: Mapping[str, Tensor]
    """By the names that the package gave them."""
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)
    vae: Mapping[str, Hyperparameter] | None = None
    """Hyperparameters of a DiscreteVAE that was trained for it; None for a pretrained one."""
    version: str | None = None
    """Of the package, where the file tells."""
    vae_class: str | None = None
    names: frozenset[str] = frozenset()
    """The first parts of all names."""

    def number(self, name: str) -> int | None:
        """Return a hyperparameter that is a whole number from 1; None where there is none.

        Raises ValueError for another value.
        """
        value = self.hyperparameters.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"hparams.{name} must be a whole number from 1, got {value!r}")
        return value


def read_saved_model(path: Path) -> SavedModel:
    """Return what a file holds.

    Raises ForeignFileError for a file that is none of these, and the RelativeError among them for a
    model of the same family.
    """
    weights = read_weights(path)
    try:
        if relative := relative_in(weights):
            raise RelativeError(path.name, relative)
        saved = saved_model_of(weights)
        require_finite(saved.weights)
    except LookupError as error:
        raise ForeignFileError(f"{path.name}: {missing_words(error)}") from error
    except ValueError as error:
        raise ForeignFileError(f"{path.name}: {error}") from error
    return saved


def saved_model_of(weights: Weights) -> SavedModel:
    """Return the model of a file's content. Raises ValueError in words that follow its name."""
    names = frozenset(name.partition(".")[0] for name in (*weights.tensors, *weights.values))
    weights = Weights(unwrapped(weights.tensors), weights.values)
    if any(name.startswith("dalle." + KNOWN_BY) for name in weights.tensors):
        args = hyperparameters_of(weights, "args")
        return SavedModel("kobiso", _checked(weights.part("dalle.")), args, names=names)
    state = unwrapped(weights.part("weights."))
    if any(name.startswith(KNOWN_BY) for name in state):
        return settings_of(weights, _checked(state), "train_dalle", names)
    if any(name.startswith(KNOWN_BY) for name in weights.tensors):
        return SavedModel("bare", _checked(weights.tensors), names=names)
    if "weights" in weights.values and "hparams" in names:
        raise ValueError(
            "it is the auxiliary.pt of a DeepSpeed checkpoint, which has no weights: give the "
            "folder that it lies in"
        )
    raise ValueError(
        "it holds no DALLE of DALLE-pytorch: it has neither weights.image_emb, dalle.image_emb nor "
        f"image_emb; it begins with {', '.join(sorted(names)[:5]) or 'nothing'}"
    )


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the prefix that DataParallel and DeepSpeed put before every name."""
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a weight of the transformer that is NaN or infinite."""
    if name := not_finite({name: each for name, each in state.items() if name[:4] != "vae."}):
        raise ValueError(f"the weight {name} has values that are not finite")


def settings_of(
    weights: Weights, state: Mapping[str, Tensor], kind: SavedKind, names: frozenset[str]
) -> SavedModel:
    """Return a model with the settings that train_dalle.py writes beside the weights."""
    version, vae_class = weights.values.get("version"), weights.values.get("vae_class_name")
    return SavedModel(
        kind,
        state,
        hyperparameters_of(weights, "hparams"),
        hyperparameters_of(weights, "vae_params") or None,
        _release_of(version) if isinstance(version, str) else None,
        vae_class if isinstance(vae_class, str) else None,
        names,
    )


def _release_of(text: str) -> str:
    """Return the numbers of a version of a package: of 1.6.6.post1 or 1.6.6+local they are 1.6.6.

    A text that is no version is returned as it is.
    """
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4}){1,3})\.?[a-z+-].*", text)
    return match[1] if match else text


def hyperparameters_of(weights: Weights, where: str) -> dict[str, Hyperparameter]:
    """Return the values below a name; the entries of a list together."""
    found: dict[str, Hyperparameter] = {}
    lists: dict[str, list[Value]] = {}
    for name, value in weights.values.items():
        first, _, rest = name.partition(".")
        if first != where or not rest:
            continue
        match = re.fullmatch(r"(\w+)\.(\d+)", rest)
        if match:
            lists.setdefault(match[1], []).append(value)
        else:
            found[rest] = value
    return found | {name: tuple(values) for name, values in lists.items()}


def _checked(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for name, value in state.items():
        if value.numel() == 0 and not name.startswith("vae."):
            raise ValueError(
                f"the weight {name} is empty, which is what ZeRO-3 leaves in place of a weight: "
                "give the folder with all of DeepSpeed's shards"
            )
    return state
