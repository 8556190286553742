"""The dVAE's blocks and encoders: images -> the feature maps that its codebooks see.

An encoder gives one feature map per codebook. One that parts what it shows them (colours here,
patterns there) lets a code stay the same where only the other part changes, which is what a
transformer has to learn from fewer examples.
Letters: B batch, C channels, G grid size, H and W sides of a feature map, M codebooks, S image
size, P patches, p patch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.dvae_config import DVAEConfig


class PositionNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position apart; [B, C, H, W] -> the same.

    Not GroupNorm: statistics over all positions would let the rest of the image into a code that
    is to be a function of its own patch.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Feature maps are kept channels-last, so that this moves no data.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + a pointwise network of its norm and its neighbours'; [B, C, H, W] -> the same.

    The neighbours come in by a depthwise convolution, as in ConvNeXt (Liu et al. 2022): at equal
    width it costs an eighth of a dense one, and on a CPU that decides how wide one can be.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = PositionNorm(width)
        self.spatial = (
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
            if kernel_size > 1
            else nn.Identity()
        )
        self.expand = nn.Conv2d(width, width, kernel_size=1)
        self.contract = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.contract(F.relu(self.expand(self.spatial(self.norm(x)))))
        return x + added


def blocks(config: DVAEConfig, kernel_size: int) -> list[nn.Module]:
    return [ResidualBlock(config.width, kernel_size) for _ in range(config.num_blocks)]


class JointEncoder(nn.Module):
    """Images -> one feature map, which every codebook sees."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        width, kernel_size = config.width, config.encoder_kernel_size
        self.num_codebooks = config.num_codebooks
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(3 * config.patch_size**2, width, kernel_size=1),
            *blocks(config, kernel_size),
        )
        for _ in range(config.num_downsamples):
            self.layers.append(nn.Conv2d(width, width, kernel_size=2, stride=2))
            self.layers.extend(blocks(config, kernel_size))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G]"""
        return [self.layers(images * 2 - 1)] * self.num_codebooks


class SplitEncoder(nn.Module):
    """Images -> a feature map of the patches' end colours, and one of their patterns.

    The parting is that of block texture compression (S3TC, Iourcha et al. 1999): a patch is two
    end colours and, for each pixel, where it lies between them. The end colours are those of its
    darkest and its lightest pixel.
    """

    luminance: Tensor

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch_size, self.num_codebooks = config.patch_size, config.num_codebooks
        kernel_size = config.encoder_kernel_size
        self.colour_layers = nn.Sequential(
            nn.Conv2d(6, config.width, kernel_size=1), *blocks(config, kernel_size)
        )
        self.pattern_layers = nn.Sequential(
            nn.Conv2d(config.patch_size**2, config.width, kernel_size=1),
            *blocks(config, kernel_size),
        )
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
        self.register_buffer("luminance", weights, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G], the first of the colours"""
        unshuffled = F.pixel_unshuffle(images, self.patch_size)
        B, _, G, _ = unshuffled.shape
        patches = unshuffled.reshape(B, 3, -1, G, G)
        light = torch.einsum("bcpij,c->bpij", patches, self.luminance)
        darkest, lightest = light.argmin(dim=1, keepdim=True), light.argmax(dim=1, keepdim=True)
        low, high = light.gather(1, darkest), light.gather(1, lightest)
        # A flat patch has no pattern: all zeros, and not noise blown up.
        pattern = (light - low) / (high - low).clamp_min(1 / 64)
        ends = [
            patches.gather(2, index[:, None].expand(-1, 3, -1, -1, -1)).squeeze(2)
            for index in (darkest, lightest)
        ]
        colour_map = self.colour_layers(torch.cat(ends, dim=1) * 2 - 1)
        pattern_map = self.pattern_layers(pattern * 2 - 1)
        return [colour_map, *[pattern_map] * (self.num_codebooks - 1)]


