"""inference.engine.model_runner: classes, completions, and requests that are refused."""

import base64
import dataclasses
import io
from dataclasses import replace

import pytest
from PIL import Image

from dalle.decoding.sampling import SamplingOptions
from dalle.errors import UserError
from dalle.manifest import ChosenSampling, Manifest, SamplingSettings, TriedSampling
from dalle.preprocess.tokenizer import CaptionTokenizer
from inference.api.schema import ClassifyRequest, CompleteRequest
from inference.engine.input_processor import prepare
from inference.engine.model_runner import ModelRunner
from inference.engine.request import DeadlineExceeded, PreparedCompletion, PreparedGeneration
from tests.inference.engine.model_runner_work import CPU, Clock, answer, ask, by_number, picture


@pytest.fixture(scope="module")
def tuned(artefact):
    """The artefact, with sampling settings that were chosen after its training."""
    settings = SamplingSettings(temperature=0.7, top_p=0.9, guidance_scale=2.0)
    tried = TriedSampling(settings=settings, own_caption=0.8, nats=1.0, spread=0.1)
    sampling = ChosenSampling(
        settings=settings, num_captions=96, own_caption_of_real=0.9, tried=[tried]
    )
    return replace(artefact, manifest=Manifest(sampling=sampling))


def options_of(artefact, request):
    prepared = prepare(artefact, request, 0.0, 1.0, artefact.manifest.sampling_settings)
    assert isinstance(prepared, PreparedGeneration | PreparedCompletion)
    return prepared.options


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, (0.7, None, 0.9, 2.0)),
        ({"temperature": 1.0}, (1.0, None, 0.9, 2.0)),
        ({"top_p": None, "guidance_scale": 1.0, "top_k": 3}, (0.7, 3, None, 1.0)),
    ],
)
def test_a_request_is_sampled_by_its_own_values_and_by_the_models_where_it_is_silent(
    tuned, artefact, given, used
):
    assert dataclasses.astuple(options_of(tuned, ask(**given))) == used
    assert options_of(artefact, ask(**given)) == SamplingOptions(**given)


def test_the_result_says_how_it_was_sampled_and_by_that_comes_again(tuned, artefact):
    result = answer(ModelRunner(tuned, CPU), ask(num_candidates=2))
    used = result.sampling.model_dump()
    assert used == {"temperature": 0.7, "top_k": None, "top_p": 0.9, "guidance_scale": 2.0}
    again = answer(ModelRunner(artefact, CPU), ask(num_candidates=2, **used))
    assert by_number(again)[1].pixels.tobytes() == by_number(result)[1].pixels.tobytes()


def test_the_models_settings_are_not_those_of_captions(tuned):
    assert options_of(tuned, CompleteRequest(complete="red")) == SamplingOptions()


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


def test_unknown_words_of_a_caption_are_told_with_near_ones_that_the_model_knows(runner):
    caption = "big oragne teapot teapot " + " ".join(f"w{number}" for number in range(3))
    (warning,) = runner.prepare(ask(caption=caption)).warnings
    assert "'oragne' (orange?), 'teapot', 'w0', 'w1', 'w2'; it knows 3" in warning
    assert runner.prepare(ask(caption="big RED star")).warnings == ()


def test_a_warning_names_ten_unknown_words_at_most_and_no_whole_long_one(tiny_models):
    caption = "x" * 1_900 + " " + " ".join(f"w{number}" for number in range(12))
    words = CaptionTokenizer.train([" ".join(map(str, range(60)))], text_length=20)
    runner = ModelRunner(replace(tiny_models, tokenizer=words), CPU)
    (warning,) = runner.prepare(ask(caption=caption)).warnings
    assert "'w8', and 3 more; it knows 60 words" in warning
    assert warning.count("x") == 80


def test_a_caption_that_is_too_long_is_cut_on_request_and_said(runner):
    caption = "big filled red star " * 3
    prepared = runner.prepare(ask(caption=caption, truncate=True))
    assert prepared.caption == "big filled red star big filled red star"
    assert prepared.warnings == (
        "the caption is longer than the 8 text tokens that the model reads, so it was cut to "
        "'big filled red star big filled red star'",
    )
    same = runner.prepare(ask(caption=prepared.caption, truncate=True))
    assert (same.text_tokens == prepared.text_tokens).all()
    assert same.warnings == ()


def test_a_caption_of_which_nothing_fits_is_refused_though_it_may_be_cut(tiny_models):
    words = CaptionTokenizer.train(["a"], kind="bpe", vocab_size=258, text_length=2)
    runner = ModelRunner(replace(tiny_models, tokenizer=words), CPU)
    with pytest.raises(UserError, match="at most 2 tokens"):
        runner.prepare(ask(caption="😀", truncate=True))


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
