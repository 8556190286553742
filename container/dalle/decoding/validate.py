"""Engine in a lower precision, built only if its probabilities are close to the model's.

The model samples some images in fp32, and both precisions give log p of each of their tokens. Two
numbers compare them: how often the likeliest token is the same, and by how much a sampled token's
log p differs. An engine beyond the bounds is refused, not served.

Letters: K captions, T text length, N positions, n positions of a window, M codes, V codebook size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.cpu.torch_step import KeyRange
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import (
    SamplingOptions,
    choose,
    complete_captions,
    image_noise_keys,
    token_log_p,
)
from dalle.decoding.select import describe_step, most_rows, needs_key_ranges, new_step
from dalle.decoding.step import Step
from dalle.errors import ArtefactError, DeviceError
from dalle.models.transformer import Dalle
from dalle.types import Precision

logger = logging.getLogger(__name__)

_CAPTIONS = 4
_WINDOW = 48  # positions compared at the image's beginning, and as many at its end
_MARGIN = 0.1  # of the keys' range, added on either side for other captions


@dataclass(frozen=True)
class Accuracy:
    """Difference that a lower precision makes, over the tokens of a `Reference`."""

    greedy_agreement: float
    """Share of codes for which the likeliest token is the same, 0 to 1."""
    likelihood_change: float
    """Mean absolute difference of a sampled token's log p, in nats."""


@dataclass(frozen=True)
class AccuracyBounds:
    """Least agreement and greatest change with which an engine is built."""

    greedy_agreement: float = 0.97
    likelihood_change: float = 0.02


def build_engine(
    model: Dalle,
    num_slots: int,
    precision: Precision = "fp32",
    *,
    max_candidates: int | None = None,
    window: int | None = None,
    captions: Tensor | None = None,
    bounds: AccuracyBounds | None = None,
) -> DecodeEngine:
    """Build an engine in a precision; other than fp32 it is compared with the model first.

    max_candidates, window: see `DecodeEngine`. captions: text tokens [K, T] to compare with, best
    real ones; None samples them from the model.
    Raises `ArtefactError` for a model that the precision changes beyond the bounds, `DeviceError`
    for a precision that the device does not support.
    """
    logger.info("decoding by %s", describe_step(model, precision))
    if precision == "fp32":
        return DecodeEngine(model, num_slots, max_candidates=max_candidates, window=window)
    device = model.text_position.device.type
    if (device == "cpu") == (precision == "bf16"):
        fitting = "fp32, fp16 or int8" if device == "cpu" else "fp32 or bf16"
        raise DeviceError(f"precision on device {device} must be {fitting}, got {precision}")
    bounds = bounds or AccuracyBounds()
    reference = sample_reference(model, captions)
    key_ranges = (
        measure_key_ranges(model, reference) if needs_key_ranges(model, precision) else None
    )
    accuracy = compare(model, reference, precision, key_ranges)
    logger.info(
        "decoding in %s: likeliest token the same for %.1f %% of codes, log p differs by %.4f nats",
        precision,
        100 * accuracy.greedy_agreement,
        accuracy.likelihood_change,
    )
    # Negated, so that NaN is refused too.
    if not (
        accuracy.greedy_agreement >= bounds.greedy_agreement
        and accuracy.likelihood_change <= bounds.likelihood_change
    ):
        raise ArtefactError(
            f"decoding in {precision} would change this model too much: the likeliest token is "
            f"the same for {accuracy.greedy_agreement:.1%} of codes (at least "
            f"{bounds.greedy_agreement:.1%} is right), log p differs by "
            f"{accuracy.likelihood_change:.3f} nats (at most {bounds.likelihood_change:.3f}); "
            "use fp32"
        )
    model, step = _convert(model, num_slots, precision, key_ranges, most_rows(num_slots))
    return DecodeEngine(model, num_slots, max_candidates=max_candidates, step=step, window=window)


@dataclass(frozen=True)
class Reference:
    """Image tokens that the model sampled in fp32, and their probabilities."""

    text_tokens: Tensor
    """[K, T]"""
    image_tokens: Tensor
    """[K, N, M]"""
    windows: Sequence[range]
    """Positions that are compared."""
    log_p: Tensor
    """[positions of all windows, K, M]: of each sampled token, in nats."""
    likeliest: Tensor
    """The same shape: the likeliest token of each code."""


