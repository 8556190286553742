"""Image tokens of a large data set, computed once by a frozen dVAE and kept beside checkpoints.

Training a transformer then neither decodes nor encodes an image. The cache is written in parts, so
that an interrupted job goes on with the next one. Knows a function from images to tokens, not
models.

Letters: M pairs, B pairs at a time, N image-token positions, C codebooks.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from dalle.platform.disk import disk_errors, write_atomically
from training.data.batching.loader import ImageLoader
from training.data.batching.preload import images_per_chunk
from training.data.batching.sampler import Sampler
from training.data.pairs import Dataset, View, image_or_skip
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.stopping import NEVER, Stop, Stopped

log = logging.getLogger(__name__)

PART_PAIRS = 4096
MAX_CACHE_BYTES = 4 << 30  # in memory, and copied to S3 once
UNUSABLE = -1

Encode = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [0, 1] -> image tokens [B, N, C]."""


class TokenCache(View):
    """The pairs of another data set whose image could be decoded, with their image tokens.

    tokens: [M, N, C] int16 or int32, on the CPU.
    """

    def __init__(self, source: Dataset, tokens: Tensor, indices: Sequence[int]) -> None:
        super().__init__(source, indices)
        self.tokens = tokens


def tokens_fit(num_pairs: int, num_tokens: int, codebook_size: int) -> bool:
    """Return whether the tokens of all pairs, `num_tokens` (N * C) each, are few enough to keep."""
    return num_pairs * num_tokens * _dtype(codebook_size).itemsize <= MAX_CACHE_BYTES


def cache_tokens(
    dataset: Dataset,
    encode: Encode,
    *,
    directory: Path,
    dvae_hash: str,
    codebook_size: int,
    device: torch.device,
    num_workers: int | None = None,
    ranks: ProcessGroup = SINGLE_PROCESS,
    stop: Stop = NEVER,
    step_pairs: int | None = None,
    part_pairs: int = PART_PAIRS,
) -> TokenCache:
    """Encode every image, or read what an earlier run of the job has encoded.

    directory: of all caches; each data set and dVAE (`dvae_hash`, of its weights) has a
        folder in it. The ranks share the work; the first one reads and writes.
    step_pairs, part_pairs: pairs that are encoded together (None: as many as suit the dVAE), and
        pairs in a part of the cache, at most.
    Raises `DataError` when too many images are unusable; PlatformError when the disk is full;
    Stopped.
    """
    step_pairs = step_pairs or images_per_chunk(dataset.image_size)
    part_steps = max(1, part_pairs // step_pairs)
    sampler = Sampler(
        num_pairs=len(dataset), batch_size=step_pairs, seed=0, shuffle=False, last="keep"
    )
    num_parts = -(-sampler.num_per_epoch // part_steps)
    folder = directory / _key(dataset, dvae_hash, step_pairs * part_steps)
    # As bytes: gloo cannot send int16.
    read = [part.view(torch.uint8) for part in _read_parts(folder)] if ranks.is_first else []
    parts = [part.view(_dtype(codebook_size)) for part in ranks.share(read)]
    if parts and ranks.is_first:
        log.info("image tokens: %d of %d parts are cached already", len(parts), num_parts)
    with (
        closing(ImageLoader(dataset, sampler, num_workers)) as loader,
        tqdm(total=num_parts, desc="encoding images", unit="parts", disable=None, delay=0.5) as bar,
    ):
        bar.update(len(parts))
        while len(parts) < num_parts:
            # Each rank encodes one of the next parts; past the last one there is nothing to do.
            first = (len(parts) + ranks.rank) * part_steps
            rows: list[Tensor] = []
            for step in range(first, min(first + part_steps, sampler.num_per_epoch)):
                if stop.is_set():
                    break
                rows.append(_encode_step(loader, step, step_pairs, len(dataset), encode, device))
            if ranks.any(stop.is_set()):
                raise Stopped
            new = [part.to(_dtype(codebook_size)) for part in _gather_parts(rows, ranks)]
            for part in new[: num_parts - len(parts)]:
                if ranks.is_first:
                    _write_part(folder, len(parts), part)
                parts.append(part)
                bar.update()
    return _without_unusable(dataset, torch.cat(parts))


def _without_unusable(dataset: Dataset, tokens: Tensor) -> TokenCache:
    """Keep the pairs that have tokens, and count the others on every rank."""
    is_usable = tokens[:, 0, 0] != UNUSABLE
    for index in (~is_usable).nonzero().flatten().tolist():
        image_or_skip(dataset, index)
    dataset.skips.check_share(dataset.max_bad_share)
    usable = is_usable.nonzero().flatten()
    return TokenCache(dataset, tokens if is_usable.all() else tokens[usable], usable.tolist())


def _encode_step(
    loader: ImageLoader,
    step: int,
    step_pairs: int,
    num_pairs: int,
    encode: Encode,
    device: torch.device,
) -> Tensor:
    """Return one step's tokens [B, N, C] int32 on the CPU, `UNUSABLE` for unusable images."""
    decoded = loader.images(step)
    first = step * step_pairs
    expected = torch.arange(first, min(first + step_pairs, num_pairs))
    tokens = encode(decoded.images.to(device).float() / 255).to("cpu", torch.int32)
    # The loader replaces an unusable pair by another; its row is marked here.
    tokens[torch.from_numpy(decoded.indices) != expected] = UNUSABLE
    return tokens


def _gather_parts(rows: Sequence[Tensor], ranks: ProcessGroup) -> list[Tensor]:
    """Gather every rank's rows as one part, by rank; ranks without rows have no part."""
    if ranks.size == 1:
        return [torch.cat(list(rows))]
    # The first rank's part is never shorter than another's; only the last one may be short.
    shape = ranks.share(torch.tensor(torch.cat(list(rows)).shape) if ranks.is_first else None)
    length, *rest = shape.tolist()
    # Padded to one size, with a last row that holds the real number of rows.
    padded = torch.full((length + 1, *rest), UNUSABLE, dtype=torch.int32)
    num_rows = sum(map(len, rows))
    if rows:
        padded[:num_rows] = torch.cat(list(rows))
    padded[-1] = num_rows
    parts = torch.split(ranks.gather(padded), length + 1)
    return [part[: int(part[-1].flatten()[0])] for part in parts if part[-1].any()]


def _dtype(codebook_size: int) -> torch.dtype:
    return torch.int16 if codebook_size <= torch.iinfo(torch.int16).max else torch.int32


def _key(dataset: Dataset, dvae_hash: str, part_pairs: int) -> str:
    content = f"{dataset.fingerprint} {len(dataset)} {dataset.image_size} {dvae_hash} {part_pairs}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.safetensors"


def _read_parts(folder: Path) -> list[Tensor]:
    """Read the parts from the first one on, up to the first that is missing or damaged."""
    parts: list[Tensor] = []
    while (path := _part_path(folder, len(parts))).is_file():
        try:
            parts.append(load_file(path)["tokens"])
        except (SafetensorError, OSError, KeyError) as error:
            log.warning("%s cannot be read (%s); its images are encoded again", path, error)
            break
    return parts


def _write_part(folder: Path, number: int, tokens: Tensor) -> None:
    path = _part_path(folder, number)
    content = save({"tokens": tokens.contiguous()})
    with disk_errors(
        f"write the image tokens {path}",
        if_full="the parts before it are kept. Give the job a larger volume",
        directory=folder,
        num_bytes=len(content),
    ):
        write_atomically(path, content)
