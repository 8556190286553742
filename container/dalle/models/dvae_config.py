"""Config of the discrete VAE: the fields of `dvae/config.json`. No torch.

Letters: M codebooks, V codebook size, N positions of the token grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle.types import QUANTISERS, RECONSTRUCTIONS, QuantiserKind, ReconstructionKind


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Fields that rebuild a `DiscreteVAE`."""

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

    @property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""
        return self.patch_size * int(2**self.num_downsamples)

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.stride

    @property
    def num_positions(self) -> int:
        """N: positions of the token grid."""
        return self.grid_size**2
