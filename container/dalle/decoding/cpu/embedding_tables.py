"""Tables whose weighted row sums are computed at the speed of memory, in floats or in bytes.

One kernel made for embeddings (`embedding_bag`) sums, for each bag of row indices, the rows by
weight. It prefetches along the indices, so that rows may lie anywhere in the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# By overload: looked up once, not at each call.
_SUMS: Any = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default
_PACK: Any = torch.ops.quantized.embedding_bag_byte_prepack.default
_UNPACK: Any = torch.ops.quantized.embedding_bag_byte_unpack.default

_SCALE_BYTES = 8  # after a row of bytes: its scale and its least value, as two floats


class FloatTable:
    """A table [rows, columns] of float32."""

    def __init__(self, num_rows: int, columns: int) -> None:
        self.table = torch.zeros(num_rows, columns)

    def sums(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """Sum rows by weight: [bags, columns]. Bag i is indices[offsets[i]:offsets[i + 1]].

        All three arguments are flat; weights has one number per index.
        """
        return torch.embedding_bag(
            self.table, indices, offsets, False, 0, False, weights, include_last_offset=True
        )[0]

    def fetch(self, indices: Tensor) -> Tensor:
        """Rows [indices, columns] as they were before `encode`."""
        return self.table.index_select(0, indices)

    @staticmethod
    def encode(rows: Tensor) -> Tensor:
        """Convert float rows to what the table holds."""
        return rows


class ByteTable:
    """A table [rows, columns] of bytes; each row has a scale and a least value."""

    def __init__(self, num_rows: int, columns: int) -> None:
        self.table = torch.zeros(num_rows, columns + _SCALE_BYTES, dtype=torch.uint8)

    def sums(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """As `FloatTable.sums`."""
        summed: Tensor = _SUMS(self.table, indices, offsets, False, 0, False, weights, None, True)
        return summed

    def fetch(self, indices: Tensor) -> Tensor:
        """As `FloatTable.fetch`."""
        chosen = self.table.index_select(0, indices)
        rows: Tensor = _UNPACK(chosen)
        return rows

    @staticmethod
    def row_length(columns: int) -> int:
        """Bytes of a row."""
        return columns + _SCALE_BYTES

    @staticmethod
    def encode(rows: Tensor) -> Tensor:
        """Convert float rows to bytes [rows, columns + 8]: 0 is a row's least value, 255 its
        greatest."""
        encoded: Tensor = _PACK(rows)
        return encoded

    def set_scales(self, scale: Tensor, least: Tensor) -> None:
        """Set scale and least value of each row, [rows] each; for rows not made by `encode`."""
        floats = self.table.view(torch.float32)
        floats[:, -2], floats[:, -1] = scale, least


Table = FloatTable | ByteTable
