"""A request made ready for the device: captions to tokens, files to pixels, refusals first.

    prepare(artefact, request) -> GenerateWork | ClassifyWork | CompleteWork

Called by requests' own threads; touches no device. Letters: T text length, S image size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingOptions
from dalle.errors import CaptionTooLong, UserError
from dalle.models.transformer import PADDING
from dalle.preprocess.images import decode_image, to_square
from inference.api.parsing import decode_base64
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest, Request

_DRAWN_SEEDS = 2**32  # a drawn seed is short enough to copy by hand


@dataclass(frozen=True, slots=True)
class GenerateWork:
    """A generation that can begin. text_tokens: [1, T]; prime: [1, 3, S, S] in [0, 1]; on CPU."""

    caption: str
    text_tokens: Tensor
    prime: Tensor | None
    prime_rows: int
    seed: int
    num_candidates: int
    options: SamplingOptions
    preview_rows: int | None = None
    num_images: int = 1
    kind: str = "generate"

    @property
    def units(self) -> int:
        return self.num_candidates


@dataclass(frozen=True, slots=True)
class ClassifyWork:
    """A classification that can begin. images: each [1, 3, S, S] in [0, 1], on CPU."""

    images: Sequence[Tensor]
    classes: Sequence[str]
    top: int
    kind: str = "classify"

    @property
    def units(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class CompleteWork:
    """A completion that can begin. prefix_tokens: [n] int64 without padding, on CPU."""

    prefix_tokens: Tensor
    num_completions: int
    options: SamplingOptions
    seed: int
    kind: str = "complete"

    @property
    def units(self) -> int:
        return self.num_completions


Work = GenerateWork | ClassifyWork | CompleteWork


def image_size(artefact: Artefact) -> int | None:
    """Side of the pictures that the artefact draws, in pixels; None when it cannot draw."""
    if artefact.dvae is None or artefact.transformer is None or artefact.tokenizer is None:
        return None
    return artefact.dvae.config.image_size


def prepare(artefact: Artefact, request: Request) -> Work:
    """Check and convert a request. Raises `UserError` that says what to change or to train."""
    match request:
        case GenerateRequest():
            return _prepare_generate(artefact, request)
        case ClassifyRequest():
            return _prepare_classify(artefact, request)
        case CompleteRequest():
            return _prepare_complete(artefact, request)


def _prepare_generate(artefact: Artefact, request: GenerateRequest) -> GenerateWork:
    dvae, transformer, tokenizer = artefact.dvae, artefact.transformer, artefact.tokenizer
    if dvae is None:
        _lacks("dvae", "dvae", "draw pictures")
    if transformer is None:
        _lacks("transformer", "transformer", "draw pictures")
    if tokenizer is None:
        _lacks("tokenizer", "transformer", "draw pictures")
    grid_size, codebook_size = dvae.config.grid_size, transformer.config.codebook_size
    if request.prime_rows >= grid_size:
        raise _out_of_range("prime_rows", 0, grid_size - 1, request.prime_rows)
    if request.preview_rows is not None and request.preview_rows >= grid_size:
        raise _out_of_range("preview_rows", 1, grid_size - 1, request.preview_rows)
    if request.top_k is not None and request.top_k > codebook_size:
        raise _out_of_range("top_k", 1, codebook_size, request.top_k)
    prime = None
    if request.prime_image is not None:
        prime = _read_image(request.prime_image, "prime_image", dvae.config.image_size)
    return GenerateWork(
        caption=request.caption,
        text_tokens=_encode(artefact, [request.caption], "caption"),
        prime=prime,
        prime_rows=request.prime_rows,
        seed=_seed(request.seed),
        num_candidates=request.num_candidates,
        options=SamplingOptions(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            guidance_scale=request.guidance_scale,
        ),
        preview_rows=request.preview_rows,
        num_images=request.num_images,
    )


def _prepare_classify(artefact: Artefact, request: ClassifyRequest) -> ClassifyWork:
    clip = artefact.clip
    if clip is None:
        _lacks("clip", "clip", "classify images")
    if clip.config.tokenizer == "artefact":
        if artefact.tokenizer is None:
            _lacks("tokenizer", "clip", "classify images")
        for number, each in enumerate(request.classes):  # what is too long, while it is cheap
            _encode(artefact, [each], f"classes[{number}]")
    images = [
        _read_image(text, f"images[{number}]", clip.config.image_size)
        for number, text in enumerate(request.images)
    ]
    return ClassifyWork(images, request.classes, request.top)


def _prepare_complete(artefact: Artefact, request: CompleteRequest) -> CompleteWork:
    if artefact.transformer is None:
        _lacks("transformer", "transformer", "complete captions")
    if artefact.tokenizer is None:
        _lacks("tokenizer", "transformer", "complete captions")
    text_tokens = _encode(artefact, [request.complete], "complete")[0]
    return CompleteWork(
        prefix_tokens=text_tokens[text_tokens != PADDING],
        num_completions=request.num_completions,
        options=SamplingOptions(temperature=request.temperature),
        seed=_seed(request.seed),
    )


def _encode(artefact: Artefact, captions: Sequence[str], field: str) -> Tensor:
    assert artefact.tokenizer is not None
    try:
        return artefact.tokenizer.encode(captions)
    except CaptionTooLong as error:  # it shows the caption, but cannot know the request's field
        message = str(error) if field == "caption" else f"{field}: {error}"
        raise CaptionTooLong(message, field=field) from error


def _read_image(text: str, field: str, size: int) -> Tensor:
    """A base64 image file -> [1, 3, size, size] in [0, 1]."""
    try:
        pixels = to_square(decode_image(decode_base64(text, field=field), what=field), size)
    except UserError as error:
        error.field = error.field or field
        raise
    # By numpy: torch would start as many threads again for every thread that ever came by here.
    return torch.from_numpy(np.float32(pixels.transpose(2, 0, 1)[None]) / np.float32(255))


def _seed(seed: int | None) -> int:
    """The request's own seed, or a new one that nobody could have known."""
    return seed if seed is not None else random.SystemRandom().randrange(_DRAWN_SEEDS)


def _lacks(component: str, stage: str, purpose: str) -> NoReturn:
    raise UserError(
        f"this artefact has no {component}, which is needed to {purpose}; train the stage {stage} "
        "with this artefact in the channel `artefact`, then serve what that job wrote",
        status=422,
        code="component_missing",
    )


def _out_of_range(field: str, low: int, high: int, got: int) -> UserError:
    return UserError(
        f"{field} must be {low} to {high} for this model, got {got}",
        field=field,
        status=422,
        code="invalid_request",
    )
