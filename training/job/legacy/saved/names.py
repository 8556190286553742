"""The names of a DALLE's weights in DALLE-pytorch, whose wrappers changed from version to version.

Wrappers around a branch (LayerScale, PreNorm, PreShiftToken, CachedAs) stand in a name as `.fn`,
once each; what is wrapped, and the wrappers' own weights, have the same last parts in all versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

_BRANCH = re.compile(r"transformer\.layers\.(?:layers|blocks)\.(\d+)\.(?:(0|1)|(f|g)\.net)\.(.*)")
_ENDS = {
    "to_qkv.weight": "to_qkv.weight",
    "to_out.0.weight": "to_out.weight",
    "to_out.0.bias": "to_out.bias",
    "net.0.weight": "expand.weight",
    "net.0.bias": "expand.bias",
    "net.3.weight": "contract.weight",
    "net.3.bias": "contract.bias",
    "attn_fn.master_layout": "layout",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "norm.g": "norm.gain",
    "norm_out.weight": "norm_out.weight",
    "norm_out.bias": "norm_out.bias",
    "scale": "scale",
}
_GMLP = ("sgu.", "proj_in.", "proj_out.")


@dataclass(eq=False)
class Branch:
    """Weights of one branch by the names of ours, and how its function was wrapped."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    num_wrappers: int = 0


@dataclass(eq=False)
class Layers:
    """Attention and feed-forward of every layer, in order."""

    branches: list[tuple[Branch, Branch]]
    is_reversible: bool


def split_layers(weights: Mapping[str, Tensor]) -> Layers:
    """Return the layers of a DALLE. Raises ValueError naming a weight that is unknown."""
    found: dict[tuple[int, int], Branch] = {}
    is_reversible = False
    for name, value in weights.items():
        match = _BRANCH.fullmatch(name)
        if match is None:
            continue
        number, place, letter, rest = match.groups()
        is_reversible |= letter is not None
        branch = found.setdefault((int(number), int(place or letter == "g")), Branch())
        inner = re.sub(r"^(fn\.)+", "", rest)
        if inner.startswith(_GMLP):
            raise ValueError(
                f"layer {number} is a gMLP, which replaced attention in some files of 0.11 to 1.2; "
                "that graph is not supported"
            )
        if inner not in _ENDS:
            raise ValueError(f"the weight {name} is unknown")
        branch.weights[_ENDS[inner]] = value
        if inner.startswith(("to_qkv", "net.0")):
            branch.num_wrappers = rest.count("fn.")
    num_layers = len({number for number, _ in found})
    if not num_layers:
        raise ValueError("it has no layer under transformer.layers")
    try:
        pairs = [(found[number, 0], found[number, 1]) for number in range(num_layers)]
    except KeyError as error:
        raise ValueError(f"layer {error.args[0][0]} lacks one of its two branches") from None
    return Layers(pairs, is_reversible)
