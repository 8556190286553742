"""Images, captions and text tokens of a step, from small and large sets."""

import threading

import pytest
import torch

from dalle.errors import CaptionTooLong, DataError
from dalle.preprocess.images import encode_image
from tests.training.pairs import SIZE, channel_of, picture, put
from training.data.batching.batches import Batch, Batches
from training.data.batching.preload import preload_if_small
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel
from training.stopping import Stopped


def pixel_numbers(batch):
    """The numbers of the pictures in a batch, read from their pixels."""
    assert (batch.images == batch.images[:, :1, :1, :1]).all()
    return (batch.images[:, 0, 0, 0] * 255).round().int().tolist()


def caption_numbers(batch):
    return [int(caption.split()[1]) for caption in batch.captions]


class NumberEncoder:
    """Encodes `picture 12 again` as its number and its count of words.

    after: called behind every encoding.
    """

    def __init__(self, name="numbers", after=lambda: None):
        self.name, self.after = name, after

    def identity(self):
        return self.name

    def encode(self, captions):
        words = [caption.split() for caption in captions]
        if any(len(parts) > 5 for parts in words):
            raise CaptionTooLong("a caption has 6 tokens; the limit is 5")
        self.after()
        return torch.tensor([[int(parts[1]), len(parts)] for parts in words])


@pytest.mark.parametrize("num_workers", [None, 0, 1])  # None: decoded into memory
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of threads
def test_images_captions_and_tokens_of_a_batch_belong_together(tmp_path, num_workers):
    folder = open_channel(channel_of(tmp_path, 10, captions=2), image_size=SIZE)
    dataset = preload_if_small(folder) if num_workers is None else folder
    options = {"batch_size": 4, "seed": 1, "num_workers": num_workers}
    with Batches(dataset, tokenizer=NumberEncoder(), **options) as batches:
        for step in range(5):
            batch = batches.batch(step)
            assert batch.images.dtype == torch.float32
            assert batch.images.shape == (4, 3, SIZE, SIZE)
            assert batch.text_tokens.dtype == torch.int64
            assert pixel_numbers(batch) == caption_numbers(batch) == batch.indices.tolist()
            words = [len(caption.split()) for caption in batch.captions]
            assert batch.text_tokens[:, 0].tolist() == pixel_numbers(batch)
            assert batch.text_tokens[:, 1].tolist() == words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_batch_depends_on_its_step_alone(tmp_path):
    dataset = open_channel(channel_of(tmp_path, 11, captions=3), image_size=SIZE)
    decoded = preload_if_small(dataset)
    through = Batches(decoded, batch_size=4, seed=5)
    expected = [through.batch(step) for step in range(8)]
    resumed = Batches(decoded, batch_size=4, seed=5)
    with Batches(dataset, batch_size=4, seed=5, num_workers=2) as streamed:
        for step in (5, 6, 7, 0, 1):
            for batches in (resumed, streamed):
                batch = batches.batch(step)
                assert torch.equal(batch.images, expected[step].images)
                assert batch.captions == expected[step].captions


def test_images_are_in_the_unit_range(tmp_path):
    for number in (0, 255):
        put(tmp_path, str(number), encode_image(picture(number), "png"), b"picture %d" % number)
    dataset = preload_if_small(open_channel(tmp_path, image_size=SIZE))
    batch = Batches(dataset, batch_size=2, seed=0).batch(0)
    assert sorted(batch.images.unique().tolist()) == [0.0, 1.0]


def test_a_pair_shows_all_its_captions_in_time(tmp_path):
    dataset = open_channel(channel_of(tmp_path, 2, captions=3), image_size=SIZE)
    batches = Batches(preload_if_small(dataset), batch_size=2, seed=0)
    seen = {caption for step in range(30) for caption in batches.batch(step).captions}
    assert len(seen) == 6


def test_one_too_long_caption_stops_the_job_before_it_begins(tmp_path):
    dataset = open_channel(channel_of(tmp_path, 2, captions=5), image_size=SIZE)
    with pytest.raises(CaptionTooLong):
        Batches(dataset, batch_size=2, seed=0, tokenizer=NumberEncoder())


