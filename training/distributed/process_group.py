"""The ranks of a job as the training loop sees them: alone, or together in a process group.

`Together` is `dalle.models.reduction.Ranks` over torch.distributed, with what the loop needs
besides: common decisions, means, and the first rank's state for all. Knows no hosts and no sockets;
those are in `training.distributed.rendezvous`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dalle.models.reduction import OneRank


class Alone(OneRank):
    """One process: everything is as it is."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes checkpoints, metrics, artefact and report."""
        return True

    def agree(
        self, progress: float, is_stopping: bool, is_saving: bool = False
    ) -> tuple[float, bool, bool]:
        """The first rank's progress, whether any rank is to stop, whether the first is to save."""
        return progress, is_stopping, is_saving

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.agree(0.0, flag)[1]

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over ranks of each scalar, without gradient; the same names on every rank."""
        return dict(scalars)

    def share(self, value: Any) -> Any:
        """The first rank's value on every rank.

        value: dicts, lists and tuples of plain values and tensors; what the others give is
        ignored. Their tensors are on the CPU.
        """
        return value

    def each(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. value: what JSON can hold."""
        return [value]

    def parted(self, num_parts: int) -> Ranks:
        """The ranks of this rank's part, where adjacent ranks make up so many parts of one size.

        They are ranks among themselves, counted from 0. To be called by every rank.
        """
        assert num_parts == 1, "one rank has no parts"
        return self

    def parallel(self, module: nn.Module) -> nn.Module:
        """A module whose backward pass leaves the mean of all ranks' gradients."""
        return module

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        """Meanwhile passes through a parallel module add up this rank's gradients alone."""
        return nullcontext()


class Together(Alone):
    """This process in a process group. On the CPU everything goes by gloo.

    group: torch's default one, of all ranks, when None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        return dist.get_world_size(self._group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(rows, self._group)  # type: ignore[no-untyped-call]
        return gathered

    @torch.no_grad()
    def total(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value, group=self._group)
        return value

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, group_src=0, group=self._group)
            tensor.copy_(values)

    def agree(
        self, progress: float, is_stopping: bool, is_saving: bool = False
    ) -> tuple[float, bool, bool]:
        # On the CPU, whatever the device: looking at a GPU's number would wait for its work.
        first_says = [progress, is_saving] if self.is_first else [0.0, False]
        said = torch.tensor([*first_says, is_stopping], dtype=torch.float64)
        dist.all_reduce(said, group=self._group)
        first_progress, first_saves, num_stopping = said.tolist()
        return first_progress, num_stopping > 0, first_saves > 0

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = torch.stack([value.detach().float() for value in scalars.values()])
        dist.all_reduce(values, group=self._group)
        return dict(zip(scalars, (values / self.size).unbind(), strict=True))

    def share(self, value: Any) -> Any:
        # Without the tensors it is small; each of them then goes by itself, so that no rank holds
        # it twice. The others read it as they read checkpoints: never as a pickle of anything.
        outline = io.BytesIO()
        if self.is_first:
            torch.save(_each_tensor(value, lambda tensor: tensor.to("meta")), outline)
        num_bytes = torch.tensor([outline.tell()])
        dist.broadcast(num_bytes, group_src=0, group=self._group)
        content = torch.zeros(int(num_bytes), dtype=torch.uint8)
        if self.is_first:
            content = torch.frombuffer(outline.getbuffer(), dtype=torch.uint8)
        dist.broadcast(content, group_src=0, group=self._group)
        if not self.is_first:
            value = torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)

        def receive(tensor: Tensor) -> Tensor:
            if tensor.is_meta:
                values = torch.empty(tensor.shape, dtype=tensor.dtype)
            else:
                values = tensor.cpu().contiguous()
            dist.broadcast(values, group_src=0, group=self._group)
            return values

        return _each_tensor(value, receive)

    def each(self, value: Any) -> list[Any]:
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.empty(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(own)]), group=self._group)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        everything = torch.empty(self.size * longest, dtype=torch.uint8)
        dist.all_gather_into_tensor(everything, padded, group=self._group)
        texts = zip(everything.chunk(self.size), sizes.tolist(), strict=True)
        return [json.loads(text[:size].numpy().tobytes()) for text, size in texts]

    def parted(self, num_parts: int) -> Ranks:
        size = self.size // num_parts
        assert size * num_parts == self.size, "parts are of one size"
        if size == 1:
            return ALONE
        parts = [range(first, first + size) for first in range(0, self.size, size)]
        # Every rank makes all of them. One may wait for another that reads for hours; that one is
        # lost, the ranks find out otherwise (`training.distributed.heartbeat`).
        groups = [dist.new_group(list(part), timeout=timedelta(days=1)) for part in parts]
        return Together(groups[self.rank // size])

    def parallel(self, module: nn.Module) -> nn.Module:
        # Buffers are equal on all ranks by themselves: constants, and codebook statistics, which
        # come from `total`.
        return DistributedDataParallel(
            module,
            process_group=self._group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel), "of `parallel`"
        return module.no_sync()


Ranks = Alone
"""What the loop is given: `Alone`, or `Together`, which is one with company."""

ALONE: Ranks = Alone()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        total = gradient.float().contiguous().clone()  # sums of rounded numbers round again
        dist.all_reduce(total, group=group)
        own = total.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        return own.to(gradient.dtype), None


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same dicts, lists and tuples with every tensor changed, always in the same order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_tensor(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_each_tensor(each, change) for each in value]
    if isinstance(value, tuple):
        return tuple(_each_tensor(each, change) for each in value)
    return value
