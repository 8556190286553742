"""inference.engine.model_runner: seeds, deadlines, ranking, priming, missing components."""

import base64
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import artefact as artefacts
from dalle.decoding.engine import DecodeEngine
from dalle.errors import ArtefactError, DeviceError, UserError
from dalle.models.clip import Clip
from inference.api.rendering import Candidate, GenerateResult, Preview
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest
from inference.engine.model_runner import ModelRunner
from inference.engine.request import Cancelled, DeadlineExceeded, EngineRequest
from tests.dalle.decoding.reference import sample_image_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artefact(tiny_artefact):
    return artefacts.load(tiny_artefact)


@pytest.fixture
def runner(artefact) -> ModelRunner:
    return ModelRunner(artefact, CPU)


def ask(**fields: object) -> GenerateRequest:
    """All candidates are asked for, so that the pixels of all are kept."""
    given = {"caption": "a red square", "seed": 7, "num_images": fields.get("num_candidates", 4)}
    return GenerateRequest.model_validate(given | fields)


def picture(size: int = 16, format: str = "PNG") -> str:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=format)
    return base64.b64encode(file.getvalue()).decode()


def answer(runner: ModelRunner, request):
    return runner.run(runner.prepare(request))


def events_of(prepared: EngineRequest):
    """The candidates and previews so far, in order."""
    return list(iter(lambda: prepared.next_event(0.0), None))


def by_number(result: GenerateResult) -> dict[int, Candidate]:
    return {candidate.number: candidate for candidate in result.ranked}


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


class Clock:
    """A clock that advances by a second at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_deadline_leaves_the_candidates_that_were_finished(artefact):
    whole = by_number(answer(ModelRunner(artefact, CPU, chunk_size=1), ask(num_candidates=4)))
    runner = ModelRunner(artefact, CPU, chunk_size=1)
    prepared = runner.prepare(ask(num_candidates=4), deadline=60.0)
    prepared.clock = Clock()
    part = runner.run(prepared)
    assert 1 <= len(part.ranked) < 4
    assert part.num_candidates == 4
    for number, candidate in by_number(part).items():
        assert (candidate.pixels == whole[number].pixels).all()


def test_a_deadline_before_the_first_candidate_is_an_error(runner):
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


def test_classes_come_likeliest_first_with_probabilities(runner):
    request = ClassifyRequest(images=[picture(), picture(40)], classes=["red", "blue", "a star"])
    for indices, classes, probabilities in answer(runner, request).predictions:
        assert sorted(indices) == [0, 1, 2]
        assert classes == [request.classes[index] for index in indices]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_no_more_classes_are_returned_than_were_asked_for(runner):
    request = ClassifyRequest(images=[picture()], classes=["red", "blue", "a star"], top=2)
    ((indices, classes, probabilities),) = answer(runner, request).predictions
    assert len(indices) == len(classes) == len(probabilities) == 2


def test_captions_are_completed_from_their_beginning(runner):
    request = CompleteRequest(complete="red", num_completions=3, seed=1)
    reply = answer(runner, request)
    assert [each.caption.split()[0] for each in reply.captions] == ["red"] * 3
    likelihoods = [each.log_likelihood for each in reply.captions]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert answer(runner, request) == reply


def test_a_deadline_between_two_words_stops_a_completion(runner):
    request = CompleteRequest(complete="", num_completions=64, seed=1)
    prepared = runner.prepare(request, deadline=5.0)
    prepared.clock = Clock()
    with pytest.raises(DeadlineExceeded, match="deadline_seconds"):
        runner.run(prepared)


def test_the_beginning_of_a_caption_may_be_empty(runner):
    assert len(answer(runner, CompleteRequest(complete="", seed=1)).captions) == 4


def test_a_caption_that_is_too_long_names_the_limit(runner):
    with pytest.raises(UserError, match="at most 8 tokens") as caught:
        runner.prepare(ask(caption="red " * 9))
    assert (caught.value.status, caught.value.field) == (422, "caption")


def test_a_class_that_is_too_long_is_refused_before_any_work(runner):
    with pytest.raises(UserError, match=r"classes\[1\]: .* at most 8 tokens") as caught:
        runner.prepare(ClassifyRequest(images=[picture()], classes=["red", "red " * 9]))
    assert (caught.value.field, caught.value.status) == ("classes[1]", 422)


def giant() -> str:
    """A PNG of 100 megapixels, all of one colour: 100 kB, but 300 MB when decoded."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (lambda: "####", "prime_image is not base64"),
        (lambda: base64.b64encode(b"hello").decode(), "prime_image is not an image"),
        (lambda: picture()[:200], "prime_image is truncated or damaged"),
        (giant, "the limit is"),
        (lambda: "https://example.com/a.png", "addresses are not fetched"),
    ],
)
def test_a_prime_image_that_cannot_be_used_says_why(runner, text, says):
    with pytest.raises(UserError, match=says) as caught:
        runner.prepare(ask(prime_image=text(), prime_rows=1))
    assert (caught.value.status, caught.value.field) == (400, "prime_image")


