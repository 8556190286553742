"""Parallel decoding samples the tokens that sampling position by position gives."""

import itertools
import math

import pytest
import torch

from dalle.decoding.cpu.step import CompiledWindows, CpuStep
from dalle.decoding.cpu.torch_step import CpuTorchStep
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import SamplingOptions
from dalle.types import ATTENTION_KINDS, FEED_FORWARD_KINDS
from tests.dalle.decoding.compiled import runs_here
from tests.dalle.decoding.reference import sample_image_tokens
from tests.dalle.decoding.reference_parallel import sample_in_windows
from tests.dalle.decoding.test_engine import (
    KINDS,
    OTHER_TEXT,
    PRIME,
    REQUESTS,
    TEXT,
    N,
    assert_as_sampled,
    run,
)

STEPS = [pytest.param(CpuStep, marks=runs_here), CpuTorchStep]
WINDOWS = [1, 2, 3, 5, N - 1, N, N + 9]
OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=0.6, guidance_scale=2.0),
    SamplingOptions(top_k=3, top_p=0.9),
]


@pytest.fixture(scope="module")
def model(make_dalle):
    return make_dalle(attention_kinds=("axial_row", "full"))


def build(step, model, num_slots, **arguments):
    """A step that may have windows in every precision: these models' tokens do not hang on how
    torch's products round."""
    built = step(model, num_slots, **arguments)
    built.window_refusal = None
    return built


