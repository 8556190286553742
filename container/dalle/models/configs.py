"""Configs of the three models: the fields of each `config.json`, checked when they are set.

No torch: a job is planned, and a wrong one refused, where no model could be built.
Letters: T text length, N positions of the image grid, M codebooks (codes per position), V codebook
size, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

from dalle.models.config_fields import Bounded, SequenceFields, TokenGrid
from dalle.types import (
    ATTENTION_KINDS,
    FEED_FORWARD_KINDS,
    QUANTISERS,
    RECONSTRUCTIONS,
    AttentionKind,
    ClipActivation,
    FeedForwardKind,
    ImageTokenizerKind,
    NormKind,
    QuantiserKind,
    ReconstructionKind,
    SquareMethod,
)


class ImageTokenizerConfig(Protocol):
    """What every config of an image tokenizer tells, whichever graph it rebuilds."""

    kind: ClassVar[ImageTokenizerKind]
    """The graph."""

    @property
    def image_size(self) -> int:
        """Side of the square image, in pixels."""

    @property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""

    @property
    def num_positions(self) -> int:
        """N: positions of the token grid."""

    @property
    def codebook_size(self) -> int:
        """V: number of codes in each codebook."""

    @property
    def num_codebooks(self) -> int:
        """M: codes per position."""


@dataclass(frozen=True, kw_only=True)
class DVAEConfig(TokenGrid):
    """Fields that rebuild a `DiscreteVAE`."""

    kind: ClassVar[ImageTokenizerKind] = "dvae"

    image_size: int = 256
    """Side of the square image, in pixels."""
    patch_size: int = 1
    """Side in pixels of the square patch that the first layer turns into one position."""
    num_downsamples: int = 3
    """How often the side is halved after the first layer."""
    width: int = 128
    """Channels of every feature map."""
    num_blocks: int = 2
    """Residual blocks after the first layer and after each halving; as many in the decoder."""
    encoder_kernel_size: int = 3
    """3 lets a code depend on neighbouring patches; 1 makes it a function of one patch, so that
    equal patches have equal tokens, which are easier for the transformer to predict."""
    decoder_kernel_size: int = 3
    """3 lets the decoder see neighbouring tokens; 1 does not."""
    codebook_size: int = 8192
    """V: number of codes in each codebook."""
    num_codebooks: int = 1
    """M: codes per position, which distinguish V to the power M patches."""
    code_width: int = 64
    """Width of one code's embedding."""
    colour_split: bool = False
    """The first codebook encodes a patch's two end colours, the others the pattern between them, so
    that a pattern has the same tokens in every colour. For drawings, logos and other images of
    few colours; needs num_codebooks > 1, patch_size > 1 and num_downsamples = 0."""
    ground_split: bool = False
    """Alternative to colour_split: the last codebook encodes a patch's colours, the others only
    which pixels differ from the background (the median colour of the image's border), so that a
    pattern has the same tokens in stripes as in one colour. For drawings on an even background."""
    quantiser: QuantiserKind = "gumbel"
    """gumbel: relaxation of the DALL-E paper. vq: nearest code, straight-through gradient."""
    reconstruction: ReconstructionKind = "mse"
    """bce suits flat graphics with hard edges; l1 and mse suit photographs."""
    kl_weight: float = 0.0
    """Weight of KL(q(code | image) || uniform), gumbel only, per code in nats."""
    commitment_weight: float = 0.25
    """Weight of the encoder's distance to its chosen code, vq only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size must be a multiple of patch_size · 2^num_downsamples = {self.stride}, "
                f"got {self.image_size}"
            )
        for name, known in (("quantiser", QUANTISERS), ("reconstruction", RECONSTRUCTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("encoder_kernel_size", "decoder_kernel_size"):
            if getattr(self, name) not in (1, 3):
                raise ValueError(f"{name} must be 1 or 3, got {getattr(self, name)}")
        if self.colour_split and self.ground_split:
            raise ValueError("colour_split and ground_split exclude each other; set one of them")
        for name in ("colour_split", "ground_split"):
            if getattr(self, name) and (
                self.num_codebooks < 2 or self.patch_size < 2 or self.num_downsamples
            ):
                raise ValueError(
                    f"{name} needs num_codebooks > 1, patch_size > 1 and num_downsamples = 0, got "
                    f"{self.num_codebooks}, {self.patch_size} and {self.num_downsamples}"
                )

    @cached_property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""
        return self.patch_size * int(2**self.num_downsamples)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(SequenceFields):
    """Fields that rebuild a `Dalle`."""

    num_codebooks: int = 1
    """M of the dVAE."""

    width: int = 512
    """W: channels of the residual stream."""
    num_layers: int = 12
    """Blocks, each of attention and feed-forward."""
    num_heads: int = 8
    """Attention heads; width is a multiple of them."""
    attention_kinds: tuple[AttentionKind, ...] = ("full",)
    """One per layer; the list repeats when there are more layers."""
    conv_kernel_size: int = 5
    """Window of the conv_like kind."""
    qk_norm: bool = True
    """Normalise queries and keys before their product (Dehghani et al. 2023, §2)."""
    norm: NormKind = "layer"
    """Normalisation before each branch and before the heads."""
    feed_forward: FeedForwardKind = "relu2"
    """Activation of the feed-forward branch."""
    feed_forward_ratio: int = 4
    """Inner width of the feed-forward branch, as a multiple of width."""
    layer_scale: float | None = None
    """Start value of a learned gain per channel on each branch; None for no gain."""
    target_position: bool = True
    """Add to each input the embedding of the grid position that it predicts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads = {self.num_heads}, got {self.width}"
            )
        if not self.attention_kinds or set(self.attention_kinds) - set(ATTENTION_KINDS):
            raise ValueError(
                f"attention_kinds must be of {ATTENTION_KINDS}, got {self.attention_kinds}"
            )
        if self.feed_forward not in FEED_FORWARD_KINDS:
            raise ValueError(
                f"feed_forward must be of {FEED_FORWARD_KINDS}, got {self.feed_forward!r}"
            )

    @cached_property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    def kind_of_layer(self, layer: int) -> AttentionKind:
        """Return the attention kind of a layer, counted from 0."""
        return self.attention_kinds[layer % len(self.attention_kinds)]


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Bounded):
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
    # What open_clip's models have otherwise than OpenAI's.
    activation: ClipActivation = "quick_gelu"
    """Of the feed-forward branches; quick_gelu is x · sigmoid(1.702 x)."""
    vision_heads: int | None = None
    """Attention heads of the vision transformer; None for one per 64 channels."""
    vision_feed_forward_width: int | None = None
    """Inner width of the vision transformer's feed-forward branches; None for 4 · vision_width."""
    text_feed_forward_width: int | None = None
    """The same of the text encoder; None for 4 · text_width."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Of red, green and blue, subtracted from images; that of OpenAI's training images."""
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """The images are divided by it."""
    squashes: bool = False
    """Whether the whole picture is resized to a square, in place of its centre; imported only."""

    @property
    def square_method(self) -> SquareMethod:
        """How pictures become the square that this model reads."""
        if self.tokenizer == "artefact":
            return "train"
        return "squash" if self.squashes else "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.patch_size is None) != isinstance(self.vision_layers, tuple):
            raise ValueError(
                "patch_size must be a number for a vision transformer and null for a ResNet, whose "
                f"vision_layers are four, got {self.patch_size} and {self.vision_layers}"
            )
        # The model class silently crops a remainder of the image, and has one head per 64 channels
        # of the image encoder (32 of a ResNet's).
        if self.patch_size is not None and self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide the image size {self.image_size}, got {self.patch_size}"
            )
        if self.patch_size is not None and self.vision_width % 64:
            raise ValueError(f"vision_width must be a multiple of 64, got {self.vision_width}")
        for name, known in (
            ("tokenizer", ("artefact", "openai")),
            ("activation", ("quick_gelu", "gelu")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.vision_heads is not None and self.vision_width % self.vision_heads:
            raise ValueError(
                f"vision_width must be a multiple of vision_heads = {self.vision_heads}, "
                f"got {self.vision_width}"
            )
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_width must be a multiple of text_heads = {self.text_heads}, "
                f"got {self.text_width}"
            )
