"""The words that files, hyperparameters and metrics have in common. Standard library only.

Whatever must agree on them (a folder of the artefact, the prefix of a hyperparameter, the name of
a metric, a field of a config) takes them from here.
"""

from __future__ import annotations

from typing import Literal, get_args

StageName = Literal["dvae", "transformer", "clip"]
"""A stage of training, and the model that it trains."""

STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order in which they are trained."""

ComponentName = Literal[StageName, "tokenizer"]
"""A folder of the artefact: a stage's model, or the tokenizer."""

COMPONENTS: tuple[ComponentName, ...] = get_args(ComponentName)

TokenizerKind = Literal["word", "bpe", "clip"]

# --- fields of the dVAE's config

QuantiserKind = Literal["gumbel", "vq"]
QUANTISERS: tuple[QuantiserKind, ...] = get_args(QuantiserKind)

ReconstructionKind = Literal["bce", "l1", "mse"]
RECONSTRUCTIONS: tuple[ReconstructionKind, ...] = get_args(ReconstructionKind)

# --- fields of the transformer's config

AttentionKind = Literal["full", "axial_row", "axial_col", "conv_like"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)

NormKind = Literal["layer", "rms"]

FeedForwardKind = Literal["gelu", "geglu", "relu2"]
FEED_FORWARD_KINDS: tuple[FeedForwardKind, ...] = get_args(FeedForwardKind)

# --- how a trained transformer decodes

Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""fp32: exact. bf16: everything, on a GPU. On a CPU fp16: weights in 16 bits, with more digits than
bf16 and a kernel as fast; int8: weights, keys and values in 8."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
