"""The reference of parallel decoding: whole forward passes, one candidate, a window of guesses.

Fixed-point iteration to the image that sampling position by position gives: Wiggers & Hoogeboom,
"Predictive Sampling with Forecasting Autoregressive Models" (ICML 2020); Song et al., "Accelerating
Feedforward Computation via Parallel Nonlinear Equation Solving" (ICML 2021), who call it Jacobi
iteration; for images of tokens by Teng et al., "Speculative Jacobi Decoding" (ICLR 2025), and with
coupled noise "MC-SJD" (arXiv 2510.24211). Gumbel noise is fixed by seed, candidate and position,
so that here the image itself is the same, and not its distribution alone.

Letters: N positions, M codes per position.
"""

import torch
from torch import Tensor

from dalle.decoding.sampling import SamplingOptions, image_noise_keys, sample_tokens
from dalle.models.transformer import PADDING, Dalle


@torch.inference_mode()
def sample_in_windows(
    model: Dalle,
    text_tokens: Tensor,
    *,
    candidate: int,
    seed: int,
    window: int,
    options: SamplingOptions | None = None,
    prime_tokens: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Sample the image tokens [N, M] of a candidate; return them and the number of steps.

    text_tokens: [1, T]. window: positions that a step samples. prime_tokens: [P, M].
    """
    options = options or SamplingOptions()
    config = model.config
    N, M = config.num_positions, config.num_codebooks
    noise_keys = torch.from_numpy(image_noise_keys(seed, candidate, N * M)).view(N, M)
    tokens = torch.zeros(N, M, dtype=torch.int64)
    exact = 0  # positions that are known
    if prime_tokens is not None:
        exact = len(prime_tokens)
        tokens[:exact] = prime_tokens
    guessed, steps = exact, 0  # positions that are known or guessed
    while exact < N:
        end = min(exact + window, N)
        for position in range(max(guessed, 1), end):
            tokens[position] = tokens[position - 1]
        sampled = _sample(model, text_tokens, tokens, range(exact, end), noise_keys, options)
        right = (sampled == tokens[exact:end]).all(dim=1).tolist()
        tokens[exact:end] = sampled
        guessed = max(guessed, end)
        # The first position is exact; each further one if the guess of the one before was right.
        number = 1
        while number < len(right) and right[number - 1]:
            number += 1
        exact, steps = exact + number, steps + 1
    return tokens, steps


def _sample(
    model: Dalle,
    text_tokens: Tensor,
    tokens: Tensor,
    window: range,
    noise_keys: Tensor,
    options: SamplingOptions,
) -> Tensor:
    """Sample each position of a window [n, M] from what the tokens [N, M] before it give."""
    texts = [text_tokens]
    if options.guidance_scale != 1.0:
        texts.append(torch.full_like(text_tokens, PADDING))
    first, end = window.start, window.stop
    hidden = [model._hidden(text, tokens[None, :-1])[1][0, first:end] for text in texts]
    sampled = torch.zeros_like(tokens[first:end])
    for m in range(model.config.num_codebooks):
        logits = [model.code_logits(each, m, sampled).float() for each in hidden]
        blank = logits[1] if len(logits) == 2 else None
        sampled[:, m], _ = sample_tokens(logits[0], noise_keys[first:end, m], options, blank)
    return sampled
