"""Input processor: a request to tensors, captions to tokens, image files to pixels.

    prepare(artefact, request, …) -> PreparedGeneration, PreparedClassification, …

Called by requests' threads; uses no device. Letters: T text length, S image size.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingOptions
from dalle.errors import CaptionTooLong, UserError
from dalle.manifest import SamplingSettings
from dalle.models.transformer import PADDING
from dalle.preprocess.captions import is_visible
from dalle.preprocess.square import Square
from dalle.preprocess.tokenizer import CaptionTokenizer
from inference.api.parsing import decode_base64
from inference.api.rendering import Mark
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest, Request
from inference.engine.request import (
    EngineRequest,
    PreparedClassification,
    PreparedCompletion,
    PreparedGeneration,
)

_NUM_RANDOM_SEEDS = 2**32  # a seed that we choose is short enough to copy by hand
_MOST_UNKNOWN = 10  # unknown words that a warning names
_MOST_KNOWN = 50  # words of a list that a warning names all of
_NEAR = 0.75  # least share of equal letters in a word that may have been meant
_QUOTED_CHARACTERS = 80


def prepare(
    artefact: Artefact,
    request: Request,
    arrival: float,
    deadline: float,
    sampling: SamplingSettings,
    mark: Mark | None = None,
) -> EngineRequest:
    """Check and convert a request. Raises `UserError` that says what to change or to train.

    sampling: of a request that names no settings. mark: what files say of their origin, for any
    seed.
    """
    match request:
        case GenerateRequest():
            return _prepare_generation(artefact, request, arrival, deadline, sampling, mark)
        case ClassifyRequest():
            return _prepare_classification(artefact, request, arrival, deadline)
        case CompleteRequest():
            return _prepare_completion(artefact, request, arrival, deadline)


def _prepare_generation(
    artefact: Artefact,
    request: GenerateRequest,
    arrival: float,
    deadline: float,
    sampling: SamplingSettings,
    mark: Mark | None,
) -> PreparedGeneration:
    purpose = "generate images"
    dvae = artefact.dvae or _missing("dvae", "dvae", purpose)
    transformer = artefact.transformer or _missing("transformer", "transformer", purpose)
    tokenizer = artefact.tokenizer or _missing("tokenizer", "transformer", purpose)
    grid_size, codebook_size = dvae.config.grid_size, transformer.config.codebook_size
    if request.prime_rows >= grid_size:
        raise _out_of_range("prime_rows", 0, grid_size - 1, request.prime_rows)
    if request.preview_rows is not None and request.preview_rows >= grid_size:
        raise _out_of_range("preview_rows", 1, grid_size - 1, request.preview_rows)
    if request.top_k is not None and request.top_k > codebook_size:
        raise _out_of_range("top_k", 1, codebook_size, request.top_k)
    prime = None
    if request.prime_image is not None:
        prime = _read_image(request.prime_image, "prime_image", Square(dvae.config.image_size))
    caption = _fitting(tokenizer, request.caption) if request.truncate else request.caption
    text_tokens = _encode(tokenizer, caption, "caption")
    seed = _choose_seed(request.seed)
    return PreparedGeneration(
        arrival=arrival,
        deadline=deadline,
        warnings=tuple(_warnings(tokenizer, request.caption, caption)),
        caption=caption,
        text_tokens=text_tokens,
        prime=prime,
        prime_rows=request.prime_rows,
        seed=seed,
        mark=None if mark is None else replace(mark, seed=seed),
        num_candidates=request.num_candidates,
        options=_sampling_options(request, sampling),
        preview_rows=request.preview_rows,
        num_images=request.num_images,
        distinct=request.distinct,
    )


def _sampling_options(request: GenerateRequest, of_model: SamplingSettings) -> SamplingOptions:
    """Return the values that a request gives, null among them, and the model's for the others."""
    given = {
        name: getattr(request, name)
        for name in SamplingSettings.model_fields
        if name in request.model_fields_set
    }
    return SamplingOptions(**{**dict(of_model), **given})


