"""One decoding step: the candidates that are sampled, the rows of its batch, and its interface.

    DecodeRequest, CandidateTokens   a request in the engine and its candidates
    SlotState, Batch                 what the engine passes to a step
    Step                             one of cpu.step, cpu.torch_step, gpu.step, gpu.torch_step

Letters: S slots, B rows of a step, R of them with caption, C candidates being sampled, K widest
window, N positions, M codes per position, V codebook size, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.sampling import SamplingOptions, sample_tokens
from dalle.models.layers import KeyValueCache
from dalle.models.transformer import Dalle, TransformerConfig

_NONE = np.zeros(0, np.int64)
_NO_SLOT = (-1, -1)  # with the caption, and without it


@dataclass(eq=False)
class DecodeRequest:
    """A request for candidates of one caption; made by `DecodeEngine.submit`."""

    seed: int
    options: SamplingOptions
    waiting: deque[int]
    """Numbers of the candidates that have no slot yet."""
    prime_tokens: Tensor | None = field(repr=False)
    prefixes: list[Prefix] = field(repr=False)
    """With the caption, and with guidance without it; none where every position is primed."""
    max_in_slots: int | None = None
    """Candidates that may be in slots at the same time; None: as many as there is room for."""
    in_slots: int = 0
    """Candidates in slots now."""
    leader: CandidateTokens | None = field(default=None, repr=False)
    """With windows the candidate that has most positions, or was the first to have all."""
    num_sampled: int = 0
    """Positions that were sampled, of all its candidates."""
    num_steps: int = 0
    """Steps that sampled them, counted for each candidate."""

    @property
    def slots_each(self) -> int:
        """Slots that one candidate takes."""
        return len(self.prefixes)

    @property
    def may_start(self) -> bool:
        """Whether a candidate waits and may take slots."""
        return bool(self.waiting) and (
            self.max_in_slots is None or self.in_slots < self.max_in_slots
        )

    @property
    def positions_per_step(self) -> float:
        """Positions of a candidate that a step sampled, in the mean; 1 before the first step."""
        return self.num_sampled / self.num_steps if self.num_steps else 1.0

    @property
    def is_over(self) -> bool:
        """Whether every candidate is finished or given up."""
        return not self.waiting and not self.in_slots


@dataclass(frozen=True, eq=False, slots=True)
class Prefix:
    """Result of the caption's pass through the model, with which each candidate starts."""

    packed: Sequence[Any]
    """What `Step.load` writes."""
    hidden: Tensor  # [W], predicts the first position that is not primed


@dataclass(eq=False, slots=True)
class CandidateTokens:
    """The image tokens of one candidate, while they are sampled and when they are complete."""

    request: DecodeRequest
    number: int
    slots: tuple[int, ...]
    """The slot with the caption, then with guidance the one without it."""
    position: int
    """Number of positions that are primed or sampled."""
    image_tokens: Tensor = field(repr=False)
    """[N, M] int64. Only the first `position` are valid, and in a slot it is the engine's own."""
    window: int = 1
    """Positions from `position` on that the next step samples; all but the first by guesses."""
    guessed: int = 0
    """Number of positions that hold a token: known ones, then guesses."""
    log_likelihood: float = 0.0
    """log p of the sampled tokens in nats, set when they are complete: before temperature, filters
    and guidance, and without the primed positions."""

    def move(self, positions: int, steps: int = 1) -> None:
        """Count positions that steps have sampled."""
        self.position += positions
        self.request.num_sampled += positions
        self.request.num_steps += steps

    @property
    def slot(self) -> int:
        return self.slots[0]

    @property
    def num_primed(self) -> int:
        """Number of positions that are primed."""
        prime = self.request.prime_tokens
        return 0 if prime is None else len(prime)

    @property
    def guidance_slot(self) -> int | None:
        return self.slots[1] if len(self.slots) > 1 else None


