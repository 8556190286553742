"""The decoding step for a GPU: torch's matrix products with Triton kernels between them.

Beside the products torch would launch a dozen kernels for each block; here they are four. One CUDA
graph samples a position and runs the model on it, and works on the engine's state in place.

Letters: S slots, B rows, M codes, N positions, V codebook size, W width, H heads, D head width, L
inputs of a sequence, n inputs that a query sees or that a prefix has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import triton
from torch import Tensor

from dalle.decoding.gpu.cuda_graph import CudaGraphStep
from dalle.decoding.gpu.kernels import attend, sum_of_rows
from dalle.decoding.gpu.layers import GpuBlock, GpuHead, add
from dalle.decoding.gpu.sampler import (
    BLANK,
    GUIDANCE_SCALE,
    IS_ACTIVE,
    NO_GUIDANCE,
    NOT_SAMPLED,
    PLAN_COLUMNS,
    POSITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    sample_code,
    store_hidden,
)
from dalle.decoding.model_parts import QK_EPSILON, blocks_of, heads_of, input_tables, inputs_seen
from dalle.decoding.step import Batch, SlotState
from dalle.models.layers import KeyValueCache
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.types import AttentionKind

# Keys read at a time, and warps that read them, for many keys and for few: the fastest on an H100
# (2026-11-26).
_FULL = 128, 4
_SPARSE = 32, 1


class GpuStep(CudaGraphStep):
    """A model's decoding step with the keys and values of all its slots, in the model's dtype.

    The residual stream is float32.
    """

    def __init__(self, model: Dalle, num_slots: int) -> None:
        super().__init__(model, num_slots)
        config, like = model.config, model.text_position.detach()
        self._config = config
        self._blocks = [GpuBlock(block) for block in blocks_of(model)]
        self._heads = [GpuHead(head) for head in heads_of(model)]
        kinds = [config.kind_of_layer(layer) for layer in range(config.num_layers)]
        seen = {kind: _Seen(config, kind, like.device) for kind in set(kinds)}
        self._seen = [seen[kind] for kind in kinds]
        # One table, so that an input is one sum of rows.
        self._inputs = torch.cat(input_tables(model))
        S, W = num_slots, config.width
        # Outputs of one kernel and inputs of the next.
        self._x = like.new_zeros(S, W, dtype=torch.float32)
        self._normed, self._attended, self._added = (like.new_zeros(S, W) for _ in range(3))
        self._qkv = like.new_zeros(S, 3 * W)
        mixes = [head.mix for head in self._heads if head.mix is not None]
        networks = [block.feed_forward for block in self._blocks] + mixes
        self._room = {each.sizes: each.new_room(S) for each in networks}
        self._logits = like.new_zeros(S, config.codebook_size)
        self._sampled = torch.zeros_like(self._codes)
        self._plan = like.new_zeros(S, len(PLAN_COLUMNS), dtype=torch.float64)
        self._batch: Batch | None = None
        shape = (S, config.num_heads, config.length, 2, config.head_width)
        self._tables = [like.new_zeros(shape) for _ in range(config.num_layers)]

    def advance(self, batch: Batch, state: SlotState) -> None:
        if state not in self._graphs:
            self._plan_for(None)  # so that the capture changes nothing
            self._graphs.add(state, partial(self._sample_and_run, state))
        if batch is not self._batch:
            self._plan_for(batch)
        self._graphs.replay(state)

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """As `Step.code_logits`, in float32."""
        B = len(hidden)
        all_hidden = torch.zeros_like(self._hidden)
        all_hidden[:B] = hidden
        self._sampled[:B, :m] = codes[:, :m]
        logits = self._compute_logits(all_hidden, m)[:B].float()
        return logits + self._heads[m].to_logits.bias.float()

    def pack(self, prefix: KeyValueCache) -> list[Tensor]:
        """Keys and values [H, n, 2, D] of each layer."""
        n = prefix.filled
        return [
            torch.stack([key[0, :, :n], value[0, :, :n]], dim=2)
            for key, value in zip(prefix.keys, prefix.values, strict=True)
        ]

    def load(self, slots: Tensor, packed: Sequence[Tensor]) -> None:
        for table, inputs in zip(self._tables, packed, strict=True):
            table[slots, :, : inputs.shape[1]] = inputs

    def _run(self, last_input: int) -> None:
        self._batch = None
        if "step" not in self._graphs:
            self._graphs.add("step", self._compute_hidden)
        self._graphs.replay("step")

    def _compute_hidden(self) -> None:
        self._run_layers(self._codes)
        self._hidden.copy_(self._x)

    def _sample_and_run(self, state: SlotState) -> None:
        config, S = self._config, self._num_slots
        N, M, V, W = config.num_positions, config.num_codebooks, config.codebook_size, config.width
        for m in range(M):
            sample_code[S,](
                self._compute_logits(state.hidden[:, 0], m),
                self._heads[m].to_logits.bias,
                self._plan,
                self._positions,
                state.noise_keys,
                self._sampled,
                state.image_tokens,
                state.log_likelihood,
                m,
                M=M,
                N=N,
                V=V,
                BLOCK_V=triton.next_power_of_2(V),
                num_warps=8,
            )
        self._run_layers(self._sampled)
        store_hidden[S,](
            self._x,
            self._plan,
            self._positions,
            state.hidden,
            W=W,
            BLOCK_W=triton.next_power_of_2(W),
        )

    def _compute_logits(self, hidden: Tensor, m: int) -> Tensor:
        """Logits [S, V] of code m without the bias, from hidden [S, W] and the sampled codes."""
        head = self._heads[m]
        if head.mix is not None:
            self._sum_rows(head.earlier, self._sampled, m, before=hidden)
            hidden = self._x
            head.norm(hidden, self._normed)
            head.mix(self._normed, self._room[head.mix.sizes], self._added)
            add(hidden, self._added, head.mix.contract, head.norm, self._normed)
        else:
            head.norm(hidden, self._normed)
        head.to_logits(self._normed, self._logits)
        return self._logits

    def _run_layers(self, codes: Tensor) -> None:
        """Compute x from the codes [S, M] of all slots' positions."""
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
        """Sum rows of a table into x: as the kernel `sum_of_rows`."""
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

    def _plan_for(self, batch: Batch | None) -> None:
        """Sample a batch's candidates from now on, from their current positions; None: nothing."""
        self._batch = batch
        self._last_slots = None
        V = self._config.codebook_size
        plan = np.zeros((self._num_slots, len(PLAN_COLUMNS)))
        plan[:, BLANK] = NOT_SAMPLED
        # Idle slots are after the last position, where no keys are read or stored.
        plan[:, POSITION] = self._config.num_positions
        for each in [] if batch is None else batch.candidates:
            options, blank = each.request.options, each.guidance_slot
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


class _Seen:
    """Inputs that the query at each input sees, [L, n], and how many, [L], for one kind of
    attention."""

    def __init__(
        self, config: TransformerConfig, kind: AttentionKind, device: torch.device
    ) -> None:
        self.is_all = kind == "full"  # all inputs before it: neither table is read
        unused = np.zeros((1, 1)), np.zeros((1, 1))
        inputs, counts = unused if self.is_all else inputs_seen(config, kind)
        self.inputs = torch.from_numpy(inputs).to(device, torch.int32).contiguous()
        self.counts = torch.from_numpy(counts).to(device, torch.int32)
