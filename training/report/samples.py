"""Images of a trained artefact: generated for captions, reconstructed, and retrieved by CLIP.

    captions, candidate numbers -> DecodeEngine -> dVAE -> CLIP -> `CandidateImages` per caption

Reports and evaluation show and count these. Knows nothing of files, jobs or HTML.
Images are uint8 tensors [., 3, S, S], rounded as in an image file.
Letters: B images, C captions, K candidates of a caption, S image size, N image-token positions,
M codebooks, V codebook size, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.select import new_step
from dalle.decoding.step import CandidateTokens
from dalle.models.clip import Clip
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.transformer import Dalle
from dalle.preprocess.images import Pixels
from training.data.batching.preload import float_chunks, images_per_chunk
from training.report.content import (
    CodebookUsage,
    Generated,
    Memorisation,
    Reconstructions,
    Retrieval,
)
from training.report.nearest import TrainingPictures
from training.stopping import NEVER, Stop, Stopped, unless_stopped

MAX_TOGETHER = 256  # candidates in the engine at once
MAX_CACHE_BYTES = 2 << 30  # of their keys and values
CAPTION_CHUNK = 64  # captions through CLIP at once


@dataclass(frozen=True)
class CandidateImages:
    """The candidates of one caption, in the order of their numbers.

    images: uint8 [K, 3, S, S]. scores: [K], shown beside an image: the CLIP score, or without a
    CLIP the log-likelihood in nats. merits: [K], the order of the ranking (`Clip.merit`), or the
    scores again.
    """

    images: Tensor
    scores: Tensor
    merits: Tensor

    def best(self, count: int) -> list[int]:
        """Rows of the `count` best candidates, best first; of equals the earlier one."""
        order = self.merits.argsort(descending=True, stable=True)
        return order[:count].tolist()


def generate_candidates(
    artefact: Artefact,
    captions: Sequence[str],
    candidates: Sequence[Sequence[int]],
    *,
    seed: int,
    options: SamplingOptions | None = None,
    stop: Stop = NEVER,
) -> Iterator[CandidateImages]:
    """Generate candidates of many captions together; yield each caption's, in the captions' order.

    candidates: for each caption the numbers of its candidates, at least one. `serve` gives the same
    image for the same caption, seed and number. options: None for the model's own. CLIP scores the
    images where the artefact has one. Raises ArtefactError when a component is missing,
    CaptionTooLong, and Stopped.
    """
    what = "generating images"
    dvae, transformer = artefact.require("dvae", what), artefact.require("transformer", what)
    text_tokens = artefact.require("tokenizer", what).encode(captions).to(_device(transformer))
    embeddings = None if artefact.clip is None else _embed_captions(artefact, captions, stop)
    options = options or SamplingOptions(**dict(artefact.manifest.sampling_settings))
    slots_each = 1 if options.guidance_scale == 1.0 else 2
    together = min(_most_together(transformer, slots_each), sum(map(len, candidates)))
    engine = _new_engine(transformer, slots_each * together)
    rows: dict[object, int] = {}  # request -> its caption's row
    finished: list[dict[int, tuple[Tensor, ...]]] = [{} for _ in captions]
    num_open, yielded = 0, 0
    while yielded < len(captions):
        while num_open < together and len(rows) < len(captions):
            if stop.is_set():
                raise Stopped
            row = len(rows)
            numbers = candidates[row]
            request = engine.submit(
                text_tokens[row : row + 1], candidates=numbers, seed=seed, options=options
            )
            rows[request] = row
            num_open += len(numbers)
        if stop.is_set():
            raise Stopped
        sampled = engine.step()
        num_open -= len(sampled)
        owners = [rows[each.request] for each in sampled]
        wanted = None if embeddings is None else embeddings[owners]
        parts = _decode_and_score(dvae, artefact.clip, sampled, wanted, stop)
        for row, each, part in zip(owners, sampled, parts, strict=True):
            finished[row][each.number] = part
        while yielded < len(captions) and len(finished[yielded]) == len(candidates[yielded]):
            own = [finished[yielded].pop(number) for number in candidates[yielded]]
            yield CandidateImages(*(torch.stack(column) for column in zip(*own, strict=True)))
            yielded += 1


def generate_best(
    artefact: Artefact,
    captions: Sequence[str],
    actuals: Tensor | None,
    *,
    num_candidates: int,
    num_images: int,
    seed: int,
    training: TrainingPictures | None = None,
    stop: Stop = NEVER,
) -> list[Generated]:
    """Generate `num_candidates` images for each caption; return the best `num_images`, best first.

    actuals: uint8 [C, 3, S, S], the captions' real images. training: pictures of which the nearest
    is shown beside the best image. CLIP ranks (see `Clip.merit`), or
    without one the transformer's log-likelihood. Raises what `generate_candidates` does.
    """
    numbers = [range(num_candidates)] * len(captions)
    candidates = generate_candidates(artefact, captions, numbers, seed=seed, stop=stop)
    return [
        Generated(
            caption=captions[row],
            images=[to_pixels(each.images[best]) for best in each.best(num_images)],
            scores=each.scores[each.best(num_images)].tolist(),
            actual=None if actuals is None else to_pixels(actuals[row]),
            **_nearest(each.images[each.best(1)], training, stop),
        )
        for row, each in enumerate(candidates)
    ]


def _nearest(image: Tensor, training: TrainingPictures | None, stop: Stop) -> dict[str, Any]:
    """Return the fields of `Generated` on the training picture nearest to image [1, 3, S, S]."""
    if training is None:
        return {}
    number = int(training.nearest(image, stop)[0])
    return {
        "nearest": to_pixels(training.images[number]),
        "nearest_caption": training.captions(number)[0],
    }


def memorisation(
    artefact: Artefact,
    captions: Sequence[str],
    actuals: Tensor,
    training: TrainingPictures,
    *,
    seed: int,
    stop: Stop = NEVER,
) -> Memorisation:
    """Sample one image for each caption and count those that are rather memorised.

    actuals: uint8 [C, 3, S, S], the captions' real images; at least one. Raises what
    `generate_candidates` does.
    """
    numbers = [[0]] * len(captions)
    candidates = generate_candidates(artefact, captions, numbers, seed=seed, stop=stop)
    images = torch.cat([each.images for each in candidates])
    return Memorisation(
        share=training.memorised_share(images, actuals, captions, stop),
        num_captions=len(captions),
        num_pictures=len(training),
    )


def reconstruct(dvae: ImageTokenizer, images: Tensor, stop: Stop = NEVER) -> Tensor:
    """Encode images uint8 [B, 3, S, S] to image tokens and decode them again, uint8 [B, 3, S, S].

    Raises Stopped.
    """
    with torch.inference_mode():
        parts = [
            to_uint8(dvae.decode(dvae.encode(chunk))).cpu()
            for chunk in float_chunks(images, _device(dvae), stop)
        ]
    return torch.cat(parts)


def reconstructions(dvae: ImageTokenizer, images: Tensor, stop: Stop = NEVER) -> Reconstructions:
    """Return images uint8 [B, 3, S, S] beside their reconstructions by the dVAE, for the report.

    Raises Stopped.
    """
    again = reconstruct(dvae, images, stop)
    return Reconstructions(
        originals=[to_pixels(image) for image in images],
        reconstructions=[to_pixels(image) for image in again],
    )


def codebook_usage(dvae: ImageTokenizer, images: Tensor, stop: Stop = NEVER) -> list[CodebookUsage]:
    """Count how often images uint8 [B, 3, S, S] use each code; one entry per codebook.

    Raises Stopped.
    """
    config = dvae.config
    counts = torch.zeros(config.num_codebooks, config.codebook_size, dtype=torch.int64)
    for chunk in float_chunks(images, _device(dvae), stop):
        for m, codes in enumerate(dvae.encode(chunk).cpu().unbind(dim=-1)):  # [B, N]
            counts[m] += torch.bincount(codes.flatten(), minlength=config.codebook_size)
    names = [f"codebook {m + 1}" for m in range(len(counts))] if len(counts) > 1 else ["codebook"]
    return [
        CodebookUsage(name=name, counts=row.numpy())
        for name, row in zip(names, counts, strict=True)
    ]


def retrieval(
    artefact: Artefact, images: Tensor, captions: Sequence[str], stop: Stop = NEVER
) -> Retrieval:
    """Measure how often a caption's best image by CLIP is its own: images uint8 [C, 3, S, S].

    An image equal to the caption's own, pixel by pixel, counts as its own.
    Raises ArtefactError without a CLIP that can read the captions; Stopped.
    """
    clip = artefact.require("clip", "retrieval")
    first: dict[bytes, int] = {}
    same = torch.tensor(
        [first.setdefault(image.tobytes(), row) for row, image in enumerate(images.numpy())]
    )
    with torch.inference_mode():
        chunks = [clip.encode_image(chunk) for chunk in float_chunks(images, _device(clip), stop)]
        image_vectors = torch.cat(chunks)
        text_vectors = _embed_captions(artefact, captions, stop)
        best = torch.cat(
            [
                (chunk @ image_vectors.T).argmax(dim=1)
                for chunk in torch.split(text_vectors, CAPTION_CHUNK)
            ]
        ).cpu()
    return Retrieval(top1=float((same[best] == same).float().mean()), num_pairs=len(captions))


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [0, 1] to uint8, rounded as `serve` rounds them."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pixels(image: Tensor) -> Pixels:
    """Convert one image uint8 [3, S, S] to an array uint8 [S, S, 3]."""
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _new_engine(transformer: Dalle, num_slots: int) -> DecodeEngine:
    """An engine by torch's kernels on a GPU: a report is too short to compile kernels for."""
    step = new_step(transformer, num_slots, own_kernels=_device(transformer).type == "cpu")
    return DecodeEngine(transformer, num_slots, step=step)


