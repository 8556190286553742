"""A channel's image-caption pairs, and batches of them. Import from the modules.

    sources.channel.open_channel(directory) -> Dataset  finds files or shards, counts bad ones
    open.open_data(channel, …) -> OpenedChannel         the same for a job: pipes, hosts, preloading
    batching.preload.preload_if_small(dataset)          decodes small sets once, into memory
    batching.token_cache.cache_tokens(dataset, …)       encodes large sets once, for the transformer
    batching.batches.Batches(dataset, …).batch(step) -> Batch

pairs.py defines `Dataset`, skips.py counts what is left out. `python -m training.data` checks and
packs channels before a job.
"""
