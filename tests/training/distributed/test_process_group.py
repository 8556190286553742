"""training.distributed.process_group: two processes exchange numbers, decisions and state."""

import pytest
import torch

from tests.training.distributed.rank_work import STATE, clip_loss_and_gradients, work
from tests.training.ranks import results_of
from training.distributed.process_group import SINGLE_PROCESS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The results of each of two processes, by rank."""
    return results_of(work, 2, tmp_path_factory.mktemp("ranks"))


def test_the_first_decides_progress_and_checkpoints_and_anybody_a_stop(seen):
    assert [seen[rank]["first"] for rank in (0, 1)] == [True, False]
    for rank in (0, 1):
        assert seen[rank]["agreed"] == (0.25, True, True)
        assert seen[rank]["any"] == [True, False]


def test_rows_are_gathered_by_rank_and_their_gradient_comes_from_all_losses(seen):
    for rank in (0, 1):
        assert seen[rank]["gathered"].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    # The losses weigh everything by 1 and 2; the second rank's rows count ten times.
    assert seen[0]["gradient"].tolist() == [[3.0, 3.0]]
    assert seen[1]["gradient"].tolist() == [[30.0, 30.0]]


def test_totals_and_the_firsts_values_are_equal_on_all(seen):
    for rank in (0, 1):
        assert seen[rank]["total"].tolist() == [[3.0, 6.0]]
        assert seen[rank]["copied"].tolist() == [[1.0, 2.0]]


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(equal, one, other))
    return one == other


def test_the_firsts_state_is_everybodys(seen):
    for rank in (0, 1):
        assert equal(seen[rank]["shared"], STATE)
        assert seen[rank]["nothing"] is None


def test_clips_loss_and_gradients_are_those_of_the_whole_batch(seen):
    means, gradients = clip_loss_and_gradients(SINGLE_PROCESS)
    for rank in (0, 1):
        ours, slopes = seen[rank]["clip"]
        assert ours["total"].item() == pytest.approx(means["total"].item(), rel=1e-5)
        assert ours["accuracy"].item() == pytest.approx(means["accuracy"].item())
        assert slopes.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(slopes[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["gumbel", "vq"])
def test_codes_that_the_first_revives_are_equal_on_all(seen, kind):
    before, first = seen[0]["revived"][kind]
    _, second = seen[1]["revived"][kind]
    assert equal(dict(first), dict(second))
    assert not (first["usage"] == 0).any()
    assert not torch.isclose(before["codebook"][:, 4:], first["codebook"][:, 4:]).any()
