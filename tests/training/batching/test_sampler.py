"""training.data.batching.sampler: which pairs make up the batch of a step."""

import numpy as np
import pytest

from training.data.batching.sampler import LANES, Sampler


@pytest.mark.parametrize("num_pairs", [16, 19])
def test_an_epoch_shows_no_pair_twice_and_as_many_as_fill_batches(num_pairs):
    order = Sampler(num_pairs=num_pairs, batch_size=4, seed=3)
    assert order.num_per_epoch == 4
    for epoch in range(3):
        steps = range(4 * epoch, 4 * epoch + 4)
        seen = [order.indices(step, order.permutation(epoch)).tolist() for step in steps]
        assert len({index for batch in seen for index in batch}) == 16


def test_epochs_and_seeds_have_their_own_order():
    orders = {
        tuple(Sampler(num_pairs=50, batch_size=5, seed=seed).permutation(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_the_same_on_every_machine_and_release():
    order = Sampler(num_pairs=8, batch_size=4, seed=7)
    assert order.permutation(0).tolist() == [4, 3, 6, 2, 1, 0, 5, 7]
    assert order.permutation(1).tolist() == [7, 6, 1, 4, 3, 2, 5, 0]


def test_a_set_smaller_than_a_batch_goes_round_again():
    order = Sampler(num_pairs=3, batch_size=8, seed=0)
    counts = np.bincount(order.indices(0, order.permutation(0)))
    assert order.num_per_epoch == 1
    assert sorted(counts.tolist()) == [2, 3, 3]


def test_ranks_share_out_the_same_global_batch():
    whole = Sampler(num_pairs=21, batch_size=6, seed=1)
    ranks = [Sampler(num_pairs=21, batch_size=6, seed=1, rank=r, world_size=3) for r in range(3)]
    for step in range(9):
        permutation = whole.permutation(whole.epoch(step))
        parts = [rank.indices(step, permutation) for rank in ranks]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert np.concatenate(parts).tolist() == whole.indices(step, permutation).tolist()


def test_validation_sees_every_pair_once_in_order():
    order = Sampler(num_pairs=7, batch_size=3, seed=1, shuffle=False, last="keep")
    seen = [order.indices(step, order.permutation(0)).tolist() for step in range(3)]
    assert order.num_per_epoch == 3
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": 3, "world_size": 2}, "multiple of world_size 2, got 3"),
        ({"rank": 1}, "rank must be 0 to 0, got 1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"last": "keep", "world_size": 2}, "world_size 1"),
    ],
)
def test_an_impossible_order_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Sampler(**{"num_pairs": 10, "batch_size": 4, "seed": 0, **wrong})


GROUPS = (7, 40, 1, 30, 22, 50, 13, 9, 28, 36, 14, 20, 5, 31, 18, 44, 27, 33, 12, 16)


def order_of_groups(**fields):
    return Sampler(
        **{"num_pairs": sum(GROUPS), "batch_size": 8, "seed": 3, "groups": GROUPS} | fields
    )


def group_of(numbers):
    return np.searchsorted(np.cumsum(GROUPS), numbers, side="right")


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_each_group_is_read_once_from_somewhere_to_its_end_and_then_from_its_beginning(epoch):
    permutation = order_of_groups().permutation(epoch)
    assert sorted(permutation.tolist()) == list(range(sum(GROUPS)))
    for group, size in enumerate(GROUPS):
        numbers = permutation[group_of(permutation) == group]
        assert len(numbers) == size
        assert ((np.diff(numbers) - 1) % size == 0).all()


def test_only_some_groups_are_under_way_at_a_time_and_a_batch_mixes_them():
    groups = group_of(order_of_groups().permutation(0))
    first = {group: np.flatnonzero(groups == group)[0] for group in set(groups.tolist())}
    last = {group: np.flatnonzero(groups == group)[-1] for group in set(groups.tolist())}
    at_once = [sum(first[g] <= place <= last[g] for g in first) for place in range(len(groups))]
    assert LANES // 2 < max(at_once) <= LANES
    assert np.mean([len(set(groups[i : i + 8].tolist())) for i in range(0, 200, 8)]) > 5


def test_every_epoch_and_seed_has_another_order_of_groups():
    permutations = [
        order_of_groups(seed=seed).permutation(epoch).tolist()
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
    ]
    assert permutations[0] != permutations[1] != permutations[2] != permutations[0]
    assert order_of_groups().permutation(0).tolist() == permutations[0]


def test_groups_must_be_those_of_the_pairs():
    with pytest.raises(ValueError, match="groups must have 9 pairs, got 456"):
        order_of_groups(num_pairs=9)


def test_the_order_of_groups_is_the_same_with_every_release_of_numpy():
    order = Sampler(num_pairs=9, batch_size=1, seed=1, groups=(4, 0, 2, 3))
    assert order.permutation(2).tolist() == [4, 8, 2, 6, 3, 5, 7, 0, 1]


def test_parts_of_a_data_set_have_orders_of_their_own():
    first, second, again = (
        Sampler(num_pairs=50, batch_size=5, seed=3, part=part).permutation(0).tolist()
        for part in (0, 1, 1)
    )
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second == again
