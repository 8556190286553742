"""Published CLIPs: the file of the channel `clip` -> `Clip`.

OpenAI's          a TorchScript archive or a state dict, ViT or ResNet
open_clip's       a state dict and its open_clip_config.json, ViT or ResNet with OpenAI's text tower
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.errors import ForeignFileError
from dalle.manifest import is_hidden
from dalle.models.clip import Clip, ClipConfig
from dalle.models.uninitialised import without_memory, without_random_values
from training.job.pretrained.fill import require_weights
from training.job.pretrained.open_clip import FILE_NAME, OpenClipConfig, read_open_clip_config
from training.job.pretrained.weights_file import (
    WEIGHTS_SUFFIXES,
    read_tensors,
    shape_of,
    to_float32,
)

logger = logging.getLogger(__name__)

OPENAI_VOCABULARY = 49_408
"""Text tokens of OpenAI's byte-pair encoding."""
_LONGEST_CAPTION = 1_024
"""Text tokens; published models have 77 to 256, and the mask of attention has their square."""
_NUMBERS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""What OpenAI's archives hold beside the weights."""
_NEEDED = frozenset({"text_projection", "logit_scale", "token_embedding.weight"})

_OTHERS = (
    ("visual.trunk.", "its image tower is one of timm's"),
    ("text_decoder.", "it is a CoCa, which has a text decoder"),
    ("text.", "its text tower is a custom one (custom_text), not OpenAI's transformer"),
    ("text_model.", "it is in the layout of the package transformers; take the file of open_clip, "
     "or OpenAI's own"),
    ("visual.attn_pool.", "its image tower ends in an attentional pool"),
    ("logit_bias", "it is a SigLIP, whose loss has a bias"),
)  # fmt: skip
"""Beginning of a weight's name -> why a model that has it is not built here."""


def find_clip(directory: Path) -> list[Path]:
    """Return the weights file of a channel, and open_clip's config where it is there.

    Raises ForeignFileError for another number of weights files; other files are left alone.
    """
    names = sorted(path.name for path in directory.iterdir() if not is_hidden(path.name))
    files = [directory / name for name in names if name.endswith(WEIGHTS_SUFFIXES)]
    if len(files) != 1:
        raise ForeignFileError(
            f"the channel clip, {directory}, must hold one file of a CLIP's weights "
            f"({', '.join(WEIGHTS_SUFFIXES)}), found {names[:5]}"
        )
    return files + [directory / name for name in names if name == FILE_NAME]


def load_clip(path: Path, config: Path | None = None) -> Clip:
    """Load a published CLIP on the CPU, in evaluation mode, without gradients.

    path: weights in any format that `weights_file` reads. config: open_clip's settings; without
    them the file is taken for OpenAI's, whose activation is quick_gelu.
    Raises `ForeignFileError` when it is something else, or has weights that are not finite.
    """
    settings = None if config is None else read_open_clip_config(config)
    state, is_wrapped = _unwrapped(read_tensors(path))
    is_openais = bool(_NUMBERS & state.keys())
    state = {name: value for name, value in state.items() if name not in _NUMBERS}
    for beginning, why in _OTHERS:
        for name in sorted(state):
            if name.startswith(beginning):
                raise ForeignFileError(
                    f"{path.name} is a CLIP that is not built here: {why} (the weight {name})"
                )
    if missing := _NEEDED - state.keys():
        raise ForeignFileError(f"{path.name} is not a CLIP: it lacks {sorted(missing)}")
    if settings is None and (is_wrapped or path.name.startswith("open_clip")):
        raise ForeignFileError(
            f"{path.name} is of open_clip and does not say whether its activation is gelu or "
            f"quick_gelu; put its {FILE_NAME} into the channel clip beside it"
        )
    try:
        state = to_float32(state)
        state["logit_scale"] = state["logit_scale"].reshape(())
    except (RuntimeError, ValueError) as error:
        raise ForeignFileError(f"{path.name}: {error}") from error
    try:
        model = _build(state, settings)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise ForeignFileError(f"{path.name} is not a CLIP that is known: {error}") from error
    if settings is None and not is_openais:
        logger.warning(
            "%s does not say its activation, and is taken for OpenAI's, which is quick_gelu; for a "
            "file of open_clip put its %s beside it",
            path.name,
            FILE_NAME,
        )
    return model.eval().requires_grad_(False)


