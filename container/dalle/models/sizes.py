"""Named model sizes: one table per model, size -> config fields. No torch.

The caller adds the fields that depend on the data or on other models, such as vocabulary and text
length. "small" fits images of 32 pixels and a laptop, "base" 256 pixels and one GPU. "dalle-1.3b"
has the shape of GPT-3 XL, "dalle-12b" that of the DALL-E paper.
"""

from __future__ import annotations

from typing import Any, Literal

from dalle.types import AttentionKind

SizeName = Literal["tiny", "small", "base", "dalle-1.3b", "dalle-12b"]

# The paper's pattern (Ramesh et al. 2021, §2.3 and figure 11): rows, a column every fourth layer.
_PAPER_PATTERN: tuple[AttentionKind, ...] = ("axial_row", "axial_col", "axial_row", "axial_row")

_DROPOUT = {"dropout": 0.1, "caption_dropout": 0.1}

# For drawings of few colours.
_DVAE_DRAWINGS: dict[str, Any] = {
    "patch_size": 4,
    "num_downsamples": 0,
    "num_codebooks": 2,
    "code_width": 8,
    "quantiser": "vq",
    "reconstruction": "bce",
    "encoder_kernel_size": 1,
}
# For photographs.
_DVAE_256: dict[str, Any] = {
    "image_size": 256,
    "patch_size": 2,
    "num_downsamples": 2,
    "width": 256,
    "num_blocks": 2,
    "codebook_size": 8192,
    "num_codebooks": 1,
    "code_width": 128,
    "quantiser": "gumbel",
    "reconstruction": "l1",
}

DVAE_SIZES: dict[SizeName, dict[str, Any]] = {
    "tiny": {**_DVAE_DRAWINGS, "image_size": 16, "width": 32, "num_blocks": 1, "codebook_size": 32},
    "small": {
        **_DVAE_DRAWINGS,
        "image_size": 32,
        "width": 192,
        "num_blocks": 2,
        "codebook_size": 256,
    },
    "base": _DVAE_256,
    "dalle-1.3b": _DVAE_256,
    "dalle-12b": _DVAE_256,
}

TRANSFORMER_SIZES: dict[SizeName, dict[str, Any]] = {
    "tiny": {"width": 32, "num_layers": 2, "num_heads": 2},
    "small": {"width": 192, "num_layers": 4, "num_heads": 4, **_DROPOUT},
    "base": {
        "width": 512,
        "num_layers": 12,
        "num_heads": 8,
        "attention_kinds": (*_PAPER_PATTERN[:3], "conv_like"),
        **_DROPOUT,
    },
    "dalle-1.3b": {
        "width": 2048,
        "num_layers": 24,
        "num_heads": 32,
        "attention_kinds": _PAPER_PATTERN,
        **_DROPOUT,
    },
    "dalle-12b": {
        "width": 3968,
        "num_layers": 64,
        "num_heads": 62,
        # 63 layers of the pattern, then one of kind conv_like.
        "attention_kinds": (*(_PAPER_PATTERN * 16)[:63], "conv_like"),
        "conv_kernel_size": 11,
        **_DROPOUT,
    },
}

# OpenAI's ViT-B/32 at the image size of the data.
_CLIP_BASE: dict[str, Any] = {
    "embed_size": 512,
    "patch_size": 32,
    "vision_layers": 12,
    "vision_width": 768,
    "text_width": 512,
    "text_heads": 8,
    "text_layers": 12,
}

CLIP_SIZES: dict[SizeName, dict[str, Any]] = {
    "tiny": {
        "embed_size": 32,
        "patch_size": 4,
        "vision_layers": 1,
        "vision_width": 64,
        "text_width": 32,
        "text_heads": 2,
        "text_layers": 1,
    },
    "small": {
        "embed_size": 128,
        "patch_size": 4,
        "vision_layers": 3,
        "vision_width": 128,
        "text_width": 128,
        "text_heads": 4,
        "text_layers": 2,
    },
    "base": _CLIP_BASE,
    # The base CLIP ranks the images of larger transformers too.
    "dalle-1.3b": _CLIP_BASE,
    "dalle-12b": _CLIP_BASE,
}
