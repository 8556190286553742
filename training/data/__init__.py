"""A channel's image-caption pairs, and batches of them. Import from the modules.

    folder.open_folder(directory) -> Dataset        files are found, captions read, bad ones counted
    memory.decode_if_small(dataset) -> Dataset      small sets are decoded once, into memory
    batches.Batches(dataset, …).batch(step) -> Batch

pairs.py says what a data set is, so that other sources can stand in for a folder.
"""
