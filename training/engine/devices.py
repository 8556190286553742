"""Devices of this host for training: which, in which number formats, how fast, how full."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from dalle.errors import DeviceError, HyperparameterError
from training.config.fields import FitHyperparameters

logger = logging.getLogger(__name__)

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of matrix products by precision; fp32 needs no autocast."""


def check_precision(hyperparameters: FitHyperparameters, device: torch.device) -> None:
    """Raise HyperparameterError for a number format that the device cannot train in."""
    if hyperparameters.precision == "fp16" and device.type == "cpu":
        raise HyperparameterError("precision=fp16 needs a GPU; on this CPU it must be fp32 or bf16")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context of the forward pass for a precision; it does nothing for fp32."""
    dtype = AUTOCAST_TYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def is_emulated(precision: str, device: torch.device) -> bool:
    """Return whether a number format is slower than fp32 because the device emulates it."""
    return precision == "bf16" and device.type == "cpu" and not _multiplies_in_bf16()


def _multiplies_in_bf16() -> bool:
    """Return whether the CPU has bf16 products; True where torch cannot tell."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def count_devices(wanted: str) -> int:
    """Return the number of devices to train on, at least 1; `wanted` is auto, cpu or cuda."""
    if wanted == "cpu" or not torch.cuda.is_available():
        return 1
    return torch.cuda.device_count()


def choose_device(wanted: str, number: int = 0) -> torch.device:
    """Return the device to train on; `wanted` is auto, cpu or cuda. Logs the choice.

    number: of the CUDA device, from 0. Raises DeviceError when cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise DeviceError(f"DALLE_DEVICE=cuda, but {_why_no_cuda()}; choose a GPU instance or auto")
    if wanted == "cpu" or not has_cuda:
        reason = "DALLE_DEVICE=cpu" if wanted == "cpu" else _why_no_cuda()
        logger.info("training on the CPU with %d threads: %s", torch.get_num_threads(), reason)
        return torch.device("cpu")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    logger.info("training on %s", torch.cuda.get_device_name(device))
    return device


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no CUDA device (no GPU, or no driver for it)"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that `work` holds at once beyond those held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        work()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    assert results is not None, "the profiler has ended"
    held = most = 0
    for event in results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
