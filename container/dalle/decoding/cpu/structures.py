"""What `container/dalle/native` reads of a model: the structures of its model.h, field by field.

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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.decoding.kv_cache import inputs_seen
from dalle.decoding.quantised import byte_scales
from dalle.decoding.step import earlier_table, gain_of
from dalle.models.attention import SelfAttention
from dalle.models.layers import FeedForward
from dalle.models.transformer import Block, CodeHead, Dalle
from dalle.types import AttentionKind, FeedForwardKind, Precision

logger = logging.getLogger(__name__)

LANES = 16
MOST_HEAD_WIDTH = 128
_MOST_HALF = 65504.0
CODES: dict[Precision, int] = {"fp32": 0, "fp16": 1, "int8": 2}
_SMALL_BYTES = 3  # int8 without VNNI, in 7 bits
_ACTIVATIONS: dict[FeedForwardKind, int] = {"gelu": 0, "geglu": 1, "relu2": 2}


class NativeMatrix(Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
    )


class NativeNorm(Structure):
    _fields_ = (("gain", c_void_p), ("bias", c_void_p), ("epsilon", c_float))


class NativeFeedForward(Structure):
    _fields_ = (
        ("norm", NativeNorm),
        ("expand", NativeMatrix),
        ("contract", NativeMatrix),
        ("activation", c_int32),
    )


class NativeTable(Structure):
    _fields_ = (("rows", c_void_p), ("ranges", c_void_p))


class NativeSeen(Structure):
    _fields_ = (("inputs", c_void_p), ("counts", c_void_p), ("most", c_int32))


class NativeLayer(Structure):
    _fields_ = (
        ("norm", NativeNorm),
        ("qkv", NativeMatrix),
        ("out", NativeMatrix),
        ("out_gain", c_void_p),
        ("feed_forward", NativeFeedForward),
        ("contract_gain", c_void_p),
        ("keys", NativeTable),
        ("values", NativeTable),
        ("seen", NativeSeen),
        ("normalises_heads", c_int32),
    )


class NativeHead(Structure):
    _fields_ = (
        ("earlier", c_void_p),
        ("mix", NativeFeedForward),
        ("norm", NativeNorm),
        ("to_logits", NativeMatrix),
    )


class NativeDraw(Structure):
    _fields_ = (
        ("top_p", c_double),
        ("temperature", c_float),
        ("guidance_scale", c_float),
        ("top_k", c_int32),
        ("blank_row", c_int32),
    )


class NativeModel(Structure):
    _fields_ = (
        ("layers", POINTER(NativeLayer)),
        ("heads", POINTER(NativeHead)),
        ("code_inputs", c_void_p),
        ("position_inputs", c_void_p),
        ("width", c_int32),
        ("num_layers", c_int32),
        ("num_heads", c_int32),
        ("length", c_int32),
        ("text_length", c_int32),
        ("num_codebooks", c_int32),
        ("codebook_size", c_int32),
        ("inner_width", c_int32),
        ("precision", c_int32),
    )


class Structures:
    """A model's parts as compiled code reads them, and the tensors that must outlive that."""

    def __init__(self, precision: Precision, support: int) -> None:
        self.precision = CODES[precision]
        if precision == "int8" and support == 1:
            self.precision = _SMALL_BYTES
        self.kept: list[Tensor] = []

    def pointer(self, tensor: Tensor | None) -> int | None:
        """Of a tensor that is kept from now on."""
        if tensor is None:
            return None
        kept = tensor.detach().contiguous()
        self.kept.append(kept)
        return kept.data_ptr()

    def matrix(self, linear: nn.Linear) -> NativeMatrix:
        N, K = linear.weight.shape
        shared = {"bias": self.pointer(linear.bias), "inputs": K, "outputs": N}
        if self.precision == CODES["fp32"]:
            # Laid out row by row in the layer itself, so that both read the same memory.
            linear.weight.data = linear.weight.data.contiguous()
            return NativeMatrix(weights=self.pointer(linear.weight), **shared)
        weight = linear.weight.detach().float()
        if self.precision == CODES["fp16"]:
            half = weight.clamp(-_MOST_HALF, _MOST_HALF).half()
            return NativeMatrix(weights=self.pointer(half), **shared)
        scales = byte_scales(weight, 63 if self.precision == _SMALL_BYTES else 127)
        rounded = (weight / scales[:, None]).round_().to(torch.int8)
        quads = F.pad(rounded, (0, -K % 4, 0, -N % LANES)).view(-(-N // LANES), LANES, -1, 4)
        return NativeMatrix(
            weights=self.pointer(quads.transpose(1, 2)),
            scales=self.pointer(scales),
            sums=self.pointer(128 * rounded.sum(dim=1, dtype=torch.int32)),
            **shared,
        )

    def norm(self, norm: nn.Module) -> NativeNorm:
        epsilon = norm.eps
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        weight = norm.get_parameter("weight")
        assert isinstance(epsilon, float)
        return NativeNorm(gain=self.pointer(weight), bias=self.pointer(bias), epsilon=epsilon)

    def feed_forward(self, norm: nn.Module, function: nn.Module) -> NativeFeedForward:
        assert isinstance(function, FeedForward)
        return NativeFeedForward(
            norm=self.norm(norm),
            expand=self.matrix(function.expand),
            contract=self.matrix(function.contract),
            activation=_ACTIVATIONS[function.kind],
        )

    def layer(
        self, block: nn.Module, tables: Sequence[NativeTable], seen: NativeSeen
    ) -> NativeLayer:
        assert isinstance(block, Block)
        attention = block.attention.function
        assert isinstance(attention, SelfAttention)
        return NativeLayer(
            norm=self.norm(block.attention.norm),
            qkv=self.matrix(attention.to_qkv),
            out=self.matrix(attention.to_out),
            out_gain=self.pointer(gain_of(block.attention)),
            feed_forward=self.feed_forward(block.feed_forward.norm, block.feed_forward.function),
            contract_gain=self.pointer(gain_of(block.feed_forward)),
            keys=tables[0],
            values=tables[1],
            seen=seen,
            normalises_heads=attention.qk_norm,
        )

    def head(self, head: nn.Module) -> NativeHead:
        assert isinstance(head, CodeHead)
        structure = NativeHead(norm=self.norm(head.norm), to_logits=self.matrix(head.to_logits))
        if head.mix is not None:
            structure.earlier = self.pointer(earlier_table(head))
            structure.mix = self.feed_forward(head.norm, head.mix)
        return structure

    def table(self, rows: Tensor, ranges: Tensor | None) -> NativeTable:
        return NativeTable(rows=self.pointer(rows), ranges=self.pointer(ranges))

    def seen(self, model: Dalle, kind: AttentionKind) -> NativeSeen:
        if kind == "full":
            return NativeSeen()
        inputs, counts = inputs_seen(model.config, kind)
        return NativeSeen(
            inputs=self.pointer(torch.from_numpy(inputs.astype(np.int32))),
            counts=self.pointer(torch.from_numpy(counts.astype(np.int32))),
            most=inputs.shape[1],
        )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, which setuptools puts beside this file; None where there is none that
    fits. Where its `dalle_support` is 0 it may have no other function."""
    found = importlib.util.find_spec("dalle.decoding.cpu._native")
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
    loaded.dalle_new_step.argtypes = (POINTER(NativeModel), c_int32)
    loaded.dalle_delete_step.argtypes = (c_void_p,)
    # The step, threads, rows, and where things are.
    own = (c_void_p, c_int32, c_int32)
    loaded.dalle_step.argtypes = (*own, c_void_p, c_void_p, c_void_p, c_void_p)
    loaded.dalle_code_logits.argtypes = (*own, c_void_p, c_int32, c_void_p, c_int64, c_void_p)
    loaded.dalle_draw.argtypes = (*own, c_void_p, c_int32, *[c_void_p] * 5)
    loaded.dalle_delete_step.restype = None
    for function in (loaded.dalle_step, loaded.dalle_code_logits, loaded.dalle_draw):
        function.restype = c_int32  # whether it was done
    return loaded


def _has_our_layout(loaded: ctypes.CDLL) -> bool:
    structures = (NativeModel, NativeLayer, NativeHead, NativeDraw)
    ours = [*map(ctypes.sizeof, structures), LANES, MOST_HEAD_WIDTH]
    theirs = (c_int32 * 64)()  # room for whatever another version has to say
    try:
        loaded.dalle_layout(theirs)
    except AttributeError:
        return False
    return theirs[: len(ours)] == ours and not any(theirs[len(ours) :])
