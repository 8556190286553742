"""Sampling of tokens from logits, and of a caption's continuation.

    sample_tokens       logits -> one token per row: guidance, temperature, filters, log p
    complete_captions   text tokens -> more text tokens

A token is the argmax of logits plus Gumbel noise, which is a sample of their softmax (Gumbel 1954,
Maddison et al. 2014). The noise is a function of seed, candidate, position, code and token. A small
change of the logits therefore seldom changes the token, which parallel decoding relies on.

Knows ids and probabilities; knows no captions, pixels or HTTP.
Letters: K candidates or completions, T text length, V codebook or vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle.models.transformer import PADDING, Dalle

LEAST_TEMPERATURE = 1e-30
"""A lower temperature takes the likeliest token: a division by it might be one by 0."""

_IMAGE_STREAM, _TEXT_STREAM = 0, 1
_FACTORS = 0x7FEB352D, 0x846CA68B - 2**32  # as int32
_GREATEST_UNIFORM = 1 - 2**-24  # the greatest float32 below 1


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is sampled from its logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token and ignores the seed."""
    top_k: int | None = None
    """Sample from this many likeliest tokens only."""
    top_p: float | None = None
    """Sample from the fewest likeliest tokens whose probabilities reach this sum, in (0, 1]."""
    guidance_scale: float = 1.0
    """uncond + s · (cond − uncond); 1.0 skips the unconditional pass, half of the work."""


class SamplingStopped(Exception):  # noqa: N818 - no error: the caller stopped it
    """`on_step` returned False."""