def description(config: ClipConfig) -> str:
    """Return what a published CLIP is, for the manifest: its images, captions and activation."""
    kind = "ResNet" if config.patch_size is None else f"ViT/{config.patch_size}"
    return (
        f"published CLIP, {kind}, {config.activation}: it reads images of {config.image_size} "
        "pixels, and captions by OpenAI's byte-pair encoding, not by the artefact's tokenizer"
    )


def _unwrapped(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the weights of a checkpoint, and whether they lay in one of open_clip's training."""
    wrapped = {name: value for name, value in tensors.items() if name.startswith("state_dict.")}
    state = {
        name.removeprefix("state_dict.").removeprefix("module."): value
        for name, value in (wrapped or tensors).items()
    }
    return state, state.keys() != tensors.keys()


def _build(state: Mapping[str, Tensor], settings: OpenClipConfig | None) -> Clip:
    sizes = _sizes(state)
    if settings is not None:
        sizes |= settings.fields_of(sizes)
    config = ClipConfig(**sizes, tokenizer="openai")
    if config.text_vocab_size != OPENAI_VOCABULARY:
        raise ValueError(
            f"its text tower has {config.text_vocab_size:,} text tokens, and OpenAI's byte-pair "
            f"encoding has {OPENAI_VOCABULARY:,}"
        )
    if config.text_length > _LONGEST_CAPTION:
        raise ValueError(
            f"its captions have {config.text_length:,} text tokens, more than {_LONGEST_CAPTION:,}"
        )
    with without_memory():
        expected = Clip(config).model.state_dict()
    require_weights(expected, state)
    with without_random_values():
        model = Clip(config)
    model.model.load_state_dict(state)
    return model


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of a config that the shapes of the weights imply, for every model."""

    def count(prefix: str) -> int:
        depth = prefix.count(".") + 1
        return len({name.split(".")[depth] for name in state if name.startswith(prefix + ".")})

    sizes: dict[str, Any] = {}
    if "visual.proj" in state:
        vision_width, _, patch_size, _ = shape_of(state, "visual.conv1.weight", 4)
        positions = shape_of(state, "visual.positional_embedding", 2)[0] - 1
        inner = shape_of(state, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        sizes |= {
            "vision_layers": count("visual.transformer.resblocks"),
            "image_size": math.isqrt(positions) * patch_size,
            "vision_feed_forward_width": None if inner == 4 * vision_width else inner,
        }
    else:
        patch_size = None
        vision_width = shape_of(state, "visual.layer1.0.conv1.weight", 4)[0]
        positions = shape_of(state, "visual.attnpool.positional_embedding", 2)[0] - 1
        sizes |= {
            "vision_layers": tuple(count(f"visual.layer{number}") for number in (1, 2, 3, 4)),
            "image_size": math.isqrt(positions) * 32,
        }
    text_vocab_size, text_width = shape_of(state, "token_embedding.weight", 2)
    inner = shape_of(state, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    return sizes | {
        "vision_width": vision_width,
        "patch_size": patch_size,
        "embed_size": shape_of(state, "text_projection", 2)[1],
        "text_vocab_size": text_vocab_size,
        "text_length": shape_of(state, "positional_embedding", 2)[0],
        "text_width": text_width,
        "text_heads": max(1, text_width // 64),
        "text_layers": count("transformer.resblocks"),
        "text_feed_forward_width": None if inner == 4 * text_width else inner,
    }
