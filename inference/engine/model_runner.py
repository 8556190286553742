"""The pipeline, caption to ranked pictures, on one device. Knows nothing of Flask or of queues.

    prepare(request)     any thread    encode the caption, decode the images, refuse what cannot be
    run(work, control)   one thread    do one piece of work to its end
    begin(work, control), advance()    the same for pictures, of several requests at once

Letters: S image size.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.validate import build_engine
from dalle.errors import ArtefactError, DalleError, DeviceError, PlatformError
from dalle.types import Precision
from inference.api.rendering import ClassifyResult, CompleteResult, GenerateResult, Result
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest, Request
from inference.engine.completion import complete
from inference.engine.control import Control
from inference.engine.input_processor import (
    ClassifyWork,
    CompleteWork,
    GenerateWork,
    Work,
    image_size,
    prepare,
)
from inference.engine.latency import Pace
from inference.engine.running_request import Drawing, Ended
from inference.engine.scheduler import Studio
from inference.engine.tasks import classify
from inference.engine.thread_tuning import choices, fastest, measure_steps

logger = logging.getLogger(__name__)

_SLOTS_EACH = 2  # with guidance; without, half of the slots are never touched
_QUICK_SECONDS = 5.0  # a self-test this fast is repeated at full size, to know the speed
_SELF_TEST_CAPTION = "a"  # one token by any tokenizer


class Generator:
    """An artefact on a device. `prepare` may be called by any thread, the rest by one only.

    chunk_size: candidates drawn together, of one request or of several; the pictures do not depend
    on it, speed and memory do. None: 16 on a CPU, 32 on a GPU. precision: see
    `dalle.decoding.validate`; raises its errors. threads: torch's on the CPU when it was made,
    or what `choose_threads` chose."""

    def __init__(
        self,
        artefact: Artefact,
        device: torch.device,
        *,
        chunk_size: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self._artefact = artefact
        self._device = device
        self.threads = torch.get_num_threads()
        self._pace = Pace(chunk_size or (32 if device.type == "cuda" else 16))
        self._engine: DecodeEngine | None = None
        self._studio: Studio | None = None
        self._ended_aside: list[Ended] = []
        if artefact.transformer is not None and artefact.dvae is not None:
            chunk = self._pace.max_chunk_size
            engine = build_engine(
                artefact.transformer,
                _SLOTS_EACH * chunk,
                precision,
                max_candidates=chunk,
                captions=_example_captions(artefact, device),
            )
            self._engine = engine
            self._studio = Studio(artefact, engine, self._pace)

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
    ) -> Generator:
        """Load an artefact directory, or the model.tar.gz in it, onto a device.

        device: auto, cpu, cuda or cuda:N. threads: torch's on the CPU, in the calling thread;
        None: as many, up to `most_threads`, as draw fastest, which takes a second to find out.
        Raises `ArtefactError` naming the file at fault, `DeviceError` for a device that is absent.
        """
        torch.set_num_threads(threads or most_threads)
        chosen = _choose_device(device)
        began = time.monotonic()
        # The model directory is read-only on the platform; a scratch one is needed for an archive.
        with tempfile.TemporaryDirectory(prefix="artefact-") as scratch:
            directory = artefacts.locate(model_dir, Path(scratch))
            artefact = artefacts.load(directory, chosen)
            generator = cls(artefact, chosen, chunk_size=chunk_size, precision=precision)
        if threads is None and most_threads > 1:
            generator.choose_threads(most_threads)
        logger.info(
            "loaded %s on %s with %d threads in %.1f s",
            ", ".join(generator.components) or "no component",
            chosen,
            generator.threads,
            time.monotonic() - began,
        )
        return generator

    @property
    def components(self) -> list[str]:
        """The names of the components that the artefact has."""
        return [*self._artefact.components()]

    @property
    def image_size(self) -> int | None:
        """Side of the pictures in pixels; None when pictures cannot be drawn."""
        return image_size(self._artefact)

    @property
    def clip_size(self) -> int | None:
        """Side in pixels of what CLIP looks at; None without a CLIP."""
        clip = self._artefact.clip
        return None if clip is None else clip.config.image_size

    @property
    def busy_slots(self) -> int:
        """Sequences that are being drawn."""
        return 0 if self._engine is None else self._engine.busy_slots

    def choose_threads(self, most: int) -> dict[int, float]:
        """Let as many threads, up to `most`, compute from now on as draw fastest.

        Returns the seconds of a step by number of threads; nothing on a GPU or without a model.
        """
        if self._engine is None or self._device.type != "cpu":
            return {}
        seconds = measure_steps(self._engine, choices(most), candidates=self._engine.max_candidates)
        self.threads = fastest(seconds)
        torch.set_num_threads(self.threads)
        told = ", ".join(f"{1000 * each:.2f} ms with {number}" for number, each in seconds.items())
        logger.info("a step of %d candidates: %s", self._engine.max_candidates, told)
        return seconds

    @property
    def _can_score(self) -> bool:
        """Whether there is a CLIP together with the tokenizer whose tokens it reads."""
        clip = self._artefact.clip
        if clip is None:
            return False
        return clip.config.tokenizer == "openai" or self._artefact.tokenizer is not None

    def generate(self, request: GenerateRequest, control: Control | None = None) -> GenerateResult:
        """Draw, decode and rank the candidates of a caption, until the deadline at most.

        Raises `UserError`, `DeadlineExceeded` when not one was finished, or `Cancelled`.
        """
        work = self.prepare(request)
        assert isinstance(work, GenerateWork)
        return self._generate(work, control or Control())

    def classify(self, request: ClassifyRequest, control: Control | None = None) -> ClassifyResult:
        """Say for each image which of the classes CLIP finds likeliest."""
        work = self.prepare(request)
        assert isinstance(work, ClassifyWork)
        return classify(self._artefact, work, control or Control(), self._device)

    def complete(self, request: CompleteRequest, control: Control | None = None) -> CompleteResult:
        """Continue a caption."""
        work = self.prepare(request)
        assert isinstance(work, CompleteWork)
        return complete(self._artefact, work, control or Control(), self._device)

    def prepare(self, request: Request) -> Work:
        """Everything of a request that needs no device. Raises `UserError` that says what to do."""
        return prepare(self._artefact, request)

    def run(self, work: Work, control: Control) -> Result:
        """Do prepared work. Raises `DeadlineExceeded`, `Cancelled` or `PlatformError`."""
        with self._named_errors():
            match work:
                case GenerateWork():
                    return self._generate(work, control)
                case ClassifyWork():
                    return classify(self._artefact, work, control, self._device)
                case CompleteWork():
                    return complete(self._artefact, work, control, self._device)

    @property
    def has_room(self) -> bool:
        """Whether another request's pictures would be drawn from now on."""
        return self._studio is not None and self._studio.has_room

    def begin(self, work: Work, control: Control) -> Drawing | None:
        """Begin to draw pictures; None for work of another kind, which `run` does.

        Raises what `run` does.
        """
        if not isinstance(work, GenerateWork):
            return None
        assert self._studio is not None
        with self._named_errors():
            return self._studio.begin(work, control)

    def advance(self) -> list[Ended]:
        """Go on with all that was begun by one token each; whatever has ended by that.

        Raises `PlatformError`; then everything begun is to be given up by `abandon`.
        """
        assert self._studio is not None
        aside, self._ended_aside = self._ended_aside, []
        with self._named_errors():
            return aside or self._studio.advance()

    def abandon(self) -> list[Drawing]:
        """Give up everything that was begun, and return it."""
        self._ended_aside.clear()
        return [] if self._studio is None else self._studio.abandon()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """An error of the device in words that say what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise PlatformError(
                f"the device's memory is full with up to {self._pace.max_chunk_size} candidates "
                "drawn together; set DALLE_CHUNK_SIZE lower",
                code="out_of_memory",
            ) from error

    def self_test(self) -> None:
        """Use every component once. Raises `ArtefactError` when nothing could be answered."""
        has = set(self.components)
        can_complete = {"transformer", "tokenizer"} <= has
        if not can_complete and not self._can_score:
            raise ArtefactError(
                f"the artefact has {', '.join(self.components) or 'no component'}, with which "
                "nothing can be answered; train the stages dvae and transformer to draw pictures, "
                "clip to classify and rank them"
            )
        if self.image_size is not None:
            request = GenerateRequest(caption=_SELF_TEST_CAPTION, num_candidates=1, seed=0)
            began = time.monotonic()
            self.generate(request)
            if time.monotonic() - began < _QUICK_SECONDS:
                full = {"num_candidates": self._pace.max_chunk_size}
                self.generate(request.model_copy(update=full))
        elif can_complete:
            self.complete(CompleteRequest(complete="", num_completions=1, seed=0))
        if self._can_score:
            assert self._artefact.clip is not None
            size = self._artefact.clip.config.image_size
            grey = torch.full((1, 3, size, size), 0.5)
            work = ClassifyWork([grey], [_SELF_TEST_CAPTION], top=1)
            classify(self._artefact, work, Control(), self._device)

    def _generate(self, work: GenerateWork, control: Control) -> GenerateResult:
        assert self._studio is not None
        drawing = self._studio.begin(work, control)
        outcome: GenerateResult | DalleError | None = None
        while outcome is None:
            try:
                over = self._studio.advance()
            except Exception:
                self._studio.abandon()
                raise
            for ended in over:
                if ended.drawing is drawing:
                    outcome = ended.outcome
                else:  # begun before, and waited for by `advance`
                    self._ended_aside.append(ended)
        if isinstance(outcome, GenerateResult):
            return outcome
        raise outcome


def _example_captions(artefact: Artefact, device: torch.device) -> Tensor | None:
    """Text tokens [K, T] of the captions that the artefact brings along; None without any."""
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
