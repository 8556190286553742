"""Pruning in mid-drawing: who survives, that nothing else changes, and what is refused."""

from dataclasses import replace

import pytest
import torch

from dalle import artefact as artefacts
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import SamplingOptions, sample_image_tokens
from dalle.errors import UserError
from inference.api.schema import GenerateRequest
from inference.engine.control import Control
from inference.engine.model_runner import Generator
from inference.engine.pruning import (
    GROUP,
    partial_merits,
    prune_rows,
    spearman,
    survivors,
    worse_half,
)
from inference.settings import read_settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artefact(tiny_artefact):
    return artefacts.load(tiny_artefact)


@pytest.fixture
def generator(artefact) -> Generator:
    return Generator(artefact, CPU, chunk_size=8)


def ask(**fields: object) -> GenerateRequest:
    given = {"caption": "a red square", "seed": 7, "num_candidates": 16, "num_images": 1}
    return GenerateRequest.model_validate(given | fields)


def pictures(result) -> dict[int, bytes]:
    return {each.number: each.pixels.tobytes() for each in result.ranked if each.pixels.size}


def test_half_of_each_group_survives_and_looks_as_without_pruning(generator):
    pruned = generator.generate(ask(prune_at=[0.5], num_images=8))
    whole = pictures(generator.generate(ask(num_images=16)))
    numbers = [each.number for each in pruned.ranked]
    assert len(numbers) == 8
    assert (pruned.pruned, pruned.begun, pruned.is_cut_short) == (8, 16, False)
    assert [sum(number // GROUP == group for number in numbers) for group in (0, 1)] == [4, 4]
    for number, picture in pictures(pruned).items():
        assert picture == whole[number]


def test_those_survive_whose_partial_pictures_are_ranked_first(artefact, generator):
    request = ask(prune_at=[0.5], num_candidates=8)
    survived = {each.number for each in generator.generate(request).ranked}
    sampled = sample_image_tokens(
        artefact.transformer,
        artefact.tokenizer.encode([request.caption]),
        candidates=range(8),
        seed=7,
    )
    merits = partial_merits(
        artefact.dvae,
        artefact.clip,
        artefact.clip.encode_captions([request.caption], artefact.tokenizer),
        sampled.image_tokens[:, :8],
        torch.zeros(8),  # this CLIP has no likelihood_weight
    )
    assert survived == set(merits.argsort(descending=True)[:4].tolist())


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 3.0}, {"preview_rows": 1}])
def test_who_survives_does_not_depend_on_the_load(artefact, fields):
    request = ask(prune_at=[0.25, 0.75], num_candidates=20, **fields)
    alone = Generator(artefact, CPU, chunk_size=8).generate(request)
    busy = Generator(artefact, CPU, chunk_size=16)
    other = ask(caption="a blue circle", num_candidates=40, seed=1, prune_at=[0.5])
    plain = ask(caption="big filled star", num_candidates=9, seed=2)
    drawings = {}
    outcomes = {}
    for each in (other, plain, request):
        drawings[busy.begin(busy.prepare(each), Control())] = each.caption
        for ended in [ended for _ in range(3) for ended in busy.advance()]:
            outcomes[drawings[ended.drawing]] = ended.outcome
    while len(outcomes) < 3:
        for ended in busy.advance():
            outcomes[drawings[ended.drawing]] = ended.outcome
    together = outcomes[request.caption]
    assert [each.number for each in together.ranked] == [each.number for each in alone.ranked]
    assert pictures(together) == pictures(alone)
    assert len(alone.ranked) == survivors(20, GROUP, 2) == 5
    assert len(outcomes[plain.caption].ranked) == 9
    assert busy.busy_slots == 0


def test_without_clip_the_likelihood_decides(artefact):
    generator = Generator(replace(artefact, clip=None), CPU)
    result = generator.generate(ask(prune_at=[0.5], num_candidates=8))
    assert (len(result.ranked), result.ranked_by) == (4, "log_likelihood")


def test_previews_of_the_dropped_end(generator):
    seen: list[tuple[int, int]] = []
    control = Control(on_preview=lambda each: seen.append((each.rows, each.number)))
    result = generator.generate(ask(prune_at=[0.5], num_candidates=8, preview_rows=1), control)
    survived = sorted(each.number for each in result.ranked)
    assert sorted(number for rows, number in seen if rows == 3) == survived
    assert sorted(number for rows, number in seen if rows == 1) == list(range(8))


