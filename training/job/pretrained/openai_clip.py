"""OpenAI's CLIP: its published files, every size, as our `Clip`."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from dalle.errors import ForeignFileError
from dalle.models.clip import Clip, ClipConfig
from training.job.pretrained.weights_file import read_tensors, to_float32


def load_openai_clip(path: Path) -> Clip:
    """Load a file of OpenAI's weights: a TorchScript archive, or a state dict in any format.

    Raises `ForeignFileError` when it is something else, or has weights that are not finite.
    """
    state = read_tensors(path)
    # The archive holds three numbers beside the weights.
    for name in ("input_resolution", "context_length", "vocab_size"):
        state.pop(name, None)
    missing = {"text_projection", "logit_scale", "token_embedding.weight"} - state.keys()
    if missing:
        raise ForeignFileError(f"{path.name} is not an OpenAI CLIP: it lacks {sorted(missing)}")
    try:
        state = to_float32(state)
    except ValueError as error:
        raise ForeignFileError(f"{path.name}: {error}") from error
    try:
        model = Clip(_config(state))
        model.model.load_state_dict(state)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise ForeignFileError(f"{path.name} is not an OpenAI CLIP: {error}") from error
    return model.eval()


def _config(state: dict[str, Tensor]) -> ClipConfig:
    """Return the config that the shapes of the weights imply, for every published model."""

    def count(prefix: str) -> int:
        depth = prefix.count(".") + 1
        return len({name.split(".")[depth] for name in state if name.startswith(prefix + ".")})

    vision_layers: int | tuple[int, int, int, int]
    if "visual.proj" in state:
        vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
        vision_layers = count("visual.transformer.resblocks")
        positions = state["visual.positional_embedding"].shape[0] - 1
        image_size = math.isqrt(positions) * patch_size
    else:
        first, second, third, fourth = (count(f"visual.layer{i}") for i in (1, 2, 3, 4))
        vision_layers, patch_size = (first, second, third, fourth), None
        vision_width = state["visual.layer1.0.conv1.weight"].shape[0]
        positions = state["visual.attnpool.positional_embedding"].shape[0] - 1
        image_size = math.isqrt(positions) * 32
    text_width = state["ln_final.weight"].shape[0]
    return ClipConfig(
        embed_size=state["text_projection"].shape[1],
        image_size=image_size,
        vision_layers=vision_layers,
        vision_width=vision_width,
        patch_size=patch_size,
        text_vocab_size=state["token_embedding.weight"].shape[0],
        text_length=state["positional_embedding"].shape[0],
        text_width=text_width,
        text_heads=text_width // 64,
        text_layers=count("transformer.resblocks"),
        tokenizer="openai",
    )
