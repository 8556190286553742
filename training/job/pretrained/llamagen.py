"""LlamaGen's image tokenizers VQ-8 and VQ-16: taming's VQGAN under names of its own."""

from __future__ import annotations

import re

from torch import Tensor

from dalle.models.tokenizers.configs import VQGANConfig
from training.job.pretrained.weights_file import Weights, shape_of

TRAINED_ON = 256
"""Side in pixels of the images that they were trained on."""

# Where the weights lie: the running average before the last step's, as LlamaGen itself does.
_PREFIXES = ("ema.", "model.", "state_dict.", "")
_KNOWN_BY = "encoder.conv_blocks.0.res.0.conv1.weight"
_MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}
_NOT_COMPUTED_WITH = "quantize.codebook_used"  # codes of the last training steps


def is_llamagen(weights: Weights) -> bool:
    """Return whether the file has LlamaGen's names."""
    return any(prefix + _KNOWN_BY in weights.tensors for prefix in _PREFIXES)


def convert(weights: Weights, image_size: int | None) -> tuple[VQGANConfig, dict[str, Tensor]]:
    """Return config and weights. Raises ValueError or LookupError where they are others."""
    prefix = next(prefix for prefix in _PREFIXES if prefix + _KNOWN_BY in weights.tensors)
    theirs = weights.part(prefix)
    theirs.pop(_NOT_COMPUTED_WITH, None)
    num_levels = _count(theirs, r"encoder\.conv_blocks\.(\d+)\.")
    state = {_name(name, num_levels): value for name, value in theirs.items()}
    width = shape_of(state, "encoder.conv_in.weight", 4)[0]
    widths = [
        shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(num_levels)
    ]
    attention = {int(i) for name in state for i in re.findall(r"encoder\.down\.(\d+)\.attn", name)}
    codebook_size, code_width = shape_of(state, "quantize.embedding.weight", 2)
    config = VQGANConfig(
        image_size=image_size or TRAINED_ON,
        codebook_size=codebook_size,
        width=width,
        channel_multipliers=tuple(each // width for each in widths),
        num_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attention_levels=tuple(sorted(attention)),
        latent_channels=shape_of(state, "encoder.conv_out.weight", 4)[0],
        code_width=code_width,
        quantiser="cosine",
    )
    return config, state


def _name(theirs: str, num_levels: int) -> str:
    """Return taming's name of a weight. The decoder's levels are numbered the other way round."""
    match = re.fullmatch(r"(encoder|decoder)\.(mid|conv_blocks)\.(\d+)\.(.*)", theirs)
    if match is None:
        return theirs
    half, place, number, rest = match.groups()
    if place == "mid":
        return f"{half}.mid.{_MIDDLE.get(number, number)}.{rest}"
    rest = re.sub(r"^res\.", "block.", rest)
    if half == "encoder":
        return f"encoder.down.{number}.{rest}"
    return f"decoder.up.{num_levels - 1 - int(number)}.{rest}"


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """Return how many different numbers stand in a place of the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
