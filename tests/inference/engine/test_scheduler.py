"""inference.engine.scheduler: each request as if it were alone, whatever runs beside it."""

import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dalle import artefact as artefacts
from dalle.decoding.sampling import SamplingOptions
from dalle.errors import DeviceError, PlatformError, UserError
from dalle.types import PRECISIONS
from inference.api.rendering import Candidate, GenerateResult, Preview, render_json
from inference.api.schema import CompleteRequest, GenerateRequest
from inference.engine.engine_core import EngineCore, State
from inference.engine.model_runner import ModelRunner
from inference.engine.request import Cancelled, DeadlineExceeded, Failed, PreparedGeneration
from inference.engine.scheduler import LatencyModel
from inference.settings import read_settings

CPU = torch.device("cpu")
PATIENCE = 60.0  # seconds until a test that waits for another thread gives up
CAPTIONS = ["a red square", "a blue circle", "big filled star"]


@pytest.fixture(scope="module")
def artefact(tiny_artefact):
    return artefacts.load(tiny_artefact)


@pytest.fixture
def runner(artefact) -> ModelRunner:
    return ModelRunner(artefact, CPU, chunk_size=4)


def ask(number: int = 0, **fields: object) -> GenerateRequest:
    """All candidates are asked for, so that the pixels of all are kept."""
    given = {"caption": CAPTIONS[number], "seed": number, "num_candidates": 3} | fields
    return GenerateRequest.model_validate({"num_images": given["num_candidates"]} | given)


REQUESTS = [
    ask(0, num_candidates=6),
    ask(1, guidance_scale=3.0),
    ask(2, temperature=0.5, top_k=5, preview_rows=2),
]


def images_of(result: GenerateResult) -> dict[int, bytes]:
    return {each.number: each.pixels.tobytes() for each in result.ranked}


def answer(runner: ModelRunner, request):
    return runner.run(runner.prepare(request))


def sample_together(runner: ModelRunner, prepared, every: int = 3):
    """Begin one request every few steps; return their outcomes."""
    begun = steps = 0
    while any(each.outcome is None for each in prepared):
        if steps % every == 0 and begun < len(prepared):
            runner.add(prepared[begun])
            begun += 1
        runner.step()
        steps += 1
        assert steps < 2000, "a request does not end"
    return [each.outcome for each in prepared]


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3, 20])
def test_each_is_sampled_as_if_it_were_alone(every, artefact, runner):
    prepared = [runner.prepare(each) for each in REQUESTS]
    outcomes = sample_together(runner, prepared, every=every)
    for request, outcome in zip(REQUESTS, outcomes, strict=True):
        alone = answer(ModelRunner(artefact, CPU, chunk_size=1), request)
        assert images_of(outcome) == images_of(alone)
        for one, other in zip(outcome.ranked, alone.ranked, strict=True):
            assert one.number == other.number
            assert one.clip_score == pytest.approx(other.clip_score, abs=1e-5)
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)


@pytest.mark.parametrize("window", [2, 7, None])
def test_windows_change_neither_images_nor_previews(window, artefact):
    """A step may complete several rows of the grid of 4, or the rest of an image."""
    seen = []
    for each in (1, window):
        runner = ModelRunner(artefact, CPU, chunk_size=4, window=each)
        prepared = [runner.prepare(ask(0, preview_rows=1)), runner.prepare(ask(1))]
        outcomes = sample_together(runner, prepared, every=2)
        images = [images_of(outcome) for outcome in outcomes]
        previews = [
            (event.number, event.rows, event.pixels.tobytes())
            for event in iter(partial(prepared[0].next_event, 0.0), None)
            if isinstance(event, Preview)
        ]
        seen.append((images, sorted(previews)))
        assert len(previews) == 3 * 3
        assert outcomes[0].positions_per_step >= 1.0
    assert seen[0] == seen[1]


def test_equal_candidates_are_decoded_once_and_counted(artefact, monkeypatch):
    runner = ModelRunner(artefact, CPU, chunk_size=4)
    decoded = []
    decode = runner._artefact.dvae.decode

    def noted(tokens):
        decoded.append(len(tokens))
        return decode(tokens)

    monkeypatch.setattr(runner._artefact.dvae, "decode", noted)
    for distinct in (True, False):
        request = ask(0, num_candidates=6, temperature=0.0, distinct=distinct)
        prepared = runner.prepare(request)
        result = runner.run(prepared)
        reply = render_json(result, request, queue_seconds=0.0)
        assert [each.number for each in result.ranked] == [*range(6)]
        assert len({each.pixels.tobytes() for each in result.ranked if each.pixels.size}) == 1
        images = [(each.rank, each.candidate, each.copies) for each in reply.images]
        assert images == ([(1, 0, 6)] if distinct else [(n + 1, n, 6) for n in range(6)])
        sent = list(iter(partial(prepared.next_event, 0.0), None))
        assert sorted(each.number for each in sent if isinstance(each, Candidate)) == [*range(6)]
        assert all(each.pixels.size for each in sent if isinstance(each, Candidate))
    assert decoded == [1, 1]


