"""Tables of which weighted sums of rows are read at the memory's speed, in floats or in bytes.

One kernel made for embeddings does it (`embedding_bag`): for each bag of row numbers, the sum of
those rows by weight. It fetches ahead along the numbers, so that rows may lie anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# By overload: found once, not at each call.
_SUMS: Any = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default
_PACK: Any = torch.ops.quantized.embedding_bag_byte_prepack.default
_UNPACK: Any = torch.ops.quantized.embedding_bag_byte_unpack.default

_SCALE_BYTES = 8  # behind a row of bytes: its scale and its least value, as two floats


class FloatRows:
    """A table [rows, columns] of float32."""

    def __init__(self, num_rows: int, columns: int) -> None:
        self.table = torch.zeros(num_rows, columns)

    def sums(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """Bag i is indices[offsets[i]:offsets[i + 1]]: [bags, columns]. All three are flat."""
        return torch.embedding_bag(
            self.table, indices, offsets, False, 0, False, weights, include_last_offset=True
        )[0]

    def fetch(self, indices: Tensor) -> Tensor:
        """Rows [indices, columns] as they were before `encode`."""
        return self.table.index_select(0, indices)

    @staticmethod
    def encode(rows: Tensor) -> Tensor:
        """Rows as the table holds them."""
        return rows


class ByteRows:
    """A table [rows, columns] of bytes; each row has a scale and a least value of its own."""

    def __init__(self, num_rows: int, columns: int) -> None:
        self.table = torch.zeros(num_rows, columns + _SCALE_BYTES, dtype=torch.uint8)

    def sums(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """As `FloatRows.sums`."""
        summed: Tensor = _SUMS(self.table, indices, offsets, False, 0, False, weights, None, True)
        return summed

    def fetch(self, indices: Tensor) -> Tensor:
        """As `FloatRows.fetch`."""
        chosen = self.table.index_select(0, indices)
        rows: Tensor = _UNPACK(chosen)
        return rows

    @staticmethod
    def row_length(columns: int) -> int:
        """Bytes of a row."""
        return columns + _SCALE_BYTES

    @staticmethod
    def encode(rows: Tensor) -> Tensor:
        """Bytes [rows, columns + 8]: 0 is a row's least value, 255 its greatest."""
        encoded: Tensor = _PACK(rows)
        return encoded

    def set_scales(self, scale: Tensor, least: Tensor) -> None:
        """Fix what the bytes of each row mean, [rows] each; for rows not written by `encode`."""
        floats = self.table.view(torch.float32)
        floats[:, -2], floats[:, -1] = scale, least


Rows = FloatRows | ByteRows
