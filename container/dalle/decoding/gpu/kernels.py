"""Triton kernels of the GPU decoding step: everything between its matrix products.

Each is one kernel where torch launches several; sums are float32. With `TRITON_INTERPRET=1` set
before the import they run on a CPU, one program after another: so they are tested.

Letters: S slots, W width, F inner width, H heads, D head width, L inputs of a sequence, n inputs
that a query sees, M codes, N positions, V codebook size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dalle.decoding.gpu.launch import Kernel

_HALF_OF_ROOT = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)


@Kernel
def sum_of_rows(
    before,  # [S, W], added; read where ADDS
    table,  # [.., W]
    codes,  # [S, M] int64
    positions,  # [S] int64; read where POSITIONS
    out,  # [S, W] float32
    NUM_CODES: tl.constexpr,  # codes of a slot that are summed, from the first
    M: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    ADDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Sum a slot's rows of a table that has V rows for each codebook, then one for each position.

    Programs: [S].
    """
    slot = tl.program_id(0)
    channels = tl.arange(0, BLOCK_W)
    inside = channels < W
    total = tl.zeros((BLOCK_W,), tl.float32)
    if ADDS:
        total += tl.load(before + slot * W + channels, inside, 0.0).to(tl.float32)
    for m in range(NUM_CODES):
        row = m * V + tl.load(codes + slot * M + m)
        total += tl.load(table + row * W + channels, inside, 0.0).to(tl.float32)
    if POSITIONS:
        # Nothing is predicted after the last position.
        row = M * V + tl.minimum(tl.load(positions + slot), N - 1)
        total += tl.load(table + row * W + channels, inside, 0.0).to(tl.float32)
    tl.store(out + slot * W + channels, total, inside)


@Kernel
def normalise(
    x,  # [S, W]; float32 where ADDS
    added,  # [S, W]: output of a branch; this and the next two are read where ADDS
    bias,  # [W] of that branch
    gain,  # [W] of that branch; read where GAIN
    norm_gain,  # [W]
    norm_bias,  # [W]; read where "layer"
    out,  # [S, W]
    W: tl.constexpr,
    EPSILON: tl.constexpr,
    ADDS: tl.constexpr,
    GAIN: tl.constexpr,
    NORM: tl.constexpr,  # "layer", "rms", or "none": out is not written
    BLOCK_W: tl.constexpr,
):
    """x += gain · (added + bias), then out = norm(x). Programs: [S]."""
    channels = tl.arange(0, BLOCK_W)
    inside = channels < W
    places = tl.program_id(0) * W + channels
    each = tl.load(x + places, inside, 0.0).to(tl.float32)
    if ADDS:
        branch = tl.load(added + places, inside, 0.0).to(tl.float32)
        branch += tl.load(bias + channels, inside, 0.0).to(tl.float32)
        if GAIN:
            branch *= tl.load(gain + channels, inside, 0.0).to(tl.float32)
        each += branch
        tl.store(x + places, each, inside)
    if NORM != "none":
        if NORM == "layer":
            each = _normalised(each, inside, W, EPSILON)
        else:
            each *= tl.rsqrt(tl.sum(each * each, 0) / W + EPSILON)
        each *= tl.load(norm_gain + channels, inside, 0.0).to(tl.float32)
        if NORM == "layer":
            each += tl.load(norm_bias + channels, inside, 0.0).to(tl.float32)
        tl.store(out + places, each.to(out.dtype.element_ty), inside)


