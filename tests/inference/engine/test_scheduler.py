"""Requests drawn together: each as if it were alone, whoever comes, leaves or is late."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from dalle import artefact as artefacts
from dalle.errors import DeviceError, PlatformError, UserError
from dalle.types import PRECISIONS
from inference.api.rendering import Candidate, GenerateResult, Preview
from inference.api.schema import CompleteRequest, GenerateRequest
from inference.engine.control import Cancelled, Control, DeadlineExceeded
from inference.engine.engine_core import Scheduler, State
from inference.engine.model_runner import Generator
from inference.engine.request import Failed
from inference.engine.running_request import Ended
from inference.settings import read_settings

CPU = torch.device("cpu")
PATIENCE = 60.0  # seconds until a test that waits for another thread gives up
CAPTIONS = ["a red square", "a blue circle", "big filled star"]


@pytest.fixture(scope="module")
def artefact(tiny_artefact):
    return artefacts.load(tiny_artefact)


@pytest.fixture
def generator(artefact) -> Generator:
    return Generator(artefact, CPU, chunk_size=4)


def ask(number: int = 0, **fields: object) -> GenerateRequest:
    """All candidates are asked for, so that none of their pictures is let go."""
    given = {"caption": CAPTIONS[number], "seed": number, "num_candidates": 3} | fields
    return GenerateRequest.model_validate({"num_images": given["num_candidates"]} | given)


REQUESTS = [
    ask(0, num_candidates=6),
    ask(1, guidance_scale=3.0),
    ask(2, temperature=0.5, top_k=5, preview_rows=2),
]


def pictures(result: GenerateResult) -> dict[int, bytes]:
    return {each.number: each.pixels.tobytes() for each in result.ranked}


def draw_together(generator: Generator, requests, controls=None, every: int = 3):
    """Begin one every few steps; how each ended."""
    controls = controls or [Control() for _ in requests]
    outcomes: list[object] = [None] * len(requests)
    numbers: dict[object, int] = {}
    steps = 0
    while None in outcomes:
        number = len(numbers)
        if steps % every == 0 and number < len(requests):
            drawing = generator.begin(generator.prepare(requests[number]), controls[number])
            numbers[drawing] = number
        for ended in generator.advance():
            outcomes[numbers[ended.drawing]] = ended.outcome
        steps += 1
        assert steps < 2000, "a request does not end"
    return outcomes


@pytest.mark.parametrize("every", [1, 3, 20])
def test_each_is_drawn_as_if_it_were_alone(every, artefact, generator):
    outcomes = draw_together(generator, REQUESTS, every=every)
    for request, outcome in zip(REQUESTS, outcomes, strict=True):
        alone = Generator(artefact, CPU, chunk_size=1).generate(request)
        assert pictures(outcome) == pictures(alone)
        for one, other in zip(outcome.ranked, alone.ranked, strict=True):
            assert one.number == other.number
            assert one.clip_score == pytest.approx(other.clip_score, abs=1e-5)
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)


def test_they_take_turns_in_one_step(generator):
    """The second does not wait for the first to end."""
    seen: list[tuple[int, int]] = []

    def noting(which: int) -> Control:
        return Control(on_candidate=lambda candidate: seen.append((which, candidate.number)))

    draw_together(generator, [ask(0, num_candidates=20), ask(1)], [noting(0), noting(1)])
    last_of_second = max(index for index, (which, _) in enumerate(seen) if which == 1)
    assert [which for which, _ in seen[last_of_second:]].count(0) >= 8
    assert [number for which, number in seen if which == 0] == list(range(20))


def test_who_leaves_does_not_disturb_who_stays(artefact, generator):
    left = Control(on_candidate=lambda _: left.cancel())
    first, second = draw_together(generator, [ask(0, num_candidates=9), ask(1)], [left, Control()])
    assert isinstance(first, Cancelled)
    assert pictures(second) == pictures(Generator(artefact, CPU).generate(ask(1)))
    assert generator.has_room


class Clock:
    """Seconds that pass only when somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_deadline_ends_its_own_request_only(artefact, generator):
    controls = [Control(), Control(40.0, clock=Clock()), Control(5.0, clock=Clock())]
    requests = [ask(0), ask(1, num_candidates=40), ask(2)]
    whole, part, none = draw_together(generator, requests, controls)
    assert pictures(whole) == pictures(Generator(artefact, CPU).generate(ask(0)))
    assert 1 <= len(part.ranked) < 40
    assert part.num_candidates == 40
    assert isinstance(none, DeadlineExceeded)


