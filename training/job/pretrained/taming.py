"""Checkpoints of taming-transformers' VQGAN and GumbelVQ, whose sizes are in a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from torch import Tensor

from dalle.errors import ForeignFileError
from dalle.models.tokenizers.configs import VQGANConfig
from dalle.types import VQGANQuantiserKind
from training.job.pretrained.weights_file import Weights

MAX_YAML_BYTES = 1 << 16  # taming's have 2 kB; the reader takes seconds for a megabyte
_QUANTISERS: Mapping[str, VQGANQuantiserKind] = {"VQModel": "nearest", "GumbelVQ": "gumbel"}
"""Class that the YAML names -> how it chooses a code."""
_NOT_COMPUTED_WITH = ("loss.", "colorize")  # LPIPS and discriminator; colours of segmentations
# What the graph here has, of the settings that the original knows.
_ONLY = {"in_channels": 3, "out_ch": 3, "double_z": False}
_DEFAULTS = {"resamp_with_conv": True, "give_pre_end": False, "attn_type": "vanilla"}
_SIZES = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
_WITHOUT_EFFECT = ("dropout",)
_SHORT = Repr()
_SHORT.maxlevel = 1


def is_taming(weights: Weights) -> bool:
    """Return whether the file has taming's names."""
    return any(
        name.removeprefix("state_dict.") == "encoder.down.0.block.0.conv1.weight"
        for name in weights.tensors
    )


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # yaml has no types
    """Plain values, each written once: aliases in aliases make gigabytes of a few bytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it repeats a part by an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises ForeignFileError, also where the file makes objects or repeats a part by an alias.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ForeignFileError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > MAX_YAML_BYTES:
        raise ForeignFileError(f"{path.name} has more than {MAX_YAML_BYTES:,} bytes")
    try:
        return yaml.load(content, _Loader)  # noqa: S506 - it is a SafeLoader
    # A value that does not suit its tag can raise anything: a KeyError, an OverflowError.
    except Exception as error:
        first = f"{error}".partition("\n")[0][:200]
        if not isinstance(error, yaml.YAMLError):
            first = f"{type(error).__name__}: {first}"
        raise ForeignFileError(f"{path.name} cannot be read as YAML: {first}") from error


def convert(
    weights: Weights, content: Any, image_size: int | None
) -> tuple[VQGANConfig, dict[str, Tensor]]:
    """Return config and weights. content: of the YAML. Raises ValueError naming what is wrong."""
    state = weights.part("state_dict.") or weights.tensors
    state = {
        name: value for name, value in state.items() if not name.startswith(_NOT_COMPUTED_WITH)
    }
    config = _config(content, image_size)
    return config, state


def _config(content: Any, image_size: int | None) -> VQGANConfig:
    model = _mapping(content, "model")
    target = model.get("target")
    quantiser = _QUANTISERS.get(target.rpartition(".")[2]) if isinstance(target, str) else None
    if quantiser is None:
        raise ValueError(
            f"model.target must be VQModel or GumbelVQ of taming, got {_short(target)}"
        )
    params = _mapping(model, "params", "model.")
    if params.get("remap") is not None:
        raise ValueError("model.params.remap, a codebook in another order, is not supported")
    sizes = _mapping(params, "ddconfig", "model.params.")
    where = "model.params.ddconfig."
    for name, value in _ONLY.items():
        if sizes.get(name) != value:
            raise ValueError(f"{where}{name} must be {value}, got {_short(sizes.get(name))}")
    for name, value in sizes.items():
        is_known = name in (*_ONLY, *_SIZES, *_WITHOUT_EFFECT)
        if not is_known and value != _DEFAULTS.get(name):
            raise ValueError(f"{where}{str(name)[:80]}={_short(value)} is not supported")
    multipliers = _numbers(sizes, "ch_mult", where)
    resolution = _number(sizes, "resolution", where)
    attended = _numbers(sizes, "attn_resolutions", where)
    return VQGANConfig(
        image_size=image_size or resolution,
        codebook_size=_number(params, "n_embed", "model.params."),
        width=_number(sizes, "ch", where),
        channel_multipliers=multipliers,
        num_blocks=_number(sizes, "num_res_blocks", where),
        attention_levels=tuple(
            level for level in range(len(multipliers)) if resolution >> level in attended
        ),
        latent_channels=_number(sizes, "z_channels", where),
        code_width=_number(params, "embed_dim", "model.params."),
        quantiser=quantiser,
    )


def _short(value: Any) -> str:
    """Return a value as a message shows it; what is nested or long is left out, not cut later."""
    return str(value)[:80] if isinstance(value, str) else _SHORT.repr(value)


def _mapping(content: Any, name: str, where: str = "") -> Mapping[str, Any]:
    value = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}{name} must be a mapping, as in taming's configs")
    return value


def _number(content: Mapping[str, Any], name: str, where: str) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}{name} must be a whole number, got {_short(value)}")
    return value


def _numbers(content: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    value = content.get(name)
    if not isinstance(value, list) or len(value) > 16:
        raise ValueError(f"{where}{name} must be a list of whole numbers, got {_short(value)}")
    return tuple(_number({name: each}, name, where) for each in value)
