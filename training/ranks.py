"""The ranks of a job as the training loop sees them: alone, or together in a process group.

`Together` is `dalle.ranks.Ranks` over torch.distributed, with what the loop needs besides: common
decisions, means, and the first rank's state for all. Knows no hosts and no sockets; those are in
`training.meeting`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dalle.ranks import OneRank


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

    def parallel(self, module: nn.Module) -> nn.Module:
        """A module whose backward pass leaves the mean of all ranks' gradients."""
        return module

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        """Meanwhile passes through a parallel module add up this rank's gradients alone."""
        return nullcontext()


class Together(Alone):
    """This process in torch's default process group. On the CPU everything goes by gloo."""

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
        return gathered

    @torch.no_grad()
    def total(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, src=0)
            tensor.copy_(values)

    def agree(
        self, progress: float, is_stopping: bool, is_saving: bool = False
    ) -> tuple[float, bool, bool]:
        # On the CPU, whatever the device: looking at a GPU's number would wait for its work.
        first_says = [progress, is_saving] if self.is_first else [0.0, False]
        said = torch.tensor([*first_says, is_stopping], dtype=torch.float64)
        dist.all_reduce(said)
        first_progress, first_saves, num_stopping = said.tolist()
        return first_progress, num_stopping > 0, first_saves > 0

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = torch.stack([value.detach().float() for value in scalars.values()])
        dist.all_reduce(values)
        return dict(zip(scalars, (values / self.size).unbind(), strict=True))

    def share(self, value: Any) -> Any:
        # Without the tensors it is small; each of them then goes by itself, so that no rank holds
        # it twice. The others read it as they read checkpoints: never as a pickle of anything.
        outline = io.BytesIO()
        if self.is_first:
            torch.save(_each_tensor(value, lambda tensor: tensor.to("meta")), outline)
        num_bytes = torch.tensor([outline.tell()])
        dist.broadcast(num_bytes, src=0)
        content = torch.zeros(int(num_bytes), dtype=torch.uint8)
        if self.is_first:
            content = torch.frombuffer(outline.getbuffer(), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        if not self.is_first:
            value = torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)

        def receive(tensor: Tensor) -> Tensor:
            if tensor.is_meta:
                values = torch.empty(tensor.shape, dtype=tensor.dtype)
            else:
                values = tensor.cpu().contiguous()
            dist.broadcast(values, src=0)
            return values

        return _each_tensor(value, receive)

    def parallel(self, module: nn.Module) -> nn.Module:
        # Buffers are equal on all ranks by themselves: constants, and codebook statistics, which
        # come from `total`.
        return DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel), "of `parallel`"
        return module.no_sync()


Ranks = Alone
"""What the loop is given: `Alone`, or `Together`, which is one with company."""

ALONE: Ranks = Alone()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.float().contiguous().clone()  # sums of rounded numbers round again
        dist.all_reduce(total)
        own = total.chunk(dist.get_world_size())[dist.get_rank()]
        return own.to(gradient.dtype)


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
