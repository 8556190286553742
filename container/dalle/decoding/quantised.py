"""Linear layers in fp32, fp16 or int8, for decoding by torch's kernels.

A decoding step reads every weight once, so the weights' size determines its time. All matrices of
the 256-pixel model, milliseconds on one thread with AVX512 and VNNI for 1, 8 and 32 rows: fp32
11.3, 22.8, 30.4 · fp16 9.9, 14.5, 31.5 · int8 4.6, 7.0, 11.4 (measured 2026-11-22).

A row's result never depends on the rows beside it: activations are scaled row by row, and int8
products are summed exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dalle.errors import DeviceError
from dalle.types import Precision

Matrix = Callable[[Tensor], Tensor]
"""A linear layer without its module: [B, in] -> [B, out], float32."""

_TINY = 1e-20  # in place of the scale of an output whose weights are all zero
_FEW = 2048  # numbers up to which one slow kernel finds the greatest sooner than two fast ones
_MIDDLE = 128  # the byte that stands for 0


def matrix(linear: nn.Linear, precision: Precision) -> Matrix:
    """Convert a linear layer's weights to a precision; fp32 and bf16 keep them as they are.

    Unconverted weights share the layer's memory, on a CPU laid out anew as [in, out], which is read
    a quarter faster. Raises `DeviceError` where this processor or this build of torch has no kernel
    for the precision.
    """
    try:
        if precision == "fp16":
            return _half(linear)
        if precision == "int8":
            return _byte(linear)
    except (AttributeError, RuntimeError) as error:
        raise DeviceError(
            f"{precision} weights need an x86 processor and a torch with FBGEMM; this one says: "
            f"{str(error).splitlines()[0]}; use fp32"
        ) from error
    return _float(linear)


def _float(linear: nn.Linear) -> Matrix:
    if linear.weight.device.type == "cpu":
        linear.weight.data = linear.weight.data.t().contiguous().t()
    weight, bias = linear.weight.detach().t(), _bias(linear)
    if bias is None:
        return lambda x: torch.mm(x, weight)
    return lambda x: torch.addmm(bias, x, weight)


def _half(linear: nn.Linear) -> Matrix:
    weight, bias = linear.weight.detach().float(), _bias(linear)
    operators: Any = torch.ops.quantized
    packed = operators.linear_prepack_fp16(weight.contiguous(), bias)
    multiply = _bare(operators.linear_dynamic_fp16)
    return lambda x: multiply(x, packed)


def _byte(linear: nn.Linear) -> Matrix:
    """Symmetric int8: one scale for each output's weights, one for each row of activations."""
    weight, bias = linear.weight.detach().float(), _bias(linear)
    # Without VNNI pairs of products are added in 16 bits, which 7-bit weights cannot overflow.
    levels = 127 if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() else 63
    scale = byte_scales(weight, levels)
    operators: Any = torch.ops.quantized
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch deprecates the type, not the kernels
        quantised = torch.quantize_per_channel(
            weight, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8
        )
        packed = operators.linear_prepack(quantised, None)
    multiply = _bare(operators.linear_with_input_q_dq_qweight_dq_output_fp32)
    # Raises where the kernel is missing.
    multiply(torch.zeros(1, weight.shape[1]), 1 / 127, _MIDDLE, packed)

    if bias is None:

        def without_bias(x: Tensor) -> Tensor:
            greatest = _greatest(x)
            y: Tensor = multiply(x / greatest, 1 / 127, _MIDDLE, packed)
            return y.mul_(greatest)

        return without_bias

    def with_bias(x: Tensor) -> Tensor:
        # A row of zeros becomes arbitrary bytes, and zeros again by the factor 0.
        greatest = _greatest(x)
        return torch.addcmul(bias, multiply(x / greatest, 1 / 127, _MIDDLE, packed), greatest)

    return with_bias


def byte_scales(weight: Tensor, levels: int) -> Tensor:
    """Scale of each output's weights, [N], for weights [N, K] and bytes of ±levels."""
    return weight.abs().amax(dim=1).clamp(min=_TINY) / levels


def _greatest(x: Tensor) -> Tensor:
    """The greatest magnitude of each row, [B, 1]."""
    if x.numel() <= _FEW:
        greatest: Tensor = torch.linalg.vector_norm(x, torch.inf, 1, True)
        return greatest
    return x.abs().amax(dim=1, keepdim=True)


def _bias(linear: nn.Linear) -> Tensor | None:
    bias: Tensor | None = linear.bias
    return None if bias is None else bias.detach()


def _bare(operator: Any) -> Callable[..., Tensor]:
    """Return the operator without its overload resolution, a tenth of a step of one row."""
    bare: Callable[..., Tensor] = getattr(operator.default, "_op", operator)
    return bare