def test_of_512_candidates_only_the_best_pictures_are_ever_held(artefact):
    generator = Generator(artefact, CPU, chunk_size=32)
    handed_over: dict[int, bytes] = {}
    held: list[int] = []

    def note(candidate: Candidate) -> None:
        handed_over[candidate.number] = candidate.pixels.tobytes()
        finished = [each.pixels.size > 0 for each in drawing.finished]
        held.append(sum(finished))

    request = ask(0, num_candidates=512, num_images=25)
    drawing = generator.begin(generator.prepare(request), Control(on_candidate=note))
    over: list[Ended] = []
    while not over:
        over = generator.advance()
    result = over[0].outcome
    assert sorted(handed_over) == list(range(512))
    assert max(held) <= 25 + 4, "those of the last few are not ranked yet"
    assert len(result.ranked) == 512
    best = result.ranked[:25]
    assert [each.pixels.tobytes() for each in best] == [handed_over[each.number] for each in best]
    assert all(each.pixels.size == 0 for each in result.ranked[25:])
    merits = [each.merit for each in result.ranked]
    assert merits == sorted(merits, reverse=True)


def test_what_is_drawn_shows_in_previews_whoever_is_beside_it(generator):
    alone: list[Preview] = []
    generator.generate(REQUESTS[2], Control(on_preview=alone.append))
    together: list[Preview] = []
    controls = [Control(), Control(), Control(on_preview=together.append)]
    draw_together(generator, REQUESTS, controls)
    key = lambda preview: (preview.number, preview.rows)  # noqa: E731
    assert sorted(map(key, together)) == sorted(map(key, alone))
    for one, other in zip(sorted(together, key=key), sorted(alone, key=key), strict=True):
        assert (one.pixels == other.pixels).all()