def calm(model):
    """Make the guesses right more often: a step then ends inside its window and at its end."""
    for head in model.code_heads:
        head.to_logits.weight.mul_(0.2)
        head.to_logits.bias.mul_(4.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_the_reference_reaches_the_image_that_one_position_after_the_other_gives(
    kind, options, make_dalle
):
    model = calm(make_dalle(attention_kinds=(kind,)))
    expected = sample_image_tokens(model, TEXT, candidates=[3], seed=5, options=options)
    steps = []
    for window in WINDOWS:
        tokens, number = sample_in_windows(
            model, TEXT, candidate=3, seed=5, window=window, options=options
        )
        assert (tokens == expected.image_tokens[0]).all()
        steps.append(number)
    assert steps[0] == N
    assert steps[-1] < N, "no guess was right"


@pytest.mark.parametrize("num_codebooks", [1, 3])
@pytest.mark.parametrize("primed", [1, 6, N - 1])
def test_so_it_does_for_primed_images_of_several_codes(primed, num_codebooks, make_dalle):
    model = calm(make_dalle(num_codebooks=num_codebooks))
    prime = sample_image_tokens(model, OTHER_TEXT, candidates=[9], seed=1).image_tokens[0, :primed]
    expected = sample_image_tokens(model, TEXT, candidates=[0], seed=2, prime_tokens=prime)
    for window in (2, 7, N):
        tokens, _ = sample_in_windows(
            model, TEXT, candidate=0, seed=2, window=window, prime_tokens=prime
        )
        assert (tokens == expected.image_tokens[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_engine_samples_as_the_reference_with_windows(window, step, model):
    engine = DecodeEngine(model, 5, step=build(step, model, 5, num_rows=40), window=window)
    assert_as_sampled(model, run(engine, every=2))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("kinds", KINDS)
def test_so_it_does_for_every_kind_of_attention(kinds, window, step, make_dalle):
    model = calm(make_dalle(attention_kinds=kinds, num_layers=3))
    engine = DecodeEngine(model, 5, step=build(step, model, 5, num_rows=40), window=window)
    assert_as_sampled(model, run(engine))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fields", [{"num_codebooks": 1}, {"grid_size": 2}, {"grid_size": 1}])
def test_so_it_does_for_small_grids(fields, step, make_dalle):
    model = make_dalle(**fields)
    engine = DecodeEngine(model, 4, step=build(step, model, 4, num_rows=40))
    requests = [{**request, "prime_tokens": None} for request in REQUESTS]
    assert_as_sampled(model, run(engine, requests, every=1), requests)


@pytest.mark.parametrize("step", STEPS)
def test_as_many_steps_are_needed_as_by_the_reference(step, make_dalle):
    model = calm(make_dalle())
    for window, candidate in itertools.product((2, 5, N), range(3)):
        _, expected = sample_in_windows(model, TEXT, candidate=candidate, seed=7, window=window)
        engine = DecodeEngine(model, 1, step=build(step, model, 1, num_rows=N), window=window)
        request = engine.submit(TEXT, candidates=[candidate], seed=7)
        # The first position follows from the caption's pass alone.
        steps = 0
        while not engine.is_idle:
            engine.step()
            steps += 1
        assert expected <= steps <= expected + 1
        assert request.positions_per_step == N / steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "precision"),
    [
        *[pytest.param(CpuStep, each, marks=runs_here) for each in ("fp32", "fp16", "int8")],
        (CpuTorchStep, "int8"),
    ],
)
@pytest.mark.parametrize("feed_forward", FEED_FORWARD_KINDS)
def test_a_row_depends_neither_on_other_rows_nor_on_windows_bit_for_bit(
    feed_forward, step, precision, make_dalle
):
    model = make_dalle(attention_kinds=("axial_row", "full"), feed_forward=feed_forward)
    found = {}
    for (window, seconds), num_slots in itertools.product(
        ((1, 0.0), (3, 0.0), (N, 0.0), (4, math.inf)), (1, 6)
    ):
        own = step(model, num_slots, precision=precision, num_rows=64)
        assert own.window_refusal is None
        engine = DecodeEngine(model, num_slots, step=own, window=window)
        for text, seed in ((TEXT, 1), (OTHER_TEXT, 2)):
            engine.submit(text, candidates=range(3), seed=seed)
        while not engine.is_idle:
            for each in engine.step(seconds):
                key = each.request.seed, each.number
                seen = each.image_tokens.tolist(), each.log_likelihood
                assert found.setdefault(key, seen) == seen
    assert len(found) == 6


@pytest.mark.parametrize("step", STEPS)
def test_a_guess_that_is_thrown_away_fails_nothing(step, make_dalle):
    model = make_dalle(num_codebooks=1)
    own = build(step, model, 1, num_rows=64)
    engine = DecodeEngine(model, 1, step=own, window=N)
    sample, spoilt = own.sample, []

    def without_the_last_guess(hidden, noise_keys, batch):
        if len(hidden) > N // 2 and not spoilt:
            spoilt.append(len(hidden))
            hidden = hidden.clone()
            hidden[-1] = torch.nan
        return sample(hidden, noise_keys, batch)

    own.sample = without_the_last_guess
    engine.submit(TEXT, candidates=[0], seed=1)
    finished = []
    for _ in range(N):
        finished += engine.step()
        for each in engine._candidates:
            if step is CpuStep and each.window > N // 2 and not spoilt:  # it samples by itself
                spoilt.append(each.window)
                engine._state.hidden[each.slot, each.window - 1] = torch.nan
    (found,) = finished
    assert spoilt
    expected = sample_image_tokens(model, TEXT, candidates=[0], seed=1)
    assert (found.image_tokens == expected.image_tokens[0]).all()


@pytest.mark.parametrize("step", STEPS)
def test_rows_never_exceed_those_that_a_step_has_room_for(step, model, monkeypatch):
    own = build(step, model, 6, num_rows=8)
    most = []
    call, sample = type(own).__call__, type(own).sample

    def noted_call(self, slots, codes, positions):
        most.append(len(slots))
        return call(self, slots, codes, positions)

    def noted_sample(self, hidden, noise_keys, batch):
        most.append(len(hidden))
        return sample(self, hidden, noise_keys, batch)

    def noted_decode(self, candidates, width, seconds):
        most.append(sum(each.window * len(each.slots) for each in candidates))
        return decode(self, candidates, width, seconds)

    decode = CompiledWindows.decode
    monkeypatch.setattr(type(own), "__call__", noted_call)
    monkeypatch.setattr(type(own), "sample", noted_sample)
    monkeypatch.setattr(CompiledWindows, "decode", noted_decode)
    engine = DecodeEngine(model, 6, step=own, window=8)
    assert_as_sampled(model, run(engine, every=1))
    assert max(most) <= 8


@runs_here
def test_steps_of_one_call_end_when_a_candidate_has_finished(model):
    engine = DecodeEngine(model, 3, step=CpuStep(model, 3, num_rows=12), window=4)
    request = engine.submit(TEXT, candidates=range(5), seed=7)
    finished, calls = [], 0
    while not engine.is_idle:
        finished.append(engine.step(math.inf))
        calls += 1
        assert finished[-1], "a call ended before a candidate had finished"
    assert sum(map(len, finished)) == 5
    assert request.num_steps > calls, "no call had several steps"
    expected = sample_image_tokens(model, TEXT, candidates=range(5), seed=7).image_tokens
    by_number = sorted(itertools.chain(*finished), key=lambda each: each.number)
    assert (torch.stack([each.image_tokens for each in by_number]) == expected).all()


@pytest.mark.parametrize("step", STEPS)
def test_a_request_may_be_cancelled_between_windows(step, model):
    engine = DecodeEngine(model, 4, step=build(step, model, 4, num_rows=32), window=4)
    gone = engine.submit(
        TEXT, candidates=range(6), seed=0, options=SamplingOptions(guidance_scale=2)
    )
    kept = engine.submit(TEXT, candidates=range(3), seed=5)
    engine.step()
    engine.step()
    engine.cancel(gone)
    assert engine.busy_slots == kept.in_slots
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    expected = sample_image_tokens(model, TEXT, candidates=range(3), seed=5).image_tokens
    by_number = sorted(finished, key=lambda each: each.number)
    assert (torch.stack([each.image_tokens for each in by_number]) == expected).all()


def test_tokens_so_far_are_exact_and_no_guesses(model):
    engine = DecodeEngine(model, 1, step=build(CpuTorchStep, model, 1), window=6)
    request = engine.submit(TEXT, candidates=[4], seed=0, prime_tokens=PRIME)
    expected = sample_image_tokens(model, TEXT, candidates=[4], seed=0, prime_tokens=PRIME)
    while not engine.is_idle:
        engine.step()
        for _, tokens in engine.tokens_so_far(request):
            assert (tokens == expected.image_tokens[0, : len(tokens)]).all()


def test_a_window_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        DecodeEngine(model, 1, window=0)


def test_torchs_products_that_round_by_their_rows_have_no_windows(model):
    step = CpuTorchStep(model, 1)
    assert step.window_refusal == "torch's fp32 products round by their number of rows"
    assert CpuTorchStep(model, 1, precision="int8").window_refusal is None
    engine = DecodeEngine(model, 1, step=step)
    assert (engine.windows.widest, engine.window_refusal) == (1, step.window_refusal)


@pytest.mark.parametrize("step", STEPS)
def test_trials_of_every_number_of_rows_change_no_image(step, model):
    engine = DecodeEngine(model, 5, step=build(step, model, 5, num_rows=20))
    trials = engine.trials()
    assert [*trials] == [1, 2, 4, 8, 15]
    for work in trials.values():
        work()
    assert engine.is_idle
    assert_as_sampled(model, run(engine))
    assert DecodeEngine(model, 5, step=CpuTorchStep(model, 5), window=1).trials() == {}
