"""Process group of a job: one process alone, or all ranks over torch.distributed.

A `dalle.models.reduction.Ranks` with what the training loop needs besides: common decisions, means,
and the first rank's state on all ranks. Knows no hosts and no sockets; those are in
`training.distributed.rendezvous`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from dalle.models.reduction import Ranks


class ProcessGroup(Ranks):
    """Interface of a process group, and the group of a single process."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def is_first(self) -> bool:
        """True on the rank that writes checkpoints, metrics, artefact and report."""
        return self.rank == 0

    def agree(
        self, progress: float, is_stopping: bool, is_saving: bool = False
    ) -> tuple[float, bool, bool]:
        """Return the first rank's progress, any rank's is_stopping, and the first's is_saving."""
        return progress, is_stopping, is_saving

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.agree(0.0, flag)[1]

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each scalar's mean over ranks, without gradient; every rank has the same names."""
        return dict(scalars)

    def share(self, value: Any) -> Any:
        """Return the first rank's value on every rank; received tensors are on the CPU.

        value: dicts, lists and tuples of plain values and tensors; ignored on the other ranks.
        """
        return value

    def each(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank. value: of JSON's types."""
        return [value]

    def parted(self, num_parts: int) -> ProcessGroup:
        """Return the sub-group of this rank, of `num_parts` sub-groups of adjacent ranks.

        All have the same size, and their ranks count from 0. Every rank must call it.
        """
        assert num_parts == 1, "one rank has no parts"
        return self

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass leaves the mean of all ranks' gradients."""
        return module

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which a parallel module adds up this rank's gradients only."""
        return nullcontext()


class TorchProcessGroup(ProcessGroup):
    """Process group over torch.distributed; collectives of CPU tensors use gloo.

    group: None for torch's default group of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        return dist.get_world_size(self._group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group)

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
        # On the CPU: reading a number from a GPU would wait for the work queued there.
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
        # First the value with empty tensors, which is small; then each tensor by itself, so that no
        # rank holds two copies. Loaded with weights_only, as checkpoints are: no arbitrary pickle.
        outline = io.BytesIO()
        if self.is_first:
            torch.save(tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value), outline)
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

        return tree_map_only(Tensor, receive, value)

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

    def parted(self, num_parts: int) -> ProcessGroup:
        size = self.size // num_parts
        assert size * num_parts == self.size, "parts are of one size"
        if size == 1:
            return SINGLE_PROCESS
        parts = [range(first, first + size) for first in range(0, self.size, size)]
        # Every rank makes all groups. The timeout is long because a rank may wait while another
        # reads for hours; a lost rank is found by `training.distributed.heartbeat`.
        groups = [dist.new_group(list(part), timeout=timedelta(days=1)) for part in parts]
        return TorchProcessGroup(groups[self.rank // size])

    def parallel(self, module: nn.Module) -> nn.Module:
        # Buffers need no broadcast: they are constants, or codebook statistics made by `total`.
        return DistributedDataParallel(
            module, process_group=self._group, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel), "of `parallel`"
        return module.no_sync()


SINGLE_PROCESS = ProcessGroup()


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
