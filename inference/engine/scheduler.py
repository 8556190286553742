"""Scheduler of requests for images: sampled together, decoded and scored a few at a time.

    add(request)    encode the caption; the candidates wait for slots
    step()          repeatedly: a position or more of every candidate -> images and scores of a
                    few finished candidates -> the requests that have ended

One thread calls everything. Letters: K candidates, N positions, M codes per position, S image size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.step import CandidateTokens
from dalle.preprocess.images import Pixels
from inference.api.rendering import Candidate, Preview
from inference.api.replies import RankedBy
from inference.engine.request import EngineRequest, PreparedGeneration

STEP_SECONDS = 0.01
"""Seconds of the further steps of one call, where the engine has them. Nothing else is begun,
cancelled or finished meanwhile; a preview is, after each step."""

_FINISH_BATCH = 4  # on a CPU: candidates decoded between two steps; all others wait meanwhile
_FINISH_BATCH_GPU = 32
_MIN_SHARING = 4  # requests that are begun even when earlier ones could use every slot
_STEPS_PER_RECORD = 32  # steps of one size that are measured together
_MAX_STEPS_AHEAD = 8  # steps that are launched on a GPU before the host waits for it
_NEWEST = 0.5  # weight of the newest measurement: there are few, and speeds are steady


class Scheduler:
    """All requests for images that are running."""

    def __init__(self, artefact: Artefact, engine: DecodeEngine) -> None:
        self._dvae = artefact.require("dvae")
        self._clip = artefact.clip
        self._tokenizer = artefact.tokenizer
        self._engine = engine
        self._latency = LatencyModel(engine.max_candidates)
        self._device = engine.model.text_position.device
        self._running: list[PreparedGeneration] = []
        self._measured = _Measured()
        self._synchronize = (
            partial(torch.cuda.synchronize, self._device) if self._device.type == "cuda" else None
        )
        self._steps_ahead = 0  # launched steps that a GPU may not have finished
        self._shares: dict[PreparedGeneration, int] = {}  # candidates of each in the last step

    @property
    def has_room(self) -> bool:
        """Whether another request should be begun: slots are free or few requests share them."""
        unsampled = sum(request.num_unsampled for request in self._running)
        return unsampled < self._engine.max_candidates or len(self._running) < _MIN_SHARING

    @torch.inference_mode()
    def add(self, request: PreparedGeneration) -> None:
        """Begin a request: encode its caption. Raises `Cancelled` or `DeadlineExceeded`."""
        request.check()
        self._wait_for_device()
        request.began = began = time.monotonic()
        if self._clip is not None:
            embedding = self._clip.encode_captions([request.caption], self._tokenizer)
            request.caption_embedding, request.rank_seconds = embedding, time.monotonic() - began
        prime_tokens, request.num_positions = None, self._dvae.config.num_positions
        if request.prime is not None:
            num_primed = request.prime_rows * self._dvae.config.grid_size
            prime_tokens = self._dvae.encode(request.prime.to(self._device))[0, :num_primed]
            request.num_positions -= num_primed
        request.decoding = self._engine.submit(
            request.text_tokens.to(self._device),
            candidates=range(request.num_candidates),
            seed=request.seed,
            options=request.options,
            prime_tokens=prime_tokens,
        )
        request.cost_seconds = time.monotonic() - began
        self._running.append(request)
        self._limit(request)

    @torch.inference_mode()
    def step(self) -> list[EngineRequest]:
        """Sample positions of every candidate, finish some, return the requests that ended."""
        for request in self._running:
            unfinished = request.decoding.in_slots + len(request.sampled)
            if not request.may_continue(self._latency.finishing_seconds(unfinished)):
                self._wait_for_device()
                self._engine.cancel(request.decoding)
                request.is_stopped = True
        if not self._engine.is_idle:
            self._preview(self._sample())
        self._finish()
        ended = [each for each in self._running if each.is_over]
        self._running = [each for each in self._running if each not in ended]
        for request in ended:
            self._engine.cancel(request.decoding)  # it may have been cancelled just now
            request.end(self._ranked_by)
        return [*ended]

    def abandon(self) -> None:
        """Give up every request after a failure."""
        self._running.clear()
        self._steps_ahead, self._shares = 0, {}
        self._engine.reset()

    def _sample(self) -> list[CandidateTokens]:
        """Sample positions of every candidate; divide the time among the requests.

        Returns the candidates whose tokens are complete now.
        """
        by_request = {request.decoding: request for request in self._running}
        before = self._num_sampled()
        began = time.monotonic()
        has_previews = any(request.preview_rows is not None for request in self._running)
        sampled = self._engine.step(0.0 if has_previews else STEP_SECONDS)
        if self._synchronize is not None:
            # A limit on how far the host is ahead: a request is then stopped in time.
            self._steps_ahead = 0 if sampled else (self._steps_ahead + 1) % _MAX_STEPS_AHEAD
            if not self._steps_ahead:
                self._synchronize()
        seconds = time.monotonic() - began
        self._shares = {
            request: request.decoding.in_slots
            + sum(each.request is request.decoding for each in sampled)
            for request in self._running
        }
        self._charge(seconds)
        self._measure(sum(self._shares.values()), self._num_sampled() - before, seconds)
        for each in sampled:
            request = by_request[each.request]
            request.sampled.append(each)
            self._limit(request)
        return sampled

    def _num_sampled(self) -> int:
        """Return the number of positions sampled for all running requests."""
        return sum(request.decoding.num_sampled for request in self._running)

    def _wait_for_device(self) -> None:
        """Wait until a GPU has finished the launched steps, and charge the time to them."""
        if self._synchronize is None or not self._steps_ahead:
            return
        began = time.monotonic()
        self._synchronize()
        seconds = time.monotonic() - began
        self._steps_ahead = 0
        self._charge(seconds)
        self._measured.seconds += seconds

    def _charge(self, seconds: float) -> None:
        """Divide the time of steps among the requests, by their candidates in the last one."""
        total = max(1, sum(self._shares.values()))
        for request, share in self._shares.items():
            request.cost_seconds += seconds * share / total

    def _measure(self, num_candidates: int, num_sampled: int, seconds: float) -> None:
        """Record the seconds of steps in the latency model, many of one size at once.

        num_sampled: positions of all candidates.
        """
        guided = any(request.decoding.slots_each == 2 for request in self._running)
        last = self._measured
        is_other = (last.num_candidates, last.guided) != (num_candidates, guided)
        if is_other or last.num_steps == _STEPS_PER_RECORD:
            if last.num_steps and last.num_candidates:
                positions = last.num_sampled / last.num_candidates
                self._latency.record_sampling(
                    last.num_candidates, last.guided, positions, last.seconds
                )
            last = self._measured = _Measured(num_candidates, guided)
        last.num_steps += 1
        last.num_sampled += num_sampled
        last.seconds += seconds

    def _limit(self, request: PreparedGeneration) -> None:
        """Limit the candidates in slots to what can be finished before the request's deadline."""
        decoding = request.decoding
        previews = previewed = 0
        if request.preview_rows is not None:  # of a finished image there is none
            previews = (self._dvae.config.grid_size - 1) // request.preview_rows
            in_slots = (number for number, _ in self._engine.tokens_so_far(decoding))
            previewed = sum(map(request.is_previewed, (*decoding.waiting, *in_slots)))
        decoding.max_in_slots = self._latency.chunk_size(
            max(1, request.num_unsampled),
            request.options.guidance_scale != 1.0,
            request.num_positions,
            request.seconds_left(),
            decodes=1 + previews,
            previewed=previewed,
            others=self._engine.num_in_slots - decoding.in_slots,
        )

    def _preview(self, sampled: list[CandidateTokens]) -> None:
        """Pass on a preview of candidates after every `preview_rows` whole rows.

        sampled: those whose tokens the last step has completed.
        """
        grid_size = self._dvae.config.grid_size
        for request in self._running:
            if request.preview_rows is None or request.is_stopped:
                continue
            tokens_of = self._engine.tokens_so_far(request.decoding)
            for each in sampled:
                if each.request is request.decoding and each.slots:
                    tokens_of.append((each.number, each.image_tokens))
            by_rows: dict[int, list[tuple[int, Tensor]]] = {}
            for number, tokens in tokens_of:
                # A step may complete several rows.
                for rows in request.rows_to_preview(number, len(tokens) // grid_size):
                    if rows < grid_size:
                        shown = tokens[: rows * grid_size]
                        by_rows.setdefault(rows, []).append((number, shown))
            if not by_rows:
                continue
            self._wait_for_device()
            began = time.monotonic()
            for rows, group in by_rows.items():
                images = self._dvae.decode_rows(torch.stack([tokens for _, tokens in group]))
                for (number, _), pixels in zip(group, to_pixels(images), strict=True):
                    request.put(Preview(number, rows, pixels, request.mark))
            seconds = time.monotonic() - began
            request.decode_seconds += seconds
            request.cost_seconds += seconds

    def _finish(self) -> None:
        """Decode and score a few sampled candidates, in the order of sampling; pass them on.

        Those with the same image tokens as one of their request are that image again.
        """
        most = _FINISH_BATCH_GPU if self._device.type == "cuda" else _FINISH_BATCH
        equal: dict[tuple[PreparedGeneration, int], list[CandidateTokens]] = {}
        finishing = [each for each in self._running if each.sampled]
        for request in finishing:
            while request.sampled and len(equal) < most and not request.is_cancelled:
                each = request.sampled.popleft()
                group = request.group_of(each.number, each.image_tokens.cpu().numpy().tobytes())
                if group in request.recent:
                    request.finish(request.recent[group].again(each.number))
                else:
                    equal.setdefault((request, group), []).append(each)
        if equal:
            self._finish_new(equal)
        for request in finishing:
            request.release_pixels()

    def _finish_new(
        self, equal: dict[tuple[PreparedGeneration, int], list[CandidateTokens]]
    ) -> None:
        """Decode, score and pass on candidates. equal: by request and group."""
        batch = [(request, candidates[0]) for (request, _), candidates in equal.items()]
        began = time.monotonic()
        images = self._dvae.decode(torch.stack([each.image_tokens for _, each in batch]))
        pixels = to_pixels(images)
        decoded = time.monotonic()
        scores: list[float | None] = [None] * len(batch)
        merits = [each.log_likelihood for _, each in batch]
        if self._clip is not None:
            captions = [request.caption_embedding for request, _ in batch]
            caption_embeddings = torch.cat([each for each in captions if each is not None])
            cosines = (self._clip.encode_generated(images) * caption_embeddings).sum(dim=1)
            scores = cosines.tolist()
            merits = self._clip.merit(cosines, cosines.new_tensor(merits)).tolist()
        ranked = time.monotonic()
        self._latency.record_finishing(len(batch), ranked - began)
        for ((request, group), candidates), score, merit, image in zip(
            equal.items(), scores, merits, pixels, strict=True
        ):
            request.decode_seconds += (decoded - began) / len(batch)
            request.rank_seconds += (ranked - decoded) / len(batch)
            request.cost_seconds += (ranked - began) / len(batch)
            log_p = candidates[0].log_likelihood
            candidate = Candidate(group, log_p, score, merit, image, request.mark)
            for each in candidates:
                request.finish(candidate if each.number == group else candidate.again(each.number))

    @property
    def _ranked_by(self) -> RankedBy:
        if self._clip is None:
            return "log_likelihood"
        return "clip_and_log_likelihood" if self._clip.config.likelihood_weight else "clip"


@dataclass
class _Measured:
    """Steps of the same number of candidates, until they are recorded."""

    num_candidates: int = 0
    guided: bool = False
    num_steps: int = 0
    num_sampled: int = 0
    """Positions of all candidates."""
    seconds: float = 0.0


class LatencyModel:
    """Running means of what sampling and finishing take. Used by the model's thread only.

    max_chunk_size: candidates sampled together when there is no deadline.
    """

    def __init__(self, max_chunk_size: int) -> None:
        self.max_chunk_size = max_chunk_size
        self._sample: dict[tuple[int, bool], float] = {}  # (size, guided) -> seconds per position
        self._finish = 0.0  # decoding and scoring, seconds per candidate

    def record_sampling(self, size: int, guided: bool, positions: float, seconds: float) -> None:
        """Record that `size` candidates took `seconds` for `positions` image-token positions."""
        newest = seconds / max(1.0, positions)
        mean = self._sample.get((size, guided), newest)
        self._sample[size, guided] = mean + _NEWEST * (newest - mean)

    def record_finishing(self, size: int, seconds: float) -> None:
        """Record that decoding and scoring `size` candidates took `seconds`."""
        self._finish = (self._finish or seconds / size) * (1 - _NEWEST) + seconds / size * _NEWEST

    def finishing_seconds(self, size: int) -> float:
        """Return the expected seconds of decoding and scoring `size` candidates."""
        return self._finish * size

    def chunk_size(
        self,
        remaining: int,
        guided: bool,
        positions: int,
        seconds: float,
        *,
        decodes: int = 1,
        previewed: int | None = None,
        others: int = 0,
    ) -> int:
        """Return how many of the `remaining` candidates to sample together, `seconds` being left.

        decodes: how often each is decoded, more than once with previews.
        previewed: of how many that holds, the others being decoded once; None: of all.
        others: candidates of other requests that are sampled in the same steps.
        The result is `remaining` or the maximum, halved until it is expected to be finished in
        time, at least 1.
        """
        size = min(remaining, self.max_chunk_size)
        while size > 1:
            expected = self._seconds_per_position(size + others, guided) * positions
            again = size if previewed is None else min(size, previewed)
            if expected + self.finishing_seconds(size + (decodes - 1) * again) <= seconds:
                break
            size = (size + 1) // 2
        return size

    def _seconds_per_position(self, size: int, guided: bool) -> float:
        """Return the measured seconds, else an upper bound.

        The bound is the next larger size that was measured, or in proportion to the largest.
        """
        known = {
            size: each for (size, is_guided), each in self._sample.items() if is_guided == guided
        }
        if not known and guided:  # two passes instead of one
            return 2 * self._seconds_per_position(size, False)
        larger = [each for each in known if each >= size]
        if larger:
            return known[min(larger)]
        return known[max(known)] * size / max(known) if known else 0.0


def to_pixels(images: Tensor) -> list[Pixels]:
    """Convert images [K, 3, S, S] in [0, 1] to K arrays [S, S, 3] of uint8."""
    rounded = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(np.ascontiguousarray(rounded.permute(0, 2, 3, 1).cpu().numpy()))
