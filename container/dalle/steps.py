"""Which decoding step a model draws by: its device's, and on a CPU the compiled one if it can."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dalle.decode_step import SlotStep
from dalle.names import Precision
from dalle.native_step import NativeStep, why_not
from dalle.ragged_step import RaggedStep
from dalle.slot_tables import KeyRange
from dalle.static_step import StaticStep
from dalle.transformer import Dalle


def new_step(
    model: Dalle,
    num_slots: int,
    precision: Precision = "fp32",
    key_ranges: Sequence[KeyRange] | None = None,
) -> SlotStep:
    """A step of a model whose weights are as they are on a GPU: precision is that of a CPU.

    key_ranges: one a layer where `needs_key_ranges`, otherwise not read.
    """
    if _is_for_graphs(model):
        return StaticStep(model, num_slots)
    if why_not(model, precision) is None:
        return NativeStep(model, num_slots, precision=precision)
    as_bytes = key_ranges if precision == "int8" else None
    return RaggedStep(model, num_slots, precision=precision, key_ranges=as_bytes)


def needs_key_ranges(model: Dalle, precision: Precision) -> bool:
    """Whether bytes need to know the keys' range beforehand."""
    return precision == "int8" and why_not(model, precision) is not None


def describe_step(model: Dalle, precision: Precision) -> str:
    """For people: which step draws, and why no other."""
    if _is_for_graphs(model):
        return "a recorded graph"
    reason = why_not(model, precision)
    return "the native step" if reason is None else f"torch's kernels, as {reason}"


def _is_for_graphs(model: Dalle) -> bool:
    """On a GPU; and bf16, wherever it is."""
    return model.text_position.device.type != "cpu" or model.text_position.dtype != torch.float32