@Kernel
def activate(
    x,  # [S, F], or [S, 2 F] of "geglu"
    bias,  # [F], or [2 F]
    out,  # [S, F]
    F: tl.constexpr,
    KIND: tl.constexpr,  # "gelu", "relu2" or "geglu"
    BLOCK: tl.constexpr,
):
    """out = activation(x + bias). Programs: [S, F / BLOCK]."""
    slot = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < F
    size: tl.constexpr = 2 * F if KIND == "geglu" else F
    first = x + slot * size + channels
    each = tl.load(first, inside, 0.0).to(tl.float32)
    each += tl.load(bias + channels, inside, 0.0).to(tl.float32)
    if KIND == "gelu":
        each = _gelu(each)
    elif KIND == "relu2":
        each = tl.maximum(each, 0.0)
        each *= each
    else:
        gate = tl.load(first + F, inside, 0.0).to(tl.float32)
        gate += tl.load(bias + F + channels, inside, 0.0).to(tl.float32)
        each *= _gelu(gate)
    tl.store(out + slot * F + channels, each.to(out.dtype.element_ty), inside)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * _HALF_OF_ROOT))


@Kernel
def attend(
    qkv,  # [S, 3, H, D]
    table,  # [S, H, L, 2, D]: key and value of each input
    positions,  # [S] int64
    seen,  # [L, n] int32: inputs that a query sees, in order, its own last; not read where FULL
    counts,  # [L] int32: how many of them; not read where FULL
    out,  # [S, H, D]
    first_input,  # of the image
    L,
    n,
    H: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    QK_NORM: tl.constexpr,
    FULL: tl.constexpr,  # a query sees all inputs before it
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Store the key and value of a slot's input, and attend to the inputs that its query sees.

    Does nothing from the last position on, which is no input. The softmax keeps its maximum and sum
    while keys are read (Milakov & Gimelshein 2018). Programs: [S, H].
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    current = first_input + tl.load(positions + slot)
    if current >= L:
        return
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    own = qkv + (slot * 3 * H + head) * D + channels
    query = tl.load(own, inside, 0.0).to(tl.float32)
    key = tl.load(own + H * D, inside, 0.0).to(tl.float32)
    value = tl.load(own + 2 * H * D, inside, 0.0).to(tl.float32)
    if QK_NORM:
        query = _normalised(query, inside, D, EPSILON)
        key = _normalised(key, inside, D, EPSILON)
    # The query uses its input's key and value as rounded as later queries read them.
    key = key.to(table.dtype.element_ty)
    value = value.to(table.dtype.element_ty)
    first = table + (slot * H + head).to(tl.int64) * L * 2 * D
    place = first + current * 2 * D + channels
    tl.store(place, key, inside)
    tl.store(place + D, value, inside)

    query *= 1.0 / tl.sqrt(tl.cast(D, tl.float32))
    most = tl.sum(query * key.to(tl.float32), 0)
    shares = tl.full((), 1.0, tl.float32)
    attended = value.to(tl.float32)
    others = current
    if not FULL:
        others = tl.load(counts + current) - 1
    for start in range(0, others, BLOCK_KEYS):
        numbers = start + tl.arange(0, BLOCK_KEYS)
        counted = numbers < others
        inputs = numbers
        if not FULL:
            inputs = tl.load(seen + current * n + numbers, counted, 0)
        rows = first + inputs[:, None] * 2 * D + channels[None, :]
        read = counted[:, None] & inside[None, :]
        keys = tl.load(rows, read, 0.0).to(tl.float32)
        values = tl.load(rows + D, read, 0.0).to(tl.float32)
        scores = tl.where(counted, tl.sum(keys * query[None, :], 1), float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 0))
        faded = tl.exp(most - higher)
        weights = tl.exp(scores - higher)
        shares = shares * faded + tl.sum(weights, 0)
        attended = attended * faded + tl.sum(weights[:, None] * values, 0)
        most = higher
    places = out + (slot * H + head) * D + channels
    tl.store(places, (attended / shares).to(out.dtype.element_ty), inside)


@triton.jit
def _normalised(x, inside, W: tl.constexpr, EPSILON: tl.constexpr):
    """As `F.layer_norm` without gains."""
    mean = tl.sum(x, 0) / W
    apart = tl.where(inside, x - mean, 0.0)
    return apart * tl.rsqrt(tl.sum(apart * apart, 0) / W + EPSILON)