@dataclass(frozen=True, eq=False)
class SlotState:
    """Tensors of the engine by slot; a candidate's entry is that of its slot with the caption."""

    hidden: Tensor
    """[S, K, W]: predicts the next K positions, all but the first by guesses."""
    image_tokens: Tensor
    """[S, N, M] int64."""
    log_likelihood: Tensor
    """[S]: log p of the tokens sampled so far, in nats; by `WindowDecoder` of those of a whole
    image."""
    log_p: Tensor
    """[S, N]: log p of each position's tokens, in nats; set by `WindowDecoder` only."""
    noise_keys: Tensor
    """[S, N, M] int64: keys of the noise that chooses the tokens."""

    @classmethod
    def new(
        cls, config: TransformerConfig, num_slots: int, like: Tensor, widest: int = 1
    ) -> SlotState:
        """Allocate zeros. like: a tensor of the model's device and dtype. widest: K."""
        shape = (num_slots, config.num_positions, config.num_codebooks)
        return cls(
            hidden=like.new_zeros(num_slots, widest, config.width),
            image_tokens=like.new_zeros(shape, dtype=torch.int64),
            log_likelihood=like.new_zeros(num_slots, dtype=torch.float32),
            log_p=like.new_zeros(shape[:2], dtype=torch.float32),
            noise_keys=like.new_zeros(shape, dtype=torch.int64),
        )


