"""Interface of a decoding step, and the parts of a model that every step reads.

    Step          one of cpu.step, cpu.torch_step, gpu.step, gpu.torch_step: see `select`
    blocks_of …   typed access to a model's blocks, heads and embedding tables

Letters: S slots, B rows of a step, C candidates being sampled, M codes, V codebook size, W width,
N positions, L inputs of a sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dalle.decoding.input_batch import Batch, SlotState
from dalle.models.layers import FeedForward, KeyValueCache, LayerScale, SelfAttention, visibility
from dalle.models.transformer import Block, Branch, CodeHead, Dalle, TransformerConfig
from dalle.types import AttentionKind

QK_EPSILON = 1e-5  # of `F.layer_norm`, which the model calls


class Step(ABC):
    """A model's decoding step with the keys and values of all its slots.

    The engine calls `pack` and `load` when a candidate starts, then `advance` once per position.
    """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory of the keys and values."""

    @abstractmethod
    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        """Run the model on the codes [B, M] of the slots' [B] positions [B]: states [B, W].

        The same array object of slots as in the last call continues its sequences: every position
        must then be one more, and no slot may have been loaded in between.
        """

    @abstractmethod
    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """Logits [B, V] of code m of the position that hidden [B, W] predicts.

        codes: [B, >= m], of which the first m are read.
        """

    @abstractmethod
    def pack(self, prefix: KeyValueCache) -> Sequence[Any]:
        """Convert a cache of one row to what `load` writes, by layer."""

    @abstractmethod
    def load(self, slots: Tensor, packed: Sequence[Any]) -> None:
        """Write the same prefix to each of the slots [B]."""

    def sample(self, hidden: Tensor, uniforms: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sample the candidates' codes [C, M] and their log p [C]: as `Batch.sample`."""
        return batch.sample(self.code_logits, hidden, uniforms)

    def advance(self, batch: Batch, state: SlotState) -> None:
        """Sample one position of every candidate and run the model on it, where one follows.

        Reads and writes the engine's state, which must be the same object in every call. The same
        batch object as in the last call continues its candidates.
        """
        N, M = state.image_tokens.shape[1:]
        hidden = state.hidden.index_select(0, batch.rows)
        uniforms = state.uniforms.view(-1, M).index_select(0, batch.places)
        codes, log_likelihood = self.sample(hidden, uniforms, batch)
        state.image_tokens.view(-1, M).index_copy_(0, batch.places, codes)
        state.log_likelihood.index_add_(0, batch.slots, log_likelihood)
        codes = batch.spread(codes)
        numpy_rows, rows, positions = batch.numpy_rows, batch.rows, batch.numpy_positions
        if (positions == N - 1).any():
            # Nothing follows the last position.
            unfinished = np.flatnonzero(positions < N - 1)
            if not len(unfinished):
                return
            numpy_rows, positions = numpy_rows[unfinished], positions[unfinished]
            rows, codes = rows[unfinished], codes[unfinished]
        state.hidden.index_copy_(0, rows, self(numpy_rows, codes, positions))


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
