"""Model runner: an artefact on one device, from a request to its result.

    prepare(request)    any thread    tokenize the caption, decode images, refuse what cannot be
    add(request)        one thread    begin it
    step()              one thread    advance what was added, return what has ended

Knows nothing of HTTP or of queues.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dalle import archive
from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.validate import build_engine
from dalle.errors import ArtefactError, DeviceError, PlatformError
from dalle.manifest import Manifest
from dalle.model_card import ModelCard
from dalle.preprocess.square import Square
from dalle.types import Precision
from inference.api.rendering import Mark, Result
from inference.api.schema import CompleteRequest, GenerateRequest, Request
from inference.engine.input_processor import prepare
from inference.engine.request import (
    EngineRequest,
    PreparedClassification,
    PreparedCompletion,
    PreparedGeneration,
)
from inference.engine.scheduler import Scheduler
from inference.engine.tasks import classify, complete
from inference.engine.thread_tuning import choices, fastest, measure_steps
from inference.engine.window_tuning import measure_windows

logger = logging.getLogger(__name__)

_SLOTS_PER_CANDIDATE = 2  # with guidance; without, half of the slots are never used
_QUICK_SECONDS = 5.0  # a self-test this fast is repeated at full size, to measure the speed
_SELF_TEST_CAPTION = "a"  # one token by any tokenizer


class ModelRunner:
    """An artefact on a device. `prepare` may be called by any thread, the rest by one only.

    chunk_size: candidates sampled together, of one request or of several; speed and memory depend
    on it, the images do not. None: 16 on a CPU, 32 on a GPU.
    precision: see `dalle.decoding.validate`, whose errors are raised.
    window: positions of a candidate that a step samples, see `dalle.decoding.windows`; None: as
    many as promise most. The images do not depend on it.
    threads: torch's on the CPU when it was made, or what `choose_threads` chose.
    """

    def __init__(
        self,
        artefact: Artefact,
        device: torch.device,
        *,
        chunk_size: int | None = None,
        precision: Precision = "fp32",
        window: int | None = None,
    ) -> None:
        self._artefact = artefact
        self._device = device
        self.threads = torch.get_num_threads()
        self.mark: Mark | None = None
        self._sampling = artefact.manifest.sampling_settings
        self._max_candidates = chunk_size or (32 if device.type == "cuda" else 16)
        self._engine: DecodeEngine | None = None
        self._scheduler: Scheduler | None = None
        self._tasks: deque[EngineRequest] = deque()
        self._ended: list[EngineRequest] = []  # not returned by `step` yet
        if artefact.transformer is not None and artefact.dvae is not None:
            self._engine = build_engine(
                artefact.transformer,
                _SLOTS_PER_CANDIDATE * self._max_candidates,
                precision,
                max_candidates=self._max_candidates,
                window=window,
                captions=_example_captions(artefact, device),
            )
            self._scheduler = Scheduler(artefact, self._engine)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        device: str = "auto",
        *,
        threads: int | None = None,
        most_threads: int = 1,
        chunk_size: int | None = None,
        precision: Precision = "fp32",
        window: int | None = None,
        mark_of: Callable[[Manifest], Mark] | None = None,
    ) -> ModelRunner:
        """Load an artefact directory, or the model.tar.gz in it, onto a device.

        device: auto, cpu, cuda or cuda:N. threads: torch's on the CPU, in the calling thread;
        None: as many, up to `most_threads`, as sample fastest, which takes a second to measure.
        mark_of: what the files of a model's images say of their origin; None: nothing.
        Raises `ArtefactError` naming the file at fault, `DeviceError` for a device that is absent.
        """
        torch.set_num_threads(threads or most_threads)
        chosen = _choose_device(device)
        began = time.monotonic()
        # The model directory is read-only on the platform; an archive is unpacked elsewhere.
        with tempfile.TemporaryDirectory(prefix="artefact-") as scratch:
            directory = archive.locate(model_dir, Path(scratch))
            artefact = artefacts.load(directory, chosen)
            runner = cls(
                artefact, chosen, chunk_size=chunk_size, precision=precision, window=window
            )
        runner.mark = mark_of(artefact.manifest) if mark_of is not None else None
        if threads is None and most_threads > 1:
            runner.choose_threads(most_threads)
        if window is None:
            runner.measure_windows()
        logger.info(
            "loaded %s on %s with %d threads in %.1f s",
            ", ".join(runner.components) or "no component",
            chosen,
            runner.threads,
            time.monotonic() - began,
        )
        return runner

    @property
    def components(self) -> list[str]:
        """Names of the artefact's components."""
        return [*self._artefact.components()]

    @property
    def image_size(self) -> int | None:
        """Side of generated images in pixels; None when there are no models to generate with."""
        dvae = self._artefact.dvae
        if dvae is None or self._artefact.transformer is None or self._artefact.tokenizer is None:
            return None
        return dvae.config.image_size

    @property
    def card(self) -> ModelCard:
        """The artefact's model card."""
        return self._artefact.card()

    @property
    def clip_square(self) -> Square | None:
        """What CLIP reads of a picture; None without a CLIP."""
        clip = self._artefact.clip
        return None if clip is None else clip.square

    @property
    def busy_slots(self) -> int:
        """Number of sequences that are being sampled."""
        return 0 if self._engine is None else self._engine.busy_slots

    def choose_threads(self, most: int) -> dict[int, float]:
        """Compute from now on with as many threads, up to `most`, as sample fastest.

        Returns the seconds of a step by number of threads; nothing on a GPU or without a model.
        """
        if self._engine is None or self._device.type != "cpu":
            return {}
        seconds = measure_steps(self._engine, choices(most), candidates=self._engine.max_candidates)
        self.threads = fastest(seconds)
        torch.set_num_threads(self.threads)
        times = ", ".join(f"{1000 * each:.2f} ms with {number}" for number, each in seconds.items())
        logger.info("a step of %d candidates: %s", self._engine.max_candidates, times)
        return seconds

    def measure_windows(self) -> dict[int, float]:
        """Time steps of windows, by which their width is chosen from now on.

        Returns the seconds of a step by its number of rows; nothing where there are no windows.
        """
        if self._engine is None:
            return {}
        if self._engine.window_refusal is not None:
            reason = self._engine.window_refusal
            logger.info("a step samples one position of a candidate, because %s", reason)
        if self._engine.windows.widest == 1:
            return {}
        seconds = self._engine.windows.seconds = measure_windows(self._engine)
        times = ", ".join(f"{rows}: {1000 * each:.2f} ms" for rows, each in seconds.items())
        logger.info("a step by its rows: %s", times)
        return seconds

    def prepare(
        self, request: Request, *, arrival: float | None = None, deadline: float = math.inf
    ) -> EngineRequest:
        """Check and convert a request, which needs no device.

        arrival, deadline: as `time.monotonic()`; the arrival is now by default.
        Raises `UserError` that says what to change.
        """
        arrival = time.monotonic() if arrival is None else arrival
        return prepare(self._artefact, request, arrival, deadline, self._sampling, self.mark)

    @property
    def has_room(self) -> bool:
        """Whether another request should be begun while others run."""
        return self._scheduler is not None and self._scheduler.has_room and not self._tasks

    def add(self, request: EngineRequest) -> None:
        """Begin a request. Raises `Cancelled`, `DeadlineExceeded` or `PlatformError`."""
        if isinstance(request, PreparedGeneration) and self._scheduler is not None:
            with self._named_errors():
                self._scheduler.add(request)
        else:
            self._tasks.append(request)

    def step(self) -> list[EngineRequest]:
        """Run one waiting task, or advance all generations by one token each.

        Returns the requests that have ended, with their outcome. Raises `PlatformError`, after
        which everything that was added must be given up by `abandon`.
        """
        ended, self._ended = self._ended, []
        return ended or self._advance()

    def abandon(self) -> None:
        """Give up everything that was added."""
        self._tasks.clear()
        self._ended.clear()
        if self._scheduler is not None:
            self._scheduler.abandon()

    def run(self, request: EngineRequest) -> Result:
        """Run one prepared request to its end: for the self-test and for benchmarks.

        Other requests that were added go on; the next `step` returns those that ended meanwhile.
        Raises the request's error.
        """
        self.add(request)
        while request.outcome is None:
            try:
                self._ended += self._advance()
            except Exception:
                self.abandon()
                raise
        self._ended.remove(request)
        if isinstance(request.outcome, Exception):
            raise request.outcome
        return request.outcome

    def self_test(self) -> None:
        """Use every component once. Raises `ArtefactError` when nothing could be answered."""
        has = set(self.components)
        can_complete = {"transformer", "tokenizer"} <= has
        if not can_complete and not self._can_score:
            raise ArtefactError(
                f"the artefact has {', '.join(self.components) or 'no component'}, with which "
                "nothing can be answered; train the stages dvae and transformer to generate "
                "images, clip to classify and rank them"
            )
        if self.image_size is not None:
            test = GenerateRequest(caption=_SELF_TEST_CAPTION, num_candidates=1, seed=0)
            began = time.monotonic()
            self.run(self.prepare(test))
            if time.monotonic() - began < _QUICK_SECONDS:
                full = {"num_candidates": self._max_candidates}
                self.run(self.prepare(test.model_copy(update=full)))
        elif can_complete:
            self.run(self.prepare(CompleteRequest(complete="", num_completions=1, seed=0)))
        if self._can_score:
            size = self._artefact.require("clip").config.image_size
            grey = torch.full((1, 3, size, size), 0.5)
            classes = [_SELF_TEST_CAPTION]
            self.run(PreparedClassification(images=[grey], classes=classes, top=1))

    def _advance(self) -> list[EngineRequest]:
        if self._tasks:
            request = self._tasks.popleft()
            began = time.monotonic()
            try:
                with self._named_errors():
                    request.outcome = self._run_task(request)
            except Exception as error:
                request.outcome = error
            request.cost_seconds = time.monotonic() - began
            return [request]
        if self._scheduler is None:
            return []
        with self._named_errors():
            return self._scheduler.step()

    def _run_task(self, request: EngineRequest) -> Result:
        match request:
            case PreparedClassification():
                return classify(self._artefact, request, self._device)
            case PreparedCompletion():
                return complete(self._artefact, request, self._device)
        raise TypeError(f"a {type(request).__name__} cannot run alone")

    @property
    def _can_score(self) -> bool:
        """Whether there is a CLIP and the tokenizer that it needs."""
        clip = self._artefact.clip
        if clip is None:
            return False
        return clip.config.tokenizer == "openai" or self._artefact.tokenizer is not None

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Replace an error of the device by one that says what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise PlatformError(
                f"the device's memory is full with up to {self._max_candidates} candidates "
                "sampled together; set DALLE_CHUNK_SIZE lower",
                code="out_of_memory",
            ) from error


def _example_captions(artefact: Artefact, device: torch.device) -> Tensor | None:
    """Return text tokens [K, T] of the artefact's example captions; None without any."""
    examples, tokenizer = artefact.manifest.captions, artefact.tokenizer
    return tokenizer.encode(examples).to(device) if examples and tokenizer is not None else None


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name} is not usable: {torch.cuda.device_count()} CUDA devices are visible; "
            "set DALLE_DEVICE to cpu or to one that is"
        )
    return device