def test_the_pixels_of_copies_are_released_though_nothing_else_is_decoded(artefact):
    runner = ModelRunner(artefact, CPU, chunk_size=4)
    result = answer(runner, ask(0, num_candidates=6, num_images=1, temperature=0.0))
    assert [each.pixels.size > 0 for each in result.ranked] == [True] + 5 * [False]


def finishing(**fields: object) -> PreparedGeneration:
    """A request whose candidates a test finishes."""
    given = {"caption": "a", "text_tokens": torch.zeros(1, 1), "seed": 0, "num_candidates": 200}
    return PreparedGeneration(**(given | fields), options=SamplingOptions())


def candidate(number: int) -> Candidate:
    return Candidate(number, -1.0, None, -float(number), np.zeros((1, 1, 3), np.uint8))


def test_few_images_serve_equal_candidates_and_the_longest_unused_is_the_first_to_go():
    request = finishing()
    for number in range(8):
        request.finish(candidate(number))
    request.finish(request.recent[0].again(8))
    request.finish(candidate(9))
    assert list(request.recent) == [2, 3, 4, 5, 6, 7, 0, 9]
    request.cancel()
    request.end("log_likelihood")
    assert not request.recent


def test_of_200_different_candidates_the_best_and_a_few_recent_images_are_in_memory():
    request = finishing(num_images=1, distinct=True)
    for number in range(200):
        request.finish(candidate(number))
        request.release_pixels()
        in_memory = [*request.finished, *request.recent.values()]
        assert len({id(each.pixels) for each in in_memory if each.pixels.size}) <= 1 + 8


def test_requests_share_each_step(artefact, monkeypatch):
    """The second request does not wait for the end of the first."""
    # Windows finish candidates in the order of their right guesses.
    runner = ModelRunner(artefact, CPU, chunk_size=4, window=1)
    seen: list[tuple[int, int]] = []

    prepared = [runner.prepare(each) for each in (ask(0, num_candidates=20), ask(1))]
    for which, each in enumerate(prepared):
        note = lambda candidate, which=which: seen.append((which, candidate.number))  # noqa: E731
        monkeypatch.setattr(each, "put", note)
    sample_together(runner, prepared)
    last_of_second = max(index for index, (which, _) in enumerate(seen) if which == 1)
    assert [which for which, _ in seen[last_of_second:]].count(0) >= 8
    assert [number for which, number in seen if which == 0] == list(range(20))


def test_a_cancelled_request_leaves_the_others_alone(artefact, runner, monkeypatch):
    leaves, stays = (runner.prepare(each) for each in (ask(0, num_candidates=9), ask(1)))
    monkeypatch.setattr(leaves, "put", lambda _: leaves.cancel())
    first, second = sample_together(runner, [leaves, stays])
    assert isinstance(first, Cancelled)
    assert images_of(second) == images_of(answer(ModelRunner(artefact, CPU), ask(1)))
    assert runner.has_room


