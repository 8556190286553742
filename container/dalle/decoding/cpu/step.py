"""The decoding step for a CPU in one call of compiled code, whose C++ is in `csrc/`.

The same arithmetic as `dalle.decoding.cpu.torch_step`. It needs Linux, AVX2 or AVX-512, and a
C++ compiler at installation; where one is missing, `why_not` names it and torch's kernels decode
instead.

Letters: S slots, B busy slots, C candidates, H heads, L inputs of a sequence, D head width, D' the
same rounded up to 16, M codes, V codebook size, W width.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.cpu.structures import (
    CODES,
    MOST_HEAD_WIDTH,
    CCandidate,
    CCounts,
    CHead,
    CLayer,
    CLeader,
    CModel,
    CSampling,
    CSeen,
    CState,
    Structures,
    library,
)
from dalle.decoding.cpu.tables import SlotTable
from dalle.decoding.model_parts import blocks_of, heads_of, input_tables
from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.step import (
    Batch,
    CandidateTokens,
    DecodeRequest,
    Prefix,
    SlotState,
    Step,
    WindowCounts,
)
from dalle.models.layers import KeyValueCache
from dalle.models.transformer import Dalle
from dalle.types import AttentionKind, Precision

_MOST_SECONDS = 3600.0  # which the library's clock can add
_CANDIDATE, _LEADER = np.dtype(CCandidate), np.dtype(CLeader)
_MOST_PREFILLED = 32  # inputs of a caption; of more, torch's products are faster


def why_not(model: Dalle, precision: Precision) -> str | None:
    """Reason why `CpuStep` cannot decode with a model on this machine; None where it can."""
    place = model.text_position
    if place.device.type != "cpu" or place.dtype != torch.float32:
        return (
            f"the compiled step is for float32 on a CPU, not {place.dtype} on {place.device.type}"
        )
    compiled = library()
    if compiled is None:
        return (
            "the compiled step is not built: install g++ 11 or later, `rm .venv/.stamp` and "
            "`make setup`"
        )
    if compiled.dalle_support() == 0:
        return "the processor has no AVX2"
    if precision not in CODES:
        return f"the compiled step has no {precision}"
    if model.config.head_width > MOST_HEAD_WIDTH:
        return f"head width must be at most {MOST_HEAD_WIDTH}, got {model.config.head_width}"
    return None


class CpuStep(Step):
    """A model's decoding step with the keys and values of all its slots.

    In fp32 it shares the model's weights. In int8 keys and values are bytes too, each row over the
    row's range. It starts as many threads as torch has, which sleep between calls. Raises
    ValueError where `why_not` has a reason.
    """

    def __init__(
        self,
        model: Dalle,
        num_slots: int,
        *,
        precision: Precision = "fp32",
        num_rows: int | None = None,
    ) -> None:
        """num_rows: most rows of one call; None: as many as slots."""
        compiled, reason = library(), why_not(model, precision)
        if compiled is None or reason is not None:
            raise ValueError(f"no compiled step: {reason}")
        config = model.config
        self._config, self._library = config, compiled
        self.num_rows = self._most_rows = num_rows or num_slots
        structures = Structures(precision, compiled.dalle_support())
        self._sampling: _BatchSampling | None = None
        self._spare_slot = num_slots  # of the caption that is being read
        shape = (num_slots + 1, config.num_heads, config.length)
        # Keys, then values, of each layer.
        self._tables = [
            [SlotTable(shape, config.head_width, precision == "int8") for _ in range(2)]
            for _ in model.blocks
        ]
        self._process = os.getpid()
        self._kept: list[Any] = []  # memory that the library reads
        self._step = self._new_step(model, structures, self._most_rows)
        # A caption is read in fp32 in every precision, as by the model itself.
        self._prefill_step = self._step
        if precision != "fp32":
            exact = Structures("fp32", compiled.dalle_support())
            self._prefill_step = self._new_step(model, exact, _MOST_PREFILLED)

    def _new_step(self, model: Dalle, structures: Structures, num_rows: int) -> int:
        """Return a step of the library over the tables of all slots."""
        config = self._config
        seen: dict[AttentionKind, CSeen] = {}
        layers = []
        for layer, block in enumerate(blocks_of(model)):
            attention_kind = config.kind_of_layer(layer)
            if attention_kind not in seen:
                seen[attention_kind] = structures.seen(model, attention_kind)
            tables = [structures.table(each.rows, each.ranges) for each in self._tables[layer]]
            layers.append(structures.layer(block, tables, seen[attention_kind]))
        heads = [structures.head(head) for head in heads_of(model)]
        code_inputs, position_inputs = input_tables(model)
        c_layers, c_heads = (CLayer * len(layers))(*layers), (CHead * len(heads))(*heads)
        c_model = CModel(
            layers=c_layers,
            heads=c_heads,
            code_inputs=structures.pointer(code_inputs),
            position_inputs=structures.pointer(position_inputs),
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            length=config.length,
            text_length=config.text_length,
            num_codebooks=config.num_codebooks,
            codebook_size=config.codebook_size,
            inner_width=config.feed_forward_ratio * config.width,
            precision=structures.precision,
        )
        self._kept += [structures.kept, c_layers, c_heads]
        step: int | None = self._library.dalle_new_step(ctypes.byref(c_model), num_rows)
        if not step:
            raise MemoryError(f"no memory for a compiled step of {num_rows} rows")
        # Not at the end of the process: another thread may be in a step, and all end with it.
        weakref.finalize(self, _delete, self._library, step, self._process).atexit = False
        return step

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for layer in self._tables for each in layer)

    def windows(self, state: SlotState) -> CompiledWindows:
        def call(num_rows: int, *others: Any) -> None:
            self._call(self._library.dalle_decode, num_rows, *others)

        return CompiledWindows(call, state, self._config.codebook_size)

    def prefill(self, model: Dalle, text_tokens: Tensor, prime_tokens: Tensor | None) -> Prefix:
        prime = None if prime_tokens is None else prime_tokens[None]
        inputs = model.prefix_inputs(text_tokens, prime)[0].contiguous()
        n = len(inputs)
        if n > min(_MOST_PREFILLED, self._most_rows):
            return super().prefill(model, text_tokens, prime_tokens)
        hidden = torch.empty(self._config.width)
        self._call(
            self._library.dalle_prefill,
            n,
            self._spare_slot,
            0,
            inputs.data_ptr(),
            hidden.data_ptr(),
            step=self._prefill_step,
        )
        return Prefix(self._save(n), hidden)

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        B = len(slots)
        codes = codes.contiguous()
        slots, positions = (np.ascontiguousarray(each, np.int64) for each in (slots, positions))
        hidden = torch.empty(B, self._config.width)
        self._call(
            self._library.dalle_step,
            B,
            slots.ctypes.data,
            codes.data_ptr(),
            positions.ctypes.data,
            hidden.data_ptr(),
        )
        return hidden

    def sample(self, hidden: Tensor, noise_keys: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        sampling = self._sampling
        if sampling is None or sampling.batch is not batch:
            size = self._config.codebook_size
            sampling = self._sampling = _BatchSampling.of(batch, size, sampling)
        B, R = len(hidden), len(noise_keys)
        hidden, noise_keys = hidden.contiguous(), noise_keys.contiguous()
        codes = torch.zeros(R, self._config.num_codebooks, dtype=torch.int64)
        log_likelihood = torch.zeros(R)
        self._call(
            self._library.dalle_sample,
            B,
            hidden.data_ptr(),
            R,
            sampling.rows.ctypes.data,
            sampling.by_row.ctypes.data,
            noise_keys.data_ptr(),
            codes.data_ptr(),
            log_likelihood.data_ptr(),
        )
        return codes, log_likelihood

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        B = len(hidden)
        hidden, codes = hidden.contiguous(), codes.contiguous()
        logits = torch.empty(B, self._config.codebook_size)
        self._call(
            self._library.dalle_code_logits,
            B,
            hidden.data_ptr(),
            m,
            codes.data_ptr(),
            codes.shape[1],
            logits.data_ptr(),
        )
        return logits

    def pack(self, prefix: KeyValueCache) -> tuple[int, Tensor]:
        """Number of inputs, and the bytes of their keys and values in all layers."""
        for tables, *keys_and_values in zip(self._tables, prefix.keys, prefix.values, strict=True):
            for table, each in zip(tables, keys_and_values, strict=True):
                table.write(self._spare_slot, each[0, :, : prefix.filled])
        return self._save(prefix.filled)

    def _save(self, n: int) -> tuple[int, Tensor]:
        """Return the first n inputs of the spare slot, as `pack`."""
        size = self._library.dalle_prefix_size(self._step, n)
        packed = torch.empty(size, dtype=torch.uint8)
        self._library.dalle_save_prefix(self._step, self._spare_slot, n, packed.data_ptr())
        return n, packed

    def load(self, slots: Tensor, packed: Sequence[Any]) -> None:
        n, numbers = packed
        for slot in slots.tolist():
            self._library.dalle_load_prefix(self._step, slot, n, numbers.data_ptr())

    def _call(
        self,
        function: Callable[..., int],
        num_rows: int,
        *others: Any,
        step: int | None = None,
    ) -> None:
        """Call a function of the library: all time outside Python, which benchmarks measure.

        step: one of its steps; None: that of this precision.
        """
        if num_rows > self._most_rows:
            raise ValueError(f"{num_rows} rows, but the step has room for {self._most_rows}")
        if os.getpid() != self._process:
            raise RuntimeError("a compiled step cannot be used in a forked process")
        if not function(step or self._step, torch.get_num_threads(), num_rows, *others):
            raise RuntimeError(
                f"cannot start {torch.get_num_threads()} threads for a compiled step"
            )


class CompiledWindows:
    """The windows of one engine's candidates, several steps of them in one call.

    The same as `dalle.decoding.windows.WindowDecoder`, whose steps of a small model would take
    longer in Python than in the model.
    """

    def __init__(self, call: Callable[..., None], state: SlotState, codebook_size: int) -> None:
        self._call, self._state, self._codebook_size = call, state, codebook_size
        _, self._widest, _ = state.hidden.shape
        _, self._num_positions, _ = state.image_tokens.shape
        self._c_state = CState(
            hidden=state.hidden.data_ptr(),
            tokens=state.image_tokens.data_ptr(),
            noise_keys=state.noise_keys.data_ptr(),
            log_likelihood=state.log_likelihood.data_ptr(),
            widest=self._widest,
            num_positions=self._num_positions,
        )

    def decode(
        self, candidates: Sequence[CandidateTokens], width: int, seconds: float
    ) -> WindowCounts:
        """Sample the candidates' windows, and run the model on the next ones of at most `width`.

        Once, and again until a candidate has all positions or `seconds` have passed.
        """
        requests = list({id(each.request): each.request for each in candidates}.values())
        places = {id(each): place for place, each in enumerate(requests)}
        table = np.array(
            [
                (
                    _sampling_numbers(each.request.options, self._codebook_size),
                    each.slot,
                    -1 if each.guidance_slot is None else each.guidance_slot,
                    each.position,
                    each.window,
                    each.guessed,
                    places[id(each.request)],
                )
                for each in candidates
            ],
            dtype=_CANDIDATE,
        )
        at = {id(each): place for place, each in enumerate(candidates)}
        leaders = np.array([_leader(each.leader, at) for each in requests], dtype=_LEADER)
        compared, right = np.zeros((2, self._widest + 1), np.int64)
        counts = CCounts(compared=compared.ctypes.data, right=right.ctypes.data)
        rows_each = 1 + (table["blank_slot"] >= 0)
        following = (self._num_positions - table["position"]).clip(max=width)
        rows = max((rows_each * each).sum() for each in (table["window"], following))
        self._run(int(rows), table, leaders, width, seconds, counts)
        for each, position, window, guessed in zip(
            candidates,
            *(table[name].tolist() for name in ("position", "window", "guessed")),
            strict=True,
        ):
            each.move(position - each.position, counts.steps)
            each.window, each.guessed = window, guessed
        for request, place in zip(requests, leaders["candidate"].tolist(), strict=True):
            if place >= 0:
                request.leader = candidates[place]
        return WindowCounts(compared, right, counts.steps)

    def _run(
        self,
        rows: int,
        candidates: np.ndarray,
        leaders: np.ndarray,
        width: int,
        seconds: float,
        counts: CCounts,
    ) -> None:
        """Call `dalle_decode` on arrays of its structures, which it changes. rows: of a step."""
        self._call(
            rows,
            ctypes.byref(self._c_state),
            candidates.ctypes.data,
            len(candidates),
            leaders.ctypes.data,
            width,
            round(1e9 * min(seconds, _MOST_SECONDS)),
            ctypes.byref(counts),
        )

    def trial(self, num_candidates: int, width: int) -> Callable[[], None]:
        """As `WindowDecoder.trial`."""
        request = DecodeRequest(0, SamplingOptions(), deque(), None, [])
        options = _sampling_numbers(request.options, self._codebook_size)
        position = 1 + (self._num_positions - 1 - width) // 2
        first = np.array(
            [(options, slot, -1, position, width, position, 0) for slot in range(num_candidates)],
            dtype=_CANDIDATE,
        )
        leaders = np.array([_leader(None, {})], dtype=_LEADER)
        tokens = self._state.image_tokens[:num_candidates]
        found = np.zeros((2, self._widest + 1), np.int64)
        counts = CCounts(compared=found[0].ctypes.data, right=found[1].ctypes.data)

        def work() -> None:
            assert len(found) == 2  # it is what the counts' memory belongs to
            tokens.zero_()  # or what the last call has sampled would be right guesses
            self._run(num_candidates * width, first.copy(), leaders.copy(), width, 0.0, counts)

        return work


@dataclass(frozen=True)
class _BatchSampling:
    """Sampling options of a batch's rows as C structures."""

    batch: Batch
    by_candidate: np.ndarray
    """[C] of `CSampling`: the options of each candidate, without rows of its own."""
    by_row: np.ndarray
    """[R] of `CSampling`."""
    rows: np.ndarray
    """[B] int32: the row with caption that each row samples for."""

    @classmethod
    def of(cls, batch: Batch, codebook_size: int, last: _BatchSampling | None) -> _BatchSampling:
        """last: that of the batch before, whose options hold where the candidates are the same."""
        if last is not None and last.batch.candidates is batch.candidates:
            by_candidate = last.by_candidate
        else:
            by_candidate = np.array(
                [
                    _sampling_numbers(each.request.options, codebook_size)
                    for each in batch.candidates
                ],
                dtype=np.dtype(CSampling),
            )
        by_row = by_candidate[batch.row_candidates]
        R, G = len(by_row), len(batch.guided)
        rows = np.arange(R, dtype=np.int32)
        if G:
            by_row["blank_row"][batch.guided] = R + np.arange(G)
            rows = np.concatenate([rows, batch.guided], dtype=np.int32)
        return cls(batch, by_candidate, by_row, rows)


def _sampling_numbers(options: SamplingOptions, codebook_size: int) -> tuple[float, ...]:
    """Return the fields of `CSampling` in order, for a row without guidance."""
    top_p = 1.0 if options.top_p is None else options.top_p
    top_k = min(options.top_k or codebook_size, codebook_size)
    return top_p, options.temperature, options.guidance_scale, top_k, -1


def _leader(leader: CandidateTokens | None, places: dict[int, int]) -> tuple[int, int, int, int]:
    """Return the fields of `CLeader`. places: of the candidates by identity."""
    if leader is None:
        return 0, 0, 0, -1
    place = places.get(id(leader), -1)
    return leader.image_tokens.data_ptr(), leader.position, leader.guessed, place


def _delete(compiled: ctypes.CDLL, step: int, process: int) -> None:
    # A forked process has none of the step's threads to wait for.
    if os.getpid() == process:
        compiled.dalle_delete_step(step)
