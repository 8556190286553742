"""inference.engine.model_runner: seeds, deadlines, ranking, previews, priming."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.models.clip import Clip
from inference.api.rendering import Preview
from inference.engine.model_runner import ModelRunner
from inference.engine.request import Cancelled, DeadlineExceeded
from tests.dalle.decoding.reference import sample_image_tokens
from tests.inference.engine.model_runner_work import (
    CPU,
    Clock,
    answer,
    ask,
    by_number,
    events_of,
    picture,
)


@pytest.mark.slow
def test_candidates_come_ranked_by_clip_best_first(runner):
    result = answer(runner, ask(num_candidates=5))
    assert result.ranked_by == "clip"
    scores = [candidate.clip_score for candidate in result.ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(-1 <= score <= 1 for score in scores)
    assert sorted(by_number(result)) == [0, 1, 2, 3, 4]
    assert {candidate.pixels.shape for candidate in result.ranked} == {(16, 16, 3)}
    assert all(candidate.log_likelihood <= 0 for candidate in result.ranked)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_images_of_a_seed_depend_on_nothing_else(artefact, guidance_scale):
    few = ModelRunner(artefact, CPU, chunk_size=1)
    many = ModelRunner(artefact, CPU, chunk_size=4)
    one = by_number(answer(few, ask(num_candidates=2, guidance_scale=guidance_scale)))
    other = by_number(answer(many, ask(num_candidates=7, guidance_scale=guidance_scale)))
    for number, candidate in one.items():
        assert (candidate.pixels == other[number].pixels).all()
        assert candidate.clip_score == pytest.approx(other[number].clip_score, abs=1e-5)
        assert candidate.log_likelihood == pytest.approx(other[number].log_likelihood, abs=1e-3)


def test_candidates_of_a_seed_differ_and_so_do_seeds(runner):
    first = by_number(answer(runner, ask(num_candidates=2)))
    second = by_number(answer(runner, ask(num_candidates=2, seed=8)))
    images = [each.pixels.tobytes() for each in (*first.values(), *second.values())]
    assert len(set(images)) == 4


def test_without_a_seed_one_is_chosen_and_returned(runner):
    result = answer(runner, ask(seed=None, num_candidates=1))
    again = answer(runner, ask(seed=result.seed, num_candidates=1))
    assert (result.ranked[0].pixels == again.ranked[0].pixels).all()
    assert answer(runner, ask(seed=None, num_candidates=1)).seed != result.seed


def test_without_clip_the_transformer_ranks(artefact):
    result = answer(ModelRunner(replace(artefact, clip=None), CPU), ask(num_candidates=4))
    assert result.ranked_by == "log_likelihood"
    assert {candidate.clip_score for candidate in result.ranked} == {None}
    likelihoods = [candidate.log_likelihood for candidate in result.ranked]
    assert likelihoods == sorted(likelihoods, reverse=True)


def test_a_clip_with_a_likelihood_weight_ranks_by_both_as_training_does(artefact):
    config = replace(artefact.clip.config, likelihood_weight=2.0)
    clip = Clip(config).eval()
    clip.load_state_dict(artefact.clip.state_dict())
    result = answer(ModelRunner(replace(artefact, clip=clip), CPU), ask(num_candidates=6))
    assert result.ranked_by == "clip_and_log_likelihood"
    merits = [candidate.merit for candidate in result.ranked]
    assert merits == sorted(merits, reverse=True)
    scores = torch.tensor([candidate.clip_score for candidate in result.ranked])
    likelihoods = torch.tensor([candidate.log_likelihood for candidate in result.ranked])
    torch.testing.assert_close(torch.tensor(merits), clip.merit(scores, likelihoods))
    by_clip = answer(ModelRunner(artefact, CPU), ask(num_candidates=6))
    assert [each.number for each in result.ranked] != [each.number for each in by_clip.ranked]
    for number, candidate in by_number(by_clip).items():
        assert (candidate.pixels == by_number(result)[number].pixels).all()


def test_finished_candidates_are_passed_on_one_by_one(artefact):
    runner = ModelRunner(artefact, CPU, chunk_size=2)
    prepared = runner.prepare(ask(num_candidates=5))
    runner.run(prepared)
    assert [event.number for event in events_of(prepared)] == [0, 1, 2, 3, 4]


def test_previews_show_the_sampled_rows_above_grey_and_change_nothing(artefact):
    dvae = artefact.dvae
    runner = ModelRunner(artefact, CPU, chunk_size=2)
    request = ask(num_candidates=3, preview_rows=1)
    prepared = runner.prepare(request)
    result = by_number(runner.run(prepared))
    seen = [event for event in events_of(prepared) if isinstance(event, Preview)]
    plain = by_number(answer(runner, ask(num_candidates=3)))
    order = [(preview.rows, preview.number) for preview in seen]
    assert order == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (1, 2), (2, 2), (3, 2)]
    assert all((plain[number].pixels == result[number].pixels).all() for number in range(3))
    image_tokens = sample_image_tokens(
        artefact.transformer,
        artefact.tokenizer.encode([request.caption]),
        candidates=range(3),
        seed=7,
    ).image_tokens
    for preview in seen:
        sampled = image_tokens[preview.number, None].clone()
        sampled[:, preview.rows * dvae.config.grid_size :] = 0
        expected = (dvae.decode(sampled)[0] * 255).round().permute(1, 2, 0).numpy()
        height = preview.rows * 4
        assert np.abs(preview.pixels[:height] - expected[:height]).max() <= 1
        assert (preview.pixels[height:] == 128).all()


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, []),
        ({"preview_rows": 2}, [2]),
        ({"preview_rows": 3}, [3]),
        ({"preview_rows": 1, "prime_image": picture(), "prime_rows": 2}, [3]),
    ],
)
def test_previews_come_as_often_as_they_were_asked_for(artefact, fields, rows):
    runner = ModelRunner(artefact, CPU)
    prepared = runner.prepare(ask(num_candidates=1, **fields))
    runner.run(prepared)
    assert [each.rows for each in events_of(prepared) if isinstance(each, Preview)] == rows


def test_a_cancelled_request_stops_at_the_next_token(artefact, monkeypatch):
    seen = []

    def cancel(preview: Preview) -> None:
        seen.append(preview)
        prepared.cancel()

    runner = ModelRunner(artefact, CPU)
    prepared = runner.prepare(ask(num_candidates=1, preview_rows=1))
    monkeypatch.setattr(prepared, "put", cancel)
    with pytest.raises(Cancelled):
        runner.run(prepared)
    assert [preview.rows for preview in seen] == [1]


def test_a_caption_is_read_by_clip_once_for_all_candidates(artefact):
    calls: list[int] = []
    text_encoder = artefact.clip.model.transformer
    handle = text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        answer(ModelRunner(artefact, CPU, chunk_size=1), ask(num_candidates=5))
    finally:
        handle.remove()
    assert len(calls) == 1


def test_a_deadline_leaves_the_candidates_that_were_finished(artefact):
    whole = by_number(answer(ModelRunner(artefact, CPU, chunk_size=1), ask(num_candidates=4)))
    runner = ModelRunner(artefact, CPU, chunk_size=1, window=1)
    prepared = runner.prepare(ask(num_candidates=4), deadline=60.0)
    prepared.clock = Clock()
    part = runner.run(prepared)
    assert 1 <= len(part.ranked) < 4
    assert part.num_candidates == 4
    for number, candidate in by_number(part).items():
        assert (candidate.pixels == whole[number].pixels).all()


def test_a_deadline_before_the_first_candidate_is_an_error(runner, monkeypatch):
    monkeypatch.setattr("inference.engine.scheduler.STEP_SECONDS", 0.0)  # a step for each reading
    prepared = runner.prepare(ask(), deadline=10.0)
    prepared.clock = Clock()
    with pytest.raises(DeadlineExceeded, match="deadline_seconds"):
        runner.run(prepared)


def test_cancelled_work_stops_between_candidates(artefact, monkeypatch):
    runner = ModelRunner(artefact, CPU, chunk_size=1)
    prepared = runner.prepare(ask(num_candidates=4))
    monkeypatch.setattr(prepared, "put", lambda _: prepared.cancel())
    with pytest.raises(Cancelled):
        runner.run(prepared)


def test_primed_rows_are_kept_and_the_rest_is_sampled(artefact, runner):
    dvae, size, rows = artefact.dvae, artefact.dvae.config.image_size, 2
    result = answer(runner, ask(num_candidates=3, prime_image=picture(size), prime_rows=rows))
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(picture(size)))))
    image_tokens = dvae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    primed = image_tokens[0, : rows * dvae.config.grid_size]
    expected = sample_image_tokens(
        artefact.transformer,
        artefact.tokenizer.encode([ask().caption]),
        candidates=range(3),
        seed=7,
        prime_tokens=primed,
    ).image_tokens
    assert (expected[:, : len(primed)] == primed).all()
    images = (dvae.decode(expected) * 255).round().permute(0, 2, 3, 1).numpy()
    for number, candidate in by_number(result).items():
        assert (candidate.pixels == images[number]).all()


def test_a_prime_image_of_another_size_or_format_is_fitted(runner):
    result = answer(runner, ask(num_candidates=1, prime_image=picture(50, "JPEG"), prime_rows=1))
    assert result.ranked[0].pixels.shape == (16, 16, 3)
