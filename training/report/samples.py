"""Pictures of a trained artefact: drawn for captions, reconstructed, and found by CLIP.

What reports and evaluation show and count; knows nothing of files, jobs or HTML.
Images are uint8 tensors [., 3, S, S] here: what a user gets, rounded as in a picture file.
Letters: B images, C captions, K candidates of a caption, S image size, N image-token positions,
M codebooks, V codebook size, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle.artefact import Artefact
from dalle.decoding.sampling import (
    SampledTokens,
    SamplingOptions,
    SamplingStopped,
    sample_image_tokens,
)
from dalle.errors import ArtefactError
from dalle.models.dvae import DiscreteVAE
from dalle.models.transformer import TransformerConfig
from dalle.preprocess.images import Pixels
from dalle.types import ComponentName
from training.data.batching.preload import float_chunks, images_per_chunk
from training.report.content import CodebookUsage, Generated, Reconstructions, Retrieval
from training.stopping import NEVER, Stop, Stopped, unless_stopped

CHUNK = 256  # rows sampled together
CAPTION_CHUNK = 64  # captions through CLIP together
MAX_CACHE_BYTES = 2 << 30  # of keys and values while many rows are sampled together


@dataclass(frozen=True)
class Drawn:
    """The candidates of one caption, in the order of their numbers.

    images: uint8 [K, 3, S, S]. scores: [K], what is shown beside a picture: the CLIP score, or
    without a CLIP the log-likelihood in nats. merits: [K], what they are ranked by (`Clip.merit`),
    or the same.
    """

    images: Tensor
    scores: Tensor
    merits: Tensor

    def best(self, count: int) -> list[int]:
        """Rows of the `count` best candidates, best first; of equals the earlier one."""
        order = self.merits.argsort(descending=True, stable=True)
        return order[:count].tolist()


def require(artefact: Artefact, *components: ComponentName, purpose: str) -> None:
    """Raise ArtefactError naming the components that `purpose` needs and the artefact lacks."""
    missing = [name for name in components if name not in artefact.components()]
    if missing:
        has = ", ".join(artefact.components()) or "nothing"
        raise ArtefactError(
            f"the artefact has no {' and no '.join(missing)}, which {purpose} needs; it has {has}: "
            "train the missing stages with this artefact in the channel `artefact`"
        )


def draw(
    artefact: Artefact,
    captions: Sequence[str],
    candidates: Sequence[Sequence[int]],
    *,
    seed: int,
    options: SamplingOptions | None = None,
    stop: Stop = NEVER,
) -> Iterator[Drawn]:
    """Draw candidates for many captions together, one `Drawn` per caption in their order.

    candidates: for each caption the numbers of its candidates, at least one; with a number goes
    the same picture as `serve` gives for that caption, seed and number. Scored by CLIP where the
    artefact has one.
    Raises ArtefactError when the artefact cannot draw, CaptionTooLong for a caption it cannot
    read; Stopped.
    """
    require(artefact, "dvae", "transformer", "tokenizer", purpose="drawing pictures")
    transformer, tokenizer = artefact.transformer, artefact.tokenizer
    assert transformer is not None
    assert tokenizer is not None
    text_tokens = tokenizer.encode(captions)
    embeddings = None if artefact.clip is None else _embed_captions(artefact, captions, stop)
    rows = [(row, number) for row, numbers in enumerate(candidates) for number in numbers]
    finished: list[tuple[Tensor, ...]] = []  # what is not yet a whole caption's
    num_finished, caption = 0, 0
    size = _rows_together(transformer.config)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        owners = torch.tensor([row for row, _ in chunk])
        try:
            sampled = sample_image_tokens(
                transformer,
                text_tokens[owners].to(_device(transformer)),
                candidates=[number for _, number in chunk],
                seed=seed,
                options=options,
                on_step=lambda _: not stop.is_set(),
            )
        except SamplingStopped:
            raise Stopped from None
        wanted = None if embeddings is None else embeddings[owners.to(embeddings.device)]
        finished.append(_developed(artefact, sampled, wanted, stop))
        num_finished += len(chunk)
        while caption < len(candidates) and num_finished >= (count := len(candidates[caption])):
            whole = [torch.cat(parts) for parts in zip(*finished, strict=True)]
            yield Drawn(*(part[:count] for part in whole))
            finished = [tuple(part[count:] for part in whole)]
            num_finished -= count
            caption += 1


def generated(
    artefact: Artefact,
    captions: Sequence[str],
    actuals: Tensor | None,
    *,
    num_candidates: int,
    num_images: int,
    seed: int,
    stop: Stop = NEVER,
) -> list[Generated]:
    """The best `num_images` of `num_candidates` pictures for each caption, best first.

    actuals: uint8 [C, 3, S, S], the captions' real pictures. Ranked by CLIP (see `Clip.merit`), or
    without one by the transformer's log-likelihood. Raises what `draw` does.
    """
    numbers = [range(num_candidates)] * len(captions)
    drawn = draw(artefact, captions, numbers, seed=seed, stop=stop)
    return [
        Generated(
            caption=captions[row],
            images=[to_pixels(each.images[best]) for best in each.best(num_images)],
            scores=each.scores[each.best(num_images)].tolist(),
            actual=None if actuals is None else to_pixels(actuals[row]),
        )
        for row, each in enumerate(drawn)
    ]


def reconstruct(dvae: DiscreteVAE, images: Tensor, stop: Stop = NEVER) -> Tensor:
    """Images uint8 [B, 3, S, S] through their tokens and back, uint8 [B, 3, S, S].

    Raises Stopped.
    """
    with torch.inference_mode():
        parts = [
            to_uint8(dvae.decode(dvae.encode(chunk))).cpu()
            for chunk in float_chunks(images, _device(dvae), stop)
        ]
    return torch.cat(parts)


def reconstructions(dvae: DiscreteVAE, images: Tensor, stop: Stop = NEVER) -> Reconstructions:
    """For the report: images uint8 [B, 3, S, S] and what is left of them after the dVAE.

    Raises Stopped.
    """
    again = reconstruct(dvae, images, stop)
    return Reconstructions(
        originals=[to_pixels(image) for image in images],
        reconstructions=[to_pixels(image) for image in again],
    )


def codebook_usage(dvae: DiscreteVAE, images: Tensor, stop: Stop = NEVER) -> list[CodebookUsage]:
    """How often images uint8 [B, 3, S, S] use each code, one entry per codebook.

    Raises Stopped.
    """
    config = dvae.config
    counts = torch.zeros(config.num_codebooks, config.codebook_size, dtype=torch.int64)
    for chunk in float_chunks(images, _device(dvae), stop):
        image_tokens = dvae.encode(chunk).cpu()  # [B, N, M]
        for m in range(config.num_codebooks):
            codes = image_tokens[..., m].flatten()
            counts[m] += torch.bincount(codes, minlength=config.codebook_size)
    names = [f"codebook {m + 1}" for m in range(len(counts))] if len(counts) > 1 else ["codebook"]
    return [
        CodebookUsage(name=name, counts=row.numpy())
        for name, row in zip(names, counts, strict=True)
    ]


def retrieval(
    artefact: Artefact, images: Tensor, captions: Sequence[str], stop: Stop = NEVER
) -> Retrieval:
    """How often a caption's best image by CLIP is its own: images uint8 [C, 3, S, S], one each.

    An image that is equal to the caption's own, pixel by pixel, is its own too.
    Raises ArtefactError without a CLIP that can read the captions; Stopped.
    """
    require(artefact, "clip", purpose="retrieval")
    clip = artefact.clip
    assert clip is not None
    first: dict[bytes, int] = {}
    same = torch.tensor(
        [first.setdefault(image.tobytes(), row) for row, image in enumerate(images.numpy())]
    )
    with torch.inference_mode():
        chunks = [clip.encode_image(chunk) for chunk in float_chunks(images, _device(clip), stop)]
        image_vectors = torch.cat(chunks)
        text_vectors = _embed_captions(artefact, captions, stop)
        best = torch.cat(
            [(chunk @ image_vectors.T).argmax(dim=1) for chunk in torch.split(text_vectors, CHUNK)]
        ).cpu()
    return Retrieval(top1=float((same[best] == same).float().mean()), num_pairs=len(captions))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, rounded as `serve` rounds them."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pixels(image: Tensor) -> Pixels:
    """One image uint8 [3, S, S] -> array uint8 [S, S, 3]."""
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _developed(
    artefact: Artefact, sampled: SampledTokens, wanted: Tensor | None, stop: Stop
) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Drawn` has of K candidates, on the CPU.

    wanted: CLIP's vectors of their captions [K, E]; without, the score is the log-likelihood.
    """
    dvae, clip = artefact.dvae, artefact.clip
    assert dvae is not None
    images, scores = [], []
    with torch.inference_mode():
        size = images_per_chunk(dvae.config.image_size)
        for start in unless_stopped(range(0, len(sampled.image_tokens), size), stop):
            decoded = dvae.decode(sampled.image_tokens[start : start + size])
            images.append(to_uint8(decoded))
            if clip is not None and wanted is not None:
                vectors = clip.encode_image(decoded)
                scores.append((vectors * wanted[start : start + size]).sum(dim=-1))
        shown = ranked = sampled.log_likelihood
        if clip is not None and wanted is not None:
            shown = torch.cat(scores)
            ranked = clip.merit(shown, sampled.log_likelihood)
    return torch.cat(images).cpu(), shown.cpu(), ranked.cpu()


def _embed_captions(artefact: Artefact, captions: Sequence[str], stop: Stop) -> Tensor:
    """CLIP's unit vectors [C, E]."""
    clip = artefact.clip
    assert clip is not None
    with torch.inference_mode():
        chunks = [
            clip.encode_captions(captions[start : start + CAPTION_CHUNK], artefact.tokenizer)
            for start in unless_stopped(range(0, len(captions), CAPTION_CHUNK), stop)
        ]
    return torch.cat(chunks)


def _rows_together(config: TransformerConfig) -> int:
    """How many rows to sample together: many are quicker, their caches must fit."""
    row_bytes = 2 * 4 * config.num_layers * config.length * config.width
    return max(1, min(CHUNK, MAX_CACHE_BYTES // row_bytes))


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
