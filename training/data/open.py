"""A job's channel as the data set to train or validate on: whatever brings it, decoded if small.

opened = open_data(channel, ..., ranks=ranks, num_hosts=2, stop=stop)
opened.pairs        this host's; opened.whole tells of all hosts'
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle.platform.environment import Channel
from training.data.batching.preload import InMemory, is_small
from training.data.batching.subset import Subset
from training.data.pairs import Dataset, Whole
from training.data.pipe.channel import open_pipe
from training.data.sharded import Part, agreed
from training.data.sources.channel import open_channel
from training.data.sources.index import StoredPairs
from training.distributed.process_group import Ranks
from training.stopping import Stop


@dataclass(frozen=True)
class Opened:
    """A channel's pairs.

    pairs: this host's. part: which part of the channel they are; None when they are all of it.
    whole: of all hosts' parts.
    """

    pairs: Dataset
    part: Part | None
    whole: Whole


def open_data(
    channel: Channel,
    *,
    image_size: int,
    max_bad_share: float,
    caption_key: str | None,
    ranks: Ranks,
    num_hosts: int,
    stop: Stop,
    most: int | None = None,
) -> Opened:
    """Find a channel's pairs, and decode them into memory where that is small on every host.

    most: draw a sample of so many pairs, all hosts together.
    Called by every rank. Raises what `open_channel`, `open_pipe` and `InMemory` do; Stopped on
    every rank when one is stopped.
    """
    is_parted = channel.distribution == "ShardedByS3Key" and num_hosts > 1
    part = Part(ranks, num_hosts) if is_parted else None
    is_streamed = channel.input_mode == "Pipe"
    # A stream is read by one rank of each host.
    siblings = part.siblings if part else ranks.parted(num_hosts) if is_streamed else ranks
    # What is too much is told of the whole channel, not of one host's part.
    share = 1.0 if part else max_bad_share

    def stored() -> StoredPairs:
        if is_streamed:
            return open_pipe(
                channel,
                image_size=image_size,
                max_bad_share=share,
                caption_key=caption_key,
                ranks=siblings,
                stop=stop,
            )
        return open_channel(
            channel.directory,
            image_size=image_size,
            channel=channel.name,
            max_bad_share=share,
            caption_key=caption_key,
            is_streamed=channel.input_mode == "FastFile",
            is_part=is_parted,
            stop=stop,
        )

    found = agreed(ranks, stored)
    if part:
        found.max_bad_share = max_bad_share
        part.settle(found.skips, max_bad_share)
    dataset: Dataset = found
    if most is not None:
        dataset = Subset(found, max(1, most // num_hosts) if part else most)
    if not ranks.any(not is_small(dataset)):
        source = dataset
        dataset = agreed(ranks, lambda: InMemory(source, stop))
        if part:
            part.settle(found.skips, max_bad_share)
    return Opened(dataset, part, whole_of(dataset, part))


def whole_of(dataset: Dataset, part: Part | None) -> Whole:
    """Of all hosts' parts; called by every rank when it is a part."""
    return Whole.of(dataset) if part is None else part.whole(dataset)
