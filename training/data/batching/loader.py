"""Images of large data sets, decoded by torch's DataLoader workers some steps ahead.

Every worker turns a step into that step's images, a pure function; the DataLoader only brings
them in order. SageMaker gives a container a /dev/shm that cannot be chosen and may be 64 MiB:
what is under way at one time is kept well below it.

Letters: B pairs in a batch, H = W = image_size.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from dalle.errors import DataError
from dalle.preprocess.images import ImageError
from training.data.batching.preload import to_planes
from training.data.batching.sampler import Order
from training.data.pairs import Dataset, SkipReason

MAX_WORKERS = 4
PREFETCH_FACTOR = 2  # batches each worker is ahead
SMALL_SHARED_MEMORY_BYTES = 1 << 30
MAX_SUBSTITUTES = 100  # unusable images in a row before a data set is given up


@dataclass(frozen=True)
class Decoded:
    """One step's images. indices: whose, [B]; another pair stands in for an unusable one.

    skipped: (reason, name, message) of every unusable image met.
    """

    images: Tensor  # uint8 [B, 3, H, W]
    indices: NDArray[np.int64]
    skipped: list[tuple[SkipReason, str, str]]


@dataclass(frozen=True)
class LoaderSettings:
    """How many processes decode, and by what means tensors travel between them."""

    num_workers: int
    sharing_strategy: str  # torch.multiprocessing's: file_descriptor or file_system


def loader_settings(
    batch_bytes: int, *, shared_memory_bytes: int, num_cpus: int, num_workers: int | None = None
) -> LoaderSettings:
    """min(CPUs - 1, 4) workers, or those asked for; fewer where /dev/shm cannot hold their work.

    batch_bytes: one decoded batch. At most half of the shared memory is planned with; where not
    even one worker fits, the main process decodes (0 workers). Below 1 GiB tensors are shared by
    name (`file_system`), which survives the low limits on open files of such containers.
    """
    wanted = min(num_cpus - 1, MAX_WORKERS) if num_workers is None else num_workers
    # One more batch than those ahead: the one being handed over.
    affordable = shared_memory_bytes // 2 // ((PREFETCH_FACTOR + 1) * batch_bytes)
    small = shared_memory_bytes < SMALL_SHARED_MEMORY_BYTES
    return LoaderSettings(
        num_workers=max(0, min(wanted, affordable)),
        sharing_strategy="file_system" if small else "file_descriptor",
    )


def measured_settings(batch_bytes: int, num_workers: int | None = None) -> LoaderSettings:
    """`loader_settings` for the machine this runs on."""
    shared_memory = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    total = shutil.disk_usage(shared_memory).total if shared_memory.is_dir() else 0
    return loader_settings(
        batch_bytes,
        shared_memory_bytes=total,
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        num_workers=num_workers,
    )


class StepImages(TorchDataset[Decoded]):
    """Step -> its images: what a DataLoader worker computes."""

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self._dataset = dataset
        self._order = order
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, step: int) -> Decoded:
        epoch = self._order.epoch(step)
        if epoch != self._epoch:
            self._permutation = self._order.permutation(epoch)
            self._epoch = epoch
        indices = self._order.indices(step, self._permutation)
        size = self._dataset.image_size
        images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
        skipped: list[tuple[SkipReason, str, str]] = []
        for row, index in enumerate(indices.tolist()):
            indices[row] = self._decode(index, images[row], skipped)
        return Decoded(images, indices, skipped)

    def _decode(self, index: int, into: Tensor, skipped: list[tuple[SkipReason, str, str]]) -> int:
        """Decode pair `index`, or the next one by number that can be; returns which.

        Returns -1 after too many failures: an exception would lose its type on the way.
        """
        for attempt in range(MAX_SUBSTITUTES):
            candidate = (index + attempt) % len(self._dataset)
            try:
                into.copy_(to_planes(self._dataset.image(candidate)))
            except ImageError as error:
                skipped.append((SkipReason.of(error), self._dataset.name(candidate), str(error)))
            else:
                return candidate
        return -1


class ImageLoader:
    """Images of steps, quick when they are asked for in order, right in any order."""

    def __init__(self, dataset: Dataset, order: Order, num_workers: int | None = None) -> None:
        self._dataset = dataset
        self._step_images = StepImages(dataset, order)
        batch_bytes = order.batch_size // order.world_size * 3 * dataset.image_size**2
        self.settings = measured_settings(batch_bytes, num_workers)
        self._next_step = -1
        self._stream: Iterator[Decoded] | None = None

    def images(self, step: int) -> Decoded:
        """This step's images; unusable ones are counted in the data set's skips.

        Raises `DataError` when more than the data set's `max_bad_share` turn out to be unusable.
        """
        if self._stream is None or step != self._next_step:
            self._stream = self._start(step)
        decoded = next(self._stream)
        self._next_step = step + 1
        skips = self._dataset.skips
        for reason, name, message in decoded.skipped:
            skips.add_damaged(reason, name, message)
        if decoded.skipped:
            skips.check_share(self._dataset.max_bad_share)
        if (decoded.indices < 0).any():
            raise DataError(
                f"{self._dataset.channel}: {MAX_SUBSTITUTES} images in a row cannot be used: "
                f"{skips.describe()}"
            )
        return decoded

    def close(self) -> None:
        """End the workers. Asking for images again starts new ones."""
        self._stream = None  # the iterator ends its processes when it goes

    def _start(self, step: int) -> Iterator[Decoded]:
        self.close()
        workers = self.settings.num_workers
        if workers:
            strategy = self.settings.sharing_strategy
            torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
        loader = DataLoader(
            self._step_images,
            batch_size=None,  # an item is a whole batch already
            sampler=_StepsFrom(step),
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_prepare_worker,
            # Otherwise every start would draw from, and so change, torch's global generator.
            generator=torch.Generator(),
        )
        return iter(loader)


class _StepsFrom(Sampler[int]):
    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._first)


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(_worker: int) -> None:
    """The job's signal handlers are the main process's business; workers end when told to."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
