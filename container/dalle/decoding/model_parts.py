"""The parts of a model that every decoding step reads when it is built: layers, tables, masks.

Letters: K inputs and N outputs of a matrix, L inputs of a sequence, M codes, V codebook size,
W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dalle.models.layers import FeedForward, LayerScale, SelfAttention, visibility
from dalle.models.transformer import Block, Branch, CodeHead, Dalle, TransformerConfig
from dalle.types import AttentionKind

QK_EPSILON = 1e-5  # of `F.layer_norm`, which the model calls
_TINY = 1e-20  # in place of the scale of an output whose weights are all zero


@dataclass(frozen=True)
class BlockParts:
    """The layers of one block of the transformer. A gain [W] scales a branch's output."""

    attention_norm: nn.Module
    attention: SelfAttention
    attention_gain: Tensor | None
    feed_forward_norm: nn.Module
    feed_forward: FeedForward
    feed_forward_gain: Tensor | None


def blocks_of(model: Dalle) -> list[BlockParts]:
    """List the model's blocks by their parts."""
    found = []
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, feed_forward = block.attention.function, block.feed_forward.function
        assert isinstance(attention, SelfAttention)
        assert isinstance(feed_forward, FeedForward)
        found.append(
            BlockParts(
                block.attention.norm,
                attention,
                _gain_of(block.attention),
                block.feed_forward.norm,
                feed_forward,
                _gain_of(block.feed_forward),
            )
        )
    return found


def _gain_of(branch: Branch) -> Tensor | None:
    return branch.scale.gain.detach() if isinstance(branch.scale, LayerScale) else None


def heads_of(model: Dalle) -> list[CodeHead]:
    """List the model's heads, one per code of a position."""
    return [head for head in model.code_heads if isinstance(head, CodeHead)]


def input_tables(model: Dalle) -> tuple[Tensor, Tensor]:
    """Embeddings of every code of every codebook [M * V, W], and of every position [N, W].

    An input of the image is the sum of M rows of the first and one row of the second.
    """
    position = (model.row_position + model.column_position).flatten(0, 1).detach().clone()
    if model.config.target_position:
        target = (model.target_row_position + model.target_column_position).flatten(0, 1)
        position[:-1] += target[1:].detach()
    codes = [each.get_parameter("weight").detach() for each in model.code_embeddings]
    return torch.cat(codes), position


def earlier_table(head: CodeHead) -> Tensor:
    """Embeddings [m * V, W] of every code of the m codebooks before a head's own."""
    tables = [each.get_parameter("weight").detach() for each in head.earlier]
    return torch.cat(tables) if tables else head.to_logits.weight.new_zeros(0, 0)


def inputs_seen(config: TransformerConfig, kind: AttentionKind) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that each input's query sees, in order, [L, most], and how many they are, [L].

    Entries of a row beyond its count are padding.
    """
    grid_size, kernel_size = config.grid_size, config.conv_kernel_size
    visible = visibility(kind, config.text_length, grid_size, kernel_size).numpy()
    counts = visible.sum(axis=1)
    return np.argsort(~visible, axis=1, kind="stable")[:, : int(counts.max())], counts


def byte_scales(weight: Tensor, levels: int) -> Tensor:
    """Scale of each output's weights, [N], for weights [N, K] and bytes of ±levels."""
    return weight.abs().amax(dim=1).clamp(min=_TINY) / levels
