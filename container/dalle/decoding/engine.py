"""Decoding engine: continuous batching of many requests' candidates, each at its own position.

    submit(...)          run a request's caption through the model; its candidates wait for slots
    step()  repeatedly   fill free slots -> sample a position of each, or several by guesses
                         (`dalle.decoding.windows`) -> finished candidates

A candidate depends on its caption, options, seed and number alone, never on the load: it is the
image that `dalle.decoding.sampling` samples. Knows ids and probabilities; no captions, pixels,
clocks or threads: one thread calls everything. On a GPU a step returns before the device has
finished it, and reading its results waits.

Letters: S slots, B rows of a step, C candidates in slots, N positions, M codes per position,
P primed or sampled positions, T text length, W width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dalle.decoding.sampling import SamplingOptions, image_noise_keys, require_evaluation_mode
from dalle.decoding.select import MOST_ROWS, most_rows, new_step
from dalle.decoding.step import Batch, CandidateTokens, DecodeRequest, Prefix, SlotState, Step
from dalle.decoding.windows import WindowDecoder, WindowWidth
from dalle.models.transformer import PADDING, Dalle
from dalle.types import WIDEST_WINDOW


class DecodeEngine:
    """A model's slots, and the step that advances them all.

    num_slots: sequences at the same time; a candidate with guidance takes two.
    max_candidates: candidates at the same time; None for as many as there are slots.
    step: None is the exact one for the model's device.
    window: positions of a candidate that a step samples; None for as many as promise most. The
    images do not depend on it.
    """

    def __init__(
        self,
        model: Dalle,
        num_slots: int,
        *,
        max_candidates: int | None = None,
        step: Step | None = None,
        window: int | None = None,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        require_evaluation_mode(model)
        self.model, self.num_slots = model, num_slots
        self.max_candidates = max_candidates or num_slots
        self._device = model.text_position.device
        self._step = step or new_step(model, num_slots, num_rows=most_rows(num_slots))
        widest = min(window or WIDEST_WINDOW, model.config.num_positions)
        if self._step.window_refusal is not None:
            widest = 1
        self.windows = WindowWidth(widest, window)
        self._free = list(range(num_slots))
        self._candidates: list[CandidateTokens] = []
        self._requests: list[DecodeRequest] = []
        self._batch: Batch | None = None
        like = model.text_position.detach()
        self._state = SlotState.new(model.config, num_slots, like, widest)
        self._windows = self._step.windows(self._state) if widest > 1 else None
        self._decoder = None
        if widest > 1 and self._windows is None:
            self._decoder = WindowDecoder(self._step, self._state)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._candidates and not self._requests

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        return self._step.num_bytes

    @property
    def window_refusal(self) -> str | None:
        """Reason why a step samples one position of each candidate; None where it may do more."""
        return self._step.window_refusal

    @property
    def busy_slots(self) -> int:
        """Number of slots that hold a sequence, B."""
        return self.num_slots - len(self._free)

    @property
    def num_in_slots(self) -> int:
        """Number of candidates in slots, C."""
        return len(self._candidates)

    @torch.inference_mode()
    def submit(
        self,
        text_tokens: Tensor,
        *,
        candidates: Iterable[int],
        seed: int,
        options: SamplingOptions | None = None,
        prime_tokens: Tensor | None = None,
    ) -> DecodeRequest:
        """Accept a request.

        text_tokens: the caption, [1, T] int64. candidates: their numbers; candidate k of a seed and
        a caption is the same image whichever others are sampled beside it. prime_tokens: [P, M],
        the first P positions in raster order, kept as they are.
        Runs the caption through the model, which takes as long as a few steps. Raises ValueError
        for no candidate and for guidance with one slot.
        """
        options = options or SamplingOptions()
        waiting = deque(candidates)
        if not waiting:
            raise ValueError("candidates must be at least one, got none")
        captions = [text_tokens]
        if options.guidance_scale != 1.0:
            if self.num_slots < 2:
                raise ValueError("num_slots must be at least 2 for guidance, got 1")
            captions.append(torch.full_like(text_tokens, PADDING))
        N = self.model.config.num_positions
        prefixes = []
        # With every position primed there is nothing to sample.
        if prime_tokens is None or len(prime_tokens) < N:
            prefixes = [
                self._step.prefill(self.model, caption, prime_tokens) for caption in captions
            ]
        request = DecodeRequest(seed, options, waiting, prime_tokens, prefixes)
        self._requests.append(request)
        return request

    def cancel(self, request: DecodeRequest) -> None:
        """Give up a request's unfinished candidates and free their slots."""
        request.waiting.clear()
        for each in [each for each in self._candidates if each.request is request]:
            self._release(each)
        self._forget(request)

    def reset(self) -> None:
        """Give up all requests, in whatever state a failed step has left them."""
        for request in self._requests:
            request.waiting.clear()
            request.in_slots = 0
        self._free = list(range(self.num_slots))
        self._candidates, self._requests, self._batch = [], [], None

    @torch.inference_mode()
    def step(self, seconds: float = 0.0) -> list[CandidateTokens]:
        """Fill free slots, sample positions of every candidate, return the finished ones.

        seconds: where a step samples windows in calls of its own, more of them follow at once until
        a candidate has finished or that time has passed.
        """
        finished = self._admit()
        if not self._candidates:
            return finished
        N = self.model.config.num_positions
        if self._windows is not None:
            candidates = self._candidates
            width = self._choose_width(candidates)
            self.windows.record_counts(self._windows.decode(candidates, width, seconds))
            done = [each for each in candidates if each.position == N]
            return finished + [self._finish(each) for each in done]
        batch = self._batch = self._batch or self._new_batch()
        if self._decoder is not None:
            self._sample_windows(self._decoder, batch)
        else:
            self._step.advance(batch, self._state)
            batch.advance()
        return finished + [self._finish(each) for each in batch.candidates if each.position == N]

    def _new_batch(self, candidates: list[CandidateTokens] | None = None) -> Batch:
        candidates = list(self._candidates) if candidates is None else candidates
        return Batch(candidates, self.model.config.num_positions, self._device)

    def _sample_windows(self, decoder: WindowDecoder, batch: Batch) -> None:
        """Sample the windows of a batch, and run the model on the next ones."""
        exact = decoder.sample(batch)
        if batch.has_windows:
            self.windows.record([each.window for each in batch.candidates], exact)
        else:
            self.windows.record([], [])
        N = self.model.config.num_positions
        unfinished = [each for each in batch.candidates if each.position < N]
        if not unfinished:
            return
        width = self._choose_width(unfinished)
        # The same list where nothing has finished, so that a step can tell.
        same = len(unfinished) == len(batch.candidates)
        if same and width == 1 and not batch.has_windows:
            batch.follow()
        else:
            for each in unfinished:
                each.window = min(width, N - each.position)
            batch = self._batch = self._new_batch(batch.candidates if same else unfinished)
        decoder.run(batch)

    def trials(self) -> dict[int, Callable[[], None]]:
        """Return the work of steps of windows by their number of rows, to be timed.

        None where no step has windows. The engine must be idle while they run.
        """
        found = {}
        widest = min(self.windows.widest, self.model.config.num_positions - 1)
        rows = 1
        windows = self._windows or self._decoder
        while windows is not None and rows <= (self._step.num_rows or MOST_ROWS):
            width = min(rows, widest)
            candidates = rows // width
            if candidates > min(self.max_candidates, self.num_slots):
                break
            work = windows.trial(candidates, width)
            found[candidates * width] = torch.inference_mode()(work)
            rows *= 2
        return found

    def _choose_width(self, candidates: list[CandidateTokens]) -> int:
        rows_each = sum(len(each.slots) for each in candidates)
        most = self._step.num_rows
        if most is not None:
            # Candidates that start before the next step have a row each, and one without caption.
            places = self.max_candidates - len(candidates)
            most -= min(self.num_slots - rows_each, 2 * places)
        return self.windows.choose(rows_each, most)

    def tokens_so_far(self, request: DecodeRequest) -> list[tuple[int, Tensor]]:
        """Return number and tokens [P, M] of each of a request's candidates in slots.

        The tokens are in the engine's own memory; copy what is to outlast its next step.
        """
        return [
            (each.number, each.image_tokens[: each.position])
            for each in self._candidates
            if each.request is request
        ]

    def _admit(self) -> list[CandidateTokens]:
        """Give free slots to waiting candidates, first of the request with the fewest in slots.

        Returns the candidates whose every position is primed: they need no slot.
        """
        finished = []
        started: dict[Prefix, list[int]] = {}
        while waiting := [each for each in self._requests if each.may_start]:
            request = min(waiting, key=lambda each: each.in_slots)
            if request.prime_tokens is not None and not request.prefixes:
                finished += self._finish_primed(request, request.prime_tokens)
                continue
            has_place = len(self._candidates) < self.max_candidates
            if len(self._free) < request.slots_each or not has_place:
                break  # for every request, else a candidate of two slots might never start
            candidate = self._start(request)
            for slot, prefix in zip(candidate.slots, request.prefixes, strict=True):
                started.setdefault(prefix, []).append(slot)
        for prefix, slots in started.items():
            chosen = torch.tensor(slots, device=self._device)
            self._step.load(chosen, prefix.packed)
            self._state.hidden[chosen, 0] = prefix.hidden
        return finished

    def _start(self, request: DecodeRequest) -> CandidateTokens:
        """Take slots for a request's next candidate."""
        number = request.waiting.popleft()
        slots = tuple(self._free[: request.slots_each])
        del self._free[: request.slots_each]
        image_tokens = self._state.image_tokens[slots[0]]
        noise_keys = self._state.noise_keys[slots[0]]
        prime = request.prime_tokens
        num_primed = 0 if prime is None else len(prime)
        if prime is not None:
            image_tokens[:num_primed] = prime
        keys = image_noise_keys(request.seed, number, noise_keys.numel())
        noise_keys.copy_(torch.from_numpy(keys).view_as(noise_keys))
        self._state.log_likelihood[slots[0]] = 0.0
        candidate = CandidateTokens(
            request, number, slots, num_primed, image_tokens, guessed=num_primed
        )
        request.in_slots += 1
        self._candidates.append(candidate)
        self._batch = None
        return candidate

    def _finish(self, candidate: CandidateTokens) -> CandidateTokens:
        """Free a candidate's slots, and keep what they hold of it.

        Raises FloatingPointError where a logit was NaN or infinite.
        """
        candidate.log_likelihood = float(self._state.log_likelihood[candidate.slot])
        if not math.isfinite(candidate.log_likelihood):
            raise FloatingPointError("a logit is NaN or infinite")
        candidate.image_tokens = candidate.image_tokens.clone()
        self._release(candidate)
        if candidate.request.is_over:
            self._forget(candidate.request)
        return candidate

    def _finish_primed(self, request: DecodeRequest, prime: Tensor) -> list[CandidateTokens]:
        numbers = list(request.waiting)
        request.waiting.clear()
        self._forget(request)
        return [
            CandidateTokens(request, number, (), len(prime), prime.clone()) for number in numbers
        ]

    def _release(self, candidate: CandidateTokens) -> None:
        self._candidates.remove(candidate)
        candidate.request.in_slots -= 1
        self._free = sorted([*self._free, *candidate.slots])
        self._batch = None

    def _forget(self, request: DecodeRequest) -> None:
        if request in self._requests:
            self._requests.remove(request)
        request.prefixes = []