class Clock:
    """A clock that advances by a second at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_deadline_ends_one_request_only(artefact, runner):
    prepared = [
        runner.prepare(ask(0)),
        runner.prepare(ask(1, num_candidates=40), deadline=40.0),
        runner.prepare(ask(2), deadline=5.0),
    ]
    prepared[1].clock, prepared[2].clock = Clock(), Clock()
    whole, part, none = sample_together(runner, prepared)
    assert images_of(whole) == images_of(answer(ModelRunner(artefact, CPU), ask(0)))
    assert 1 <= len(part.ranked) < 40
    assert part.num_candidates == 40
    assert isinstance(none, DeadlineExceeded)


@pytest.mark.slow
def test_of_512_candidates_only_the_best_images_are_in_memory(artefact, monkeypatch):
    runner = ModelRunner(artefact, CPU, chunk_size=32)
    passed_on: dict[int, bytes] = {}
    in_memory: list[int] = []

    def note(candidate: Candidate) -> None:
        passed_on[candidate.number] = candidate.pixels.tobytes()
        (running,) = runner._scheduler._running
        finished = [each.pixels.size > 0 for each in running.finished]
        in_memory.append(sum(finished))

    prepared = runner.prepare(ask(0, num_candidates=512, num_images=25))
    monkeypatch.setattr(prepared, "put", note)
    result = runner.run(prepared)
    assert sorted(passed_on) == list(range(512))
    assert max(in_memory) <= 25 + 4, "those of the last few are not ranked yet"
    assert len(result.ranked) == 512
    best = result.ranked[:25]
    assert [each.pixels.tobytes() for each in best] == [passed_on[each.number] for each in best]
    assert all(each.pixels.size == 0 for each in result.ranked[25:])
    merits = [each.merit for each in result.ranked]
    assert merits == sorted(merits, reverse=True)


def test_previews_are_the_same_whichever_requests_run_beside_them(runner):
    def previews_of(prepared) -> list[Preview]:
        events = iter(lambda: prepared.next_event(0.0), None)
        return [each for each in events if isinstance(each, Preview)]

    one = runner.prepare(REQUESTS[2])
    runner.run(one)
    several = [runner.prepare(each) for each in REQUESTS]
    sample_together(runner, several)
    alone, together = previews_of(one), previews_of(several[2])
    assert together
    key = lambda preview: (preview.number, preview.rows)  # noqa: E731
    assert sorted(map(key, together)) == sorted(map(key, alone))
    for one, other in zip(sorted(together, key=key), sorted(alone, key=key), strict=True):
        assert (one.pixels == other.pixels).all()


def test_only_as_many_candidates_are_previewed_as_are_to_be(runner, monkeypatch):
    prepared = runner.prepare(ask(0, preview_rows=2))
    prepared.num_previewed = 1
    decoded: list[int] = []
    decode_rows = runner._artefact.dvae.decode_rows

    def note(tokens):
        decoded.append(len(tokens))
        return decode_rows(tokens)

    monkeypatch.setattr(runner._artefact.dvae, "decode_rows", note)
    result = runner.run(prepared)
    events = iter(lambda: prepared.next_event(0.0), None)
    assert {each.number for each in events if isinstance(each, Preview)} == {0}
    assert set(decoded) == {1}
    assert len(result.ranked) == 3


def test_the_self_test_leaves_running_requests_alone(artefact, runner):
    prepared = runner.prepare(ask(0, num_candidates=5))
    runner.add(prepared)
    runner.step()
    runner.self_test()
    ended = [each for _ in range(200) for each in runner.step()]
    assert ended == [prepared]
    outcome = prepared.outcome
    expected = answer(ModelRunner(artefact, CPU), ask(0, num_candidates=5))
    assert images_of(outcome) == images_of(expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precision_is_a_setting(precision):
    assert read_settings({"DALLE_PRECISION": precision}).precision == precision
    assert read_settings({}).precision == "fp32"


def test_a_precision_that_is_none_is_refused_by_name():
    with pytest.raises(UserError, match="DALLE_PRECISION must be one of fp32, .* got 'int4'"):
        read_settings({"DALLE_PRECISION": "int4"})


def test_in_another_precision_nearly_the_same_is_sampled(artefact, tiny_artefact):
    exact = answer(ModelRunner(artefact, CPU), ask(0))
    half = answer(ModelRunner.load(tiny_artefact, "cpu", precision="fp16"), ask(0))
    scores = [
        {each.number: each.log_likelihood for each in result.ranked} for result in (exact, half)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=0.01)
    assert scores[0] != scores[1]


def test_a_precision_of_another_device_stops_the_loading(tiny_artefact):
    with pytest.raises(DeviceError, match="device cpu must be fp32, fp16 or int8, got bf16"):
        ModelRunner.load(tiny_artefact, "cpu", precision="bf16")


# --- the same in an engine core


@pytest.fixture
def engine_core(runner):
    engine_core = EngineCore(lambda: runner)
    engine_core.start()
    assert engine_core.wait_until_loaded(PATIENCE) is State.READY
    yield engine_core
    engine_core.cancel_all()
    assert engine_core.drain(PATIENCE)


def submit(engine_core: EngineCore, runner: ModelRunner, request, seconds: float = 600.0):
    prepared = runner.prepare(request, deadline=time.monotonic() + seconds)
    engine_core.submit(prepared)
    return prepared


def last_event(prepared):
    while isinstance(event := prepared.next_event(PATIENCE), Preview | Candidate):
        pass
    assert event is not None, "the request did not end"
    return event


@pytest.mark.slow
def test_each_of_many_clients_gets_the_images_of_its_request(artefact, runner, engine_core):
    requests = [ask(number % 3, seed=number, num_candidates=1 + number % 4) for number in range(9)]
    submitted = [submit(engine_core, runner, request) for request in requests]
    completion = submit(engine_core, runner, CompleteRequest(complete="red", seed=1))
    alone = ModelRunner(artefact, CPU)
    for request, prepared in zip(requests, submitted, strict=True):
        assert images_of(last_event(prepared)) == images_of(answer(alone, request))
    assert len(last_event(completion).captions) == 4
    assert engine_core.queue_depth == 0


def test_a_short_request_overtakes_a_long_one(runner, engine_core):
    long = submit(engine_core, runner, ask(0, num_candidates=200))
    assert isinstance(long.next_event(PATIENCE), Candidate)
    short = submit(engine_core, runner, ask(1, num_candidates=1))
    assert isinstance(last_event(short), GenerateResult)
    assert engine_core.queue_depth == 1, "the long one goes on"
    long.cancel()
    assert isinstance(last_event(long).error, Cancelled)


def test_a_failed_step_ends_the_requests_in_it_and_no_later_one(artefact, engine_core, runner):
    both_begun = threading.Event()

    def fail(module, arguments):
        both_begun.wait(PATIENCE)
        handle.remove()
        raise RuntimeError("the device stumbled")

    handle = artefact.dvae.decoder.register_forward_pre_hook(fail)
    submitted = [submit(engine_core, runner, ask(number)) for number in range(2)]
    both_begun.set()
    outcomes = [last_event(prepared) for prepared in submitted]
    assert isinstance(outcomes[0], Failed)
    assert "stumbled" in str(outcomes[0].error)
    assert engine_core.state is State.READY
    assert isinstance(last_event(submit(engine_core, runner, ask(2))), GenerateResult)


def test_a_full_device_is_an_error_with_a_remedy_for_all_requests_that_run(
    runner, artefact, monkeypatch
):
    monkeypatch.setattr("inference.engine.scheduler.STEP_SECONDS", 0.0)  # both are begun

    def fail(module, arguments):
        handle.remove()
        raise torch.OutOfMemoryError("no memory")

    handle = artefact.dvae.decoder.register_forward_pre_hook(fail)
    prepared = [runner.prepare(ask(number)) for number in range(2)]
    with pytest.raises(PlatformError, match="set DALLE_CHUNK_SIZE lower"):
        sample_together(runner, prepared)
    assert len(runner._scheduler._running) == 2
    runner.abandon()
    assert runner._scheduler._running == []
    assert images_of(answer(runner, ask(0)))


def test_without_a_transformer_there_is_no_room(artefact):
    assert not ModelRunner(replace(artefact, transformer=None), CPU).has_room


def test_the_host_waits_for_a_device_that_is_behind(artefact, monkeypatch):
    """As on a GPU: after some steps, before a candidate is decoded, and before the seconds would be
    charged to another request."""
    runner = ModelRunner(artefact, CPU, chunk_size=4, window=1)
    waits: list[int] = []  # steps before each
    steps = 0

    def step(seconds):
        nonlocal steps
        steps += 1
        return sample(seconds)

    scheduler, engine = runner._scheduler, runner._engine
    sample = engine.step
    monkeypatch.setattr(engine, "step", step)
    monkeypatch.setattr(scheduler, "_synchronize", lambda: waits.append(steps))
    first = runner.prepare(ask(0))
    runner.add(first)
    assert waits == []
    for _ in range(11):
        runner.step()
    assert waits == [8]
    runner.add(runner.prepare(ask(1)))
    assert waits == [8, 11]
    ended = []
    while not ended:
        ended = runner.step()
    assert waits[2:] == [16], "the first candidates are finished"
    assert ended[0] is first


def test_a_chunk_is_as_large_as_the_time_allows():
    latency = LatencyModel(16)
    assert latency.chunk_size(100, False, 16, 1.0) == 16, "nothing is known yet"
    latency.record_sampling(1, False, 16, 16.0)
    assert latency.chunk_size(100, False, 16, 1000.0) == 16
    assert latency.chunk_size(100, False, 16, 70.0) == 4, "at worst in proportion"
    assert latency.chunk_size(3, False, 16, 1000.0) == 3, "no more than are wanted"
    assert latency.chunk_size(100, True, 16, 70.0) == 2, "guidance takes two passes"
    assert latency.chunk_size(100, False, 16, 0.5) == 1
    latency.record_sampling(16, False, 16, 20.0)
    assert latency.chunk_size(100, False, 16, 30.0) == 16, "measured"
    latency.record_finishing(1, 1.0)
    assert latency.chunk_size(100, False, 16, 30.0) == 8, "decoding counts too"
    assert latency.chunk_size(100, False, 16, 30.0, decodes=4) == 2, "and so do previews"
    assert latency.chunk_size(100, False, 16, 30.0, decodes=4, previewed=1) == 4, "of one alone"
