"""Images of large data sets, decoded some steps ahead by torch's DataLoader workers.

A worker computes a step's images, a pure function of the step; the DataLoader brings the steps in
order. SageMaker gives a container a /dev/shm of a fixed size, which may be 64 MiB: the batches that
all processes of a host have in it at one time are kept well below that.

Letters: B pairs in a batch, H = W = image_size.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dalle.errors import DataError, JobError
from dalle.platform.limits import usable_cpus
from dalle.preprocess.images import ImageError
from training.data.batching.preload import to_chw
from training.data.batching.sampler import Sampler
from training.data.pairs import Dataset
from training.data.skips import SkipReason
from training.distributed.topology import local_world_size

MAX_WORKERS = 4
PREFETCH_FACTOR = 2  # batches each worker is ahead
SMALL_SHARED_MEMORY_BYTES = 1 << 30
MAX_SUBSTITUTES = 100  # unusable images in a row at which a data set is given up
# A Unix socket's path has at most 107 bytes. torch and multiprocessing add up to 34 of them, as in
# /torch-shm-dir-abcdef/manager.sock.
MAX_TEMPORARY_FOLDER_BYTES = 107 - 34


@dataclass(frozen=True)
class DecodedImages:
    """One step's images.

    images: uint8 [B, 3, H, W]. indices: their pairs, [B]; another pair replaces an unusable one.
    skipped: (reason, name, message) of every unusable image met.
    """

    images: Tensor
    indices: NDArray[np.int64]
    skipped: list[tuple[SkipReason, str, str]]


@dataclass(frozen=True)
class LoaderSettings:
    """How many processes decode, and how tensors are passed between them.

    sharing_strategy: torch.multiprocessing's, file_descriptor or file_system.
    """

    num_workers: int
    sharing_strategy: str


def loader_settings(
    batch_bytes: int,
    *,
    shared_memory_bytes: int,
    num_cpus: int,
    num_workers: int | None = None,
    num_processes: int = 1,
) -> LoaderSettings:
    """Choose min(CPUs - 1, 4) workers, or `num_workers`; fewer where /dev/shm is too small.

    batch_bytes: one decoded batch. num_processes: of this host, each with such a loader; they share
    the processors and the memory. Batches may take half of the shared memory; where not even one
    worker's fit, the main process decodes (0 workers). Below 1 GiB tensors are shared by name
    (`file_system`), which works with the low limits on open files of such containers.
    """
    wanted = num_workers
    if wanted is None:
        wanted = min(num_cpus // num_processes - 1, MAX_WORKERS)
    # One more batch than those ahead: the one being handed over.
    own_bytes = shared_memory_bytes // 2 // num_processes
    affordable = own_bytes // ((PREFETCH_FACTOR + 1) * batch_bytes)
    small = shared_memory_bytes < SMALL_SHARED_MEMORY_BYTES
    return LoaderSettings(
        num_workers=max(0, min(wanted, affordable)),
        sharing_strategy="file_system" if small else "file_descriptor",
    )


class StepImages(TorchDataset[DecodedImages]):
    """Step -> its images: what a DataLoader worker computes."""

    def __init__(self, dataset: Dataset, sampler: Sampler) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._permutation = lru_cache(maxsize=1)(sampler.permutation)

    def __getitem__(self, step: int) -> DecodedImages:
        permutation = self._permutation(self._sampler.epoch(step))
        indices = self._sampler.indices(step, permutation)
        size = self._dataset.image_size
        images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
        skipped: list[tuple[SkipReason, str, str]] = []
        for row, index in enumerate(indices.tolist()):
            indices[row] = self._decode(index, images[row], skipped)
        return DecodedImages(images, indices, skipped)

    def _decode(self, index: int, into: Tensor, skipped: list[tuple[SkipReason, str, str]]) -> int:
        """Decode pair `index`, or the next one by number that can be decoded; return its number.

        Returns -1 after too many failures: an exception would lose its type between processes.
        """
        for attempt in range(MAX_SUBSTITUTES):
            candidate = (index + attempt) % len(self._dataset)
            try:
                into.copy_(to_chw(self._dataset.image(candidate)))
            except ImageError as error:
                skipped.append((SkipReason.of(error), self._dataset.name(candidate), str(error)))
            else:
                return candidate
        return -1


class ImageLoader:
    """Images of steps, in any order; quick when the steps are consecutive."""

    def __init__(self, dataset: Dataset, sampler: Sampler, num_workers: int | None = None) -> None:
        self._dataset = dataset
        self._step_images = StepImages(dataset, sampler)
        shared_memory = Path("/dev/shm")  # noqa: S108 - looked at, not written to
        self.settings = loader_settings(
            sampler.batch_size // sampler.world_size * 3 * dataset.image_size**2,
            shared_memory_bytes=(
                shutil.disk_usage(shared_memory).total if shared_memory.is_dir() else 0
            ),
            num_cpus=usable_cpus(),
            num_workers=num_workers,
            num_processes=local_world_size(),
        )
        self._next_step = -1
        self._stream: Iterator[DecodedImages] | None = None

    def images(self, step: int) -> DecodedImages:
        """Return this step's images; unusable ones are counted in the data set's skips.

        Raises `DataError` when more than the data set's `max_bad_share` are unusable.
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
        """End the workers. `images` starts new ones."""
        self._stream = None  # the iterator ends its processes when it is deleted

    def _start(self, step: int) -> Iterator[DecodedImages]:
        self.close()
        workers = self.settings.num_workers
        if workers:
            _check_temporary_folder()
            strategy = self.settings.sharing_strategy
            torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
        loader = DataLoader(
            self._step_images,
            batch_size=None,  # an item is a whole batch already
            sampler=itertools.count(step),
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_reset_signals,
            # Otherwise every start would advance torch's global random generator.
            generator=torch.Generator(),
        )
        return iter(loader)


def _check_temporary_folder() -> None:
    """Raise `JobError` where a worker could not hand its tensors over.

    The worker does so by a socket in the temporary folder. Where the socket's path is too long, the
    worker only prints a traceback, and the main process waits for ever.
    """
    folder = tempfile.gettempdir()
    length = len(os.fsencode(folder))
    if length > MAX_TEMPORARY_FOLDER_BYTES:
        raise JobError(
            f"TMPDIR: the path {folder} has {length} bytes, too many for the sockets by which the "
            f"processes that decode images hand them over; name a folder of at most "
            f"{MAX_TEMPORARY_FOLDER_BYTES} bytes, or set num_workers=0"
        )


def _unchanged(item: Any) -> Any:
    return item


def _reset_signals(_worker: int) -> None:
    """Undo the job's signal handlers in a worker: the main process ends the workers."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
