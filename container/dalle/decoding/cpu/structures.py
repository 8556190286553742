"""C structures of a model for the compiled step, as `csrc/model.h` declares them, and its library.

Letters: K inputs and N outputs of a matrix, L inputs of a sequence, M codes, V codebook size, W
width.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.decoding.model_parts import BlockParts, byte_scales, earlier_table, inputs_seen
from dalle.models.layers import FeedForward
from dalle.models.transformer import CodeHead, Dalle
from dalle.types import AttentionKind, FeedForwardKind, Precision

logger = logging.getLogger(__name__)

BUILDS = ("_native_avx512", "_native_avx2")  # the best first
LANES = 16
INTERFACE = 3
"""Number of the functions' arguments and of what they mean, as `kInterface` in the C++."""
MOST_HEAD_WIDTH = 128
_MOST_HALF = 65504.0  # greatest number of float16
CODES: dict[Precision, int] = {"fp32": 0, "fp16": 1, "int8": 2}
_SMALL_BYTES = 3  # int8 in 7 bits, for processors without VNNI
_ACTIVATIONS: dict[FeedForwardKind, int] = {"gelu": 0, "geglu": 1, "relu2": 2}


def _fields(kind: type[Any], names: str) -> list[tuple[str, type[Any]]]:
    """Fields of one C type."""
    return [(name, kind) for name in names.split()]


class CMatrix(Structure):
    _fields_ = (*_fields(c_void_p, "weights scales sums bias"), *_fields(c_int32, "inputs outputs"))


class CNorm(Structure):
    _fields_ = (*_fields(c_void_p, "gain bias"), ("epsilon", c_float))


class CFeedForward(Structure):
    _fields_ = (("norm", CNorm), *_fields(CMatrix, "expand contract"), ("activation", c_int32))


class CTable(Structure):
    _fields_ = (*_fields(c_void_p, "rows ranges"),)


class CSeen(Structure):
    _fields_ = (*_fields(c_void_p, "inputs counts"), ("most", c_int32))


class CLayer(Structure):
    _fields_ = (
        ("norm", CNorm),
        *_fields(CMatrix, "qkv out"),
        ("out_gain", c_void_p),
        ("feed_forward", CFeedForward),
        ("contract_gain", c_void_p),
        *_fields(CTable, "keys values"),
        ("seen", CSeen),
        ("normalises_heads", c_int32),
    )


class CHead(Structure):
    _fields_ = (
        ("earlier", c_void_p),
        ("mix", CFeedForward),
        ("norm", CNorm),
        ("to_logits", CMatrix),
    )


class CSampling(Structure):
    _fields_ = (
        ("top_p", c_double),
        *_fields(c_float, "temperature guidance_scale"),
        *_fields(c_int32, "top_k blank_row"),
    )


class CModel(Structure):
    _fields_ = (
        ("layers", POINTER(CLayer)),
        ("heads", POINTER(CHead)),
        *_fields(c_void_p, "code_inputs position_inputs"),
        *_fields(c_int32, "width num_layers num_heads length text_length num_codebooks"),
        *_fields(c_int32, "codebook_size inner_width precision"),
    )


class CCandidate(Structure):
    _fields_ = (
        ("sampling", CSampling),
        *_fields(c_int64, "slot blank_slot position window guessed leader"),
    )


class CLeader(Structure):
    _fields_ = (("tokens", c_void_p), *_fields(c_int64, "position guessed candidate"))


class CState(Structure):
    _fields_ = (
        *_fields(c_void_p, "hidden tokens noise_keys log_likelihood"),
        *_fields(c_int64, "widest num_positions"),
    )


class CCounts(Structure):
    _fields_ = (*_fields(c_void_p, "compared right"), ("steps", c_int64))


