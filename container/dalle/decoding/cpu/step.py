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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.decoding.cpu.structures import (
    CODES,
    LANES,
    MOST_HEAD_WIDTH,
    CHead,
    CLayer,
    CModel,
    CSampling,
    CSeen,
    Structures,
    library,
)
from dalle.decoding.model_parts import blocks_of, heads_of, input_tables
from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.step import Batch, Step
from dalle.models.layers import KeyValueCache
from dalle.models.transformer import Dalle
from dalle.types import AttentionKind, Precision


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
        shape = (num_slots, config.num_heads, config.length)
        # Keys, then values, of each layer.
        self._tables = [
            [_SlotTable(shape, config.head_width, precision == "int8") for _ in range(2)]
            for _ in model.blocks
        ]
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
        self._kept = structures.kept
        self._layers = (CLayer * len(layers))(*layers)
        self._heads = (CHead * len(heads))(*heads)
        self._model = CModel(
            layers=self._layers,
            heads=self._heads,
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
        self._step: int | None = compiled.dalle_new_step(ctypes.byref(self._model), self._most_rows)
        if not self._step:
            raise MemoryError(f"no memory for a compiled step of {num_slots} slots")
        # Not at the end of the process: another thread may be in a step, and all end with it.
        self._process = os.getpid()
        weakref.finalize(self, _delete, compiled, self._step, self._process).atexit = False

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for layer in self._tables for each in layer)

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

    def pack(self, prefix: KeyValueCache) -> list[list[_Packed]]:
        """Keys and values of each layer, as its tables store them."""
        return [
            [
                table.encode(each[0, :, : prefix.filled])
                for table, each in zip(tables, keys_and_values, strict=True)
            ]
            for tables, *keys_and_values in zip(
                self._tables, prefix.keys, prefix.values, strict=True
            )
        ]

    def load(self, slots: Tensor, packed: Sequence[Sequence[_Packed]]) -> None:
        for tables, parts in zip(self._tables, packed, strict=True):
            for table, part in zip(tables, parts, strict=True):
                table.load(slots, part)

    def _call(self, function: Callable[..., int], num_rows: int, *others: Any) -> None:
        """Call a function of the library: all time outside Python, which benchmarks measure."""
        if num_rows > self._most_rows:
            raise ValueError(f"{num_rows} rows, but the step has room for {self._most_rows}")
        if os.getpid() != self._process:
            raise RuntimeError("a compiled step cannot be used in a forked process")
        if not function(self._step, torch.get_num_threads(), num_rows, *others):
            raise RuntimeError(
                f"cannot start {torch.get_num_threads()} threads for a compiled step"
            )


_Packed = tuple[Tensor, Tensor | None]
"""The first n rows of a slot [H, n, D'], and for bytes their ranges [H, n, 2]."""


class _SlotTable:
    """Keys or values of a layer for all slots, as floats, or as bytes over the range of each row.

    rows: [S, H, L, D']. ranges: for bytes [S, H, L, 2], the scale and the least value of a row.
    """

    def __init__(self, shape: tuple[int, int, int], head_width: int, as_bytes: bool) -> None:
        """Allocate zeros. shape: S, H, L."""
        self._padding = -head_width % LANES
        kind = torch.uint8 if as_bytes else torch.float32
        self.rows = torch.zeros(*shape, head_width + self._padding, dtype=kind)
        self.ranges = torch.zeros(*shape, 2) if as_bytes else None

    @property
    def num_bytes(self) -> int:
        """Memory of rows and ranges."""
        return self.rows.nbytes + (0 if self.ranges is None else self.ranges.nbytes)

    def encode(self, x: Tensor) -> _Packed:
        """Convert keys or values [H, n, D] to rows and ranges."""
        if self.ranges is None:
            return F.pad(x, (0, self._padding)), None
        least, greatest = x.aminmax(dim=-1, keepdim=True)
        scale = ((greatest - least) / 255).clamp(min=1e-20)
        rows = ((x - least) / scale).round_().to(torch.uint8)
        return F.pad(rows, (0, self._padding)), torch.cat([scale, least], dim=-1)

    def load(self, slots: Tensor, packed: _Packed) -> None:
        """Write the same rows to each of the slots [B]."""
        rows, ranges = packed
        n = rows.shape[1]
        self.rows[slots, :, :n] = rows
        if self.ranges is not None and ranges is not None:
            self.ranges[slots, :, :n] = ranges


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
                [_numbers(each.request.options, codebook_size) for each in batch.candidates],
                dtype=np.dtype(CSampling),
            )
        by_row = by_candidate[batch.row_candidates]
        R, G = len(by_row), len(batch.guided)
        rows = np.arange(R, dtype=np.int32)
        if G:
            by_row["blank_row"][batch.guided] = R + np.arange(G)
            rows = np.concatenate([rows, batch.guided], dtype=np.int32)
        return cls(batch, by_candidate, by_row, rows)


def _numbers(options: SamplingOptions, codebook_size: int) -> tuple[float, ...]:
    """Return the fields of `CSampling` in order, for a row without guidance."""
    top_p = 1.0 if options.top_p is None else options.top_p
    top_k = min(options.top_k or codebook_size, codebook_size)
    return top_p, options.temperature, options.guidance_scale, top_k, -1


def _delete(compiled: ctypes.CDLL, step: int, process: int) -> None:
    # A forked process has none of the step's threads to wait for.
    if os.getpid() == process:
        compiled.dalle_delete_step(step)
