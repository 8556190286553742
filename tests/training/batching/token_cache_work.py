"""What each rank does in test_token_cache.py."""

import torch

from tests.training.pairs import SIZE
from training.data.batching import token_cache
from training.data.sources.channel import open_channel
from training.distributed.process_group import SINGLE_PROCESS


def encode(images):
    """Each picture's number as its tokens: [B, 2, 1]."""
    numbers = (images[:, 0, 0, :2] * 255).round().long()
    return numbers[:, :, None]


def cache_tokens(channel, out, ranks=SINGLE_PROCESS, encode=encode, **options):
    """The pictures of a channel, three a step and six a part."""
    dataset = open_channel(channel, image_size=SIZE, max_bad_share=0.5)
    fixed = {"dvae_hash": "d", "codebook_size": 256, "device": torch.device("cpu")}
    fixed |= {"step_pairs": 3, "part_pairs": 6}
    return token_cache.cache_tokens(
        dataset,
        encode,
        **{"directory": out, "num_workers": 0, "ranks": ranks} | fixed | options,
    )


def work(ranks, channel, out):
    """Tokens, pairs and what was left out, as this rank sees them."""
    own = out / str(ranks.rank)  # each host has its own disk
    found = cache_tokens(channel, own, ranks)
    names = [found.name(index) for index in range(len(found))]
    return {"tokens": found.tokens, "names": names, "skips": found.skips.as_dict()}
