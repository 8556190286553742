"""Checks of a channel before a job is paid for. See `training.data.tools.findings`.

The channel is read as training reads it, each image is decoded once, and what training would skip
or refuse is counted under the same names. Training does not look for two things that are counted
too: images that occur twice, and images of the channel `validation` that are trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dalle.errors import CaptionTooLong, DataError
from dalle.platform.limits import usable_cpus
from dalle.preprocess.images import ImageError
from dalle.types import TokenizerKind
from training.data.skips import SkipReason, printable
from training.data.sources.channel import open_channel
from training.data.sources.index import Pairs
from training.data.tools.findings import EXAMPLES, ChannelFindings, Doubles, Findings, LongCaptions

THREAD_CHUNK = 64  # images that threads work on at a time
ENCODE_CHUNK = 4096


@dataclass(frozen=True)
class CheckOptions:
    """Settings of the job; the names are those of hyperparameters."""

    image_size: int
    max_bad_share: float
    caption_key: str | None
    text_length: int
    tokenizer_kind: TokenizerKind
    tokenizer_vocab_size: int


def check(directory: Path, validation: Path | None, options: CheckOptions) -> Findings:
    """Check a channel, and the held-out one that goes with it."""
    findings: list[ChannelFindings] = []
    opened: dict[str, Pairs] = {}
    images: dict[str, dict[bytes, str]] = {"train": {}, "validation": {}}
    for channel, root in (("train", directory), ("validation", validation)):
        if root is None:
            continue
        try:
            dataset = open_channel(
                root,
                image_size=options.image_size,
                channel=channel,
                max_bad_share=1.0,  # everything is counted, however much of it is bad
                caption_key=options.caption_key,
            )
        except DataError as error:
            findings.append(ChannelFindings(channel, str(root), refusal=str(error)))
            continue
        opened[channel] = dataset
        findings.append(_check_channel(dataset, str(root), images[channel]))
    leaks = [
        f"{name} is {images['train'][digest]}"
        for digest, name in images["validation"].items()
        if digest in images["train"]
    ]
    num_shared_captions = 0
    if len(opened) == 2:
        trained_on = {caption for _, caption in _captions(opened["train"])}
        shared = (caption in trained_on for _, caption in _captions(opened["validation"]))
        num_shared_captions = sum(shared)
    return Findings(
        findings,
        leaks=Doubles.of(leaks),
        num_shared_captions=num_shared_captions,
        long_captions=_long_captions(opened, options),
        max_bad_share=options.max_bad_share,
    )


def _check_channel(dataset: Pairs, directory: str, images: dict[bytes, str]) -> ChannelFindings:
    """Decode all of a channel. images: filled with the name of each digest's first image."""
    doubles: list[str] = []
    for index, digest in _digests(dataset):
        name = printable(dataset.name(index))
        first = images.setdefault(digest, name)
        if first != name:
            doubles.append(f"{name} is {first}")
    skips = dataset.skips
    return ChannelFindings(
        dataset.channel,
        directory,
        layout=dataset.layout,
        num_pairs=skips.num_good,
        num_captions=sum(len(dataset.captions(index)) for index in range(len(dataset))),
        num_bytes=sum(dataset.num_bytes(index) for index in range(len(dataset))),
        num_bad=skips.num_bad,
        fingerprint=dataset.fingerprint,
        skipped=skips.as_dict(),
        examples={reason.value: names for reason, names in skips.examples.items()},
        matches={match.value: count for match, count in skips.matches.items()},
        doubles=Doubles.of(doubles),
    )


def _digests(dataset: Pairs) -> Iterator[tuple[int, bytes]]:
    """Hash each image that can be decoded, as the models see it; the others are counted."""

    def digest(index: int) -> bytes | ImageError:
        try:
            return hashlib.sha256(dataset.image(index).tobytes()).digest()[:16]
        except ImageError as error:
            return error

    bar = tqdm(
        range(len(dataset)), f"decoding {dataset.channel}", unit="images", disable=None, delay=0.5
    )
    numbers = iter(bar)
    # Pillow decodes without the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(usable_cpus()) as threads:
        while chunk := list(itertools.islice(numbers, THREAD_CHUNK)):
            for index, result in zip(chunk, threads.map(digest, chunk), strict=True):
                if isinstance(result, ImageError):
                    reason = SkipReason.of(result)
                    dataset.skips.add_damaged(reason, dataset.name(index), str(result))
                else:
                    yield index, result


def _captions(dataset: Pairs) -> Iterator[tuple[str, str]]:
    """Yield the name of a pair and a caption of it, for all captions."""
    for index in range(len(dataset)):
        for caption in dataset.captions(index):
            yield dataset.name(index), caption


def _long_captions(opened: dict[str, Pairs], options: CheckOptions) -> LongCaptions:
    """Find captions that training would refuse, with the tokenizer that it would train."""
    if "train" not in opened:
        return LongCaptions(options.text_length, "there are no captions to train on")
    try:
        from dalle.preprocess.tokenizer import CaptionTokenizer  # torch: a laptop need not have it
    except ImportError as error:
        return LongCaptions(options.text_length, f"{error.name} is not installed here")
    tokenizer = CaptionTokenizer.train(
        (caption for _, caption in _captions(opened["train"])),
        kind=options.tokenizer_kind,
        vocab_size=options.tokenizer_vocab_size,
        text_length=options.text_length,
    )

    def too_long(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
        for name, caption in pairs:
            try:
                tokenizer.encode([caption])
            except CaptionTooLong as error:
                yield f"{name}: {error}"

    found: list[str] = []
    captions = (
        (f"{channel}/{printable(name)}", caption)
        for channel, dataset in opened.items()
        for name, caption in _captions(dataset)
    )
    while chunk := list(itertools.islice(captions, ENCODE_CHUNK)):
        try:
            tokenizer.encode([caption for _, caption in chunk])
        except CaptionTooLong:  # at least one of them
            found += too_long(chunk)
    return LongCaptions(options.text_length, None, len(found), found[:EXAMPLES])
