"""training.data.batching.token_cache: image tokens of a large data set, computed once."""

import threading

import pytest
import torch

from dalle.errors import DataError, DiskFullError
from tests.permissions import small_disk
from tests.training.batching.token_cache_work import cache_tokens, encode, work
from tests.training.pairs import channel_of
from tests.training.ranks import results_of
from training.data.batching.batches import Batches
from training.data.batching.token_cache import tokens_fit
from training.data.skips import SkipReason
from training.stopping import Stopped


class Counting:
    """`encode`, and how many images it was given; a stop is set after some of them."""

    def __init__(self, stop=None, after=0):
        self.count, self.stop, self.after = 0, stop, after

    def __call__(self, images):
        self.count += len(images)
        if self.stop is not None and self.count >= self.after:
            self.stop.set()
        return encode(images)


def pair_numbers(dataset):
    return [int(dataset.captions(index)[0].split()[1]) for index in range(len(dataset))]


def test_every_pair_has_its_own_tokens_and_a_second_run_computes_none(tmp_path):
    channel = channel_of(tmp_path / "c", 20)
    first = cache_tokens(channel, tmp_path / "out")
    assert first.tokens[:, :, 0].tolist() == [[number, number] for number in range(20)]
    assert first.tokens.dtype == torch.int16
    again = Counting()
    assert torch.equal(cache_tokens(channel, tmp_path / "out", encode=again).tokens, first.tokens)
    assert again.count == 0


def test_an_interrupted_run_goes_on_with_the_next_part(tmp_path):
    channel, stop = channel_of(tmp_path / "c", 20), threading.Event()
    with pytest.raises(Stopped):
        cache_tokens(channel, tmp_path / "out", encode=Counting(stop, after=13), stop=stop)
    rest = Counting()
    dataset = cache_tokens(channel, tmp_path / "out", encode=rest)
    assert dataset.tokens[:, 0, 0].tolist() == list(range(20))
    assert rest.count == 20 - 12  # two parts of six were written


def test_a_part_without_room_keeps_those_before_it(tmp_path):
    channel, out = channel_of(tmp_path / "c", 20), tmp_path / "out"
    with small_disk(out, 4096):  # a page, which a part takes whole
        says = r"no room to write the image tokens \S+part-000001.* the parts before it are kept"
        with pytest.raises(DiskFullError, match=says):
            cache_tokens(channel, out)
        assert [path.name for path in out.glob("*/*")] == ["part-000000.safetensors"]


def test_a_damaged_part_is_computed_again(tmp_path, caplog):
    channel = channel_of(tmp_path / "c", 20)
    cache_tokens(channel, tmp_path / "out")
    (part,) = (tmp_path / "out").glob("*/part-000001.safetensors")
    part.write_bytes(part.read_bytes()[:-5])
    again = Counting()
    dataset = cache_tokens(channel, tmp_path / "out", encode=again)
    assert dataset.tokens[:, 0, 0].tolist() == list(range(20))
    assert again.count == 14
    assert "its images are encoded again" in caplog.text


@pytest.mark.parametrize("change", ["dvae", "caption", "pair"])
def test_other_data_and_another_dvae_have_tokens_of_their_own(tmp_path, change):
    channel = channel_of(tmp_path / "c", 12)
    cache_tokens(channel, tmp_path / "out")
    if change == "caption":
        (channel / "003.txt").write_text("picture 3, but other words")
    elif change == "pair":
        channel_of(channel, 13)
    again = Counting()
    cache_tokens(
        channel, tmp_path / "out", encode=again, dvae_hash="other" if change == "dvae" else "d"
    )
    assert again.count == (13 if change == "pair" else 12)


def test_a_damaged_image_is_left_out_and_counted_in_a_second_run_too(tmp_path):
    channel = channel_of(tmp_path / "c", 20)
    for number in (0, 7, 19):
        (channel / f"{number:03}.png").write_bytes(b"no")
    for _ in range(2):
        dataset = cache_tokens(channel, tmp_path / "out")
        numbers = [number for number in range(20) if number not in (0, 7, 19)]
        assert pair_numbers(dataset) == dataset.tokens[:, 0, 0].tolist() == numbers
        assert dataset.skips.counts == {SkipReason.NOT_AN_IMAGE: 3}
    for number in range(12):
        (channel / f"{number:03}.png").write_bytes(b"no")
    with pytest.raises(DataError, match="max_bad_share"):
        cache_tokens(channel, tmp_path / "fresh")


def test_batches_bring_the_numbers_of_tokens_and_no_image(tmp_path):
    dataset = cache_tokens(channel_of(tmp_path / "c", 20), tmp_path / "out")
    with Batches(dataset, batch_size=4, seed=0) as batches:
        seen = []
        for step in range(5):
            batch = batches.batch(step)
            assert batch.images.shape == (4, 3, 0, 0)
            numbers = [int(caption.split()[1]) for caption in batch.captions]
            assert dataset.tokens[batch.indices][:, 0, 0].tolist() == numbers
            seen += numbers
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("num_pairs", [20, 5])
def test_two_ranks_share_the_work_and_have_the_same_tokens(tmp_path, num_pairs):
    channel, out = channel_of(tmp_path / "c", num_pairs), tmp_path / "out"
    (channel / "003.png").write_bytes(b"no")
    out.mkdir()
    for _ in range(2):  # the second time, only the first rank's disk has them
        numbers = [number for number in range(num_pairs) if number != 3]
        for seen in results_of(work, 2, tmp_path, channel, out):
            assert seen["tokens"][:, 0, 0].tolist() == numbers
            assert seen["names"] == [f"{number:03}.png" for number in numbers]
            assert seen["skips"] == {"not an image": 1}
        assert list((out / "0").glob("*/part-000000.safetensors"))
        assert not (out / "1").exists()


def test_only_so_many_tokens_are_kept():
    assert tokens_fit(2 << 20, 1024, 8192)
    assert not tokens_fit((2 << 20) + 1, 1024, 8192)
    assert not tokens_fit(2 << 20, 1024, 100_000)
