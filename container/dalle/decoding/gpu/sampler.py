"""Triton kernels that sample codes and advance slots by a plan of each slot.

Letters: S slots, N positions, M codes, V codebook size, W width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dalle.decoding.gpu.launch import Kernel
from dalle.decoding.sampling import LEAST_TEMPERATURE

PLAN_COLUMNS = BLANK, TEMPERATURE, TOP_K, TOP_P, GUIDANCE_SCALE, IS_ACTIVE, POSITION = range(7)
"""A slot's plan: the slot of its branch without caption, the sampling options of its candidate,
whether it is in use, and the position at which it starts."""

NOT_SAMPLED = -2
"""In column BLANK: nothing is sampled, since the slot is a branch without caption, or idle."""

NO_GUIDANCE = -1
"""In column BLANK: the candidate has no branch without caption."""

_BLANK, _TEMPERATURE, _TOP_K = tl.constexpr(BLANK), tl.constexpr(TEMPERATURE), tl.constexpr(TOP_K)
_TOP_P, _GUIDANCE_SCALE = tl.constexpr(TOP_P), tl.constexpr(GUIDANCE_SCALE)
_PLAN_SIZE = tl.constexpr(len(PLAN_COLUMNS))
_IS_ACTIVE = tl.constexpr(IS_ACTIVE)
_NOT_SAMPLED = tl.constexpr(NOT_SAMPLED)
_LEAST_TEMPERATURE = tl.constexpr(LEAST_TEMPERATURE)
_LOWER_BITS = tl.constexpr(0xFFFFFFFF)
_FIRST_FACTOR, _SECOND_FACTOR = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
_UNIT = tl.constexpr(2.0**-32)
_GREATEST_UNIFORM = tl.constexpr(1 - 2.0**-24)  # the greatest float32 below 1
_INFINITY_BITS = tl.constexpr(0x7F800000)


@Kernel
def sample_code(
    logits,  # [S, V], without the bias
    bias,  # [V]
    plan,  # [S, PLAN_COLUMNS] float64
    positions,  # [S] int64
    noise_keys,  # [S, N, M] int64
    codes,  # [S, M] int64: written, for both branches
    image_tokens,  # [S, N, M] int64: written
    log_likelihood,  # [S] float32: log p of the code is added; NaN where a logit is NaN
    m,
    M: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sample code m of every candidate's position, as `dalle.decoding.sampling.sample_tokens`.

    Programs: [S].
    """
    slot = tl.program_id(0)
    mine = plan + slot * _PLAN_SIZE
    blank = tl.load(mine + _BLANK).to(tl.int64)
    if blank == _NOT_SAMPLED:
        return
    temperature = tl.load(mine + _TEMPERATURE).to(tl.float32)
    top_k = tl.load(mine + _TOP_K).to(tl.int32)
    top_p = tl.load(mine + _TOP_P)
    scale = tl.load(mine + _GUIDANCE_SCALE).to(tl.float32)
    place = (slot * N + tl.load(positions + slot)) * M + m
    tokens = tl.arange(0, BLOCK_V)
    real = tokens < V
    added = tl.load(bias + tokens, real, 0.0).to(tl.float32)
    own = tl.load(logits + slot * V + tokens, real, float("-inf")).to(tl.float32) + added
    guided = own
    if blank >= 0:
        without = tl.load(logits + blank * V + tokens, real, 0.0).to(tl.float32) + added
        guided = tl.where(real, without + scale * (own - without), float("-inf"))
    scores = guided
    if temperature >= _LEAST_TEMPERATURE:
        scaled = (guided - tl.max(guided, 0)) / temperature
        # Probabilities in units of the greatest.
        weights = tl.exp(scaled)
        if top_k < V:
            weights = _keep_likeliest(guided, weights, top_k)
        if top_p < 1.0:
            weights = _keep_nucleus(weights, top_p)
        noise = _gumbel_noise(tl.load(noise_keys + place), tokens)
        scores = tl.where(weights > 0.0, scaled + noise, float("-inf"))
    code = tl.min(tl.where(scores == tl.max(scores, 0), tokens, V), 0)
    code = tl.minimum(code, V - 1)
    is_number = tl.sum((guided != guided).to(tl.int32), 0) == 0
    tl.store(codes + slot * M + m, code.to(tl.int64))
    if blank >= 0:
        tl.store(codes + blank * M + m, code.to(tl.int64))
    tl.store(image_tokens + place, code.to(tl.int64))
    most = tl.max(own, 0)
    chosen = tl.sum(tl.where(tokens == code, own, 0.0), 0)
    log_p = chosen - most - tl.log(tl.sum(tl.exp(own - most), 0))
    log_p = tl.where(is_number, log_p, float("nan"))
    tl.store(log_likelihood + slot, tl.load(log_likelihood + slot) + log_p)


