"""The same work on every rank of a process group, each of them a fork, for tests."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.forked import Forked
from training.distributed.process_group import TorchProcessGroup

SECONDS = 300  # an upper bound that only a failing test waits for


def results_of(work, size, folder, *arguments):
    """What `work(ranks, *arguments)` returns on each of so many ranks, by rank.

    work: a function of a module, which returns tensors and plain values. folder: for their files.
    """
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [folder / f"{rank}.pt" for rank in range(size)]
    processes = [
        Forked(_work_as, rank, size, server.port, file, work, arguments)
        for rank, file in enumerate(files)
    ]
    assert [process.wait(timeout=SECONDS) for process in processes] == [0] * size
    return [torch.load(file, weights_only=True) for file in files]


def _work_as(rank, size, port, file, work, arguments):
    store = TCPStore("127.0.0.1", port, wait_for_workers=False)
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    result = work(TorchProcessGroup(), *arguments)
    dist.destroy_process_group()
    torch.save(result, file)
