"""What each rank does in test_sharded.py."""

from unittest.mock import patch

import torch

from dalle.errors import DataError
from dalle.platform.environment import Channel
from tests.training.pairs import SIZE
from training.data import open as opening
from training.data.batching.batches import Batches
from training.data.batching.preload import Preloaded
from training.loop.stages import StageData
from training.stopping import NEVER

HOSTS = 2
STEPS = 12


def opened(folder, ranks, max_bad_share=0.2):
    """A channel whose parts are the folder's sub-folders 0 and 1."""
    directory = folder / str(ranks.rank // (ranks.size // HOSTS))
    return opening.open_data(
        Channel("train", directory, distribution="ShardedByS3Key"),
        image_size=SIZE,
        max_bad_share=max_bad_share,
        caption_key=None,
        ranks=ranks,
        num_hosts=HOSTS,
        stop=NEVER,
    )


def refusal(folder, ranks):
    try:
        opened(folder, ranks, max_bad_share=0.03)
    except DataError as error:
        return str(error)
    return ""


def batches(found, ranks, **options):
    given = {"rank": ranks.rank, "world_size": ranks.size, "part": found.part}
    given |= {"totals": found.totals, "num_workers": 0, "batch_size": 4, "seed": 3}
    return Batches(found.pairs, **given | options)


def validation(found, ranks):
    """The mean over all pairs of the numbers in their captions."""
    own = batches(found, ranks, rank=0, world_size=1, part=None, shuffle=False, last="keep")
    data = StageData(own, own, torch.device("cpu"), ranks=ranks, is_validation_parted=True)

    def measure(batch):
        numbers = [float(caption.split()[1]) for caption in batch.captions]
        return {"number": torch.tensor(numbers).mean()}

    return data.validation_means(measure)["number"]


def work(ranks, folder):
    found = opened(folder, ranks)
    with patch.object(
        opening, "is_small", lambda dataset: ranks.is_first
    ):  # not so on one host alone
        lazy = opened(folder, ranks)
    mine = batches(found, ranks)
    captions = (caption for i in range(len(found.pairs)) for caption in found.pairs.captions(i))
    options = {"vocab_size": 300, "text_length": 16}
    return {
        "steps": [mine.batch(step).captions for step in range(STEPS)],
        "num_per_epoch": mine.num_per_epoch,
        "identity": {key: str(value) for key, value in mine.identity().items()},
        "skips": found.pairs.skips.as_dict(),
        "examples": found.pairs.skips.describe(),
        "totals": [found.totals.num_pairs, found.totals.num_captions],
        "decoded": [isinstance(each.pairs, Preloaded) for each in (found, lazy)],
        "validation": validation(found, ranks),
        "word": found.part.tokenizer(captions, kind="word", **options).identity(),
        "host_ranks": found.part.host_ranks.each(ranks.rank),
        "refusal": refusal(folder, ranks),
    }
