"""Batches of a data set: step -> images, captions and text tokens. Knows nothing of models.

    batches = Batches(dataset, batch_size=64, seed=7, tokenizer=tokenizer)
    batch = batches.batch(step)          # any step, in any order; quick in ascending order

Letters: B pairs of this rank, H = W = image_size, T text length, C captions of the data set,
P micro-batches of a batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dalle.errors import DataError
from dalle.preprocess.tokenizer import CaptionTokenizer
from training.data.batching.loader import ImageLoader
from training.data.batching.preload import Preloaded
from training.data.batching.sampler import Last, Sampler
from training.data.batching.token_cache import TokenCache
from training.data.pairs import Dataset, Totals
from training.data.sharded import HostPart
from training.stopping import NEVER, Stop, unless_stopped

ENCODE_CHUNK = 4096


@dataclass(frozen=True)
class Batch:
    """One rank's pairs of one step.

    images: [B, 3, H, W] float32 in [0, 1], or [B, 3, 0, 0] of a `TokenCache`.
    captions: B of them, each pair's caption of the epoch.
    indices: [B] int64, the pairs' numbers in `Batches.dataset`.
    text_tokens: [B, T] int64, None when no tokenizer was given.
    step_text_tokens: [P * B, T], of a micro-batch: those of the whole batch.
    mirrored: bool [B], the pictures that are mirrored in this epoch; None where none ever is.
    """

    images: Tensor
    captions: list[str]
    indices: Tensor
    text_tokens: Tensor | None
    step_text_tokens: Tensor | None = None
    mirrored: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on a device."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def micro_batches(self, number: int) -> list[Batch]:
        """Split the batch into so many equal ones, in order.

        Raises DataError when its pairs cannot be split evenly.
        """
        size, rest = divmod(len(self.captions), number)
        if rest:
            raise DataError(
                f"gradient_accumulation_steps={number} needs batches of a multiple of as many "
                f"pairs on each device, but one has {len(self.captions)}"
            )
        return [
            Batch(
                self.images[start : start + size],
                self.captions[start : start + size],
                self.indices[start : start + size],
                None if self.text_tokens is None else self.text_tokens[start : start + size],
                self.text_tokens,
                None if self.mirrored is None else self.mirrored[start : start + size],
            )
            for start in range(0, number * size, size)
        ]


class Batches(AbstractContextManager["Batches"]):
    """The batches of one rank, a pure function of (data set, seed, step).

    dataset: the data set that the batches' `indices` count in. The images of a `Preloaded` one are
    in memory, a `TokenCache` has none; those of any other are decoded by worker processes, and the
    next usable pair replaces one that cannot be decoded.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        tokenizer: CaptionTokenizer | None = None,
        shuffle: bool = True,
        last: Last = "drop",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        part: HostPart | None = None,
        totals: Totals | None = None,
        mirrorable: Tensor | None = None,
        stop: Stop = NEVER,
    ) -> None:
        """See `Sampler` for batch_size, shuffle, last, rank and world_size, all of all hosts.

        tokenizer: encodes all captions now, so that a caption that is too long stops the job before
            it begins; the tokens take 4 * T bytes a caption.
        num_workers: processes that decode images; None chooses (see `loader_settings`).
        part: which host's part of a channel the data set is, if it is one; `totals` are then those
            of all parts.
        mirrorable: bool, one for each pair of a `Preloaded` data set: pictures that are mirrored in
            half of the epochs after the first ones, chosen by seed, epoch and pair.
        Raises what the tokenizer raises; Stopped.
        """
        self.dataset = dataset
        self._part = part
        self._totals = totals or Totals.of(dataset)
        num_parts = 1 if part is None else part.num_parts
        if batch_size % num_parts:
            raise ValueError(f"batch_size must be a multiple of {num_parts}, got {batch_size}")
        self.sampler = Sampler(
            num_pairs=len(dataset),
            batch_size=batch_size // num_parts,
            seed=seed,
            shuffle=shuffle,
            last=last,
            rank=rank % (world_size // num_parts),
            world_size=world_size // num_parts,
            groups=dataset.groups,
            part=0 if part is None else part.number,
        )
        self.num_per_epoch = self.sampler.num_per_epoch
        """Batches in an epoch, the same on every rank, at least 1."""
        if part is not None:
            self.num_per_epoch = max(1, self._totals.num_pairs // batch_size)
        self._loader = None
        if not isinstance(dataset, Preloaded | TokenCache):
            self._loader = ImageLoader(dataset, self.sampler, num_workers)
        self.mirrorable = mirrorable
        self._are_mirrored = lru_cache(maxsize=1)(self.sampler.are_mirrored)
        self._tokenizer = tokenizer
        self._text_tokens = None if tokenizer is None else _encode_all(dataset, tokenizer, stop)
        self._permutation = lru_cache(maxsize=1)(self.sampler.permutation)
        self._caption_numbers = lru_cache(maxsize=1)(self.sampler.caption_numbers)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0 through all epochs."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if self._part is not None and step % self.num_per_epoch == 0:
            self._part.share_skips(self.dataset.skips, self.dataset.max_bad_share)
        epoch = self.sampler.epoch(step)
        if self._loader is not None:
            decoded = self._loader.images(step)
            indices, images = decoded.indices, decoded.images
        else:
            indices = self.sampler.indices(step, self._permutation(epoch))
            if isinstance(self.dataset, Preloaded):
                images = self.dataset.images[torch.from_numpy(indices)]
            else:
                images = torch.empty((len(indices), 3, 0, 0), dtype=torch.uint8)
        mirrored = None
        if self.mirrorable is not None:
            chosen = torch.from_numpy(self._are_mirrored(epoch)[indices])
            mirrored = self.mirrorable[torch.from_numpy(indices)] & chosen
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        captions, text_tokens = self._texts(indices, self._caption_numbers(epoch))
        return Batch(
            images.to(torch.float32).div_(255),
            captions,
            torch.from_numpy(indices),
            text_tokens,
            mirrored=mirrored,
        )

    def identity(self) -> dict[str, Any]:
        """Return what the batches hold, as plain values: other pairs or tokens, other values.

        The order is left out, since the job's hyperparameters determine it, but for its kind.
        """
        data: dict[str, Any] = {
            "data": self._totals.fingerprint,
            "num_pairs": self._totals.num_pairs,
        }
        order = [] if self._part is None else ["each host its own part"]
        order += [] if self.sampler.groups is None else ["shards from front to back"]
        if order:
            data["order"] = ", ".join(order)
        return data if self._tokenizer is None else data | {"tokenizer": self._tokenizer.identity()}

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self._loader is not None:
            self._loader.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _texts(
        self, indices: NDArray[np.int64], caption_numbers: NDArray[np.uint64]
    ) -> tuple[list[str], Tensor | None]:
        captions: list[str] = []
        rows: list[int] = []
        for index in indices.tolist():
            choices = self.dataset.captions(index)
            choice = int(caption_numbers[index]) % len(choices)
            captions.append(choices[choice])
            if self._text_tokens is not None:
                rows.append(int(self._text_tokens.first_rows[index]) + choice)
        if self._text_tokens is None:
            return captions, None
        return captions, self._text_tokens.tokens[rows].to(torch.int64)


@dataclass(frozen=True)
class _EncodedCaptions:
    """tokens: [C, T] int32, a pair's captions in adjacent rows; first_rows: [M], their first."""

    tokens: Tensor
    first_rows: NDArray[np.int64]


def _encode_all(dataset: Dataset, tokenizer: CaptionTokenizer, stop: Stop) -> _EncodedCaptions:
    counts = [len(dataset.captions(index)) for index in range(len(dataset))]
    captions = [caption for index in range(len(dataset)) for caption in dataset.captions(index)]
    starts = tqdm(
        range(0, len(captions), ENCODE_CHUNK),
        f"encoding captions of {dataset.channel}",
        disable=None,
        delay=0.5,
    )
    chunks = [
        tokenizer.encode(captions[start : start + ENCODE_CHUNK]).to(torch.int32)
        for start in unless_stopped(starts, stop)
    ]
    first_rows = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return _EncodedCaptions(torch.cat(chunks), first_rows)
