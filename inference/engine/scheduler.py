"""Requests for pictures, drawn together: who goes on, what is finished, when a request has ended.

    begin(work, control)     the caption is read; the candidates wait for room
    advance()   repeatedly   a position of every candidate -> pictures and scores of a few that are
                             finished -> the requests that have ended

Sampling goes on while finished candidates are decoded and scored a few at a time. One thread calls
everything. Letters: K candidates, N positions, M codes per position, E embedding.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import groupby

import torch

from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.request import FinishedCandidate
from inference.api.rendering import Candidate
from inference.api.replies import RankedBy
from inference.engine.control import Control
from inference.engine.image_decoder import Previews, to_pixels
from inference.engine.input_processor import GenerateWork
from inference.engine.latency import Pace
from inference.engine.running_request import Drawing, Ended

_FINISH_TOGETHER = 4  # on a CPU: pictures decoded between two steps, in which the others wait
_FINISH_TOGETHER_GPU = 32
_SHARE = 4  # requests that are begun though those before them want all the room there is
_NOTE_STEPS = 32  # steps of one size that are measured together
_STEPS_AHEAD = 8  # that a GPU is told of before it is waited for


class Studio:
    """All requests for pictures that are drawn at present.

    pace: what it takes is measured there, and how much is drawn together is asked there.
    """

    def __init__(self, artefact: Artefact, engine: DecodeEngine, pace: Pace) -> None:
        self._artefact = artefact
        self._engine = engine
        self._pace = pace
        self._device = engine.model.text_position.device
        self._drawings: list[Drawing] = []
        self._measured = (0, False, 0, 0.0)  # candidates, guided, steps, seconds
        self._wait = (
            partial(torch.cuda.synchronize, self._device) if self._device.type == "cuda" else None
        )
        self._ahead = 0  # steps that a GPU may not have done yet
        self._shares: dict[Drawing, int] = {}  # of the last step, in candidates

    @property
    def has_room(self) -> bool:
        """Whether another request would be drawn from now on: there are free places, or few to
        share with."""
        wanted = sum(drawing.wanted for drawing in self._drawings)
        return wanted < self._engine.max_candidates or len(self._drawings) < _SHARE

    @torch.inference_mode()
    def begin(self, work: GenerateWork, control: Control) -> Drawing:
        """Read the caption. Raises what `control` raises for work that is not wanted any more."""
        control.check()
        self._catch_up()
        began = time.monotonic()
        dvae, clip = self._artefact.dvae, self._artefact.clip
        assert dvae is not None
        embedding, rank_seconds = None, 0.0
        if clip is not None:
            embedding = clip.encode_captions([work.caption], self._artefact.tokenizer)
            rank_seconds = time.monotonic() - began
        prime_tokens = None
        if work.prime is not None:
            encoded = dvae.encode(work.prime.to(self._device))[0]
            prime_tokens = encoded[: work.prime_rows * dvae.config.grid_size]
        generation = self._engine.submit(
            work.text_tokens.to(self._device),
            candidates=range(work.num_candidates),
            seed=work.seed,
            options=work.options,
            prime_tokens=prime_tokens,
        )
        primed = 0 if prime_tokens is None else len(prime_tokens)
        drawing = Drawing(
            work, control, generation, embedding, dvae.config.num_positions - primed, began
        )
        drawing.rank_seconds = rank_seconds
        drawing.cost_seconds = time.monotonic() - began
        self._drawings.append(drawing)
        self._limit(drawing)
        return drawing

    @torch.inference_mode()
    def advance(self) -> list[Ended]:
        """One position of every candidate, and some pictures; the requests that ended by that."""
        for drawing in self._drawings:
            unfinished = drawing.generation.in_slots + len(drawing.drawn)
            if not drawing.control.keep_going(self._pace.finishing_seconds(unfinished)):
                self._catch_up()
                self._engine.cancel(drawing.generation)
                drawing.is_stopped = True
        if self._sample():
            self._preview()
        self._finish()
        ended = [each for each in self._drawings if each.is_over]
        self._drawings = [each for each in self._drawings if each not in ended]
        for drawing in ended:
            self._engine.cancel(drawing.generation)  # it may have been left just now
        return [Ended(each, each.outcome(self._ranked_by), each.cost_seconds) for each in ended]

    def abandon(self) -> list[Drawing]:
        """After a failure: give up every request, and return them."""
        given_up, self._drawings = self._drawings, []
        self._ahead, self._shares = 0, {}
        self._engine.reset()
        return given_up

    def _sample(self) -> bool:
        """One position of every candidate, its time divided among the requests; whether there was
        any."""
        if self._engine.is_idle:
            return False
        by_generation = {drawing.generation: drawing for drawing in self._drawings}
        began = time.monotonic()
        drawn = self._engine.step()
        if self._wait is not None:
            # The host may go ahead, but not so far that a request is given up late.
            self._ahead = 0 if drawn else (self._ahead + 1) % _STEPS_AHEAD
            if not self._ahead:
                self._wait()
        seconds = time.monotonic() - began
        self._shares = {
            drawing: drawing.generation.in_slots
            + sum(each.generation is drawing.generation for each in drawn)
            for drawing in self._drawings
        }
        self._charge(seconds)
        self._measure(sum(self._shares.values()), seconds)
        for each in drawn:
            drawing = by_generation[each.generation]
            drawing.drawn.append(each)
            self._limit(drawing)
        return True

    def _catch_up(self) -> None:
        """Wait for the steps that a GPU was told of, and count the time as theirs."""
        if self._wait is None or not self._ahead:
            return
        began = time.monotonic()
        self._wait()
        seconds = time.monotonic() - began
        self._ahead = 0
        self._charge(seconds)
        candidates, guided, steps, total = self._measured
        self._measured = candidates, guided, steps, total + seconds

    def _charge(self, seconds: float) -> None:
        """Divide the time of the last step, or of some, among the requests."""
        together = max(1, sum(self._shares.values()))
        for drawing, share in self._shares.items():
            drawing.cost_seconds += seconds * share / together

    def _measure(self, together: int, seconds: float) -> None:
        """Tell the pace how long steps take, many of one size at once."""
        guided = any(drawing.generation.slots_each == 2 for drawing in self._drawings)
        candidates, was_guided, steps, total = self._measured
        if (candidates, was_guided) != (together, guided) or steps == _NOTE_STEPS:
            if steps and candidates:
                self._pace.note_sampling(candidates, was_guided, steps, total)
            steps, total = 0, 0.0
        self._measured = together, guided, steps + 1, total + seconds

    def _limit(self, drawing: Drawing) -> None:
        """Draw no more of a request together than can be finished before its deadline."""
        work, generation = drawing.work, drawing.generation
        dvae = self._artefact.dvae
        assert dvae is not None
        previews = Previews(dvae, 0, work.preview_rows, drawing.control.previewed)
        generation.most = self._pace.chunk_size(
            max(1, drawing.wanted),
            work.options.guidance_scale != 1.0,
            drawing.positions,
            drawing.control.seconds_left(),
            decodes=1 + previews.most,
            beside=self._engine.in_making - generation.in_slots,
        )

    def _preview(self) -> None:
        """Hand on what is drawn so far, at each of the rows for which that was asked."""
        dvae = self._artefact.dvae
        assert dvae is not None
        for drawing in self._drawings:
            if not (every_rows := drawing.work.preview_rows) or drawing.is_stopped:
                continue
            every = every_rows * dvae.config.grid_size
            at_a_row = self._engine.positions(drawing.generation).values()
            if not any(position and position % every == 0 for position in at_a_row):
                continue
            self._catch_up()
            unfinished = self._engine.tokens_so_far(drawing.generation)
            # Neighbours that have come equally far are decoded together.
            for _, group in groupby(
                enumerate(unfinished), lambda each: (each[1][0] - each[0], len(each[1][1]))
            ):
                some = [each for _, each in group]
                previews = Previews(dvae, some[0][0], every_rows, drawing.control.previewed)
                previews(torch.stack([tokens for _, tokens in some]))
                drawing.decode_seconds += previews.seconds
                drawing.cost_seconds += previews.seconds

    def _finish(self) -> None:
        """Decode and score a few candidates, the first drawn first, and hand them over."""
        most = _FINISH_TOGETHER_GPU if self._device.type == "cuda" else _FINISH_TOGETHER
        some: list[tuple[Drawing, FinishedCandidate]] = []
        for drawing in self._drawings:
            while drawing.drawn and len(some) < most and not drawing.control.cancelled:
                some.append((drawing, drawing.drawn.popleft()))
        if not some:
            return
        dvae, clip = self._artefact.dvae, self._artefact.clip
        assert dvae is not None
        began = time.monotonic()
        images = dvae.decode(torch.stack([each.image_tokens for _, each in some]))
        pixels = to_pixels(images)
        decoded = time.monotonic()
        scores: list[float | None] = [None] * len(some)
        merits = [each.log_likelihood for _, each in some]
        if clip is not None:
            captions = [each.caption_embedding for each, _ in some]
            caption_embeddings = torch.cat([each for each in captions if each is not None])
            cosines = (clip.encode_image(images) * caption_embeddings).sum(dim=1)
            scores, merits = (
                cosines.tolist(),
                clip.merit(cosines, cosines.new_tensor(merits)).tolist(),
            )
        ranked = time.monotonic()
        self._pace.note_finishing(len(some), ranked - began)
        for (drawing, each), score, merit, picture in zip(
            some, scores, merits, pixels, strict=True
        ):
            drawing.decode_seconds += (decoded - began) / len(some)
            drawing.rank_seconds += (ranked - decoded) / len(some)
            drawing.cost_seconds += (ranked - began) / len(some)
            candidate = Candidate(each.candidate, each.log_likelihood, score, merit, picture)
            drawing.finished.append(candidate)
            drawing.control.finished(candidate)
        for drawing in {id(drawing): drawing for drawing, _ in some}.values():
            drawing.let_go()

    @property
    def _ranked_by(self) -> RankedBy:
        clip = self._artefact.clip
        if clip is None:
            return "log_likelihood"
        return "clip_and_log_likelihood" if clip.config.likelihood_weight else "clip"
