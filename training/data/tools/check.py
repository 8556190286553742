"""Checks of a channel before a job is paid for. See `training.data.tools.findings`.

The channel is read as training reads it, each image is decoded once, and what training would skip
or refuse is counted under the same names. Training does not look for two things that are counted
too: images that occur twice, and images of the channel `validation` that are trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from dalle.errors import CaptionTooLong, DataError
from dalle.platform.limits import usable_cpus
from dalle.preprocess.images import ImageError
from training.config.fields import JobHyperparameters
from training.data.held_out import TRAIN, refuse_held_out
from training.data.skips import SkipReason, printable
from training.data.sources.channel import open_channel
from training.data.sources.index import Pairs
from training.data.tools.findings import EXAMPLES, ChannelFindings, Doubles, Findings, LongCaptions
from training.stopping import NEVER

if TYPE_CHECKING:
    from dalle.preprocess.tokenizer import CaptionTokenizer

THREAD_CHUNK = 64  # images that threads work on at a time
ENCODE_CHUNK = 4096


def check(
    directory: Path, validation: Path | None, settings: JobHyperparameters, image_size: int
) -> Findings:
    """Check a channel, and the held-out one that goes with it, for a job of these settings."""
    findings: dict[str, ChannelFindings] = {}
    opened: dict[str, Pairs] = {}
    roots = {TRAIN: directory} | ({} if validation is None else {"validation": validation})
    for channel, root in roots.items():
        try:
            opened[channel] = open_channel(
                root,
                image_size=image_size,
                channel=channel,
                max_bad_share=1.0,  # everything is counted, however much of it is bad
                caption_key=settings.caption_key or None,
            )
        except DataError as error:
            findings[channel] = ChannelFindings(channel, str(root), refusal=str(error))
    tokenizer = _tokenizer(opened, settings)
    long_captions = _long_captions(opened, tokenizer, settings)
    images: dict[str, dict[bytes, str]] = {TRAIN: {}, "validation": {}}
    for channel, dataset in opened.items():
        fault = _fault(dataset, roots[channel], tokenizer, settings.long_captions)
        found = _check_channel(dataset, str(roots[channel]), images[channel])
        findings[channel] = replace(found, fault=fault)
    leaks = [
        f"{name} is {images[TRAIN][digest]}"
        for digest, name in images["validation"].items()
        if digest in images[TRAIN]
    ]
    num_shared_captions = 0
    if len(opened) == 2:
        trained_on = {caption for _, caption in _captions(opened[TRAIN])}
        shared = (caption in trained_on for _, caption in _captions(opened["validation"]))
        num_shared_captions = sum(shared)
    return Findings(
        [findings[channel] for channel in roots],
        leaks=Doubles.of(leaks),
        num_shared_captions=num_shared_captions,
        long_captions=long_captions,
        max_bad_share=settings.max_bad_share,
    )


def _fault(
    dataset: Pairs,
    root: Path,
    tokenizer: CaptionTokenizer | str,
    how: Literal["fail", "cut", "skip"],
) -> str | None:
    """Cut or leave out captions as a job would; return why it would refuse the channel."""
    try:
        if dataset.channel == TRAIN:
            refuse_held_out(dataset, root)
        if how != "fail" and not isinstance(tokenizer, str):
            from training.data.long_captions import fit_captions  # it imports torch

            fit_captions(dataset, tokenizer, how, NEVER)
    except DataError as error:
        return str(error)
    return None


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


def _tokenizer(opened: Mapping[str, Pairs], settings: JobHyperparameters) -> CaptionTokenizer | str:
    """Return the tokenizer that training would learn, or why there is none."""
    if TRAIN not in opened:
        return "there are no captions to train on"
    try:
        from dalle.preprocess.tokenizer import CaptionTokenizer  # torch: a laptop need not have it
    except ImportError as error:
        return f"{error.name} is not installed here"
    return CaptionTokenizer.train(
        (caption for _, caption in _captions(opened[TRAIN])),
        kind=settings.tokenizer_kind,
        vocab_size=settings.tokenizer_vocab_size,
        text_length=settings.text_length,
    )


def _long_captions(
    opened: Mapping[str, Pairs], tokenizer: CaptionTokenizer | str, settings: JobHyperparameters
) -> LongCaptions:
    """Find captions of more tokens than models read."""
    result = LongCaptions(settings.text_length, settings.long_captions)
    if isinstance(tokenizer, str):
        return replace(result, unchecked=tokenizer)

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
    return replace(result, count=len(found), names=found[:EXAMPLES])