def test_taking_batches_leaves_the_global_random_state_alone(tmp_path):
    dataset = open_channel(channel_of(tmp_path, 4), image_size=SIZE)
    before = torch.get_rng_state()
    for each in (dataset, preload_if_small(dataset)):
        with Batches(each, batch_size=2, seed=0, num_workers=0) as batches:
            batches.batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_may_be_changed_without_harm_to_the_next(tmp_path):
    dataset = preload_if_small(open_channel(channel_of(tmp_path, 4), image_size=SIZE))
    batches = Batches(dataset, batch_size=4, seed=0)
    batches.batch(0).images.zero_()
    assert sorted(pixel_numbers(batches.batch(0))) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_in_a_large_set_the_next_pair_stands_in_for_a_damaged_one(tmp_path, num_workers):
    folder = channel_of(tmp_path, 20)
    (folder / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    dataset = open_channel(folder, image_size=SIZE)
    options = {"batch_size": 20, "seed": 0, "num_workers": num_workers}
    with Batches(dataset, tokenizer=NumberEncoder(), **options) as batches:
        for step in range(2):
            batch = batches.batch(step)
            numbers = pixel_numbers(batch)
            assert sorted(numbers) == sorted([*range(3), 4, *range(4, 20)])
            assert numbers == caption_numbers(batch) == batch.text_tokens[:, 0].tolist()
    assert dataset.skips.counts == {SkipReason.DAMAGED_IMAGE: 1}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_large_set_that_turns_out_bad_stops_the_job_with_the_reasons(tmp_path):
    folder = channel_of(tmp_path, 10)
    for number in range(4):
        (folder / f"00{number}.png").write_bytes(b"no")
    dataset = open_channel(folder, image_size=SIZE, max_bad_share=0.2)
    with (
        Batches(dataset, batch_size=10, seed=0, num_workers=1) as batches,
        pytest.raises(DataError, match="4 of 10 pairs cannot be used.*4 not an image"),
    ):
        batches.batch(0)


def test_other_pairs_and_other_tokens_make_another_identity(tmp_path):
    for name in ("a", "b"):
        channel_of(tmp_path / name, 4)
    whole, damaged = (
        open_channel(tmp_path / name, image_size=SIZE, max_bad_share=0.5) for name in ("a", "b")
    )
    size = (tmp_path / "b/001.png").stat().st_size
    (tmp_path / "b/001.png").write_bytes(b"x" * size)
    assert whole.fingerprint == damaged.fingerprint  # image contents are not read for it

    def identity(dataset, tokenizer=None):
        return Batches(dataset, batch_size=2, seed=0, tokenizer=tokenizer).identity()

    identities = [
        identity(preload_if_small(whole)),
        identity(preload_if_small(damaged)),
        identity(whole, NumberEncoder()),
        identity(whole, NumberEncoder("other numbers")),
    ]
    assert [each for each in identities if identities.count(each) > 1] == []
    assert identity(whole, NumberEncoder()) == identities[2]


def test_a_stop_ends_the_encoding_of_captions(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.batching.batches.ENCODE_CHUNK", 2)
    dataset = open_channel(channel_of(tmp_path, 8), image_size=SIZE)
    stop, encoded = threading.Event(), []

    def stop_at_the_second():
        encoded.append(1)
        if len(encoded) == 2:
            stop.set()

    tokenizer = NumberEncoder(after=stop_at_the_second)
    with pytest.raises(Stopped):
        Batches(dataset, batch_size=2, seed=0, tokenizer=tokenizer, stop=stop)
    assert len(encoded) == 2


def test_a_batchs_parts_are_the_batch_and_know_the_text_of_all_of_it():
    batch = Batch(torch.rand(6, 3, 2, 2), list("abcdef"), torch.arange(6), torch.ones(6, 4))
    parts = batch.micro_batches(3)
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert [part.captions for part in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert torch.cat([part.indices for part in parts]).tolist() == [0, 1, 2, 3, 4, 5]
    assert all(len(part.text_tokens) == 2 for part in parts)
    assert all(part.to("cpu").step_text_tokens is batch.text_tokens for part in parts)


def test_a_batch_that_cannot_be_parted_evenly_is_refused():
    batch = Batch(torch.rand(6, 3, 2, 2), list("abcdef"), torch.arange(6), None)
    with pytest.raises(DataError, match=r"gradient_accumulation_steps=4 .* but one has 6"):
        batch.micro_batches(4)
