"""Memory and arithmetic of a training step's passes, traced without computing them.

The stage's loss and its gradient run on fake tensors, which have shapes but no values, and every
storage that is allocated and freed is logged. So the figures follow a change to a model, and a
model of any size is traced in a second. Memory that a kernel allocates and frees within one
operation is not traced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dalle.models.quantiser import Quantiser
from dalle.models.uninitialised import without_memory
from training.engine.interface import Trainable

FAKE_DEVICE = torch.device("cpu")
"""Without a GPU torch cannot choose its kernels; on the CPU attention is fused as on a GPU."""


@dataclass(frozen=True)
class Passes:
    """The storages of one forward and backward pass, as functions of the batch size.

    coefficients: [degree + 1, storages], of each storage's bytes as a polynomial in the pairs of
        a batch; made of traces at as many batch sizes.
    log: n >= 0 when storage n is allocated, -n - 1 when it is freed.
    is_gradient: [storages], whether the storage is a weight's gradient in the end.
    flops: [degree + 1], of the floating-point operations of matrix products and convolutions.
    """

    coefficients: NDArray[np.float64]
    log: NDArray[np.int64]
    is_gradient: NDArray[np.bool_]
    flops: NDArray[np.float64]

    def activations(self, batch_size: int) -> int:
        """Return the most bytes held at once beside weights and gradients."""
        return self._peak(np.where(self.is_gradient, 0.0, self._sizes(batch_size)))

    def with_gradients(self, batch_size: int) -> int:
        """Return the same with the gradients, which are allocated while activations are freed."""
        return self._peak(self._sizes(batch_size))

    def operations(self, batch_size: int) -> float:
        """Return the floating-point operations of both passes; a product and its sum are two."""
        powers = float(batch_size) ** np.arange(len(self.flops))
        return float(powers @ self.flops)

    def _sizes(self, batch_size: int) -> NDArray[np.float64]:
        powers = float(batch_size) ** np.arange(len(self.coefficients))
        sizes: NDArray[np.float64] = powers @ self.coefficients
        return sizes

    def _peak(self, sizes: NDArray[np.float64]) -> int:
        numbers = np.where(self.log >= 0, self.log, -self.log - 1)
        changes = np.where(self.log >= 0, sizes[numbers], -sizes[numbers])
        return round(float(np.cumsum(changes).max(initial=0.0)))


def trace_passes(
    make_stage: Callable[[], Trainable],
    make_batch: Callable[[int], Any],
    batch_sizes: Sequence[int],
    *,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    is_for_gpu: bool = False,
) -> Passes:
    """Trace one forward and backward pass of a stage in training.

    make_stage: models among its attributes but `model` are frozen.
    make_batch: a batch of so many pairs, whose values do not matter.
    batch_sizes: at least two different ones; three when something grows with their square.
    autocast: the number format of the forward pass, where it is not that of the weights.
    dtype: what the trained model is converted to first, as DeepSpeed does.
    is_for_gpu: autocast computes more in fp32 on a GPU than on a CPU.
    """
    logs = []
    for batch_size in batch_sizes:
        with without_memory():
            stage = make_stage()
        mode = _AutocastOfGPU() if is_for_gpu and autocast else nullcontext()
        with mode:
            logs.append(_trace(stage, partial(make_batch, batch_size), autocast, dtype))
    first = logs[0]
    assert all(log.entries == first.entries for log in logs), "a step depends on the batch size"
    powers = np.vander(np.asarray(batch_sizes, dtype=np.float64), increasing=True)
    sizes = np.asarray([log.sizes for log in logs], dtype=np.float64)
    flops = np.asarray([log.flops for log in logs], dtype=np.float64)
    return Passes(
        coefficients=np.asarray(np.linalg.solve(powers, sizes), dtype=np.float64),
        log=np.asarray(first.entries, dtype=np.int64),
        is_gradient=np.isin(np.arange(len(first.sizes)), list(first.gradients)),
        flops=np.asarray(np.linalg.solve(powers, flops), dtype=np.float64),
    )


@dataclass(frozen=True)
class _Log:
    sizes: list[int]
    entries: list[int]
    gradients: set[int]
    flops: int


def _trace(
    stage: Trainable,
    make_batch: Callable[[], Any],
    autocast: torch.dtype | None,
    dtype: torch.dtype | None,
) -> _Log:
    models = {id(each): each for each in vars(stage).values() if isinstance(each, nn.Module)}
    with FakeTensorMode(), _Allocations() as allocations:
        for model in models.values():
            _materialise(model, dtype if model is stage.model else None)
        stage.model.train()
        for module in stage.model.modules():
            if isinstance(module, Quantiser):
                module.eval()  # its statistics need values, and are as small as the codebook
        allocations.begin()
        batch = make_batch()
        precision = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
        with precision:
            loss, reported = stage.loss(batch, 0.0)
        # Not loss.backward(): a function mode does not see what is computed again within it.
        torch.autograd.backward(loss)
        parameters = [each for each in stage.model.parameters() if each.grad is not None]
        gradients = {allocations.number(each.grad) for each in parameters if each.grad is not None}
        sizes, entries = list(allocations.sizes), _ordered(allocations.entries)
        del loss, reported
    return _Log(sizes, entries, gradients, allocations.flops)


def _ordered(entries: Iterable[int]) -> list[int]:
    """Return the log with storages that are freed in a row sorted by number."""
    return [
        entry
        for _, run in groupby(entries, key=lambda entry: entry >= 0)
        for entry in sorted(run, key=abs)
    ]


class _Allocations(TorchDispatchMode):
    """Logs storages, numbered from 0 in the order in which they are allocated, and counts flops."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self.begin()

    def begin(self) -> None:
        """Start a new log, without the storages that exist already."""
        self.sizes: list[int] = []
        self.entries: list[int] = []
        self.flops = 0
        self._alive = {key: (-1, alive[1]) for key, alive in self._alive.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.number(leaf)
        return result

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage; -1 when it existed before the log began."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            return known[0]
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.entries.append(number)

        def free(_: weakref.ref[Any]) -> None:
            freed, _ = self._alive.pop(key)
            if freed >= 0:
                self.entries.append(-freed - 1)

        self._alive[key] = (number, weakref.ref(storage, free))
        return number


class _AutocastOfGPU(TorchFunctionMode):
    """Computes in fp32, under autocast, the operations that autocast does so on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FP32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_in_fp32, (args, kwargs))
        return func(*args, **kwargs)


_FP32_ON_GPU = {
    *("binary_cross_entropy_with_logits", "cosine_similarity", "cross_entropy", "cumsum", "exp"),
    *("group_norm", "kl_div", "l1_loss", "layer_norm", "log", "log_softmax", "mse_loss"),
    *("nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt", "smooth_l1_loss"),
    *("__pow__", "softmax", "softplus", "square", "sum"),
}
"""Those of https://docs.pytorch.org/docs/stable/amp.html that models use; square is a pow."""


def _in_fp32(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def _materialise(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace a model's tensors by fake ones of the same layout, floats in `dtype` if it is given.

    The model is made on the meta device first: `Module.to` cannot convert fake tensors.
    """

    def fake(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=FAKE_DEVICE)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                replaced = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = replaced
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):  # as OpenAI's CLIP keeps its masks
                setattr(module, name, fake(value))
