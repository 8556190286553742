"""training.evaluate.choose_sampling: which settings are chosen on held-out captions, and when."""

import threading
from dataclasses import replace

import pytest
import torch

from dalle.decoding.sampling import SamplingOptions
from dalle.manifest import ChosenSampling, Manifest, SamplingSettings
from tests.conftest import build_tiny_models
from training import rainbow
from training.evaluate import choose_sampling as module
from training.evaluate.choose_sampling import (
    FILTERS,
    GUIDED,
    PLAIN,
    Trial,
    best_of,
    choose_sampling,
)
from training.report import samples
from training.stopping import NEVER, Stopped

CAPTIONS = [sample.caption for sample in rainbow.samples()[::270]]


def trial(settings, share, nats=1.0, captions=100):
    """Draws of which a share is right: all of the first captions, none of the others."""
    hits = torch.zeros(captions, dtype=torch.float64)
    hits[: round(share * captions)] = 1
    return Trial(settings, hits, nats, 0.1)


T7, T5, GUIDANCE = (
    SamplingSettings(temperature=0.7),
    SamplingSettings(temperature=0.5),
    SamplingSettings(guidance_scale=2.0),
)
PLAIN_DRAWS = trial(PLAIN, 0.5)


@pytest.mark.parametrize(
    ("tried", "real", "chosen"),
    [
        ([trial(T7, 0.8)], 0.9, T7),
        ([trial(T7, 0.52)], 0.9, PLAIN),  # 2 of 100 captions, of an error of 1.4
        ([trial(T7, 0.7), trial(T5, 0.9)], 0.95, T5),
        ([trial(T7, 0.88, nats=1.05), trial(T5, 0.9, nats=1.1)], 0.95, T7),  # cannot be told apart
        ([trial(T7, 0.7), trial(T5, 0.9, nats=1.2)], 0.95, T7),  # T5 forgets too much of the model
        ([trial(T7, 0.7, nats=1.05), trial(GUIDANCE, 0.9, nats=1.1)], 0.7, T7),  # above real ones
        ([trial(T7, 0.3)], 0.9, PLAIN),
        ([], 0.9, PLAIN),
    ],
)
def test_settings_must_be_better_than_chance_allows_and_the_mildest_of_equals(tried, real, chosen):
    assert best_of(tried, PLAIN_DRAWS, real).settings == chosen


@pytest.fixture(scope="module")
def held_out():
    """Tiny models, captions and random images of their size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(CAPTIONS), 3, 16, 16), generator=generator)
    return build_tiny_models(), CAPTIONS, images.to(torch.uint8)


@pytest.mark.slow
def test_the_plain_settings_come_first_and_lose_what_the_model_says_of_the_images(held_out):
    models, captions, images = held_out
    chosen = choose_sampling(models, captions, images, guidance=True, seconds=1e6)
    assert chosen.num_captions == len(captions)
    first, *others = chosen.tried
    assert first.settings == PLAIN
    assert {each.settings for each in others} <= {*FILTERS, *GUIDED}
    codes = models.dvae.encode(images.float() / 255)
    likelihood = models.transformer.log_likelihood(models.tokenizer.encode(captions), codes)
    assert first.nats == pytest.approx(float(-likelihood.sum() / codes.numel()), rel=1e-4)
    assert all(each.nats <= first.nats + module.MOST_LOST_NATS for each in others)
    assert chosen.settings == PLAIN, "an untrained model has nothing to choose"


def test_a_code_that_a_filter_leaves_out_costs_a_tenth_of_its_probability(held_out):
    models, captions, images = held_out
    chooser = module._Chooser(models, captions, images, 0, NEVER)
    plain, one = chooser._nats([PLAIN, SamplingSettings(top_k=1)])
    assert plain < one < plain + 2.31  # ln 10 more, where no image has the likeliest code


@pytest.fixture
def slow(monkeypatch):
    """A clock by which every draw of captions takes a second for each of the first 16."""
    now = [0.0]
    draw = module._Chooser.draw

    def slowly(chooser, settings, number):
        now[0] += min(number, 16)
        return draw(chooser, settings, number)

    monkeypatch.setattr(module._Chooser, "draw", slowly)
    return lambda: now[0]


@pytest.mark.slow
def test_fewer_captions_are_drawn_where_the_time_is_short(held_out, slow):
    chosen = choose_sampling(*held_out, guidance=False, seconds=165.0, clock=slow)
    assert chosen.num_captions == 33


def test_draws_that_take_much_longer_than_they_may_are_given_up(held_out, slow, caplog):
    with caplog.at_level("INFO"):
        assert choose_sampling(*held_out, guidance=False, seconds=7.0, clock=slow) is None
    assert "7 seconds are too few to choose another on 32 captions" in caplog.text


@pytest.mark.parametrize(
    ("number", "seconds", "says"),
    [
        (31, 1e6, "it takes 32 different held-out captions to choose another, and there are 31"),
        (33, 1e-9, "seconds are too few to choose another on 32 captions"),
    ],
)
def test_with_few_captions_or_little_time_nothing_is_chosen(
    held_out, caplog, number, seconds, says
):
    models, captions, images = held_out
    rows = [*range(number), 0, 1]
    some = [captions[row] for row in rows]
    with caplog.at_level("INFO"):
        found = choose_sampling(models, some, images[rows], guidance=False, seconds=seconds)
    assert found is None
    assert says in caplog.text


def test_a_stop_ends_the_choice(held_out):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        choose_sampling(*held_out, guidance=False, seconds=60, stop=stop)


def test_reports_and_evaluation_sample_as_serve_does_with_guidance_too(held_out):
    models, captions, _ = held_out
    settings = SamplingSettings(temperature=0.5, guidance_scale=2.0)
    tried = module.Trial(settings, torch.ones(1), 1.0, 0.0).record()
    sampling = ChosenSampling(
        settings=settings, num_captions=40, own_caption_of_real=1.0, tried=[tried]
    )
    of_model = replace(models, manifest=Manifest(sampling=sampling))
    options = SamplingOptions(temperature=0.5, guidance_scale=2.0)
    numbers = [[0, 3]] * 2
    silent = samples.generate_candidates(of_model, captions[:2], numbers, seed=1)
    given = samples.generate_candidates(models, captions[:2], numbers, seed=1, options=options)
    plain = samples.generate_candidates(models, captions[:2], numbers, seed=1)
    for one, two, other in zip(silent, given, plain, strict=True):
        assert torch.equal(one.images, two.images)
        assert not torch.equal(one.images, other.images)
