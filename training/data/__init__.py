"""A channel's image-caption pairs, and batches of them. Import from the modules.

    channel.open_channel(directory) -> Dataset      files or shards are found, bad ones counted
    opening.open_data(channel, …) -> Opened         the same for a job: pipes, parts, decoding
    memory.decode_if_small(dataset) -> Dataset      small sets are decoded once, into memory
    tokenised.tokenise(dataset, …) -> Dataset       large ones encoded once, for the transformer
    batches.Batches(dataset, …).batch(step) -> Batch

pairs.py says what a data set is. `python -m training.data` works on channels before a job.
"""
