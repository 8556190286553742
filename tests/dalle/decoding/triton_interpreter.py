"""Triton kernels by Triton's interpreter, for machines without a GPU; conftest turns it on."""

import pytest

# torch has them as dependencies on Linux on x86 only.
pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from triton.runtime import interpreter

from dalle.decoding.gpu.step import GpuStep

_patch_tensor = interpreter._patch_lang_tensor


def _with_an_index(tensor, scope):
    """Let a loop's bounds be tensors: numpy 2.4 no longer converts an array of one number, and
    Triton 3.6 relies on that."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_an_index


__all__ = ["GpuStep"]
