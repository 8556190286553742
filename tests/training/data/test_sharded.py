"""training.data.sharded and opening: channels of which each host has another part."""

from collections import Counter

import pytest

from dalle.preprocess.tokenizer import CaptionTokenizer
from tests.training.data.sharded_work import STEPS, work
from tests.training.pairs import SIZE, channel_of, members_of, tar_of
from tests.training.ranks import results_of
from training.data.pairs import add_fingerprints, fingerprint
from training.data.sharded import on_all_ranks
from training.data.sources.channel import open_channel
from training.distributed.process_group import SINGLE_PROCESS
from training.stopping import Stopped

pytestmark = pytest.mark.slow

NUMBERS = (range(5), range(5, 21))  # pictures of the first host's shards, and of the second's


def lay_out(folder):
    """Two hosts' parts, each with a bad pair of its own."""
    for host, numbers in enumerate(NUMBERS):
        tar_of(folder / str(host) / f"{host}.tar", [*members_of(numbers), ("x.txt", b"alone")])
    damaged = ("099.png", b"no"), ("099.txt", b"picture 99")
    tar_of(folder / "1" / "2.tar", damaged)
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank of two hosts with two devices saw, by rank."""
    folder = lay_out(tmp_path_factory.mktemp("channel"))
    return results_of(work, 4, tmp_path_factory.mktemp("ranks"), folder)


def numbers_of(rank, steps):
    return [int(caption.split()[1]) for step in rank["steps"][steps] for caption in step]


def of_host(seen, host):
    size = len(seen) // 2
    return seen[host * size : (host + 1) * size]


def test_every_rank_makes_the_same_number_of_steps_however_small_its_part(seen):
    assert {rank["num_per_epoch"] for rank in seen} == {21 // 4}
    assert {len(step) for rank in seen for step in rank["steps"]} == {1}


def test_each_host_draws_from_its_own_part_alone_and_goes_round_it_evenly(seen):
    for host, numbers in enumerate(NUMBERS):
        ranks = of_host(seen, host)
        drawn = Counter(n for rank in ranks for n in numbers_of(rank, slice(None)))
        assert set(drawn) == set(numbers)
        # Two pairs a step: within a pass over the part, none comes twice.
        steps = len(numbers) // 2
        for start in range(0, STEPS - steps + 1, steps):
            turn = [n for rank in ranks for n in numbers_of(rank, slice(start, start + steps))]
            assert len(set(turn)) == len(turn)


def test_the_whole_is_the_same_on_all_and_that_of_the_undivided_channel(seen, tmp_path):
    for host in (0, 1):
        (tmp_path / "all").mkdir(exist_ok=True)
        for path in (lay_out(tmp_path / "parts") / str(host)).iterdir():
            path.rename(tmp_path / "all" / path.name)
    whole = open_channel(tmp_path / "all", image_size=SIZE, max_bad_share=0.5)
    for rank in seen:
        assert rank["totals"] == [21, 21]
        assert rank["identity"] == {
            "data": whole.fingerprint,
            "num_pairs": "21",
            "order": "each host its own part",
        }


def test_what_every_host_left_out_is_counted_everywhere_against_the_whole(seen):
    for rank in seen:
        assert rank["skips"] == {"caption without image": 2, "not an image": 1}
        assert "0.tar/x.txt" in rank["examples"]
        assert "1.tar/x.txt" in rank["examples"]
        assert rank["refusal"].startswith("train: 2 of 24 pairs cannot be used, more than")


def test_images_are_decoded_ahead_on_all_hosts_or_on_none(seen):
    assert {tuple(rank["decoded"]) for rank in seen} == {(True, False)}


def test_a_validation_is_the_mean_over_all_pairs_of_all_hosts(seen):
    assert {rank["validation"] for rank in seen} == {10.0}


def test_the_tokenizer_is_learned_from_all_hosts_captions(seen):
    captions = [f"picture {number}" for numbers in NUMBERS for number in numbers]
    whole = CaptionTokenizer.train(captions, kind="word", vocab_size=300, text_length=16)
    assert {rank["word"] for rank in seen} == {whole.identity()}


def test_the_ranks_of_a_host_are_told_from_the_others(seen):
    size = len(seen) // 2
    for rank, each in enumerate(seen):
        first = rank // size * size
        assert each["host_ranks"] == list(range(first, first + size))


def test_a_stop_of_one_ranks_work_is_everybodys():
    def stopped():
        raise Stopped

    with pytest.raises(Stopped):
        on_all_ranks(SINGLE_PROCESS, stopped)
    assert on_all_ranks(SINGLE_PROCESS, lambda: None) is None


def test_fingerprints_of_parts_add_up_in_any_order():
    pairs = [(f"{number}.png", number, (f"caption {number}",)) for number in range(9)]
    parts = [fingerprint(pairs[4:]), fingerprint(reversed(pairs[:4]))]
    assert add_fingerprints(parts) == add_fingerprints(reversed(parts)) == fingerprint(pairs)
    assert fingerprint(pairs[1:]) != fingerprint(pairs)
    assert add_fingerprints([fingerprint(pairs)] * 2) != fingerprint(pairs)


def test_single_files_of_a_part_are_a_warning_and_none_at_all_a_clear_error(tmp_path, caplog):
    open_channel(channel_of(tmp_path / "a", 3), image_size=SIZE, is_part=True)
    assert "separates images from their captions" in caplog.text
    (tmp_path / "b").mkdir()
    with pytest.raises(Exception, match="none of the channel's objects; .*as many shards as"):
        open_channel(tmp_path / "b", image_size=SIZE, is_part=True)