@Kernel
def store_hidden(
    x,  # [S, W] float32
    plan,  # [S, PLAN_COLUMNS] float64
    positions,  # [S] int64
    hidden,  # [S, W]
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Store x as the hidden state of the slots in use, and advance their positions.

    Programs: [S].
    """
    slot = tl.program_id(0)
    is_active = tl.load(plan + slot * _PLAN_SIZE + _IS_ACTIVE).to(tl.int64)
    channels = tl.arange(0, BLOCK_W)
    inside = (channels < W) & (is_active != 0)
    each = tl.load(x + slot * W + channels, inside, 0.0)
    tl.store(hidden + slot * W + channels, each.to(hidden.dtype.element_ty), inside)
    tl.store(positions + slot, tl.load(positions + slot) + is_active)


@triton.jit
def _gumbel_noise(key, tokens):
    """As `dalle.decoding.sampling.gumbel_noise`."""
    low, high = (key & _LOWER_BITS).to(tl.uint32), ((key >> 32) & _LOWER_BITS).to(tl.uint32)
    hashes = _mix(_mix(tokens.to(tl.uint32) + low) ^ high)
    uniforms = tl.minimum((hashes.to(tl.float32) + 0.5) * _UNIT, _GREATEST_UNIFORM)
    # -log1p(-uniforms), exact where it is small (Kahan).
    rest = 1.0 - uniforms
    is_one = rest == 1.0
    quotient = tl.log(rest) * uniforms / tl.where(is_one, -1.0, rest - 1.0)
    return -tl.log(tl.where(is_one, uniforms, quotient))


@triton.jit
def _mix(x):
    """As `dalle.decoding.sampling._mix`."""
    x ^= x >> 16
    x *= tl.full((), _FIRST_FACTOR, tl.uint32)
    x ^= x >> 15
    x *= tl.full((), _SECOND_FACTOR, tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def _keep_likeliest(logits, weights, k):
    """Set weights to 0 but for the k greatest logits; of equal logits the first ones stay."""
    bits = logits.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    # Bisect for the greatest number that at least k logits reach: one bit for each halving.
    low = tl.full((), -(2**31), tl.int64)
    high = tl.full((), 2**31, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum((order >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = order > low
    equal = order == low
    places = k - tl.sum(above.to(tl.int32), 0)
    first = equal & (tl.cumsum(equal.to(tl.int32), 0) <= places)
    return tl.where(above | first, weights, 0.0)


@triton.jit
def _keep_nucleus(weights, top_p):
    """Set weights to 0 but for the fewest likeliest codes whose probabilities reach top_p.

    In descending order a code stays if the sum before it is less than that.
    """
    exact = weights.to(tl.float64)
    enough = top_p * tl.sum(exact, 0)
    order = weights.to(tl.int32, bitcast=True)  # integers in the order of floats >= 0
    # Bisect for the least weight above which the sum is less than enough.
    low = tl.full((), -1, tl.int64)
    high = tl.full((), _INFINITY_BITS, tl.int64)
    for _ in range(31):
        middle = (low + high) >> 1
        is_less = tl.sum(tl.where(order > middle, exact, 0.0), 0) < enough
        high = tl.where(is_less, middle, high)
        low = tl.where(is_less, low, middle)
    above = order > high
    equal = order == high
    before = tl.sum(tl.where(above, exact, 0.0), 0) + (tl.cumsum(equal.to(tl.int32), 0) - 1) * exact
    return tl.where(above | (equal & (before < enough)), weights, 0.0)
