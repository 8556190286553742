"""A job's channel as the data set to train or validate on: files or a pipe, preloaded if small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dalle.platform.environment import Channel
from training.data.batching.preload import Preloaded, is_small
from training.data.held_out import TRAIN, refuse_held_out
from training.data.pairs import Dataset, Subset, Totals
from training.data.pipe.channel import open_pipe
from training.data.sharded import HostPart, on_all_ranks
from training.data.sources.channel import open_channel
from training.data.sources.index import Pairs
from training.distributed.process_group import ProcessGroup
from training.stopping import Stop


@dataclass(frozen=True)
class OpenedChannel:
    """A channel's pairs.

    pairs: those of this host. part: which part of the channel they are; None when they are all.
    totals: of all hosts together.
    """

    pairs: Dataset
    part: HostPart | None
    totals: Totals


def open_data(
    channel: Channel,
    *,
    image_size: int,
    max_bad_share: float,
    caption_key: str | None,
    ranks: ProcessGroup,
    num_hosts: int,
    stop: Stop,
    most: int | None = None,
    prepare: Callable[[Pairs, HostPart | None], None] | None = None,
) -> OpenedChannel:
    """Find a channel's pairs, and decode them into memory where they are few on every host.

    prepare: changes captions before any image is read, see `long_captions`; every rank calls it.
    most: take a random sample of so many pairs, all hosts together.
    Every rank calls this. Raises what `open_channel`, `open_pipe` and `Preloaded` raise; Stopped on
    every rank when one is stopped.
    """
    is_sharded = channel.distribution == "ShardedByS3Key" and num_hosts > 1
    part = HostPart(ranks, num_hosts) if is_sharded else None
    # max_bad_share is a share of the whole channel, so one host's part is not held to it.
    max_bad_share_here = 1.0 if part else max_bad_share

    def find() -> Pairs:
        pairs = listed()
        if channel.name == TRAIN:
            refuse_held_out(pairs, channel.directory)
        return pairs

    def listed() -> Pairs:
        if channel.input_mode == "Pipe":
            return open_pipe(
                channel,
                image_size=image_size,
                max_bad_share=max_bad_share_here,
                caption_key=caption_key,
                ranks=part.host_ranks if part else ranks.parted(num_hosts),
                stop=stop,
            )
        return open_channel(
            channel.directory,
            image_size=image_size,
            channel=channel.name,
            max_bad_share=max_bad_share_here,
            caption_key=caption_key,
            is_streamed=channel.input_mode == "FastFile",
            is_part=is_sharded,
            stop=stop,
        )

    found = on_all_ranks(ranks, find)
    if prepare is not None:
        prepare(found, part)
    if part:
        found.max_bad_share = max_bad_share
        part.share_skips(found.skips, max_bad_share)
    pairs: Dataset = found
    if most is not None:
        pairs = Subset(found, max(1, most // num_hosts) if part else most)
    if not ranks.any(not is_small(pairs)):
        source = pairs
        pairs = on_all_ranks(ranks, lambda: Preloaded(source, stop))
        if part:
            part.share_skips(found.skips, max_bad_share)
    return OpenedChannel(pairs, part, totals_of(pairs, part))


def totals_of(dataset: Dataset, part: HostPart | None) -> Totals:
    """Return the totals of all hosts' parts, or of the data set when it is no part.

    Every rank calls this.
    """
    return Totals.of(dataset) if part is None else part.totals(dataset)