def test_the_self_test_leaves_what_was_begun_alone(artefact, generator):
    drawing = generator.begin(generator.prepare(ask(0, num_candidates=5)), Control())
    generator.advance()
    generator.self_test()
    over = [ended for _ in range(200) for ended in generator.advance()]
    ((began, outcome),) = [(each.drawing, each.outcome) for each in over]
    assert began is drawing
    expected = Generator(artefact, CPU).generate(ask(0, num_candidates=5))
    assert pictures(outcome) == pictures(expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precision_is_a_setting(precision):
    assert read_settings({"DALLE_PRECISION": precision}).precision == precision
    assert read_settings({}).precision == "fp32"


def test_a_precision_that_is_none_is_refused_by_name():
    with pytest.raises(UserError, match="DALLE_PRECISION must be one of fp32, .* got 'int4'"):
        read_settings({"DALLE_PRECISION": "int4"})


def test_in_another_precision_nearly_the_same_is_drawn(artefact, tiny_artefact):
    exact = Generator(artefact, CPU).generate(ask(0))
    half = Generator.load(tiny_artefact, "cpu", precision="fp16").generate(ask(0))
    scores = [
        {each.number: each.log_likelihood for each in result.ranked} for result in (exact, half)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=0.01)
    assert scores[0] != scores[1]


def test_a_precision_of_another_device_stops_the_loading(tiny_artefact):
    with pytest.raises(DeviceError, match="device cpu must be fp32, fp16 or int8, got bf16"):
        Generator.load(tiny_artefact, "cpu", precision="bf16")


# --- the same under the scheduler


@pytest.fixture
def scheduler(generator):
    scheduler = Scheduler(lambda: generator)
    scheduler.start()
    assert scheduler.wait_until_loaded(PATIENCE) is State.READY
    yield scheduler
    scheduler.cancel_all()
    assert scheduler.drain(PATIENCE)


def submit(scheduler: Scheduler, generator: Generator, request, seconds: float = 600.0):
    now = time.monotonic()
    return scheduler.submit(generator.prepare(request), arrival=now, deadline=now + seconds)


def last_event(job):
    while isinstance(event := job.next_event(PATIENCE), Preview | Candidate):
        pass
    assert event is not None, "the job did not end"
    return event


def test_many_clients_get_their_own_pictures(artefact, generator, scheduler):
    requests = [ask(number % 3, seed=number, num_candidates=1 + number % 4) for number in range(9)]
    jobs = [submit(scheduler, generator, request) for request in requests]
    completion = submit(scheduler, generator, CompleteRequest(complete="red", seed=1))
    alone = Generator(artefact, CPU)
    for request, job in zip(requests, jobs, strict=True):
        assert pictures(last_event(job)) == pictures(alone.generate(request))
    assert len(last_event(completion).reply.captions) == 4
    assert scheduler.queue_depth == 0


def test_a_short_request_overtakes_a_long_one(generator, scheduler):
    long = submit(scheduler, generator, ask(0, num_candidates=200))
    assert isinstance(long.next_event(PATIENCE), Candidate)
    short = submit(scheduler, generator, ask(1, num_candidates=1))
    assert isinstance(last_event(short), GenerateResult)
    assert scheduler.queue_depth == 1, "the long one goes on"
    long.cancel()
    assert isinstance(last_event(long).error, Cancelled)


def test_a_failure_in_a_step_ends_what_was_in_it_and_nothing_later(artefact, scheduler, generator):
    both_begun = threading.Event()

    def fail(module, arguments):
        both_begun.wait(PATIENCE)
        handle.remove()
        raise RuntimeError("the device stumbled")

    handle = artefact.dvae.decoder.register_forward_pre_hook(fail)
    jobs = [submit(scheduler, generator, ask(number)) for number in range(2)]
    both_begun.set()
    outcomes = [last_event(job) for job in jobs]
    assert isinstance(outcomes[0], Failed)
    assert "stumbled" in str(outcomes[0].error)
    assert scheduler.state is State.READY
    assert isinstance(last_event(submit(scheduler, generator, ask(2))), GenerateResult)


def test_a_full_device_is_told_in_words_to_all_who_were_drawn_together(generator, artefact):
    def fail(module, arguments):
        handle.remove()
        raise torch.OutOfMemoryError("no memory")

    handle = artefact.dvae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(PlatformError, match="set DALLE_CHUNK_SIZE lower"):
        draw_together(generator, [ask(0), ask(1)])
    assert len(generator.abandon()) == 2
    assert pictures(generator.generate(ask(0)))


def test_without_a_transformer_there_is_no_room(artefact):
    assert not Generator(replace(artefact, transformer=None), CPU).has_room


def test_a_device_that_lags_behind_is_waited_for_in_time(generator, monkeypatch):
    """As on a GPU: after some steps, before a picture is taken, and before another request's work
    would be charged with them."""
    waits: list[int] = []  # steps before each
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        return draw()

    studio, engine = generator._studio, generator._engine
    draw = engine.step
    monkeypatch.setattr(engine, "step", step)
    monkeypatch.setattr(studio, "_wait", lambda: waits.append(steps))
    first = generator.begin(generator.prepare(ask(0)), Control())
    assert waits == []
    for _ in range(11):
        generator.advance()
    assert waits == [8]
    generator.begin(generator.prepare(ask(1)), Control())
    assert waits == [8, 11]
    ended = []
    while not ended:
        ended = generator.advance()
    assert waits[2:] == [16], "the pictures are there"
    assert ended[0].drawing is first
