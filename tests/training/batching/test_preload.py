"""Data sets decoded once, samples of them, and their skips."""

import threading

import pytest
import torch

from tests.training.pairs import SIZE, channel_of
from training.data.batching.batches import Batches
from training.data.batching.preload import (
    Preloaded,
    first_usable,
    float_chunks,
    images_per_chunk,
    preload_if_small,
)
from training.data.pairs import Subset
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel
from training.stopping import Stopped


@pytest.mark.parametrize("is_decoded", [True, False])
def test_a_sample_of_a_healthy_channel_is_not_held_to_have_all_its_bad_pairs(tmp_path, is_decoded):
    folder = channel_of(tmp_path, 40)
    for number in range(3):
        (folder / f"x{number}.txt").write_text("alone")
    dataset = open_channel(folder, image_size=SIZE, max_bad_share=0.1)
    sample = Subset(dataset, 10)
    (folder / sample.name(0)).write_bytes(b"no")
    batches = Batches(
        preload_if_small(sample) if is_decoded else sample, batch_size=10, seed=0, num_workers=0
    )
    batches.batch(0)
    assert dataset.skips.num_bad == 4  # of 43, but 4 of 13 would be too many
    assert batches.dataset.captions(0)[0].split()[1] == batches.dataset.name(0)[:3].lstrip("0")


def test_the_first_usable_images_come_with_their_own_captions(tmp_path):
    dataset = open_channel(channel_of(tmp_path, 6), image_size=SIZE)
    (tmp_path / "001.png").write_bytes(b"no")
    images, captions = first_usable(dataset, 3)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert captions == ["picture 0", "picture 2", "picture 3"]
    assert dataset.skips.counts == {SkipReason.NOT_AN_IMAGE: 1}


def test_a_file_that_vanishes_is_an_unreadable_one(tmp_path):
    folder = channel_of(tmp_path, 20)
    dataset = open_channel(folder, image_size=SIZE)
    (folder / "003.png").unlink()
    decoded = preload_if_small(dataset)
    assert len(decoded) == 19
    assert decoded.name(3) == "004.png"
    assert decoded.captions(3) == ("picture 4",)
    assert (decoded.image(3) == 4).all()
    assert dataset.skips.counts == {SkipReason.UNREADABLE: 1}


def test_only_a_data_set_that_fits_is_decoded(tmp_path):
    dataset = open_channel(channel_of(tmp_path, 3), image_size=SIZE)
    num_bytes = 3 * 3 * SIZE**2
    assert isinstance(preload_if_small(dataset, num_bytes), Preloaded)
    assert preload_if_small(dataset, num_bytes - 1) is dataset


class StoppingAt:
    """A data set that asks for a stop while its image `number` is decoded."""

    def __init__(self, source, stop, number):
        self.source, self.stop, self.number, self.decoded = source, stop, number, []

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)

    def image(self, index):
        self.decoded.append(index)
        if index == self.number:
            self.stop.set()
        return self.source.image(index)


@pytest.mark.parametrize(
    "work",
    [
        lambda dataset, stop: preload_if_small(dataset, stop=stop),
        lambda dataset, stop: first_usable(dataset, 8, stop),
    ],
)
def test_a_stop_ends_the_decoding(tmp_path, work):
    stop = threading.Event()
    dataset = StoppingAt(open_channel(channel_of(tmp_path, 9), image_size=SIZE), stop, number=2)
    with pytest.raises(Stopped):
        work(dataset, stop)
    assert dataset.decoded == [0, 1, 2]


def test_no_more_pixels_go_to_a_model_at_once_than_it_is_soon_done_with():
    assert [images_per_chunk(side) for side in (16, 32, 256, 1024, 4096)] == [256, 256, 16, 1, 1]
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 600, 600)
    chunks = list(float_chunks(images, torch.device("cpu")))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat(chunks), images.float() / 255)