def _most_together(transformer: Dalle, slots_each: int) -> int:
    """How many candidates the engine may hold so that their keys and values fit."""
    config = transformer.config
    slot_bytes = 2 * 4 * config.num_layers * config.length * config.width
    return max(1, min(MAX_TOGETHER, MAX_CACHE_BYTES // slot_bytes) // slots_each)


def _decode_and_score(
    dvae: ImageTokenizer,
    clip: Clip | None,
    sampled: Sequence[CandidateTokens],
    wanted: Tensor | None,
    stop: Stop,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Image [3, S, S], score and merit of each sampled candidate, on the CPU.

    wanted: CLIP's vectors of their captions [K, E]; None scores by the log-likelihood.
    """
    size = images_per_chunk(dvae.config.image_size)
    for start in unless_stopped(range(0, len(sampled), size), stop):
        some = sampled[start : start + size]
        with torch.inference_mode():
            decoded = dvae.decode(torch.stack([each.image_tokens for each in some]))
            scores = merits = torch.tensor([each.log_likelihood for each in some])
            if clip is not None and wanted is not None:
                vectors = clip.encode_generated(decoded)
                scores = (vectors * wanted[start : start + size]).sum(dim=-1)
                merits = clip.merit(scores, merits.to(scores.device))
        yield from zip(to_uint8(decoded).cpu(), scores.cpu(), merits.cpu(), strict=True)


def _embed_captions(artefact: Artefact, captions: Sequence[str], stop: Stop) -> Tensor:
    """CLIP's unit vectors [C, E]."""
    clip = artefact.require("clip")
    with torch.inference_mode():
        chunks = [
            clip.encode_captions(captions[start : start + CAPTION_CHUNK], artefact.tokenizer)
            for start in unless_stopped(range(0, len(captions), CAPTION_CHUNK), stop)
        ]
    return torch.cat(chunks)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
