"""Names that files, hyperparameters and metrics share. Standard library only.

Artefact folders, hyperparameter prefixes, metric names and config fields take their names from
here, so that they agree.
"""

from __future__ import annotations

from typing import Literal, get_args

StageName = Literal["dvae", "transformer", "clip"]
"""A stage of training and the model that it trains."""

STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order of training."""

ComponentName = Literal[StageName, "tokenizer"]
"""A folder of the artefact: a stage's model, or the tokenizer."""

COMPONENTS: tuple[ComponentName, ...] = get_args(ComponentName)

TokenizerKind = Literal["word", "bpe", "clip"]
SquareMethod = Literal["train", "clip", "squash"]
"""How an image becomes a square: as `train` reads pictures, as OpenAI's CLIP does, or squashed."""
ClipActivation = Literal["quick_gelu", "gelu"]
SMALLEST_BPE_VOCABULARY = 258
"""Padding, the unknown token and the 256 bytes, which byte pairs are made of."""

ImageTokenizerKind = Literal["dvae", "dalle_pytorch", "openai", "vqgan"]
"""The graph of the component dvae: the one that is trained here, or that of a published file."""

# --- dVAE config

QuantiserKind = Literal["gumbel", "vq"]
QUANTISERS: tuple[QuantiserKind, ...] = get_args(QuantiserKind)

ReconstructionKind = Literal["bce", "l1", "mse"]
RECONSTRUCTIONS: tuple[ReconstructionKind, ...] = get_args(ReconstructionKind)

VQGANQuantiserKind = Literal["nearest", "cosine", "gumbel"]
VQGAN_QUANTISERS: tuple[VQGANQuantiserKind, ...] = get_args(VQGANQuantiserKind)

# --- transformer config

AttentionKind = Literal["full", "axial_row", "axial_col", "conv_like"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)

NormKind = Literal["layer", "rms"]

FeedForwardKind = Literal["gelu", "geglu", "relu2"]
FEED_FORWARD_KINDS: tuple[FeedForwardKind, ...] = get_args(FeedForwardKind)

# --- number formats of decoding

Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""fp32: exact. bf16: everything, on a GPU. fp16: weights, on a CPU, where it has more digits than
bf16 at the same speed. int8: weights, keys and values, on a CPU."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

WIDEST_WINDOW = 32
"""Most positions of a candidate that a step samples, see `dalle.decoding.windows`."""