class Batch:
    """The rows of a step, for as long as the candidates stay the same and have no windows.

    One row for each position of each candidate's window, then one without caption for each of
    those of a candidate with guidance. Tensors are made at first use, and nothing is sent to the
    device after that: a step on a GPU never waits for the host.
    """

    candidates: list[CandidateTokens]
    """[C]."""
    widths: np.ndarray
    """Each candidate's rows with caption, [C]."""
    starts: np.ndarray
    """Each candidate's first row, [C]."""
    row_candidates: np.ndarray
    """Index of the candidate of each row with caption, [R]."""
    numpy_rows: np.ndarray
    """Each row's slot, [B]."""
    numpy_positions: np.ndarray
    """Each row's position, [B]."""
    numpy_offsets: np.ndarray
    """Each row's place in its window, [B]."""
    numpy_places: np.ndarray
    """Slot and position of each row with caption as one index, slot · N + position, [R]."""
    guided: np.ndarray
    """Indices of the rows with guidance, in the order of their rows without caption, [B - R]."""

    def __init__(
        self, candidates: list[CandidateTokens], num_positions: int, device: torch.device
    ) -> None:
        """candidates: not copied, so that a step can tell whether they are the same."""
        self.candidates = candidates
        table = np.array(
            [
                (*each.slots, *_NO_SLOT[len(each.slots) :], each.position, each.window)
                for each in candidates
            ],
            dtype=np.int64,
        )
        slots, guidance_slots, positions, self.widths = table.T
        self.starts = self.widths.cumsum() - self.widths
        rows = self.row_candidates = np.arange(len(candidates)).repeat(self.widths)
        offsets = np.arange(len(rows)) - self.starts[rows]
        slots, positions = slots[rows], positions[rows] + offsets
        self.numpy_places = slots * num_positions + positions
        if (guidance_slots < 0).all():
            self.guided = _NONE
            self.numpy_rows, self.numpy_positions, self.numpy_offsets = slots, positions, offsets
        else:
            guided = self.guided = np.flatnonzero(guidance_slots[rows] >= 0)
            self.numpy_rows = np.concatenate([slots, guidance_slots[rows[guided]]])
            self.numpy_positions = np.concatenate([positions, positions[guided]])
            self.numpy_offsets = np.concatenate([offsets, offsets[guided]])
        self._device = device
        self._places: Tensor | None = None

    def advance(self) -> None:
        """Move every candidate to its next position; they have no windows."""
        for each in self.candidates:
            each.move(1)
        self.follow()

    @property
    def has_windows(self) -> bool:
        """Whether a candidate has rows of several positions."""
        return len(self.row_candidates) > len(self.candidates)

    def follow(self) -> None:
        """Move the rows to the candidates' next position, to which they were moved."""
        self.numpy_positions += 1
        self.numpy_places += 1
        if self._places is not None and self._device.type != "cpu":  # else the same memory
            self._places += 1

    @cached_property
    def rows(self) -> Tensor:
        """`numpy_rows` on the device."""
        return torch.from_numpy(self.numpy_rows).to(self._device)

    @cached_property
    def slots(self) -> Tensor:
        """Slot of each row with caption, [R]."""
        return self.rows[: len(self.row_candidates)]

    @property
    def places(self) -> Tensor:
        """`numpy_places` on the device, [R]."""
        if self._places is None:
            self._places = torch.from_numpy(self.numpy_places).to(self._device)
        return self._places

    @property
    def blank_rows(self) -> dict[int, int]:
        """Row without caption of each row with guidance."""
        return {int(row): len(self.row_candidates) + n for n, row in enumerate(self.guided)}

    def sample(
        self,
        code_logits: Callable[[Tensor, int, Tensor], Tensor],
        hidden: Tensor,
        noise_keys: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Sample the codes [R, M] of the positions that the rows' hidden [B, W] predict.

        code_logits: as `Step.code_logits`. noise_keys: [R, M]. Returns the codes and their
        log p [R].
        """
        R, M = noise_keys.shape
        codes = torch.zeros(R, M, dtype=torch.int64, device=self._device)
        log_likelihood = torch.zeros(R, device=self._device)
        for m in range(M):
            logits = code_logits(hidden, m, self.spread(codes)).float()
            codes[:, m], log_p = self._sample_code(logits, noise_keys[:, m])
            log_likelihood += log_p
        return codes, log_likelihood

    def spread(self, codes: Tensor) -> Tensor:
        """Codes [R, M] of the rows with caption -> [B, M] of all rows."""
        return torch.cat([codes, codes[self._guided]]) if len(self.guided) else codes

    def _sample_code(self, logits: Tensor, noise_keys: Tensor) -> tuple[Tensor, Tensor]:
        """One code per row and its log p, [R] each: one call for all of equal options."""
        R = len(self.row_candidates)
        if len(self._groups) == 1:
            blank = logits[R:] if len(self.guided) else None
            return sample_tokens(logits[:R], noise_keys, self._groups[0][0], blank)
        codes = torch.empty(R, dtype=torch.int64, device=self._device)
        log_p = torch.empty(R, device=self._device)
        for options, rows, blank_rows in self._groups:
            blank = None if blank_rows is None else logits[blank_rows]
            codes[rows], log_p[rows] = sample_tokens(logits[rows], noise_keys[rows], options, blank)
        return codes, log_p

    @cached_property
    def _guided(self) -> Tensor:
        """`guided` on the device."""
        return torch.from_numpy(self.guided).to(self._device)

    @cached_property
    def _groups(self) -> list[tuple[SamplingOptions, Tensor, Tensor | None]]:
        """Candidates of equal options: the options, their rows, their rows without caption."""
        by_options: dict[SamplingOptions, list[int]] = {}
        for row, candidate in enumerate(self.row_candidates):
            options = self.candidates[candidate].request.options
            by_options.setdefault(options, []).append(row)
        blank_rows = self.blank_rows
        return [
            (
                options,
                torch.tensor(rows, device=self._device),
                torch.tensor([blank_rows[row] for row in rows], device=self._device)
                if rows[0] in blank_rows
                else None,
            )
            for options, rows in by_options.items()
        ]


@dataclass(frozen=True, eq=False, slots=True)
class WindowCounts:
    """What steps have found of the windows that they sampled."""

    compared: np.ndarray
    """Windows by the number of their guesses that were compared, [K + 1]."""
    right: np.ndarray
    """Windows by the number of their guesses that were right, [K + 1]."""
    steps: int


class StepWindows(Protocol):
    """The windows of an engine's candidates, by a step that samples and guesses them itself."""

    def decode(
        self, candidates: Sequence[CandidateTokens], width: int, seconds: float
    ) -> WindowCounts:
        """Sample the candidates' windows, and run the model on the next ones of at most `width`.

        Once, and again until a candidate has all positions or `seconds` have passed.
        """

    def trial(self, num_candidates: int, width: int) -> Callable[[], None]:
        """As `WindowDecoder.trial` of `dalle.decoding.windows`."""


class Step(ABC):
    """A model's decoding step with the keys and values of all its slots.

    The engine calls `pack` and `load` when a candidate starts, then `advance` once per position, or
    with windows `sample` and the step itself once each.
    """

    window_refusal: str | None = None
    """Reason why a call cannot have several rows of one slot; None where it can."""

    num_rows: int | None = None
    """Most rows of one call; None: any number."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory of the keys and values."""

    @abstractmethod
    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        """Run the model on the codes [B, M] of the slots' [B] positions [B]: states [B, W].

        Rows of one slot stand together, each at the position after the one before it, and see the
        keys and values of those before. What lies there from an earlier call is replaced.
        The same array object of slots as in the last call continues its sequences: every position
        must then be one more, and no slot may have been loaded in between.
        """

    @abstractmethod
    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """Logits [B, V] of code m of the position that hidden [B, W] predicts.

        codes: [B, >= m], of which the first m are read.
        """

    @abstractmethod
    def pack(self, prefix: KeyValueCache) -> Sequence[Any]:
        """Convert a cache of one row to what `load` writes, by layer."""

    @abstractmethod
    def load(self, slots: Tensor, packed: Sequence[Any]) -> None:
        """Write the same prefix to each of the slots [B]."""

    def prefill(self, model: Dalle, text_tokens: Tensor, prime_tokens: Tensor | None) -> Prefix:
        """Run the model on a caption [1, T] and codes [P, M] of the first P positions."""
        cache = model.new_cache(1)
        prime = None if prime_tokens is None else prime_tokens[None]
        hidden = model.prefill(text_tokens, prime, cache)
        return Prefix(self.pack(cache), hidden[0])

    def windows(self, state: SlotState) -> StepWindows | None:
        """Return what samples windows in calls of its own; None: `dalle.decoding.windows` does."""
        return None

    def sample(self, hidden: Tensor, noise_keys: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sample the codes [R, M] and their log p [R]: as `Batch.sample`."""
        return batch.sample(self.code_logits, hidden, noise_keys)

    def advance(self, batch: Batch, state: SlotState) -> None:
        """Sample one position of every candidate and run the model on it, where one follows.

        Only where no candidate has a window.
        Reads and writes the engine's state, which must be the same object in every call. The same
        batch object as in the last call continues its candidates.
        """
        N, M = state.image_tokens.shape[1:]
        hidden = state.hidden[:, 0].index_select(0, batch.rows)
        noise_keys = state.noise_keys.view(-1, M).index_select(0, batch.places)
        codes, log_likelihood = self.sample(hidden, noise_keys, batch)
        state.image_tokens.view(-1, M).index_copy_(0, batch.places, codes)
        state.log_likelihood.index_add_(0, batch.slots, log_likelihood)
        codes = batch.spread(codes)
        numpy_rows, rows, positions = batch.numpy_rows, batch.rows, batch.numpy_positions
        if (positions == N - 1).any():
            # Nothing follows the last position.
            unfinished = np.flatnonzero(positions < N - 1)
            if not len(unfinished):
                return
            numpy_rows, positions = numpy_rows[unfinished], positions[unfinished]
            rows, codes = rows[unfinished], codes[unfinished]
        state.hidden[:, 0].index_copy_(0, rows, self(numpy_rows, codes, positions))
