"""Triton's kernels on a machine without a GPU: by its interpreter, as conftest asks for."""

import pytest

# torch for another platform than Linux on x86 comes without them.
pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from triton.runtime import interpreter

from dalle.decoding.gpu.step import GpuStep

_patch_tensor = interpreter._patch_lang_tensor


def _with_an_index(tensor, scope):
    """numpy 2.4 makes no number of an array of one number, which Triton 3.6 asks of it for the
    bounds of a loop."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_an_index


__all__ = ["GpuStep"]
