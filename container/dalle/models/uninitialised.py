"""Models made without initial values, because only their shapes matter or weights will be loaded.

On the meta device random values would import torch's compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it, modules are made with shapes, but neither memory nor initial values."""
    with torch.device("meta"), _Uninitialised():
        yield


@contextmanager
def without_random_values() -> Iterator[None]:
    """Within it, weights with random initial values are made with any: they are to be loaded."""
    with _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """Skips initialisation: the models of `base` are built three times faster."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in _RANDOM | _CONSTANT:
            return func(*args, **kwargs)
        tensor: torch.Tensor = args[0] if args else kwargs["tensor"]
        if name in _RANDOM:
            return tensor
        is_scaled = name != "mul" or isinstance(args[1], float)  # `scale * torch.randn(width)`
        if not (tensor.is_meta and is_scaled):
            return func(*args, **kwargs)
        if name == "zeros_like":
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return tensor


_RANDOM = {
    *("normal_", "_no_grad_normal_", "uniform_", "_no_grad_uniform_", "trunc_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"),
}
_CONSTANT = {"zeros_", "zero_", "ones_", "fill_", "constant_", "triu_", "zeros_like", "mul"}