class Structures:
    """C structures of a model's parts, and the tensors whose memory they point to."""

    def __init__(self, precision: Precision, support: int) -> None:
        self.precision = CODES[precision]
        if precision == "int8" and support == 1:
            self.precision = _SMALL_BYTES
        self.kept: list[Tensor] = []

    def pointer(self, tensor: Tensor | None) -> int | None:
        """Return the address of a tensor's numbers, and keep the tensor."""
        if tensor is None:
            return None
        kept = tensor.detach().contiguous()
        self.kept.append(kept)
        return kept.data_ptr()

    def matrix(self, linear: nn.Linear) -> CMatrix:
        N, K = linear.weight.shape
        shared = {"bias": self.pointer(linear.bias), "inputs": K, "outputs": N}
        if self.precision == CODES["fp32"]:
            # Row by row in the layer itself, so that the step and the model share the memory.
            linear.weight.data = linear.weight.data.contiguous()
            return CMatrix(weights=self.pointer(linear.weight), **shared)
        weight = linear.weight.detach().float()
        if self.precision == CODES["fp16"]:
            half = weight.clamp(-_MOST_HALF, _MOST_HALF).half()
            return CMatrix(weights=self.pointer(half), **shared)
        scales = byte_scales(weight, 63 if self.precision == _SMALL_BYTES else 127)
        rounded = (weight / scales[:, None]).round_().to(torch.int8)
        quads = F.pad(rounded, (0, -K % 4, 0, -N % LANES)).view(-(-N // LANES), LANES, -1, 4)
        return CMatrix(
            weights=self.pointer(quads.transpose(1, 2)),
            scales=self.pointer(scales),
            sums=self.pointer(128 * rounded.sum(dim=1, dtype=torch.int32)),
            **shared,
        )

    def norm(self, norm: nn.Module) -> CNorm:
        epsilon = norm.eps
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        weight = norm.get_parameter("weight")
        assert isinstance(epsilon, float)
        return CNorm(gain=self.pointer(weight), bias=self.pointer(bias), epsilon=epsilon)

    def feed_forward(self, norm: nn.Module, function: FeedForward) -> CFeedForward:
        return CFeedForward(
            norm=self.norm(norm),
            expand=self.matrix(function.expand),
            contract=self.matrix(function.contract),
            activation=_ACTIVATIONS[function.kind],
        )

    def layer(self, block: BlockParts, tables: Sequence[CTable], seen: CSeen) -> CLayer:
        return CLayer(
            norm=self.norm(block.attention_norm),
            qkv=self.matrix(block.attention.to_qkv),
            out=self.matrix(block.attention.to_out),
            out_gain=self.pointer(block.attention_gain),
            feed_forward=self.feed_forward(block.feed_forward_norm, block.feed_forward),
            contract_gain=self.pointer(block.feed_forward_gain),
            keys=tables[0],
            values=tables[1],
            seen=seen,
            normalises_heads=block.attention.qk_norm,
        )

    def head(self, head: CodeHead) -> CHead:
        structure = CHead(norm=self.norm(head.norm), to_logits=self.matrix(head.to_logits))
        if head.mix is not None:
            structure.earlier = self.pointer(earlier_table(head))
            structure.mix = self.feed_forward(head.norm, head.mix)
        return structure

    def table(self, rows: Tensor, ranges: Tensor | None) -> CTable:
        return CTable(rows=self.pointer(rows), ranges=self.pointer(ranges))

    def seen(self, model: Dalle, kind: AttentionKind) -> CSeen:
        if kind == "full":
            return CSeen()
        inputs, counts = inputs_seen(model.config, kind)
        return CSeen(
            inputs=self.pointer(torch.from_numpy(inputs.astype(np.int32))),
            counts=self.pointer(torch.from_numpy(counts.astype(np.int32))),
            most=inputs.shape[1],
        )


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled code for this processor, which setuptools puts beside this file.

    None where it is missing, or of another version. Where its `dalle_support` is 0 no code is for
    this processor, and it may have no other function.
    """
    unfit = None
    for build in BUILDS:
        loaded = load(build)
        if loaded is not None and loaded.dalle_support():
            return loaded
        unfit = unfit or loaded
    return unfit


def load(build: str) -> ctypes.CDLL | None:
    """Load one build of the compiled code; None where it is missing, or of another version."""
    found = importlib.util.find_spec(f"dalle.decoding.cpu.{build}")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
    except OSError as error:
        logger.warning("%s cannot be loaded: %s", found.origin, error)
        return None
    loaded.dalle_support.restype = c_int32
    if loaded.dalle_support() == 0:
        return loaded
    if not _has_our_layout(loaded):
        logger.warning("%s is of another version: run `make setup` again", found.origin)
        return None
    loaded.dalle_new_step.restype = c_void_p
    loaded.dalle_new_step.argtypes = (POINTER(CModel), c_int32)
    loaded.dalle_delete_step.argtypes = (c_void_p,)
    # The step, threads, rows; then pointers.
    own = (c_void_p, c_int32, c_int32)
    loaded.dalle_step.argtypes = (*own, c_void_p, c_void_p, c_void_p, c_void_p)
    loaded.dalle_code_logits.argtypes = (*own, c_void_p, c_int32, c_void_p, c_int64, c_void_p)
    loaded.dalle_sample.argtypes = (*own, c_void_p, c_int32, *[c_void_p] * 5)
    loaded.dalle_prefill.argtypes = (*own, c_int64, c_int32, c_void_p, c_void_p)
    loaded.dalle_decode.argtypes = (
        *own,
        POINTER(CState),
        c_void_p,
        c_int32,
        c_void_p,
        c_int64,
        c_int64,
        POINTER(CCounts),
    )
    loaded.dalle_delete_step.restype = None
    loaded.dalle_prefix_size.argtypes = (c_void_p, c_int32)
    loaded.dalle_prefix_size.restype = c_int64
    for copy in (loaded.dalle_save_prefix, loaded.dalle_load_prefix):
        copy.argtypes = (c_void_p, c_int64, c_int32, c_void_p)
        copy.restype = None
    for function in (
        loaded.dalle_step,
        loaded.dalle_code_logits,
        loaded.dalle_sample,
        loaded.dalle_prefill,
        loaded.dalle_decode,
    ):
        function.restype = c_int32  # 0 for a failure
    return loaded


def _has_our_layout(loaded: ctypes.CDLL) -> bool:
    structures = (CModel, CLayer, CHead, CSampling, CCandidate, CState, CLeader)
    ours = [INTERFACE, *map(ctypes.sizeof, structures), LANES, MOST_HEAD_WIDTH]
    theirs = (c_int32 * 64)()  # room for the sizes of another version
    if not (hasattr(loaded, "dalle_layout") and hasattr(loaded, "dalle_sample")):
        return False
    loaded.dalle_layout(theirs)
    return theirs[: len(ours)] == ours and not any(theirs[len(ours) :])
