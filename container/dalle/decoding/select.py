"""Which decoding step a model draws by: its device's, and the one in code of ours if it can."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from dalle.decoding.cpu.step import NativeStep, why_not
from dalle.decoding.kv_cache import KeyRange
from dalle.decoding.static_step import StaticStep
from dalle.decoding.step import EngineStep
from dalle.decoding.torch_step import RaggedStep
from dalle.models.transformer import Dalle
from dalle.types import Precision

_LEAST_CAPABILITY = (8, 0)  # that Triton is made for, and that computes in bf16


def new_step(
    model: Dalle,
    num_slots: int,
    precision: Precision = "fp32",
    key_ranges: Sequence[KeyRange] | None = None,
    *,
    own_kernels: bool = True,
) -> EngineStep:
    """A step of a model whose weights are as they are on a GPU: precision is that of a CPU.

    key_ranges: one a layer where `needs_key_ranges` or without our own kernels, otherwise not read.
    own_kernels: False draws by torch's alone, to compare with.
    """
    if _is_for_graphs(model):
        if not own_kernels or why_not_fused(model) is not None:
            return StaticStep(model, num_slots)
        # Here, because Triton may be absent, and takes its time.
        from dalle.decoding.gpu.step import FusedStep

        return FusedStep(model, num_slots)
    if own_kernels and why_not(model, precision) is None:
        return NativeStep(model, num_slots, precision=precision)
    as_bytes = key_ranges if precision == "int8" else None
    return RaggedStep(model, num_slots, precision=precision, key_ranges=as_bytes)


def needs_key_ranges(model: Dalle, precision: Precision) -> bool:
    """Whether bytes need to know the keys' range beforehand."""
    return precision == "int8" and why_not(model, precision) is not None


def describe_step(model: Dalle, precision: Precision) -> str:
    """For people: which step draws, and why no other."""
    if _is_for_graphs(model):
        reason, own = why_not_fused(model), "fused kernels"
    else:
        reason, own = why_not(model, precision), "the native step"
    return own if reason is None else f"torch's kernels, as {reason}"


def why_not_fused(model: Dalle) -> str | None:
    """What keeps `dalle.decoding.gpu.step` from drawing with a model here; None where nothing
    does."""
    device = model.text_position.device
    if device.type != "cuda":
        return f"the fused ones are for a GPU, not for {device.type}"
    for package in ("triton", "cuda.bindings"):  # torch's for CUDA needs both
        if not _is_there(package):
            return f"{package} is not installed"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        found, least = torch.cuda.get_device_capability(device), _LEAST_CAPABILITY
        return f"the GPU is of capability {found[0]}.{found[1]}, below {least[0]}.{least[1]}"
    return None


def _is_for_graphs(model: Dalle) -> bool:
    """On a GPU; and bf16, wherever it is."""
    return model.text_position.device.type != "cpu" or model.text_position.dtype != torch.float32


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # what it is in
        return False
