"""Continuous batching: candidates of many requests at once, each at a position of its own.

    submit(...)          a request's caption, computed once; its candidates wait for slots
    step()  again, again    free slots filled -> one position drawn for all -> finished candidates

What a candidate is depends on its caption, options, seed and number alone, never on the load: the
same picture as `dalle.decoding.sampling` draws. Knows ids and probabilities; no captions, pixels,
clocks or threads: one thread calls everything. On a GPU a step returns before it is done, and what
is read of it waits.

Letters: S slots, B busy slots (rows of a step), C candidates in the making, N positions, M codes
per position, P primed positions, T text length, W width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from dalle.decoding.input_batch import Batch, SlotState
from dalle.decoding.request import Candidate, FinishedCandidate, Generation, Prefix
from dalle.decoding.sampling import SamplingOptions, image_uniforms, require_evaluation_mode
from dalle.decoding.select import new_step
from dalle.decoding.step import Step
from dalle.models.transformer import PADDING, Dalle


class DecodeEngine:
    """A model's slots and the step that moves them all on.

    num_slots: sequences in the making; a candidate with guidance takes two.
    max_candidates: in the making together; None for as many as there are slots.
    step: None is the exact one for the model's device.
    """

    def __init__(
        self,
        model: Dalle,
        num_slots: int,
        *,
        max_candidates: int | None = None,
        step: Step | None = None,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        require_evaluation_mode(model)
        self.model, self.num_slots = model, num_slots
        self.max_candidates = max_candidates or num_slots
        self._device = model.text_position.device
        self._step = step or new_step(model, num_slots)
        self._free = list(range(num_slots))
        self._making: list[Candidate] = []
        self._generations: list[Generation] = []
        self._batch: Batch | None = None
        self._state = SlotState.new(model.config, num_slots, model.text_position.detach())

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._making and not self._generations

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return self._step.num_bytes

    @property
    def busy_slots(self) -> int:
        """B"""
        return self.num_slots - len(self._free)

    @property
    def in_making(self) -> int:
        """C"""
        return len(self._making)

    @torch.inference_mode()
    def submit(
        self,
        text_tokens: Tensor,
        *,
        candidates: Iterable[int],
        seed: int,
        options: SamplingOptions | None = None,
        prime_tokens: Tensor | None = None,
    ) -> Generation:
        """Accept a request: arguments as of `sample_image_tokens`, for one caption [1, T].

        Runs the caption through the model, so that it takes as long as some steps. Raises
        ValueError for no candidate and for guidance with one slot.
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
        # A picture that is primed whole is finished before it begins.
        if prime_tokens is None or len(prime_tokens) < N:
            prefixes = [self._prefill(caption, prime_tokens) for caption in captions]
        generation = Generation(seed, options, waiting, prime_tokens, prefixes)
        self._generations.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Give up what a request still has to come; its slots are free from now on."""
        generation.waiting.clear()
        for each in [each for each in self._making if each.generation is generation]:
            self._release(each)
        self._forget(generation)

    def reset(self) -> None:
        """Give up everything, whatever state a failed step has left behind."""
        for generation in self._generations:
            generation.waiting.clear()
            generation.in_slots = 0
        self._free = list(range(self.num_slots))
        self._making, self._generations, self._batch = [], [], None

    @torch.inference_mode()
    def step(self) -> list[FinishedCandidate]:
        """Fill free slots, draw one position of every candidate, and return the finished ones."""
        finished = self._admit()
        if not self._making:
            return finished
        N = self.model.config.num_positions
        batch = self._batch = self._batch or Batch(self._making, N, self._device)
        self._step.advance(batch, self._state)
        batch.advance()
        return finished + [self._finish(each) for each in batch.candidates if each.position == N]

    def positions(self, generation: Generation) -> dict[int, int]:
        """Of each of a request's candidates in the making, how many positions are drawn."""
        return {
            each.number: each.position for each in self._making if each.generation is generation
        }

    def tokens_so_far(self, generation: Generation) -> list[tuple[int, Tensor]]:
        """Number and drawn positions [P, M] of each of a request's candidates in the making."""
        return [
            (each.number, self._state.image_tokens[each.slot, : each.position].clone())
            for each in self._making
            if each.generation is generation
        ]

    def _prefill(self, text_tokens: Tensor, prime_tokens: Tensor | None) -> Prefix:
        cache = self.model.new_cache(1)
        prime = None if prime_tokens is None else prime_tokens[None]
        hidden = self.model.prefill(text_tokens, prime, cache)
        return Prefix(self._step.pack(cache), hidden[0])

    def _admit(self) -> list[FinishedCandidate]:
        """Give free slots to waiting candidates, in turn to the request that has fewest."""
        finished = []
        started: dict[tuple[int, int], list[int]] = {}
        prefixes: dict[tuple[int, int], Prefix] = {}
        while waiting := [each for each in self._generations if each.may_start]:
            generation = min(waiting, key=lambda each: each.in_slots)
            if not generation.prefixes:
                finished += self._finish_primed(generation)
                continue
            has_place = len(self._making) < self.max_candidates
            if len(self._free) < generation.slots_each or not has_place:
                break  # for nobody else either, or a candidate of two slots might never begin
            candidate = self._start(generation)
            slots = [candidate.slot, candidate.guidance_slot]
            for number, prefix in enumerate(generation.prefixes):
                slot = slots[number]
                assert slot is not None
                started.setdefault((id(generation), number), []).append(slot)
                prefixes[id(generation), number] = prefix
        for key, slots_of_prefix in started.items():
            chosen = torch.tensor(slots_of_prefix, device=self._device)
            self._step.load(chosen, prefixes[key].packed)
            self._state.hidden[chosen] = prefixes[key].hidden
        return finished

    def _start(self, generation: Generation) -> Candidate:
        """Take slots for a request's next candidate."""
        number = generation.waiting.popleft()
        slot = self._free.pop(0)
        guidance_slot = self._free.pop(0) if generation.slots_each == 2 else None
        prime = generation.prime_tokens
        primed = 0 if prime is None else len(prime)
        candidate = Candidate(generation, number, slot, guidance_slot, primed)
        if prime is not None:
            self._state.image_tokens[slot, :primed] = prime
        own = self._state.uniforms[slot]
        own.copy_(
            torch.from_numpy(image_uniforms(generation.seed, number, own.numel())).view_as(own)
        )
        self._state.log_likelihood[slot] = 0.0
        generation.in_slots += 1
        self._making.append(candidate)
        self._batch = None
        return candidate

    def _finish(self, candidate: Candidate) -> FinishedCandidate:
        """Raise FloatingPointError where a logit was NaN or infinite."""
        log_likelihood = float(self._state.log_likelihood[candidate.slot])
        if not math.isfinite(log_likelihood):
            raise FloatingPointError("a logit is NaN or infinite")
        self._release(candidate)
        finished = FinishedCandidate(
            candidate.generation,
            candidate.number,
            self._state.image_tokens[candidate.slot].clone(),
            log_likelihood,
        )
        if candidate.generation.is_over:
            self._forget(candidate.generation)
        return finished

    def _finish_primed(self, generation: Generation) -> list[FinishedCandidate]:
        assert generation.prime_tokens is not None
        numbers = list(generation.waiting)
        generation.waiting.clear()
        self._forget(generation)
        return [
            FinishedCandidate(generation, number, generation.prime_tokens.clone(), 0.0)
            for number in numbers
        ]

    def _release(self, candidate: Candidate) -> None:
        self._making.remove(candidate)
        candidate.generation.in_slots -= 1
        self._free.append(candidate.slot)
        if candidate.guidance_slot is not None:
            self._free.append(candidate.guidance_slot)
        self._free.sort()
        self._batch = None

    def _forget(self, generation: Generation) -> None:
        if generation in self._generations:
            self._generations.remove(generation)
        generation.prefixes = []
