"""Scheduler of requests for images: sampled together, decoded and scored a few at a time.

    add(request)    encode the caption; the candidates wait for slots
    step()          repeatedly: one position of every candidate -> images and scores of a few
                    finished candidates -> the requests that have ended

One thread calls everything. Letters: K candidates, N positions, M codes per position, E embedding.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.request import CandidateTokens
from inference.api.rendering import Candidate
from inference.api.replies import RankedBy
from inference.engine.image_decoder import (
    decode_previews,
    is_preview_position,
    max_previews,
    to_pixels,
)
from inference.engine.latency import LatencyModel
from inference.engine.request import EngineRequest, PreparedGeneration
from inference.engine.running_request import RunningRequest

_FINISH_BATCH = 4  # on a CPU: candidates decoded between two steps; all others wait meanwhile
_FINISH_BATCH_GPU = 32
_MIN_SHARING = 4  # requests that are begun even when earlier ones could use every slot
_STEPS_PER_RECORD = 32  # steps of one size that are measured together
_MAX_STEPS_AHEAD = 8  # steps that are launched on a GPU before the host waits for it


class Scheduler:
    """All requests for images that are running.

    latency: receives the measured seconds, and limits how much is sampled together.
    """

    def __init__(self, artefact: Artefact, engine: DecodeEngine, latency: LatencyModel) -> None:
        self._dvae = artefact.require("dvae")
        self._clip = artefact.clip
        self._tokenizer = artefact.tokenizer
        self._engine = engine
        self._latency = latency
        self._device = engine.model.text_position.device
        self._running: list[RunningRequest] = []
        self._measured = (0, False, 0, 0.0)  # candidates, guided, steps, seconds
        self._synchronize = (
            partial(torch.cuda.synchronize, self._device) if self._device.type == "cuda" else None
        )
        self._steps_ahead = 0  # launched steps that a GPU may not have finished
        self._shares: dict[RunningRequest, int] = {}  # candidates of each in the last step

    @property
    def has_room(self) -> bool:
        """Whether another request should be begun: slots are free or few requests share them."""
        unsampled = sum(running.num_unsampled for running in self._running)
        return unsampled < self._engine.max_candidates or len(self._running) < _MIN_SHARING

    @torch.inference_mode()
    def add(self, request: PreparedGeneration) -> None:
        """Begin a request: encode its caption. Raises `Cancelled` or `DeadlineExceeded`."""
        request.check()
        self._wait_for_device()
        began = time.monotonic()
        embedding, rank_seconds = None, 0.0
        if self._clip is not None:
            embedding = self._clip.encode_captions([request.caption], self._tokenizer)
            rank_seconds = time.monotonic() - began
        prime_tokens, num_positions = None, self._dvae.config.num_positions
        if request.prime is not None:
            num_primed = request.prime_rows * self._dvae.config.grid_size
            prime_tokens = self._dvae.encode(request.prime.to(self._device))[0, :num_primed]
            num_positions -= num_primed
        decoding = self._engine.submit(
            request.text_tokens.to(self._device),
            candidates=range(request.num_candidates),
            seed=request.seed,
            options=request.options,
            prime_tokens=prime_tokens,
        )
        running = RunningRequest(
            request, decoding, embedding, num_positions, began, rank_seconds=rank_seconds
        )
        request.cost_seconds = time.monotonic() - began
        self._running.append(running)
        self._limit(running)

    @torch.inference_mode()
    def step(self) -> list[EngineRequest]:
        """Sample one position of every candidate, finish some, return the requests that ended."""
        for running in self._running:
            unfinished = running.decoding.in_slots + len(running.sampled)
            if not running.request.may_continue(self._latency.finishing_seconds(unfinished)):
                self._wait_for_device()
                self._engine.cancel(running.decoding)
                running.is_stopped = True
        if not self._engine.is_idle:
            self._sample()
            self._preview()
        self._finish()
        ended = [each for each in self._running if each.is_over]
        self._running = [each for each in self._running if each not in ended]
        for running in ended:
            self._engine.cancel(running.decoding)  # it may have been cancelled just now
            running.end(self._ranked_by)
        return [running.request for running in ended]

    def abandon(self) -> None:
        """Give up every request after a failure."""
        self._running.clear()
        self._steps_ahead, self._shares = 0, {}
        self._engine.reset()

    def _sample(self) -> None:
        """Sample one position of every candidate; divide the time among the requests."""
        by_request = {running.decoding: running for running in self._running}
        began = time.monotonic()
        sampled = self._engine.step()
        if self._synchronize is not None:
            # A limit on how far the host is ahead: a request is then stopped in time.
            self._steps_ahead = 0 if sampled else (self._steps_ahead + 1) % _MAX_STEPS_AHEAD
            if not self._steps_ahead:
                self._synchronize()
        seconds = time.monotonic() - began
        self._shares = {
            running: running.decoding.in_slots
            + sum(each.request is running.decoding for each in sampled)
            for running in self._running
        }
        self._charge(seconds)
        self._measure(sum(self._shares.values()), seconds)
        for each in sampled:
            running = by_request[each.request]
            running.sampled.append(each)
            self._limit(running)

    def _wait_for_device(self) -> None:
        """Wait until a GPU has finished the launched steps, and charge the time to them."""
        if self._synchronize is None or not self._steps_ahead:
            return
        began = time.monotonic()
        self._synchronize()
        seconds = time.monotonic() - began
        self._steps_ahead = 0
        self._charge(seconds)
        candidates, guided, steps, total = self._measured
        self._measured = candidates, guided, steps, total + seconds

    def _charge(self, seconds: float) -> None:
        """Divide the time of steps among the requests, by their candidates in the last one."""
        total = max(1, sum(self._shares.values()))
        for running, share in self._shares.items():
            running.request.cost_seconds += seconds * share / total

    def _measure(self, num_candidates: int, seconds: float) -> None:
        """Record the seconds of steps in the latency model, many of one size at once."""
        guided = any(running.decoding.slots_each == 2 for running in self._running)
        candidates, was_guided, steps, total = self._measured
        if (candidates, was_guided) != (num_candidates, guided) or steps == _STEPS_PER_RECORD:
            if steps and candidates:
                self._latency.record_sampling(candidates, was_guided, steps, total)
            steps, total = 0, 0.0
        self._measured = num_candidates, guided, steps + 1, total + seconds

    def _limit(self, running: RunningRequest) -> None:
        """Limit the candidates in slots to what can be finished before the request's deadline."""
        request, decoding = running.request, running.decoding
        previews = max_previews(self._dvae.config.grid_size, request.preview_rows)
        decoding.max_in_slots = self._latency.chunk_size(
            max(1, running.num_unsampled),
            request.options.guidance_scale != 1.0,
            running.num_positions,
            request.seconds_left(),
            decodes=1 + previews,
            others=self._engine.num_in_slots - decoding.in_slots,
        )

    def _preview(self) -> None:
        """Pass previews on of the candidates that have reached a preview position."""
        grid_size = self._dvae.config.grid_size
        for running in self._running:
            every_rows = running.request.preview_rows
            if every_rows is None or running.is_stopped:
                continue
            positions = self._engine.positions(running.decoding).values()
            if not any(is_preview_position(each, grid_size, every_rows) for each in positions):
                continue
            self._wait_for_device()
            began = time.monotonic()
            unfinished = self._engine.tokens_so_far(running.decoding)
            for preview in decode_previews(self._dvae, unfinished, every_rows):
                running.request.put(preview)
            seconds = time.monotonic() - began
            running.decode_seconds += seconds
            running.request.cost_seconds += seconds

    def _finish(self) -> None:
        """Decode and score a few sampled candidates, in the order of sampling; pass them on."""
        most = _FINISH_BATCH_GPU if self._device.type == "cuda" else _FINISH_BATCH
        batch: list[tuple[RunningRequest, CandidateTokens]] = []
        for running in self._running:
            while running.sampled and len(batch) < most and not running.request.is_cancelled:
                batch.append((running, running.sampled.popleft()))
        if not batch:
            return
        began = time.monotonic()
        images = self._dvae.decode(torch.stack([each.image_tokens for _, each in batch]))
        pixels = to_pixels(images)
        decoded = time.monotonic()
        scores: list[float | None] = [None] * len(batch)
        merits = [each.log_likelihood for _, each in batch]
        if self._clip is not None:
            captions = [running.caption_embedding for running, _ in batch]
            caption_embeddings = torch.cat([each for each in captions if each is not None])
            cosines = (self._clip.encode_image(images) * caption_embeddings).sum(dim=1)
            scores = cosines.tolist()
            merits = self._clip.merit(cosines, cosines.new_tensor(merits)).tolist()
        ranked = time.monotonic()
        self._latency.record_finishing(len(batch), ranked - began)
        for (running, each), score, merit, image in zip(batch, scores, merits, pixels, strict=True):
            running.decode_seconds += (decoded - began) / len(batch)
            running.rank_seconds += (ranked - decoded) / len(batch)
            running.request.cost_seconds += (ranked - began) / len(batch)
            candidate = Candidate(each.number, each.log_likelihood, score, merit, image)
            running.finished.append(candidate)
            running.request.put(candidate)
        for running in dict.fromkeys(running for running, _ in batch):
            running.release_pixels()

    @property
    def _ranked_by(self) -> RankedBy:
        if self._clip is None:
            return "log_likelihood"
        return "clip_and_log_likelihood" if self._clip.config.likelihood_weight else "clip"
