"""What is wrong with a channel, found before a job is paid for. See `training.data.tools.findings`.

The channel is read as training reads it, each image decoded once, and what training would skip or
refuse is counted by the same names. Two things training does not look for: pictures that occur
twice, and pictures of the channel `validation` that are trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dalle.errors import CaptionTooLong, DataError
from dalle.preprocess.images import ImageError
from dalle.types import TokenizerKind
from training.data.skips import SkipReason, printable
from training.data.sources.channel import open_channel
from training.data.sources.index import Pairs
from training.data.tools.findings import ChannelFindings, Doubles, Findings, LongCaptions

AT_ONCE = 64  # images on their way through the threads
ENCODE_CHUNK = 4096


@dataclass(frozen=True)
class CheckOptions:
    """What training would be told; the names are those of hyperparameters."""

    image_size: int
    max_bad_share: float
    caption_key: str | None
    text_length: int
    tokenizer_kind: TokenizerKind
    tokenizer_vocab_size: int


@dataclass(frozen=True)
class _Looked:
    """A channel that could be opened, and the pictures it holds: digest -> the first's name."""

    dataset: Pairs
    pictures: dict[bytes, str]
    findings: ChannelFindings


def check(directory: Path, validation: Path | None, options: CheckOptions) -> Findings:
    """Look at a channel, and at the held-out one that goes with it."""
    train = _look(directory, "train", options)
    held_out = None if validation is None else _look(validation, "validation", options)
    looked = [each for each in (train, held_out) if isinstance(each, _Looked)]
    leaks = Doubles(0, [])
    if isinstance(train, _Looked) and isinstance(held_out, _Looked):
        names = [
            f"{name} is {train.pictures[digest]}"
            for digest, name in held_out.pictures.items()
            if digest in train.pictures
        ]
        leaks = Doubles(len(names), names)
    channels = [
        each.findings if isinstance(each, _Looked) else each
        for each in (train, held_out)
        if each is not None
    ]
    return Findings(
        channels,
        leaks=leaks,
        num_shared_captions=_shared_captions(looked),
        long_captions=_long_captions([each.dataset for each in looked], options),
        max_bad_share=options.max_bad_share,
    )


def _look(directory: Path, channel: str, options: CheckOptions) -> _Looked | ChannelFindings:
    """Open a channel and decode all of it; findings alone when it cannot be opened."""
    try:
        dataset = open_channel(
            directory,
            image_size=options.image_size,
            channel=channel,
            max_bad_share=1.0,  # everything is to be seen, however much of it is bad
            caption_key=options.caption_key,
        )
    except DataError as error:
        return ChannelFindings(channel, str(directory), refusal=str(error))
    pictures: dict[bytes, str] = {}
    doubles: list[str] = []
    for index, digest in _digests(dataset):
        name = printable(dataset.name(index))
        first = pictures.setdefault(digest, name)
        if first != name:
            doubles.append(f"{name} is {first}")
    skips = dataset.skips
    findings = ChannelFindings(
        channel,
        str(directory),
        layout=dataset.layout,
        num_pairs=skips.num_good,
        num_captions=sum(len(dataset.captions(index)) for index in range(len(dataset))),
        num_bytes=sum(dataset.num_bytes(index) for index in range(len(dataset))),
        num_bad=skips.num_bad,
        fingerprint=dataset.fingerprint,
        skipped=skips.as_dict(),
        examples={reason.value: names for reason, names in skips.examples.items()},
        doubles=Doubles(len(doubles), doubles),
    )
    return _Looked(dataset, pictures, findings)


def _digests(dataset: Pairs) -> Iterator[tuple[int, bytes]]:
    """A hash of each picture that can be decoded, as the models see it; the others are counted."""

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
    with ThreadPoolExecutor(_num_cpus()) as threads:
        while chunk := list(itertools.islice(numbers, AT_ONCE)):
            for index, result in zip(chunk, threads.map(digest, chunk), strict=True):
                if isinstance(result, ImageError):
                    reason = SkipReason.of(result)
                    dataset.skips.add_damaged(reason, dataset.name(index), str(result))
                else:
                    yield index, result


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _captions(dataset: Pairs) -> Iterator[tuple[str, str]]:
    """The name of a pair and a caption of it, for all captions."""
    for index in range(len(dataset)):
        for caption in dataset.captions(index):
            yield dataset.name(index), caption


def _shared_captions(looked: Sequence[_Looked]) -> int:
    """Held-out captions that are trained on word for word."""
    if len(looked) < 2:
        return 0
    known = {caption for _, caption in _captions(looked[0].dataset)}
    return sum(caption in known for _, caption in _captions(looked[1].dataset))


def _long_captions(datasets: Iterable[Pairs], options: CheckOptions) -> LongCaptions:
    """Captions that training would refuse, by the tokenizer that it would make."""
    datasets = list(datasets)
    if not datasets or datasets[0].channel != "train":
        return LongCaptions(options.text_length, "there are no captions to train on")
    try:
        from dalle.preprocess.tokenizer import CaptionTokenizer  # torch: a laptop need not have it
    except ImportError as error:
        return LongCaptions(options.text_length, f"{error.name} is not installed here")
    tokenizer = CaptionTokenizer.train(
        (caption for _, caption in _captions(datasets[0])),
        kind=options.tokenizer_kind,
        vocab_size=options.tokenizer_vocab_size,
        text_length=options.text_length,
    )
    too_long: list[str] = []
    everything = (
        (f"{dataset.channel}/{printable(name)}", caption)
        for dataset in datasets
        for name, caption in _captions(dataset)
    )
    while chunk := list(itertools.islice(everything, ENCODE_CHUNK)):
        try:
            tokenizer.encode([caption for _, caption in chunk])
        except CaptionTooLong:  # of one of them; now one by one
            for name, caption in chunk:
                try:
                    tokenizer.encode([caption])
                except CaptionTooLong as error:
                    too_long.append(f"{name}: {error}")
    return LongCaptions(options.text_length, None, len(too_long), too_long)