@torch.inference_mode()
def complete_captions(
    model: Dalle,
    prefix_tokens: Tensor,
    *,
    num_completions: int,
    seed: int,
    options: SamplingOptions | None = None,
    on_step: Callable[[int], bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue a caption: prefix_tokens [n] without padding, 0 <= n <= T.

    Returns text tokens [K, T] (each ends at its first padding) and the log-likelihood [K] of the
    added tokens, in nats, the end included. guidance_scale has no meaning here and is not read.
    on_step: called after each position with the number of positions done, the prefix's included;
    returning False ends the call with SamplingStopped. Raises ValueError for a model in training
    mode.
    """
    require_evaluation_mode(model)
    options = options or SamplingOptions()
    T = model.config.text_length
    K, start = num_completions, len(prefix_tokens)
    text_tokens = torch.full((K, T), PADDING, dtype=torch.int64, device=prefix_tokens.device)
    text_tokens[:, :start] = prefix_tokens
    log_likelihood = torch.zeros(K, device=prefix_tokens.device)
    noise_keys = torch.from_numpy(
        np.stack([_noise_keys(seed, k, _TEXT_STREAM, T) for k in range(K)])
    ).to(prefix_tokens.device)
    ended = torch.zeros(K, dtype=torch.bool, device=prefix_tokens.device)
    for position in range(start, T):
        # A caption is short: each step runs the whole prefix again instead of keeping a cache.
        logits = model.text_logits(text_tokens)[:, position].float()
        sampled, log_p = sample_tokens(logits, noise_keys[:, position], options)
        text_tokens[:, position] = sampled.where(~ended, PADDING)
        log_likelihood += log_p.where(~ended, 0.0)
        ended |= sampled == PADDING
        if on_step is not None and not on_step(position + 1):
            raise SamplingStopped
        if bool(ended.all()):
            break
    return text_tokens, log_likelihood


def sample_tokens(
    logits: Tensor, noise_keys: Tensor, options: SamplingOptions, blank: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per row, and say how likely it was.

    logits: [K, V]. noise_keys: [K] int64. blank: the logits [K, V] without the caption, which turn
    guidance on. Returns the tokens [K] int64 and their log p [K] in nats, the latter before
    guidance, temperature and filters; NaN where a logit is NaN or infinite, `blank`'s included.
    """
    guided = logits if blank is None else blank + options.guidance_scale * (logits - blank)
    tokens = choose(guided, noise_keys, options)
    log_p = token_log_p(logits, tokens)
    if blank is not None:
        log_p = log_p.where(guided.isfinite().all(dim=-1), torch.nan)
    return tokens, log_p


def token_log_p(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log p [K] in nats of one token [K] per row of logits [K, V]."""
    return logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)


def choose(logits: Tensor, noise_keys: Tensor, options: SamplingOptions) -> Tensor:
    """Choose one token per row: logits [K, V], noise_keys [K] int64 -> [K] int64.

    Of equal tokens the first is chosen. guidance_scale is not read.
    """
    if options.temperature < LEAST_TEMPERATURE:
        return logits.argmax(dim=-1)
    scaled = filtered(logits, options)
    return (scaled + gumbel_noise(noise_keys, logits.shape[-1])).argmax(dim=-1)


def filtered(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Return the logits [K, V] that tokens are sampled from: -inf for those that are left out.

    temperature above 0. guidance_scale is not read.
    """
    # From the greatest, so that a temperature close to 0 overflows to -inf, never to NaN.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        # By index and not by value: of equal logits, too, no more than k stay.
        kept = logits.topk(options.top_k, dim=-1).indices
        scaled = torch.full_like(scaled, -torch.inf).scatter(1, kept, scaled.gather(1, kept))
    if options.top_p is not None and options.top_p < 1.0:
        probabilities = scaled.softmax(dim=-1, dtype=torch.float64)
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays while the sum before it has not reached top_p: the first always does.
        dropped = ordered.cumsum(dim=-1) - ordered >= options.top_p
        scaled = scaled.masked_fill(dropped.gather(1, order.argsort(dim=-1)), -torch.inf)
    return scaled


def gumbel_noise(noise_keys: Tensor, size: int) -> Tensor:
    """Gumbel noise [K, size] float32 of the tokens 0, 1, … under each key [K] int64.

    Token v of key k has the hash mix(mix(v + low) ^ high), of the key's lower and upper 32 bits.
    The compiled step and the Triton kernel compute the same hash, bit for bit.
    """
    low, high = noise_keys.int()[:, None], (noise_keys >> 32).int()[:, None]
    hashes = _mix(torch.arange(size, dtype=torch.int32, device=noise_keys.device) + low)
    hashes = _mix(hashes.bitwise_xor_(high))
    uniforms = hashes.long().bitwise_and_(0xFFFFFFFF).float().add_(0.5).mul_(2**-32)
    # Of an exponential variable, whose small values are exact to 24 bits.
    exponentials = uniforms.clamp_(max=_GREATEST_UNIFORM).neg_().log1p_().neg_()
    return exponentials.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Hash 32 bits to 32 bits, in place: "lowbias32" of C. Wellons' hash prospector (2018)."""
    x ^= (x >> 16) & 0xFFFF
    x *= _FACTORS[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= _FACTORS[1]
    x ^= (x >> 16) & 0xFFFF
    return x


def require_evaluation_mode(model: Dalle) -> None:
    """Raise ValueError for a model in training mode, whose dropout would change the tokens."""
    if model.training:
        raise ValueError(
            "the model must be in evaluation mode to sample from it; call eval() first"
        )


def image_noise_keys(seed: int, candidate: int, count: int) -> np.ndarray:
    """Keys [count] int64 of the noise that chooses a candidate's image tokens."""
    return _noise_keys(seed, candidate, _IMAGE_STREAM, count)


def _noise_keys(seed: int, candidate: int, stream: int, count: int) -> np.ndarray:
    """Random numbers [count] int64, a function of the arguments alone.

    Philox is counter-based (Salmon et al. 2011): no candidate's numbers depend on another's.
    """
    # As one list of numbers, (2**32, 0, 0) would be the same entropy as (0, 1, 0).
    sequence = np.random.SeedSequence(seed, spawn_key=(candidate, stream))
    key = sequence.generate_state(2, np.uint64)
    return np.random.Philox(key=key).random_raw(count).view(np.int64)
