"""Image tokens that go wrong as a sampled candidate does: one picture's, from a seam on another's.

CLIP learns from them to tell a flawless picture from a nearly right one.
Knows image tokens; knows no captions, words or pixels.
Letters: B batch, N positions, M codes per position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def splice(image_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Join each picture's image tokens [B, N, M] with those of another of the batch, B > 1.

    The other is, half of the time, the one with the most tokens in common (not all), else any.
    The seam is at random among the positions at which the two differ; what is behind it is the
    other's, or what is before it. Random numbers are torch's own.
    Returns the spliced tokens [B, N, M], and bool [B]: whether they differ from the picture's own.
    """
    B, N, _ = image_tokens.shape
    device = image_tokens.device
    flat = image_tokens.flatten(1)
    agreement = torch.stack([(flat == row).float().mean(dim=1) for row in flat])  # [B, B]
    nearest = agreement.masked_fill(agreement == 1.0, -1.0).argmax(dim=1)
    anyone = (torch.arange(B, device=device) + torch.randint(1, B, (B,), device=device)) % B
    is_near = torch.rand(B, device=device) < 0.5
    other = image_tokens[torch.where(is_near, nearest, anyone)]

    differs = (image_tokens != other).any(dim=2)
    # A little for every position, so that equal pictures have a seam as well.
    seam = torch.multinomial(differs.float() + 1e-6, 1)  # [B, 1]
    position = torch.arange(N, device=device)
    is_other = torch.where(
        torch.rand(B, 1, device=device) < 0.5, position >= seam, position <= seam
    )
    spliced = torch.where(is_other[..., None], other, image_tokens)
    return spliced, (spliced != image_tokens).flatten(1).any(dim=1)
