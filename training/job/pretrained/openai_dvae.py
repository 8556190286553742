"""encoder.pkl and decoder.pkl of OpenAI's DALL-E: two pickled modules."""

from __future__ import annotations

from torch import Tensor

from dalle.models.tokenizers.configs import OpenAIConfig
from training.job.pretrained.weights_file import Weights, shape_of

TRAINED_ON = 256
"""Side in pixels of the images that it was trained on."""


def convert(
    encoder: Weights, decoder: Weights, image_size: int | None
) -> tuple[OpenAIConfig, dict[str, Tensor]]:
    """Return config and weights. Raises ValueError or LookupError where they are others."""
    state: dict[str, Tensor] = {}
    renamed = {"w": "weight", "b": "bias"}  # of their convolutions
    for half, weights in (("encoder", encoder), ("decoder", decoder)):
        for name, value in weights.tensors.items():
            path, _, end = name.rpartition(".")
            state[f"{half}.{path}.{renamed.get(end, end)}"] = value
    blocks = {
        name.split(".")[3]
        for name in state
        if name.startswith("encoder.blocks.group_1.") and ".block_" in name
    }
    config = OpenAIConfig(
        image_size=image_size or TRAINED_ON,
        codebook_size=shape_of(state, "encoder.blocks.output.conv.weight", 4)[0],
        width=shape_of(state, "encoder.blocks.input.weight", 4)[0],
        decoder_input_width=shape_of(state, "decoder.blocks.input.weight", 4)[0],
        num_blocks=len(blocks),
    )
    return config, state
