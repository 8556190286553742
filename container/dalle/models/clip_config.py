"""CLIP's configuration. No torch.

Checked when it is made, so that a wrong job fails before its models are built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Fields that rebuild a `Clip`, in the order of OpenAI's class."""

    embed_size: int
    """E: width of the space that images and captions share."""
    image_size: int
    """Side in pixels that images are resized to."""
    vision_layers: int | tuple[int, int, int, int]
    """Layers of the vision transformer; four numbers mean a modified ResNet."""
    vision_width: int
    """Channels of the image encoder."""
    patch_size: int | None
    """Side of a patch in pixels; None for a ResNet."""
    text_vocab_size: int
    """Number of text token ids, end mark included."""
    text_length: int
    """Text tokens per caption, start and end marks included."""
    text_width: int
    """Channels of the text encoder."""
    text_heads: int
    """Attention heads of the text encoder."""
    text_layers: int
    """Layers of the text encoder."""
    tokenizer: Literal["artefact", "openai"] = "artefact"
    """Source of the text tokens: the artefact's tokenizer or OpenAI's byte-pair encoding."""
    likelihood_weight: float = 0.0
    """Weight of the transformer's log-likelihood (nats) beside CLIP's logit when candidates are
    ranked. 1 for drawings that their caption determines, where an unlikely image is a wrong one;
    0 for photographs, where an unlikely image may be the more interesting one."""

    def __post_init__(self) -> None:
        # The model class silently crops a remainder of the image, and has one head per 64 channels
        # of the image encoder (32 of a ResNet's).
        if self.patch_size is not None and self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide the image size {self.image_size}, got {self.patch_size}"
            )
        if self.patch_size is not None and self.vision_width % 64:
            raise ValueError(f"vision_width must be a multiple of 64, got {self.vision_width}")
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_width must be a multiple of text_heads = {self.text_heads}, "
                f"got {self.text_width}"
            )
