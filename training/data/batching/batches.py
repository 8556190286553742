"""Batches of a data set: step -> images, captions and text tokens. Knows nothing of models.

    batches = Batches(dataset, batch_size=64, seed=7, tokenizer=tokenizer)
    batch = batches.batch(step)          # any step, in any order; quick in ascending order

Letters: B pairs of this rank, H = W = image_size, T text length, C captions of the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dalle.errors import DataError
from training.data.batching.loader import ImageLoader
from training.data.batching.preload import InMemory
from training.data.batching.sampler import Last, Order
from training.data.batching.token_cache import Tokenised
from training.data.pairs import Dataset, Whole
from training.data.sharded import Part
from training.stopping import NEVER, Stop, unless_stopped

ENCODE_CHUNK = 4096


class TextEncoder(Protocol):
    """What batches need of `dalle.preprocess.tokenizer.CaptionTokenizer`."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> text tokens [len(captions), T] int64."""
        ...

    def identity(self) -> str:
        """The same for encoders that give every caption the same tokens."""
        ...


@dataclass(frozen=True)
class Batch:
    """One rank's pairs of one step.

    images: [B, 3, H, W] float32 in [0, 1], or [B, 3, 0, 0] of a data set that is `Tokenised`.
    captions: B of them, each pair's caption of the epoch.
    indices: [B] int64, the pairs' numbers in `Batches.dataset`.
    text_tokens: [B, T] int64, None when no tokenizer was given.
    step_text_tokens: [P * B, T], of a batch that is one of P parts: those of all parts.
    """

    images: Tensor
    captions: list[str]
    indices: Tensor
    text_tokens: Tensor | None
    step_text_tokens: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""

        def there(tokens: Tensor | None) -> Tensor | None:
            return None if tokens is None else tokens.to(device, non_blocking=True)

        return Batch(
            self.images.to(device, non_blocking=True),
            self.captions,
            self.indices.to(device, non_blocking=True),
            there(self.text_tokens),
            there(self.step_text_tokens),
        )

    def parts(self, number: int) -> list[Batch]:
        """So many equal batches, in order, that are this one together.

        Raises DataError when its pairs cannot be shared out evenly.
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
            )
            for start in range(0, number * size, size)
        ]


class Batches:
    """The batches of one rank, a pure function of (data set, seed, step).

    dataset: the data set the batches' `indices` count in. The images of one that is `InMemory` are
    at hand, one that is `Tokenised` has none; those of another are decoded by worker processes,
    and the next usable pair stands in for one that cannot be.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        tokenizer: TextEncoder | None = None,
        shuffle: bool = True,
        last: Last = "drop",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        part: Part | None = None,
        whole: Whole | None = None,
        stop: Stop = NEVER,
    ) -> None:
        """See `Order` for batch_size, shuffle, last, rank and world_size.

        tokenizer: all captions are encoded here, so that one that is too long stops the job
            before it begins; the tokens take 4 * T bytes a caption.
        num_workers: processes that decode images; None chooses (see `loader_settings`).
        part: when the data set is one of several hosts' parts of a channel, which; `whole` is then
            what they are together. `rank` and `world_size` are of all hosts nevertheless.
        Raises what the tokenizer raises; Stopped.
        """
        self.dataset = dataset
        self._part = part
        self._whole = whole or Whole.of(dataset)
        num_parts = 1 if part is None else part.num_parts
        if batch_size % num_parts:
            raise ValueError(f"batch_size must be a multiple of {num_parts}, got {batch_size}")
        self.order = Order(
            num_pairs=len(self.dataset),
            batch_size=batch_size // num_parts,
            seed=seed,
            shuffle=shuffle,
            last=last,
            rank=rank % (world_size // num_parts),
            world_size=world_size // num_parts,
            groups=self.dataset.groups,
            part=0 if part is None else part.number,
        )
        self._num_per_epoch = self.order.num_per_epoch
        if part is not None:
            self._num_per_epoch = max(1, self._whole.num_pairs // batch_size)
        self._loader = (
            None
            if isinstance(self.dataset, InMemory | Tokenised)
            else ImageLoader(self.dataset, self.order, num_workers)
        )
        self._tokenizer = tokenizer
        self._text_tokens = None if tokenizer is None else _encode_all(dataset, tokenizer, stop)
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._caption_draws: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)

    @property
    def num_per_epoch(self) -> int:
        """Batches in an epoch, the same on every rank, at least 1."""
        return self._num_per_epoch

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 through all epochs."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if self._part is not None and step % self._num_per_epoch == 0:
            self._part.settle(self.dataset.skips, self.dataset.max_bad_share)
        self._enter_epoch(self.order.epoch(step))
        if isinstance(self.dataset, InMemory):
            numbers = self.order.indices(step, self._permutation)
            images = self.dataset.images[torch.from_numpy(numbers)]
        elif isinstance(self.dataset, Tokenised):
            numbers = self.order.indices(step, self._permutation)
            images = torch.empty((len(numbers), 3, 0, 0), dtype=torch.uint8)
        else:
            assert self._loader is not None
            decoded = self._loader.images(step)
            numbers, images = decoded.indices, decoded.images
        captions, text_tokens = self._texts(numbers)
        return Batch(
            images.to(torch.float32).div_(255), captions, torch.from_numpy(numbers), text_tokens
        )

    def identity(self) -> dict[str, Any]:
        """What the batches hold, as plain values: another pair or token makes another identity.

        Without the order: the author's settings say what that depends on, but for the groups.
        """
        data: dict[str, Any] = {
            "data": self._whole.fingerprint,
            "num_pairs": self._whole.num_pairs,
        }
        order = [] if self._part is None else ["each host its own part"]
        order += [] if self.order.groups is None else ["shards from front to back"]
        if order:
            data["order"] = ", ".join(order)
        return data if self._tokenizer is None else data | {"tokenizer": self._tokenizer.identity()}

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self._loader is not None:
            self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _enter_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._permutation = self.order.permutation(epoch)
            self._caption_draws = self.order.caption_draws(epoch)
            self._epoch = epoch

    def _texts(self, numbers: NDArray[np.int64]) -> tuple[list[str], Tensor | None]:
        captions: list[str] = []
        rows: list[int] = []
        for index in numbers.tolist():
            choices = self.dataset.captions(index)
            choice = int(self._caption_draws[index]) % len(choices)
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


def _encode_all(dataset: Dataset, tokenizer: TextEncoder, stop: Stop) -> _EncodedCaptions:
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
