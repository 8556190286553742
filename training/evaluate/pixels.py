"""How far images are from the real ones, pixel by pixel: what a nearest picture does not tell.

Letters: B images, S image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

CLOSE = 32  # of 255: a difference that is not seen at once
MOST_PSNR = 100.0  # dB, of equal images

_WINDOW, _SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian
_STABILISERS = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)
_CHUNK = 64  # images at once


@dataclass(frozen=True, kw_only=True)
class PixelScore:
    """Means over some images.

    error: absolute difference of a value, 0 to 255.
    close: share of the images in which no value of any pixel is off by more than `CLOSE`.
    psnr: peak signal-to-noise ratio of each image in dB, at most `MOST_PSNR`.
    ssim: structural similarity, -1 to 1 (Wang et al., IEEE Transactions on Image Processing, 2004).
    """

    error: float
    close: float
    psnr: float
    ssim: float


@dataclass(frozen=True)
class PixelErrors:
    """The same of each image, [B] each."""

    error: Tensor
    close: Tensor
    psnr: Tensor
    ssim: Tensor

    def of(self, rows: Tensor) -> PixelErrors:
        """Return those of some images."""
        return PixelErrors(*(getattr(self, each.name)[rows] for each in fields(self)))

    def mean(self) -> PixelScore:
        """Return the means; of at least one image."""
        return PixelScore(
            **{each.name: float(getattr(self, each.name).mean()) for each in fields(self)}
        )


def join(parts: Sequence[PixelErrors]) -> PixelErrors:
    """Return the errors of several batches as of one; at least one batch."""
    names = [each.name for each in fields(PixelErrors)]
    return PixelErrors(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def compare_pixels(images: Tensor, real: Tensor) -> PixelErrors:
    """Compare images uint8 [B, 3, S, S] with as many real ones, each with its own; B at least 1."""
    chunks = (slice(start, start + _CHUNK) for start in range(0, len(images), _CHUNK))
    return join([_compare(images[each].double(), real[each].double()) for each in chunks])


def _compare(images: Tensor, real: Tensor) -> PixelErrors:
    off = (images - real).abs().flatten(1)
    mean_square = off.square().mean(dim=1)
    psnr = 10 * torch.log10(255**2 / mean_square)  # inf of equal images
    return PixelErrors(
        error=off.mean(dim=1),
        close=(off.amax(dim=1) <= CLOSE).double(),
        psnr=psnr.clamp(max=MOST_PSNR),
        ssim=structural_similarity(images, real),
    )


def structural_similarity(images: Tensor, real: Tensor) -> Tensor:
    """Return the mean SSIM of each pair of images [B, 3, S, S] with values 0 to 255: [B].

    Gaussian windows that lie wholly within the image; of images below 11 pixels one smaller window.
    """
    channels, size = images.shape[1], min(_WINDOW, images.shape[-1])
    offsets = torch.arange(size, dtype=images.dtype) - (size - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).expand(channels, 1, size)

    def blurred(values: Tensor) -> Tensor:
        rows = F.conv2d(values, weights[:, :, None], groups=channels)
        return F.conv2d(rows, weights[..., None], groups=channels)

    mean, real_mean = blurred(images), blurred(real)
    variance = blurred(images**2) - mean**2
    real_variance = blurred(real**2) - real_mean**2
    covariance = blurred(images * real) - mean * real_mean
    c1, c2 = _STABILISERS
    luminance = (2 * mean * real_mean + c1) / (mean**2 + real_mean**2 + c1)
    structure = (2 * covariance + c2) / (variance + real_variance + c2)
    return (luminance * structure).flatten(1).mean(dim=1)