def _prepare_classification(
    artefact: Artefact, request: ClassifyRequest, arrival: float, deadline: float
) -> PreparedClassification:
    purpose = "classify images"
    clip = artefact.clip or _missing("clip", "clip", purpose)
    if clip.config.tokenizer == "artefact":
        tokenizer = artefact.tokenizer or _missing("tokenizer", "clip", purpose)
        for number, each in enumerate(request.classes):  # refuse a long one before any other work
            _encode(tokenizer, each, f"classes[{number}]")
    images = [
        _read_image(text, f"images[{number}]", clip.square)
        for number, text in enumerate(request.images)
    ]
    return PreparedClassification(
        arrival=arrival, deadline=deadline, images=images, classes=request.classes, top=request.top
    )


def _prepare_completion(
    artefact: Artefact, request: CompleteRequest, arrival: float, deadline: float
) -> PreparedCompletion:
    purpose = "complete captions"
    if artefact.transformer is None:
        _missing("transformer", "transformer", purpose)
    tokenizer = artefact.tokenizer or _missing("tokenizer", "transformer", purpose)
    text_tokens = _encode(tokenizer, request.complete, "complete")[0]
    return PreparedCompletion(
        arrival=arrival,
        deadline=deadline,
        prefix=request.complete,
        prefix_tokens=text_tokens[text_tokens != PADDING],
        num_completions=request.num_completions,
        options=SamplingOptions(temperature=request.temperature),
        seed=_choose_seed(request.seed),
    )


def _encode(tokenizer: CaptionTokenizer, caption: str, field: str) -> Tensor:
    """Return the text tokens [1, T] of a caption that came in a request's field."""
    try:
        return tokenizer.encode([caption])
    except CaptionTooLong as error:  # it names the caption; the field is known here only
        message = str(error) if field == "caption" else f"{field}: {error}"
        raise CaptionTooLong(message, field=field) from error


def _fitting(tokenizer: CaptionTokenizer, caption: str) -> str:
    """Return the beginning of a caption that the model reads; all of it where nothing would stay.

    The latter is refused as one that is too long.
    """
    cut = tokenizer.fitting(caption)
    return cut if is_visible(cut) else caption


def _warnings(tokenizer: CaptionTokenizer, caption: str, read: str) -> Iterator[str]:
    """Yield what the model does not read of a caption. read: the caption, or its beginning."""
    if len(read) < len(caption):
        yield (
            f"the caption is longer than the {tokenizer.text_length} text tokens that the model "
            f"reads, so it was cut to {_quoted(read)}"
        )
    unknown = tokenizer.unknown_words(read)
    known = tokenizer.words
    if not unknown or known is None:
        return
    named = [_quoted(word) + _meant(word, known) for word in unknown[:_MOST_UNKNOWN]]
    if len(unknown) > len(named):
        named.append(f"and {len(unknown) - len(named)} more")
    words = f"{len(known):,} words"
    if len(known) <= _MOST_KNOWN:
        words += f": {', '.join(known)}"
    yield f"unknown to the model, which reads them all as one: {', '.join(named)}; it knows {words}"


def _meant(word: str, known: Sequence[str]) -> str:
    """Return the nearest known word as a question; nothing where none is near.

    Only words of about the same length with the same first letter are compared, which takes a few
    milliseconds for 16,000 words.
    """
    word = word.lower()
    alike = [each for each in known if each[0] == word[0] and abs(len(each) - len(word)) <= 2]
    near = difflib.get_close_matches(word, alike, n=1, cutoff=_NEAR)
    return f" ({near[0]}?)" if near else ""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED_CHARACTERS else f"{text[:_QUOTED_CHARACTERS]}…")


def _read_image(text: str, field: str, square: Square) -> Tensor:
    """Read what a model reads of a base64 image file, [1, 3, size, size] in [0, 1]."""
    try:
        pixels = square.read(decode_base64(text, field=field), field)
    except UserError as error:
        error.field = error.field or field
        raise
    # In numpy: torch would start a pool of threads for every thread that calls it.
    return torch.from_numpy(np.float32(pixels.transpose(2, 0, 1)[None]) / np.float32(255))


def _choose_seed(seed: int | None) -> int:
    """Return the request's seed, or an unpredictable new one."""
    return seed if seed is not None else random.SystemRandom().randrange(_NUM_RANDOM_SEEDS)


def _missing(component: str, stage: str, purpose: str) -> NoReturn:
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
