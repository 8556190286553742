"""Choice of the decoding step for a model, by its device and by what this machine supports."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from dalle.decoding.cpu.step import CpuStep, why_not
from dalle.decoding.cpu.torch_step import CpuTorchStep, KeyRange
from dalle.decoding.gpu.torch_step import GpuTorchStep
from dalle.decoding.legacy_step import LegacyStep
from dalle.decoding.step import Step
from dalle.errors import DeviceError
from dalle.models.legacy.transformer import LegacyTransformer
from dalle.models.transformer import Dalle
from dalle.types import Precision

MOST_ROWS = 64
"""Rows that a step with windows has room for, where there are fewer slots."""

_LEGACY = (
    "the model has the graph of DALLE-pytorch, which neither the compiled step nor the GPU steps "
    "compute yet"
)
_LEAST_CAPABILITY = (8, 0)  # the least that Triton supports and that computes in bf16


def new_step(
    model: Dalle,
    num_slots: int,
    precision: Precision = "fp32",
    key_ranges: Sequence[KeyRange] | None = None,
    *,
    own_kernels: bool = True,
    num_rows: int | None = None,
) -> Step:
    """Build the decoding step of a model.

    precision: of the weights on a CPU; on a GPU it is not read, and weights are the model's.
    key_ranges: one a layer where `needs_key_ranges` or without our own kernels, otherwise not read.
    own_kernels: False decodes by torch's kernels alone, to compare with.
    num_rows: most rows of a call, more than slots where there are windows; not read on a GPU. None:
    as many as there are slots.
    Raises `DeviceError` for a precision that the model's graph is not computed in.
    """
    if isinstance(model, LegacyTransformer):
        if precision != "fp32":
            raise DeviceError(f"precision must be fp32, got {precision}: {_LEGACY}")
        return LegacyStep(model, num_slots)
    if _is_for_graphs(model):
        if not own_kernels or why_not_triton(model) is not None:
            return GpuTorchStep(model, num_slots)
        # Imported here, because Triton may be absent and is slow to import.
        from dalle.decoding.gpu.step import GpuStep

        return GpuStep(model, num_slots)
    if own_kernels and why_not(model, precision) is None:
        return CpuStep(model, num_slots, precision=precision, num_rows=num_rows)
    as_bytes = key_ranges if precision == "int8" else None
    return CpuTorchStep(
        model, num_slots, precision=precision, key_ranges=as_bytes, num_rows=num_rows
    )


def most_rows(num_slots: int) -> int:
    """Return the rows that a step of an engine should have room for."""
    return max(num_slots, MOST_ROWS)


def needs_key_ranges(model: Dalle, precision: Precision) -> bool:
    """Whether the step stores keys as bytes over ranges that must be measured first."""
    is_legacy = isinstance(model, LegacyTransformer)
    return precision == "int8" and not is_legacy and why_not(model, precision) is not None


def describe_step(model: Dalle, precision: Precision) -> str:
    """Describe the decoding step for a log line: which one it is, and why it is not our own."""
    if isinstance(model, LegacyTransformer):
        return f"torch's kernels, because {_LEGACY}"
    if _is_for_graphs(model):
        reason, own = why_not_triton(model), "Triton kernels"
    else:
        reason, own = why_not(model, precision), "the compiled CPU step"
    return own if reason is None else f"torch's kernels, because {reason}"


def why_not_triton(model: Dalle) -> str | None:
    """Reason why `gpu.step` cannot decode with a model on this machine; None where it can."""
    device = model.text_position.device
    if device.type != "cuda":
        return f"Triton kernels are for a GPU, not for {device.type}"
    for package in ("triton", "cuda.bindings"):  # dependencies of torch for CUDA
        if not _is_there(package):
            return f"{package} is not installed"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        found, least = torch.cuda.get_device_capability(device), _LEAST_CAPABILITY
        return f"the GPU is of capability {found[0]}.{found[1]}, below {least[0]}.{least[1]}"
    return None


def _is_for_graphs(model: Dalle) -> bool:
    """Whether the model is on a GPU, or in bf16 anywhere."""
    return model.text_position.device.type != "cpu" or model.text_position.dtype != torch.float32


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
