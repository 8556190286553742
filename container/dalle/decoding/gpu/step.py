"""The decoding step for a GPU: torch's products, between them kernels of our own, all recorded.

A step reads the weights and the keys and values that its queries see; what else there is to do is
little, but takes torch a dozen kernels for each block beside the products, where these are four. A
position is drawn and taken in by one replay, in the engine's own memory.

Letters: S slots, B rows, M codes, N positions, V codebook size, W width, H heads, D head width, L
inputs of a sequence, n inputs that a query sees or that a prefix has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import triton
from torch import Tensor

from dalle.decoding.gpu.cuda_graph import RecordedStep
from dalle.decoding.gpu.kernels import attend, sum_of_rows
from dalle.decoding.gpu.layers import FusedBlock, FusedHead, add
from dalle.decoding.gpu.sampler import (
    BLANK,
    GUIDANCE_SCALE,
    IS_ACTIVE,
    NO_GUIDANCE,
    NOT_DRAWN,
    PLAN_COLUMNS,
    POSITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    draw_code,
    take_in,
)
from dalle.decoding.input_batch import Batch, SlotState
from dalle.decoding.kv_cache import inputs_seen
from dalle.decoding.step import QK_EPSILON, input_tables
from dalle.models.attention import KeyValueCache
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.types import AttentionKind

# Keys read at a time, and warps that read them, on an H100 the fastest
# (2026-11-26): of many keys, and of few.
_FULL = 128, 4
_SPARSE = 32, 1


class FusedStep(RecordedStep):
    """A model's decoding step with the keys and values of all its slots, in the model's dtype; the
    residual stream is float32."""

    def __init__(self, model: Dalle, num_slots: int) -> None:
        super().__init__(model, num_slots)
        config, like = model.config, model.text_position.detach()
        self._config = config
        self._blocks = [FusedBlock.of(block) for block in model.blocks]
        self._heads = [FusedHead.of(head) for head in model.code_heads]
        kinds = [config.kind_of_layer(layer) for layer in range(config.num_layers)]
        seen = {kind: _Seen.of(config, kind, like.device) for kind in set(kinds)}
        self._seen = [seen[kind] for kind in kinds]
        # One table, so that an input is one sum of rows.
        self._inputs = torch.cat(input_tables(model))
        S, W = num_slots, config.width
        # What one kernel leaves to the next.
        self._x = like.new_zeros(S, W, dtype=torch.float32)
        self._normed, self._attended, self._added = (like.new_zeros(S, W) for _ in range(3))
        self._qkv = like.new_zeros(S, 3 * W)
        mixes = [head.mix for head in self._heads if head.mix is not None]
        networks = [block.feed_forward for block in self._blocks] + mixes
        self._room = {each.sizes: each.new_room(S) for each in networks}
        self._logits = like.new_zeros(S, config.codebook_size)
        self._drawn = torch.zeros_like(self._codes)
        self._plan = like.new_zeros(S, len(PLAN_COLUMNS), dtype=torch.float64)
        self._batch: Batch | None = None
        shape = (S, config.num_heads, config.length, 2, config.head_width)
        self._tables = [like.new_zeros(shape) for _ in range(config.num_layers)]

    def move(self, batch: Batch, state: SlotState) -> None:
        """As `MovingStep`."""
        if state not in self._recordings:
            self._become(None)  # so that it changes nothing while it is recorded
            self._recordings.add(state, partial(self._draw_and_take_in, state))
        if batch is not self._batch:
            self._become(batch)
        self._recordings.replay(state)

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """As `SlotStep`, in float32."""
        B = len(hidden)
        all_hidden = torch.zeros_like(self._hidden)
        all_hidden[:B] = hidden
        self._drawn[:B, :m] = codes[:, :m]
        logits = self._compute_logits(all_hidden, m)[:B].float()
        return logits + self._heads[m].to_logits.bias.float()

    def pack(self, prefix: KeyValueCache) -> list[Tensor]:
        """As `SlotStep`: [H, n, 2, D]."""
        n = prefix.filled
        return [
            torch.stack([key[0, :, :n], value[0, :, :n]], dim=2)
            for key, value in zip(prefix.keys, prefix.values, strict=True)
        ]

    def load(self, slots: Tensor, packed: Sequence[Tensor]) -> None:
        """As `SlotStep`."""
        for table, inputs in zip(self._tables, packed, strict=True):
            table[slots, :, : inputs.shape[1]] = inputs

    def _run(self, last_input: int) -> None:
        self._batch = None
        if "step" not in self._recordings:
            self._recordings.add("step", self._take_in_codes)
        self._recordings.replay("step")

    def _take_in_codes(self) -> None:
        self._take_in(self._codes)
        self._hidden.copy_(self._x)

    def _draw_and_take_in(self, state: SlotState) -> None:
        config, S = self._config, self._num_slots
        N, M, V, W = config.num_positions, config.num_codebooks, config.codebook_size, config.width
        for m in range(M):
            draw_code[S,](
                self._compute_logits(state.hidden, m),
                self._heads[m].to_logits.bias,
                self._plan,
                self._positions,
                state.uniforms,
                self._drawn,
                state.image_tokens,
                state.log_likelihood,
                m,
                M=M,
                N=N,
                V=V,
                BLOCK_V=triton.next_power_of_2(V),
                num_warps=8,
            )
        self._take_in(self._drawn)
        take_in[S,](
            self._x,
            self._plan,
            self._positions,
            state.hidden,
            W=W,
            BLOCK_W=triton.next_power_of_2(W),
        )

    def _compute_logits(self, hidden: Tensor, m: int) -> Tensor:
        """Of code m [S, V], given those drawn before it and hidden [S, W]; without the bias."""
        head = self._heads[m]
        if head.mix is not None:
            self._sum_rows(head.earlier, self._drawn, m, before=hidden)
            hidden = self._x
            head.norm(hidden, self._normed)
            head.mix(self._normed, self._room[head.mix.sizes], self._added)
            add(hidden, self._added, head.mix.contract, head.norm, self._normed)
        else:
            head.norm(hidden, self._normed)
        head.to_logits(self._normed, self._logits)
        return self._logits

    def _take_in(self, codes: Tensor) -> None:
        """Codes [S, M] of all slots' positions into x."""
        config, x = self._config, self._x
        H, D = config.num_heads, config.head_width
        self._sum_rows(self._inputs, codes, config.num_codebooks, positions=self._positions)
        self._blocks[0].attention_norm(x, self._normed)
        norms = [block.attention_norm for block in self._blocks[1:]] + [None]
        for block, next_norm, seen, table in zip(
            self._blocks, norms, self._seen, self._tables, strict=True
        ):
            block.qkv(self._normed, self._qkv)
            keys, warps = _FULL if seen.is_all else _SPARSE
            attend[self._num_slots, H](
                self._qkv,
                table,
                self._positions,
                seen.inputs,
                seen.counts,
                self._attended,
                self._first_input,
                self._length,
                seen.inputs.shape[1],
                H=H,
                D=D,
                EPSILON=QK_EPSILON,
                QK_NORM=config.qk_norm,
                FULL=seen.is_all,
                BLOCK_D=triton.next_power_of_2(D),
                BLOCK_KEYS=keys,
                num_warps=warps,
            )
            block.out(self._attended, self._added)
            add(x, self._added, block.out, block.feed_forward_norm, self._normed)
            network = block.feed_forward
            network(self._normed, self._room[network.sizes], self._added)
            add(x, self._added, network.contract, next_norm, self._normed)

    def _sum_rows(
        self,
        table: Tensor,
        codes: Tensor,
        num_codes: int,
        *,
        before: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Into x."""
        config = self._config
        sum_of_rows[self._num_slots,](
            table if before is None else before,
            table,
            codes,
            codes if positions is None else positions,
            self._x,
            NUM_CODES=num_codes,
            M=config.num_codebooks,
            N=config.num_positions,
            V=config.codebook_size,
            W=config.width,
            ADDS=before is not None,
            POSITIONS=positions is not None,
            BLOCK_W=triton.next_power_of_2(config.width),
        )

    def _become(self, batch: Batch | None) -> None:
        """Draw a batch's candidates from now on, from where they are; None: nothing."""
        self._batch = batch
        self._last_slots = None
        V = self._config.codebook_size
        plan = np.zeros((self._num_slots, len(PLAN_COLUMNS)))
        plan[:, BLANK] = NOT_DRAWN
        # Idle slots are behind their last position, where no keys are read or stored.
        plan[:, POSITION] = self._config.num_positions
        for each in [] if batch is None else batch.candidates:
            options, blank = each.generation.options, each.guidance_slot
            mine = plan[each.slot]
            mine[BLANK] = NO_GUIDANCE if blank is None else blank
            mine[TEMPERATURE] = options.temperature
            mine[TOP_K] = min(options.top_k or V, V)
            mine[TOP_P] = 1.0 if options.top_p is None else options.top_p
            mine[GUIDANCE_SCALE] = options.guidance_scale
            for slot in [each.slot] if blank is None else [each.slot, blank]:
                plan[slot, IS_ACTIVE], plan[slot, POSITION] = True, each.position
        self._plan.copy_(torch.from_numpy(plan))
        self._positions.copy_(self._plan[:, POSITION])


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of a kind of attention what the query at each input sees, [L, n], and how many, [L]."""

    inputs: Tensor
    counts: Tensor
    is_all: bool
    """That is everything before it, and neither is read."""

    @classmethod
    def of(cls, config: TransformerConfig, kind: AttentionKind, device: torch.device) -> _Seen:
        if kind == "full":
            nothing = torch.zeros(1, 1, dtype=torch.int32, device=device)
            return cls(nothing, nothing, is_all=True)
        inputs, counts = (
            torch.from_numpy(each).to(device, torch.int32) for each in inputs_seen(config, kind)
        )
        return cls(inputs.contiguous(), counts, is_all=False)
