"""Encoders of the dVAE: images -> one feature map per codebook.

An encoder that separates colours from patterns keeps a code the same where only the other part
changes. The transformer then needs fewer examples.

Letters: B batch, C channels, G grid size, H and W sides of a feature map, M codebooks, S image
size, P patches, p patch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.configs import DVAEConfig
from dalle.models.layers import residual_blocks


def _patch_encoder(config: DVAEConfig, channels: int) -> nn.Sequential:
    """[B, channels, G, G] of one patch per position -> [B, C, G, G]"""
    first = nn.Conv2d(channels, config.width, kernel_size=1)
    return nn.Sequential(first, *residual_blocks(config, config.encoder_kernel_size))


class JointEncoder(nn.Module):
    """Images -> one feature map, shared by all codebooks."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        width, kernel_size = config.width, config.encoder_kernel_size
        self.num_codebooks = config.num_codebooks
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(3 * config.patch_size**2, width, kernel_size=1),
            *residual_blocks(config, kernel_size),
        )
        for _ in range(config.num_downsamples):
            self.layers.append(nn.Conv2d(width, width, kernel_size=2, stride=2))
            self.layers.extend(residual_blocks(config, kernel_size))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G]"""
        return [self.layers(images * 2 - 1)] * self.num_codebooks


class ColourSplitEncoder(nn.Module):
    """Images -> a feature map of the patches' end colours and one of their patterns.

    As in block texture compression (S3TC, Iourcha et al. 1999), a patch is two end colours and, for
    each pixel, a place between them. The end colours are those of the darkest and lightest pixel.
    """

    luminance: Tensor

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch_size, self.num_codebooks = config.patch_size, config.num_codebooks
        self.colour_layers = _patch_encoder(config, 6)
        self.pattern_layers = _patch_encoder(config, config.patch_size**2)
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
        self.register_buffer("luminance", weights, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G]; the first encodes the colours"""
        unshuffled = F.pixel_unshuffle(images, self.patch_size)
        B, _, G, _ = unshuffled.shape
        patches = unshuffled.reshape(B, 3, -1, G, G)
        light = torch.einsum("bcpij,c->bpij", patches, self.luminance)
        darkest, lightest = light.argmin(dim=1, keepdim=True), light.argmax(dim=1, keepdim=True)
        low, high = light.gather(1, darkest), light.gather(1, lightest)
        # The bound keeps a flat patch at zero instead of amplifying its noise.
        pattern = (light - low) / (high - low).clamp_min(1 / 64)
        ends = [
            patches.gather(2, index[:, None].expand(-1, 3, -1, -1, -1)).squeeze(2)
            for index in (darkest, lightest)
        ]
        colour_map = self.colour_layers(torch.cat(ends, dim=1) * 2 - 1)
        pattern_map = self.pattern_layers(pattern * 2 - 1)
        return [colour_map, *[pattern_map] * (self.num_codebooks - 1)]


class GroundSplitEncoder(nn.Module):
    """Images -> a feature map of which pixels are foreground and one of their colours.

    Foreground pixels differ from the background, the median colour of the image's border. Their
    colours are extended over the background pixels of a patch, so that the colour map does not
    depend on the pattern: from the nearest foreground pixel, along rows or along columns, whichever
    has less variance in the patch.
    """

    FOREGROUND_DISTANCE = 1 / 16  # least difference from the background in any channel, in [0, 1]

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch_size, self.num_codebooks = config.patch_size, config.num_codebooks
        self.pattern_layers = _patch_encoder(config, config.patch_size**2)
        self.colour_layers = _patch_encoder(config, 3 * config.patch_size**2 + 3)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G]; the last encodes the colours"""
        p = self.patch_size
        background = _border_median(images)  # [B, 3]
        distance = (images - background[..., None, None]).abs().amax(dim=1, keepdim=True)
        pattern = F.pixel_unshuffle((distance > self.FOREGROUND_DISTANCE).to(images.dtype), p)
        B, _, G, _ = pattern.shape
        foreground = pattern.permute(0, 2, 3, 1).reshape(B * G * G, p, p) > 0
        patches = F.pixel_unshuffle(images, p).permute(0, 2, 3, 1).reshape(B * G * G, 3, p, p)
        background = background.repeat_interleave(G * G, dim=0)
        colours = _extend_colours(patches, foreground, background)
        colour_inputs = torch.cat([colours.flatten(1), background], dim=1)
        colour_inputs = colour_inputs.view(B, G, G, -1).permute(0, 3, 1, 2)
        pattern_map = self.pattern_layers(pattern * 2 - 1)
        colour_map = self.colour_layers(colour_inputs * 2 - 1)
        return [*[pattern_map] * (self.num_codebooks - 1), colour_map]


def build_encoder(config: DVAEConfig) -> nn.Module:
    """Return the config's encoder: images [B, 3, S, S] in [0, 1] -> M of [B, C, G, G]."""
    if config.ground_split:
        return GroundSplitEncoder(config)
    return ColourSplitEncoder(config) if config.colour_split else JointEncoder(config)


def _border_median(images: Tensor) -> Tensor:
    """Return the median of the border pixels in each channel: [B, 3, S, S] -> [B, 3]."""
    sides = [images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]]
    return torch.cat(sides, dim=-1).median(dim=-1).values


def _extend_colours(patches: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Return patches [P, 3, p, p] with foreground colours on all pixels.

    foreground: bool [P, p, p]. background: [P, 3], the colour of a patch without foreground.
    """
    weights = foreground.to(patches.dtype)[:, None]
    variance = []
    for axis in (3, 2):  # within each row, within each column
        mean = (patches * weights).sum(axis, keepdim=True)
        mean = mean / weights.sum(axis, keepdim=True).clamp_min(1)
        variance.append(((patches - mean).square() * weights).sum(dim=(1, 2, 3)))
    by_columns = (variance[1] < variance[0])[:, None, None]
    patches = torch.where(by_columns[:, None], patches.mT, patches)
    foreground = torch.where(by_columns, foreground.mT, foreground)

    patches = _copy_nearest(patches, foreground)
    # Each row is now filled or empty; empty rows copy the nearest filled row.
    filled = foreground.any(dim=2)
    patches = _copy_nearest(patches.mT, filled[:, None].expand_as(foreground)).mT
    patches = torch.where(by_columns[:, None], patches.mT, patches)
    return torch.where(filled.any(dim=1)[:, None, None, None], patches, background[..., None, None])


def _copy_nearest(patches: Tensor, known: Tensor) -> Tensor:
    """Return patches [P, 3, p, p] with unknown pixels copied from the nearest known one of the row.

    known: bool [P, p, p]. A row without a known pixel copies its first.
    """
    column = torch.arange(known.shape[-1], device=known.device)
    distance = (column[:, None] - column).abs()  # [to, from]
    unreachable = len(column)
    nearest = torch.where(known[:, :, None], distance, unreachable).argmin(dim=-1)  # [P, p, p]
    return patches.gather(3, nearest[:, None].expand_as(patches))
