"""Keys and values of a layer for all slots, as the compiled step reads them.

Letters: S slots, H heads, L inputs of a sequence, D head width, D' the same rounded up to 16, n
inputs of a call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.decoding.cpu.structures import LANES


class SlotTable:
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

    def write(self, slot: int, x: Tensor) -> None:
        """Write keys or values [H, n, D] to a slot's first inputs."""
        n = x.shape[1]
        if self.ranges is not None:
            least, greatest = x.aminmax(dim=-1, keepdim=True)
            scale = ((greatest - least) / 255).clamp(min=1e-20)
            x = ((x - least) / scale).round_()
            self.ranges[slot, :, :n] = torch.cat([scale, least], dim=-1)
        self.rows[slot, :, :n] = F.pad(x, (0, self._padding))
