"""The reference that the engine's steps are tested against: one request, position by position.

Letters: K candidates, T text length, N positions, M codes per position, V codebook size,
P primed positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.sampling import SamplingOptions, image_noise_keys, sample_tokens
from dalle.models.layers import KeyValueCache
from dalle.models.transformer import PADDING, Dalle


@dataclass(frozen=True)
class SampledTokens:
    """Sampled images as tokens."""

    image_tokens: Tensor
    """[K, N, M] int64 in [0, V)."""
    log_likelihood: Tensor
    """[K] float32: log p of the sampled tokens given the caption, in nats, before temperature,
    filters and guidance; primed positions are not counted."""


@torch.inference_mode()
def sample_image_tokens(
    model: Dalle,
    text_tokens: Tensor,
    *,
    candidates: Sequence[int],
    seed: int,
    options: SamplingOptions | None = None,
    prime_tokens: Tensor | None = None,
) -> SampledTokens:
    """Sample the image tokens of each of the numbered candidates.

    text_tokens: [1, T] int64, one caption for all, or [K, T], a caption for each; not modified.
    candidates: their numbers; candidate k of a seed and a caption is the same image whichever
    others are sampled beside it. prime_tokens: [P, M], the first P positions in raster order, kept
    as they are.
    """
    options = options or SamplingOptions()
    config = model.config
    N, M, K = config.num_positions, config.num_codebooks, len(candidates)
    device = text_tokens.device
    primed = 0 if prime_tokens is None else len(prime_tokens)
    image_tokens = torch.zeros(K, N, M, dtype=torch.int64, device=device)
    log_likelihood = torch.zeros(K, device=device)
    noise_keys = torch.from_numpy(
        np.stack([image_noise_keys(seed, k, N * M).reshape(N, M) for k in candidates])
    ).to(device)
    if prime_tokens is not None:
        image_tokens[:, :primed] = prime_tokens
        if primed == N:
            return SampledTokens(image_tokens, log_likelihood)

    branches = [_Branch(model, text_tokens, prime_tokens, K)]
    if options.guidance_scale != 1.0:
        no_caption = torch.full_like(text_tokens, PADDING)
        branches.append(_Branch(model, no_caption, prime_tokens, K))
    for position in range(primed, N):
        codes = image_tokens[:, position]
        for m in range(M):
            logits = [branch.code_logits(m, codes) for branch in branches]
            blank = logits[1] if len(logits) == 2 else None
            codes[:, m], log_p = sample_tokens(
                logits[0], noise_keys[:, position, m], options, blank
            )
            log_likelihood += log_p
        if position + 1 < N:
            for branch in branches:
                branch.advance(codes, position)
    return SampledTokens(image_tokens, log_likelihood)


class _Branch:
    """One caption's pass through the model: its cache and its last hidden state."""

    def __init__(
        self, model: Dalle, text_tokens: Tensor, prime_tokens: Tensor | None, num_candidates: int
    ) -> None:
        self.model = model
        rows = len(text_tokens)
        if rows not in (1, num_candidates):
            raise ValueError(f"text_tokens must have 1 or {num_candidates} rows, got {rows}")
        prime = None if prime_tokens is None else prime_tokens.expand(rows, -1, -1)
        self.cache = model.new_cache(rows)
        self.hidden = model.prefill(text_tokens, prime, self.cache)
        if rows < num_candidates:
            # A caption that all candidates share is computed once, in one row.
            prefix, self.cache = self.cache, model.new_cache(num_candidates)
            copy_prefix(prefix, self.cache)
            self.hidden = self.hidden.expand(num_candidates, -1)

    def code_logits(self, m: int, codes: Tensor) -> Tensor:
        """Logits [K, V] of code m of the position, given its codes before m."""
        return self.model.code_logits(self.hidden, m, codes).float()

    def advance(self, codes: Tensor, position: int) -> None:
        """Run the model on the codes [K, M] of a position."""
        self.hidden = decode_one(self.model, codes, position, self.cache)


def decode_one(model: Dalle, codes: Tensor, position: int, cache: KeyValueCache) -> Tensor:
    """Append the codes [K, M] of a position; return the state [K, W] that predicts the next."""
    return model._run(model._embed_image(codes[:, None], position), cache)[:, -1]


def copy_prefix(prefix: KeyValueCache, cache: KeyValueCache) -> None:
    """Copy the content of a cache of one row into every row of another."""
    cache.filled = prefix.filled
    for own, other in zip(cache.keys + cache.values, prefix.keys + prefix.values, strict=True):
        own[:, :, : prefix.filled] = other[:, :, : prefix.filled]