def test_an_image_among_several_is_named(runner):
    with pytest.raises(UserError, match=r"images\[1\] is not an image"):
        runner.prepare(ClassifyRequest(images=[picture(), "aGk="], classes=["a"]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prime_image": picture(), "prime_rows": 4}, "prime_rows must be 0 to 3"),
        ({"top_k": 10_000}, "top_k must be 1 to"),
        ({"preview_rows": 4}, "preview_rows must be 1 to 3"),
    ],
)
def test_limits_of_the_model_are_checked_before_any_work(runner, fields, says):
    with pytest.raises(UserError, match=says) as caught:
        runner.prepare(ask(**fields))
    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("missing", "request_", "says"),
    [
        ("dvae", ask(), "no dvae, .* train the stage dvae"),
        ("transformer", ask(), "no transformer, .* train the stage transformer"),
        ("tokenizer", ask(), "no tokenizer, .* train the stage transformer"),
        (
            "clip",
            ClassifyRequest(images=[picture()], classes=["a"]),
            "no clip, .* train the stage clip",
        ),
        ("transformer", CompleteRequest(complete="a"), "train the stage transformer"),
    ],
)
def test_a_missing_component_says_which_stage_to_train(artefact, missing, request_, says):
    runner = ModelRunner(replace(artefact, **{missing: None}), CPU)
    with pytest.raises(UserError, match=says) as caught:
        runner.prepare(request_)
    assert (caught.value.status, caught.value.code) == (422, "component_missing")


@pytest.mark.parametrize("missing", ["dvae", "transformer", "clip", None])
def test_an_artefact_without_a_component_passes_the_self_test(artefact, missing):
    partial = replace(artefact, **{missing: None}) if missing else artefact
    ModelRunner(partial, CPU).self_test()


@pytest.mark.parametrize("left", [[], ["dvae"], ["tokenizer", "dvae"], ["transformer", "dvae"]])
def test_an_artefact_that_can_answer_nothing_fails_its_self_test(left, artefact):
    components = {name: getattr(artefact, name) for name in left}
    partial = artefacts.Artefact(**components)
    with pytest.raises(ArtefactError, match="nothing can be answered; train the stages"):
        ModelRunner(partial, CPU).self_test()


def test_it_loads_a_directory_and_an_archive_of_it(tiny_artefact, tmp_path):
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(tiny_artefact, arcname=".")
    first, second = (ModelRunner.load(path, "cpu") for path in (tiny_artefact, tmp_path))
    assert first.components == second.components == ["dvae", "transformer", "clip", "tokenizer"]
    one, other = (answer(each, ask(num_candidates=1)) for each in (first, second))
    assert (one.ranked[0].pixels == other.ranked[0].pixels).all()


def test_a_device_that_is_absent_is_named():
    with pytest.raises(DeviceError, match="cuda:63 is not usable"):
        ModelRunner.load(Path("unused"), "cuda:63")


@pytest.mark.gpu
def test_it_samples_and_scores_on_a_gpu(tiny_artefact):
    runner = ModelRunner.load(tiny_artefact, "cuda")
    runner.self_test()
    assert len(answer(runner, ask(num_candidates=3)).ranked) == 3


def test_precisions_are_compared_on_the_artefacts_example_captions(tiny_artefact, monkeypatch):
    given = []

    def build_engine(model, num_slots, *_, captions, **__):
        given.append(captions)
        return DecodeEngine(model, num_slots)

    monkeypatch.setattr("inference.engine.model_runner.build_engine", build_engine)
    loaded = artefacts.load(tiny_artefact)
    ModelRunner(loaded, torch.device("cpu"))
    loaded.manifest.captions = ["a", "a a"]
    ModelRunner(loaded, torch.device("cpu"))
    nothing, examples = given
    assert nothing is None
    assert torch.equal(examples, loaded.tokenizer.encode(["a", "a a"]))
