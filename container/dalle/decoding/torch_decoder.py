"""The model's arithmetic for one position of many sequences, by torch's kernels.

The same numbers as `dalle.models.transformer` with fewer kernels. Knows no slots and no sampling:
keys and values are those of a cache that is passed in.

A step reads every weight once, so the weights' size determines its time. All matrices of the
256-pixel model, milliseconds on one thread with AVX512 and VNNI for 1, 8 and 32 rows: fp32 11.3,
22.8, 30.4 · fp16 9.9, 14.5, 31.5 · int8 4.6, 7.0, 11.4 (measured 2026-11-22). A row's result never
depends on the rows beside it: activations are scaled row by row, and int8 products are summed
exactly.

Letters: B rows, M codes, V codebook size, W width, N positions, H heads, D head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.decoding.model_parts import (
    QK_EPSILON,
    BlockParts,
    blocks_of,
    byte_scales,
    earlier_table,
    heads_of,
    input_tables,
)
from dalle.errors import DeviceError
from dalle.models.layers import FeedForward
from dalle.models.transformer import CodeHead, Dalle
from dalle.types import Precision

Function = Callable[[Tensor], Tensor]

_FEW = 2048  # numbers up to which one slow kernel finds the greatest sooner than two fast ones
_MIDDLE = 128  # the byte that stands for 0


class Cache(Protocol):
    """Keys and values; the rows of the current step are set before the call."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values and attend: all [B, H, D] -> [B, H * D]."""
        ...


class TorchDecoder:
    """A model's layers and heads for one position, weights in the given precision.

    fp32 shares the model's memory.
    """

    def __init__(self, model: Dalle, precision: Precision = "fp32") -> None:
        config = model.config
        self._blocks = [_Block(block, precision) for block in blocks_of(model)]
        self._heads = [_Head(head, precision) for head in heads_of(model)]
        self._heads_shape = (3, config.num_heads, config.head_width)
        # One table, so that an input is one sum of rows.
        codes, position = input_tables(model)
        self._inputs = torch.cat([codes, position])
        V, M = config.codebook_size, config.num_codebooks
        self._first_rows = torch.arange(M + 1, device=position.device) * V

    def __call__(self, codes: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Run the layers on the codes [B, M] of each row's position [B].

        Returns the states [B, W] that predict the next position.
        """
        rows = torch.cat([codes, positions[:, None]], dim=1).add_(self._first_rows)
        x = self._inputs.index_select(0, rows.view(-1)).view(*rows.shape, -1).sum(dim=1)
        head = self._heads_shape[2:]
        for layer, block in enumerate(self._blocks):
            qkv = block.qkv(block.attention_norm(x)).view(-1, *self._heads_shape)
            query_key = qkv.narrow(1, 0, 2)
            if block.qk_norm:
                query_key = torch.native_layer_norm(query_key, head, None, None, QK_EPSILON)[0]
            query, key = query_key.unbind(1)
            attended = block.out(cache.attend(layer, query, key, qkv.select(1, 2)))
            x = _add(x, attended, block.out_gain)
            added = block.contract(block.activate(block.expand(block.feed_forward_norm(x))))
            x = _add(x, added, block.contract_gain)
        return x

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """As `Step.code_logits`."""
        head = self._heads[m]
        if head.mix is not None:
            expand, activate, contract = head.mix
            known = F.embedding_bag(codes[:, :m] + head.first_rows, head.earlier, mode="sum")
            hidden = hidden + known
            hidden = hidden + contract(activate(expand(head.norm(hidden))))
        return head.to_logits(head.norm(hidden))


class _Block:
    """A block of the transformer as functions of its parts."""

    def __init__(self, block: BlockParts, precision: Precision) -> None:
        self.attention_norm = _norm(block.attention_norm)
        self.qkv = matrix(block.attention.to_qkv, precision)
        self.qk_norm = block.attention.qk_norm
        self.out = matrix(block.attention.to_out, precision)
        self.out_gain = block.attention_gain
        self.feed_forward_norm = _norm(block.feed_forward_norm)
        self.expand = matrix(block.feed_forward.expand, precision)
        self.activate = _activation(block.feed_forward)
        self.contract = matrix(block.feed_forward.contract, precision)
        self.contract_gain = block.feed_forward_gain


class _Head:
    """The head of one code as functions of its parts."""

    def __init__(self, head: CodeHead, precision: Precision) -> None:
        weight = head.to_logits.weight
        self.earlier = earlier_table(head)
        self.first_rows = torch.arange(len(head.earlier), device=weight.device) * len(weight)
        self.norm = _norm(head.norm)
        self.mix: tuple[Function, Function, Function] | None = None
        if head.mix is not None:
            expand, contract = (
                matrix(each, precision) for each in (head.mix.expand, head.mix.contract)
            )
            self.mix = expand, _activation(head.mix), contract
        self.to_logits = matrix(head.to_logits, precision)


def _norm(norm: nn.Module) -> Function:
    """The module's function without its call, which for few rows takes as long as the kernel."""
    if not isinstance(norm, nn.LayerNorm):
        return norm
    shape, weight, bias, epsilon = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.native_layer_norm(x, shape, weight, bias, epsilon)[0]


def _activation(feed_forward: FeedForward) -> Function:
    def geglu(x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        # The gate of one row is contiguous and that of several is not, and torch rounds both
        # otherwise.
        return F.gelu(gate.contiguous()).mul_(x)

    match feed_forward.kind:
        case "gelu":
            return F.gelu
        case "relu2":
            return lambda x: x.relu_().square_()
        case "geglu":
            return geglu


def _add(x: Tensor, branch: Tensor, gain: Tensor | None) -> Tensor:
    """x + branch · gain, in x's memory."""
    return x.add_(branch) if gain is None else x.addcmul_(branch, gain)


def matrix(linear: nn.Linear, precision: Precision) -> Function:
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


def _float(linear: nn.Linear) -> Function:
    if linear.weight.device.type == "cpu":
        linear.weight.data = linear.weight.data.t().contiguous().t()
    weight, bias = linear.weight.detach().t(), _bias(linear)
    if bias is None:
        return lambda x: torch.mm(x, weight)
    return lambda x: torch.addmm(bias, x, weight)


def _half(linear: nn.Linear) -> Function:
    weight, bias = linear.weight.detach().float(), _bias(linear)
    operators: Any = torch.ops.quantized
    packed = operators.linear_prepack_fp16(weight.contiguous(), bias)
    multiply = _bare(operators.linear_dynamic_fp16)
    return lambda x: multiply(x, packed)


def _byte(linear: nn.Linear) -> Function:
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