def test_primed_rows_are_not_pruned_at(artefact, generator):
    assert prune_rows([0.25, 0.5, 0.75], 4, primed_rows=2) == (3,)
    assert prune_rows([0.01, 0.5, 0.51, 0.99], 4) == (2,)


@pytest.mark.parametrize(
    ("candidates", "group", "prunings", "left"),
    [(16, 8, 1, 8), (16, 8, 2, 4), (20, 8, 1, 10), (9, 8, 3, 2), (1, 8, 2, 1), (5, 1, 3, 5)],
)
def test_the_middle_one_of_a_group_goes_on(candidates, group, prunings, left):
    assert survivors(candidates, group, prunings) == left


def test_of_equal_candidates_the_lower_numbers_survive():
    assert worse_half([4, 5, 6], torch.tensor([1.0, 1.0, 1.0])) == [6]
    assert worse_half([4, 5, 6, 7], torch.tensor([0.0, 3.0, 2.0, 1.0])) == [7, 4]


def test_pruning_that_leaves_too_few_is_refused(generator):
    with pytest.raises(UserError, match="num_images must be at most 4, .* got 5") as caught:
        generator.prepare(ask(prune_at=[0.25, 0.5], num_images=5))
    assert (caught.value.status, caught.value.field) == (422, "num_images")


def test_the_servers_default_prunes_whoever_says_nothing_as_far_as_enough_is_left(artefact):
    generator = Generator(artefact, CPU, chunk_size=8, prune_at=(0.25, 0.5))
    assert len(generator.generate(ask(num_images=1)).ranked) == 4
    assert len(generator.generate(ask(num_images=8)).ranked) == 8
    assert len(generator.generate(ask(num_images=9)).ranked) == 16
    assert len(generator.generate(ask(prune_at=[])).ranked) == 16
    generator.self_test()


def test_where_to_prune_is_a_setting():
    assert read_settings({"DALLE_PRUNE_AT": "0.25, 0.5"}).prune_at == (0.25, 0.5)
    assert read_settings({}).prune_at == ()
    for wrong in ("1", "0", "half", "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"):
        with pytest.raises(UserError, match="DALLE_PRUNE_AT must be up to 8 numbers between 0"):
            read_settings({"DALLE_PRUNE_AT": wrong})


def test_rank_correlation_by_spearman():
    one = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)
    tied = torch.tensor([1.0, 1.0, 2.0, 2.0])
    assert spearman(one, tied) == pytest.approx(4 / 20**0.5)


# --- the same in the engine


def tokens() -> torch.Tensor:
    return torch.ones(1, 5, dtype=torch.int64)


def test_candidates_that_begin_together_are_equally_far_whoever_else_is_drawn(make_dalle):
    engine = DecodeEngine(make_dalle(), 6)
    engine.submit(tokens(), candidates=range(7), seed=1)
    group = engine.submit(tokens(), candidates=range(8), seed=2, together=4)
    began = set()
    while not engine.is_idle:
        engine.step()
        positions = engine.positions(group)
        for first in (0, 4):
            members = {number: at for number, at in positions.items() if number // 4 == first // 4}
            assert len(set(members.values())) <= 1
            assert len(members) in (0, 4)
            began |= {first} if members else set()
    assert began == {0, 4}


def test_dropped_candidates_free_their_slots_and_change_no_other(make_dalle):
    model = make_dalle()
    engine = DecodeEngine(model, 4)
    generation = engine.submit(tokens(), candidates=range(4), seed=3)
    engine.step()
    engine.drop(generation, [1, 3])
    assert engine.busy_slots == 2
    finished = {}
    while not engine.is_idle:
        finished |= {each.candidate: each.image_tokens for each in engine.step()}
    expected = sample_image_tokens(model, tokens(), candidates=[0, 2], seed=3).image_tokens
    assert sorted(finished) == [0, 2]
    assert (torch.stack([finished[0], finished[2]]) == expected).all()
    generation = engine.submit(tokens(), candidates=[0], seed=3)
    engine.step()
    engine.drop(generation, [0])
    assert engine.is_idle


@pytest.mark.parametrize(("together", "guidance"), [(5, 1.0), (3, 3.0), (0, 1.0)])
def test_more_together_than_there_is_room_for_is_refused(make_dalle, together, guidance):
    engine = DecodeEngine(make_dalle(), 4)
    options = SamplingOptions(guidance_scale=guidance)
    with pytest.raises(ValueError, match="together must be 1 to"):
        engine.submit(tokens(), candidates=range(9), seed=0, options=options, together=together)
