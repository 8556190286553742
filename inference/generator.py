"""The pipeline, caption to ranked pictures, on one device. Knows nothing of Flask or of queues.

    prepare(request)     any thread    encode the caption, decode the images, refuse what cannot be
    run(work, control)   one thread    sample -> decode -> score, chunk by chunk; then rank

Letters: B batch, K candidates, N image-token positions, M codebooks, P primed positions, S image
size, C classes, E embedding.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.errors import ArtefactError, DeviceError, PlatformError
from dalle.images import Pixels
from dalle.sampling import SamplingStopped, complete_captions, sample_image_tokens
from inference.control import Control
from inference.pacing import Pace
from inference.prepare import (
    ClassifyWork,
    CompleteWork,
    GenerateWork,
    Work,
    image_size,
    prepare,
)
from inference.render import (
    Candidate,
    ClassifyResult,
    CompleteResult,
    GenerateResult,
    Result,
    rank,
)
from inference.replies import CompleteReply, Completion, Prediction
from inference.schema import (
    ClassifyRequest,
    CompleteRequest,
    GenerateRequest,
    Request,
)

logger = logging.getLogger(__name__)

_CLASSIFY_CHUNK = 16  # images through CLIP together
_QUICK_SECONDS = 5.0  # a self-test this fast is repeated at full size, to know the speed
_SELF_TEST_CAPTION = "a"  # one token by any tokenizer


@dataclass(slots=True)
class _Spent:
    """Seconds by stage; a stage is measured with `with spent.on("decode"):`."""

    sample: float = 0.0
    decode: float = 0.0
    rank: float = 0.0

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.monotonic() - began)


class Generator:
    """An artefact on a device. `prepare` may be called by any thread, the rest by one only.

    chunk_size: candidates drawn together; the pictures do not depend on it, speed and memory do.
    None: 16 on a CPU, 32 on a GPU.
    """

    def __init__(
        self, artefact: Artefact, device: torch.device, *, chunk_size: int | None = None
    ) -> None:
        self._artefact = artefact
        self._device = device
        self._pace = Pace(chunk_size or (32 if device.type == "cuda" else 16))

    @classmethod
    def load(
        cls,
        model_dir: Path,
        device: str = "auto",
        *,
        threads: int | None = None,
        chunk_size: int | None = None,
    ) -> Generator:
        """Load an artefact directory, or the model.tar.gz in it, onto a device.

        device: auto, cpu, cuda or cuda:N. threads: torch's on the CPU; None leaves them alone.
        Raises `ArtefactError` naming the file at fault, `DeviceError` for a device that is absent.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        chosen = _choose_device(device)
        began = time.monotonic()
        # The model directory is read-only on the platform; a scratch one is needed for an archive.
        with tempfile.TemporaryDirectory(prefix="artefact-") as scratch:
            directory = artefacts.locate(model_dir, Path(scratch))
            generator = cls(artefacts.load(directory, chosen), chosen, chunk_size=chunk_size)
        logger.info(
            "loaded %s on %s with %d threads in %.1f s",
            ", ".join(generator.components) or "no component",
            chosen,
            torch.get_num_threads(),
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
        return self._classify(work, control or Control())

    def complete(self, request: CompleteRequest, control: Control | None = None) -> CompleteResult:
        """Continue a caption."""
        work = self.prepare(request)
        assert isinstance(work, CompleteWork)
        return self._complete(work, control or Control())

    def prepare(self, request: Request) -> Work:
        """Everything of a request that needs no device. Raises `UserError` that says what to do."""
        return prepare(self._artefact, request)

    def run(self, work: Work, control: Control) -> Result:
        """Do prepared work. Raises `DeadlineExceeded`, `Cancelled` or `PlatformError`."""
        try:
            match work:
                case GenerateWork():
                    return self._generate(work, control)
                case ClassifyWork():
                    return self._classify(work, control)
                case CompleteWork():
                    return self._complete(work, control)
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
            self._classify(ClassifyWork([grey], [_SELF_TEST_CAPTION], top=1), Control())

    @torch.inference_mode()
    def _generate(self, work: GenerateWork, control: Control) -> GenerateResult:
        control.check()
        spent = _Spent()
        finished: list[Candidate] = []
        prime_tokens = self._prime_tokens(work)
        while (first := len(finished)) < work.num_candidates:
            sampled = self._sample(work, first, prime_tokens, control, spent)
            if sampled is None:
                break
            for candidate in self._finish(work, first, *sampled, spent):
                finished.append(candidate)
                control.finished(candidate)
        if control.cancelled or not finished:
            raise control.error()
        ranked_by, ranked = rank(finished)
        return GenerateResult(
            ranked=ranked,
            ranked_by=ranked_by,
            seed=work.seed,
            num_candidates=work.num_candidates,
            sample_seconds=spent.sample,
            decode_seconds=spent.decode,
            rank_seconds=spent.rank,
        )

    def _prime_tokens(self, work: GenerateWork) -> Tensor | None:
        """The image tokens [P, M] of the prime image's first rows."""
        if work.prime is None:
            return None
        dvae = self._artefact.dvae
        assert dvae is not None
        tokens = dvae.encode(work.prime.to(self._device))[0]
        return tokens[: work.prime_rows * dvae.config.grid_size]

    def _sample(
        self,
        work: GenerateWork,
        first: int,
        prime_tokens: Tensor | None,
        control: Control,
        spent: _Spent,
    ) -> tuple[Tensor, list[float]] | None:
        """Image tokens [K, N, M] and log-likelihoods of the candidates from `first` on.

        How many depends on the time that is left. None when it ran out, or nobody waits any more.
        """
        dvae, transformer = self._artefact.dvae, self._artefact.transformer
        assert dvae is not None
        assert transformer is not None
        positions = dvae.config.num_positions - (0 if prime_tokens is None else len(prime_tokens))
        guided = work.options.guidance_scale != 1.0
        size = self._pace.chunk_size(
            work.num_candidates - first, guided, positions, control.seconds_left()
        )
        reserve_seconds = self._pace.finishing_seconds(size)
        before = spent.sample
        try:
            with spent.on("sample"):
                sampled = sample_image_tokens(
                    transformer,
                    work.text_tokens.to(self._device),
                    candidates=range(first, first + size),
                    seed=work.seed,
                    options=work.options,
                    prime_tokens=prime_tokens,
                    on_step=lambda _: control.keep_going(reserve_seconds),
                )
                # Reading the numbers waits for the device, so that the clock is right.
                log_likelihood: list[float] = sampled.log_likelihood.tolist()
        except SamplingStopped:
            return None
        self._pace.note_sampling(size, guided, positions, spent.sample - before)
        return sampled.image_tokens, log_likelihood

    def _finish(
        self,
        work: GenerateWork,
        first: int,
        image_tokens: Tensor,
        log_likelihood: list[float],
        spent: _Spent,
    ) -> list[Candidate]:
        """Image tokens [K, N, M] to pictures with their scores."""
        dvae, clip = self._artefact.dvae, self._artefact.clip
        assert dvae is not None
        before = spent.decode + spent.rank
        with spent.on("decode"):
            images = dvae.decode(image_tokens)
            pixels = _to_pixels(images)
        scores: list[float | None] = [None] * len(pixels)
        if clip is not None:
            with spent.on("rank"):
                scores = (clip.encode_image(images) @ self._embed([work.caption]).T)[:, 0].tolist()
        self._pace.note_finishing(len(pixels), spent.decode + spent.rank - before)
        return [
            Candidate(first + row, log_likelihood[row], scores[row], pixels[row])
            for row in range(len(pixels))
        ]

    @torch.inference_mode()
    def _classify(self, work: ClassifyWork, control: Control) -> ClassifyResult:
        clip = self._artefact.clip
        assert clip is not None
        control.check()
        class_embeddings = self._embed(work.classes)
        predictions: list[Prediction] = []
        for start in range(0, len(work.images), _CLASSIFY_CHUNK):
            control.check()
            images = torch.cat(list(work.images[start : start + _CLASSIFY_CHUNK])).to(self._device)
            cosines = clip.encode_image(images) @ class_embeddings.T  # [B, C]
            probabilities = (cosines * clip.model.logit_scale.exp()).softmax(dim=-1)
            best = probabilities.topk(min(work.top, len(work.classes)), dim=-1)
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                predictions.append((indices, [work.classes[each] for each in indices], values))
        return ClassifyResult(predictions)

    @torch.inference_mode()
    def _complete(self, work: CompleteWork, control: Control) -> CompleteResult:
        transformer, tokenizer = self._artefact.transformer, self._artefact.tokenizer
        assert transformer is not None
        assert tokenizer is not None
        control.check()
        try:
            text_tokens, log_likelihood = complete_captions(
                transformer,
                work.prefix_tokens.to(self._device),
                num_completions=work.num_completions,
                seed=work.seed,
                options=work.options,
                on_step=lambda _: control.keep_going(),
            )
        except SamplingStopped:
            raise control.error() from None
        captions = [
            Completion(caption=caption, log_likelihood=each)
            for caption, each in zip(
                tokenizer.decode(text_tokens), log_likelihood.tolist(), strict=True
            )
        ]
        captions.sort(key=lambda each: -each.log_likelihood)
        return CompleteResult(CompleteReply(captions=captions, seed=work.seed))

    def _embed(self, captions: Sequence[str]) -> Tensor:
        """CLIP's unit embeddings [C, E] of captions."""
        clip = self._artefact.clip
        assert clip is not None
        return clip.encode_captions(captions, self._artefact.tokenizer)


def _to_pixels(images: Tensor) -> list[Pixels]:
    """Images [K, 3, S, S] in [0, 1] -> K arrays [S, S, 3] of uint8."""
    rounded = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(np.ascontiguousarray(rounded.permute(0, 2, 3, 1).cpu().numpy()))


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