class GroundEncoder(nn.Module):
    """Images -> a feature map of which pixels are drawn, and one of the colours they have.

    Drawn is what differs from the ground, the median colour of the picture's border. The colours
    of a patch go on over its undrawn pixels, so that they say nothing of the pattern: along rows
    or along columns, whichever its drawn pixels vary less by, from the nearest drawn pixel.
    """

    DRAWN_DISTANCE = 1 / 16  # from the ground in the channel that differs most; of the range 0 to 1

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch_size, self.num_codebooks = config.patch_size, config.num_codebooks
        kernel_size, pixels = config.encoder_kernel_size, config.patch_size**2
        self.pattern_layers = nn.Sequential(
            nn.Conv2d(pixels, config.width, kernel_size=1), *blocks(config, kernel_size)
        )
        self.colour_layers = nn.Sequential(
            nn.Conv2d(3 * pixels + 3, config.width, kernel_size=1), *blocks(config, kernel_size)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G], the last of the colours"""
        ground = _ground(images)  # [B, 3]
        apart = (images - ground[..., None, None]).abs().amax(dim=1, keepdim=True)
        pattern = F.pixel_unshuffle((apart > self.DRAWN_DISTANCE).to(images.dtype), self.patch_size)
        B, _, G, _ = pattern.shape
        p = self.patch_size
        drawn = pattern.permute(0, 2, 3, 1).reshape(B * G * G, p, p) > 0
        patches = F.pixel_unshuffle(images, p).permute(0, 2, 3, 1).reshape(B * G * G, 3, p, p)
        per_patch = ground.repeat_interleave(G * G, dim=0)
        colours = _continued(patches, drawn, per_patch)
        colour_inputs = torch.cat([colours.flatten(1), per_patch], dim=1)
        colour_inputs = colour_inputs.view(B, G, G, -1).permute(0, 3, 1, 2)
        pattern_map = self.pattern_layers(pattern * 2 - 1)
        colour_map = self.colour_layers(colour_inputs * 2 - 1)
        return [*[pattern_map] * (self.num_codebooks - 1), colour_map]


def build_encoder(config: DVAEConfig) -> nn.Module:
    """The encoder that a config asks for: images [B, 3, S, S] in [0, 1] -> M of [B, C, G, G]."""
    if config.ground_split:
        return GroundEncoder(config)
    return SplitEncoder(config) if config.colour_split else JointEncoder(config)


def _ground(images: Tensor) -> Tensor:
    """The median colour of the border, channel by channel: [B, 3, S, S] -> [B, 3]."""
    sides = [images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]]
    return torch.cat(sides, dim=-1).median(dim=-1).values


def _continued(patches: Tensor, drawn: Tensor, ground: Tensor) -> Tensor:
    """Patches [P, 3, p, p] with the colours of drawn pixels (bool [P, p, p]) on all others too.

    ground: [P, 3], the colour of a patch in which nothing is drawn.
    """
    weights = drawn.to(patches.dtype)[:, None]
    spread = []
    for axis in (3, 2):  # within each row, within each column
        mean = (patches * weights).sum(axis, keepdim=True)
        mean = mean / weights.sum(axis, keepdim=True).clamp_min(1)
        spread.append(((patches - mean).square() * weights).sum(dim=(1, 2, 3)))
    by_columns = (spread[1] < spread[0])[:, None, None]
    patches = torch.where(by_columns[:, None], patches.mT, patches)
    drawn = torch.where(by_columns, drawn.mT, drawn)

    patches = _from_nearest(patches, drawn)
    # Rows are now whole or empty; the empty ones take the nearest whole one.
    patches = _from_nearest(patches.mT, drawn.any(dim=2)[:, None].expand_as(drawn)).mT
    patches = torch.where(by_columns[:, None], patches.mT, patches)
    return torch.where(
        drawn.any(dim=2).any(dim=1)[:, None, None, None], patches, ground[..., None, None]
    )


def _from_nearest(patches: Tensor, known: Tensor) -> Tensor:
    """In each row of patches [P, 3, p, p], pixels not known [P, p, p] are the nearest one known."""
    place = torch.arange(known.shape[-1], device=known.device)
    apart = (place[:, None] - place).abs()  # [to, from]
    unreachable = len(place)
    nearest = torch.where(known[:, :, None], apart, unreachable).argmin(dim=-1)  # [P, p, p]
    return patches.gather(3, nearest[:, None].expand_as(patches))