@torch.inference_mode()
def sample_reference(model: Dalle, captions: Tensor | None = None, *, seed: int = 0) -> Reference:
    """Sample the first and the last positions of an image for each caption, in fp32.

    The positions between repeat the first ones: they only fill the cache.
    """
    config = model.config
    N, M = config.num_positions, config.num_codebooks
    if captions is None:
        empty = torch.zeros(0, dtype=torch.int64, device=model.text_position.device)
        captions, _ = complete_captions(model, empty, num_completions=_CAPTIONS, seed=seed)
    captions = captions[:_CAPTIONS]
    K, n = len(captions), min(_WINDOW, N)
    noise_keys = torch.from_numpy(
        np.stack([image_noise_keys(seed, k, N * M).reshape(N, M) for k in range(K)])
    ).to(captions.device)
    image_tokens = torch.zeros(K, N, M, dtype=torch.int64, device=captions.device)
    _, step = _convert(model, K, "fp32", None)
    windows = [range(n)] if 2 * n >= N else [range(n), range(N - n, N)]
    walks = []
    for window in windows:
        if window.start:
            repeats = -(-N // n)
            image_tokens[:, n:] = image_tokens[:, :n].repeat(1, repeats, 1)[:, n:N]
        walks.append(_walk(model, step, captions, image_tokens, window, noise_keys))
    log_p, likeliest = (torch.cat(each) for each in zip(*walks, strict=True))
    return Reference(captions, image_tokens, windows, log_p, likeliest)


@torch.inference_mode()
def measure_key_ranges(model: Dalle, reference: Reference) -> list[KeyRange]:
    """Measure the range of the keys in each layer, and add a margin."""
    K = len(reference.text_tokens)
    cache = model.new_cache(K)
    model.prefill(reference.text_tokens, reference.image_tokens[:, :-1], cache)
    ranges = []
    for keys in cache.keys:
        seen = keys[:, :, : cache.filled]
        least, greatest = seen.amin(dim=(0, 2)), seen.amax(dim=(0, 2))
        margin = _MARGIN * (greatest - least)
        ranges.append(KeyRange(least - margin, greatest + margin))
    return ranges


@torch.inference_mode()
def compare(
    model: Dalle,
    reference: Reference,
    precision: Precision,
    key_ranges: Sequence[KeyRange] | None,
) -> Accuracy:
    """Compute the probabilities of a reference's tokens in another precision, and compare."""
    K = len(reference.text_tokens)
    model, step = _convert(model, K, precision, key_ranges)
    walks = [
        _walk(model, step, reference.text_tokens, reference.image_tokens, window, None)
        for window in reference.windows
    ]
    log_p, likeliest = (torch.cat(each) for each in zip(*walks, strict=True))
    return Accuracy(
        greedy_agreement=float((likeliest == reference.likeliest).float().mean()),
        likelihood_change=float((log_p - reference.log_p).abs().mean()),
    )


def _convert(
    model: Dalle,
    num_slots: int,
    precision: Precision,
    key_ranges: Sequence[KeyRange] | None,
    num_rows: int | None = None,
) -> tuple[Dalle, Step]:
    """Return the model that computes the captions, and the step that continues them."""
    if precision == "bf16":
        model = copy.deepcopy(model).to(torch.bfloat16)
    return model, new_step(model, num_slots, precision, key_ranges, num_rows=num_rows)


def _walk(
    model: Dalle,
    step: Step,
    captions: Tensor,
    image_tokens: Tensor,
    window: range,
    noise_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute log p and the likeliest tokens [n, K, M] of a window.

    noise_keys: [K, N, M] to sample the tokens, which are written; None reads those that are there.
    """
    K, _, M = image_tokens.shape
    device = image_tokens.device
    hidden = []
    for row in range(K):
        prefix = model.new_cache(1)
        prime = image_tokens[row : row + 1, : window.start] if window.start else None
        hidden.append(model.prefill(captions[row : row + 1], prime, prefix))
        step.load(torch.tensor([row], device=device), step.pack(prefix))
    state = torch.cat(hidden)
    rows = np.arange(K)
    log_p = torch.zeros(len(window), K, M, device=device)
    likeliest = torch.zeros(len(window), K, M, dtype=torch.int64, device=device)
    for done, position in enumerate(window):
        codes = image_tokens[:, position]
        for m in range(M):
            logits = step.code_logits(state, m, codes).float()
            if noise_keys is not None:
                codes[:, m] = choose(logits, noise_keys[:, position, m], SamplingOptions())
            log_p[done, :, m] = token_log_p(logits, codes[:, m])
            likeliest[done, :, m] = logits.argmax(dim=-1)
        if position + 1 < window.stop:
            state = step(rows, codes, np.full(K, position))
    return log_p, likeliest
