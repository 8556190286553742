"""inference.engine.engine_core: order, refusals, deadlines, cancellation, draining, death."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from dalle.errors import ArtefactError, PlatformError
from inference.api.rendering import Candidate, GenerateResult, Preview, Result
from inference.engine.engine_core import EngineCore, State
from inference.engine.request import Cancelled, DeadlineExceeded, EngineRequest, Failed
from inference.engine.request_queue import Busy
from tests.inference.one_at_a_time import OneAtATime

PATIENCE = 180.0  # seconds until a test that waits for another thread gives up


@dataclass(kw_only=True, eq=False)
class Work(EngineRequest):
    """A request of the engine below: finishes `units` candidates, each when `gate` is open."""

    units: int = 1
    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def opened(self) -> "Work":
        self.gate.set()
        return self


@dataclass
class Engine(OneAtATime):
    """An engine without a model: runs one request in a step, and fails where a test says so."""

    tests: list[Exception | None] = field(default_factory=list)
    done: list[Work] = field(default_factory=list)

    def prepare(self, request: Any, **_: Any) -> Any:
        return request

    def self_test(self) -> None:
        if self.tests and (error := self.tests.pop(0)) is not None:
            raise error

    def run(self, work: Work) -> Result:
        work.begun.set()
        finished: list[Candidate] = []
        for number in range(work.units):
            while work.may_continue() and not work.gate.wait(0.01):
                pass
            if not work.may_continue():
                break
            candidate = Candidate(number, -1.0, None, -1.0, np.zeros((4, 4, 3), np.uint8))
            finished.append(candidate)
            work.put(candidate)
        if work.error is not None:
            raise work.error
        if work.is_cancelled or not finished:
            raise work.stop_error()
        self.done.append(work)
        return GenerateResult(finished, "log_likelihood", 0, work.units, 0.0, 0.0, 0.0)


@contextmanager
def started(engine: Engine, **options: object) -> Iterator[EngineCore]:
    engine_core = EngineCore(lambda: engine, **options)  # type: ignore[arg-type]
    engine_core.start()
    assert engine_core.wait_until_loaded(PATIENCE) is not State.LOADING
    yield engine_core
    engine_core.cancel_all()
    engine_core.drain(PATIENCE)


def submit(
    engine_core: EngineCore, work: Work, seconds: float = 600.0, **options: bool
) -> EngineRequest:
    work.arrival = time.monotonic()
    work.deadline = work.arrival + seconds
    engine_core.submit(work, **options)
    return work


def last_event(request: EngineRequest) -> Result | Failed:
    while isinstance(event := request.next_event(PATIENCE), Preview | Candidate):
        pass
    assert event is not None, "the request did not end"
    return event


def error_of(request: EngineRequest) -> Exception:
    event = last_event(request)
    assert isinstance(event, Failed)
    return event.error


def test_work_is_done_in_the_order_of_arrival():
    engine, first = Engine(), Work()
    with started(engine) as engine_core:
        requests = [submit(engine_core, first)]
        later = [Work().opened() for _ in range(3)]
        requests += [submit(engine_core, work) for work in later]
        first.gate.set()
        for request in requests:
            assert isinstance(last_event(request), GenerateResult)
    assert engine.done == [first, *later]


def test_candidates_arrive_before_the_result():
    with started(Engine()) as engine_core:
        request = submit(engine_core, Work(units=2).opened())
        events = [request.next_event(PATIENCE) for _ in range(3)]
    assert [type(event) for event in events] == [Candidate, Candidate, GenerateResult]


def test_a_slow_reader_misses_previews_but_no_candidate():
    request = Work()
    pixels = np.zeros((4, 4, 3), np.uint8)
    for number in range(1000):
        request.put(Preview(number, 1, pixels))
        request.put(Candidate(number, -1.0, None, -1.0, pixels))
    events = []
    while (event := request.next_event(0.0)) is not None:
        events.append(event)
    candidates = [event.number for event in events if isinstance(event, Candidate)]
    assert candidates == list(range(1000))
    assert 1 <= len(events) - len(candidates) <= 64


def test_a_full_queue_refuses_with_the_seconds_until_a_retry():
    with started(Engine(), queue_size=1) as engine_core:
        running, waiting = Work(), Work()
        submit(engine_core, running)
        assert running.begun.wait(PATIENCE)
        submit(engine_core, waiting)
        with pytest.raises(Busy) as caught:
            submit(engine_core, Work())
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1


def test_a_cancelled_request_frees_its_place_in_the_queue():
    with started(Engine(), queue_size=1) as engine_core:
        running = Work()
        submit(engine_core, running)
        assert running.begun.wait(PATIENCE)
        submit(engine_core, Work()).cancel()
        submit(engine_core, Work())


def test_a_request_that_waits_for_a_place_gets_a_free_one():
    with started(Engine(), queue_size=1) as engine_core:
        running, waiting = Work(), Work().opened()
        submit(engine_core, running)
        assert running.begun.wait(PATIENCE)
        submit(engine_core, waiting)
        threading.Timer(0.05, running.gate.set).start()
        request = submit(engine_core, Work().opened(), wait=True)
        assert isinstance(last_event(request), GenerateResult)


def test_a_request_waits_for_a_place_until_its_deadline():
    with started(Engine(), queue_size=1) as engine_core:
        running = Work()
        submit(engine_core, running)
        assert running.begun.wait(PATIENCE)
        submit(engine_core, Work())
        with pytest.raises(DeadlineExceeded, match="waited for its turn"):
            submit(engine_core, Work(), seconds=0.05, wait=True)


def test_work_that_could_not_begin_before_its_deadline_is_refused():
    engine = Engine()
    with started(engine) as engine_core:
        slow = Work()
        request = submit(engine_core, slow)
        assert slow.begun.wait(PATIENCE)
        threading.Timer(0.3, slow.gate.set).start()
        last_event(request)  # measured: at least 0.3 s a unit
        behind = Work(units=100)
        submit(engine_core, behind)
        with pytest.raises(Busy) as caught:
            submit(engine_core, Work(), seconds=5)
        assert (caught.value.status, caught.value.code) == (503, "too_busy")
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 5


@pytest.mark.parametrize("wait", [False, True])
def test_work_whose_deadline_has_passed_is_refused_by_an_idle_server_too(wait):
    with started(Engine()) as engine_core, pytest.raises(DeadlineExceeded, match="could be queued"):
        submit(engine_core, Work(), seconds=-1, wait=wait)


def test_work_whose_deadline_passed_in_the_queue_is_not_begun():
    engine = Engine()
    with started(engine) as engine_core:
        running, late = Work(), Work().opened()
        submit(engine_core, running)
        assert running.begun.wait(PATIENCE)
        request = submit(engine_core, late)
        late.shorten(time.monotonic())
        running.gate.set()
        assert isinstance(error_of(request), DeadlineExceeded)
    assert not late.begun.is_set()


def test_a_deadline_counts_from_arrival():
    with started(Engine()) as engine_core:
        now = time.monotonic()
        request = Work(units=3, arrival=now - 100, deadline=now + 100).opened()
        engine_core.submit(request)
        assert isinstance(last_event(request), GenerateResult)
        assert request.queue_seconds >= 100


def test_cancelled_work_stops_and_the_next_goes_on():
    with started(Engine()) as engine_core:
        unwanted = Work()
        request = submit(engine_core, unwanted)
        assert unwanted.begun.wait(PATIENCE)
        request.cancel()
        assert isinstance(error_of(request), Cancelled)
        assert isinstance(last_event(submit(engine_core, Work().opened())), GenerateResult)


def test_before_loading_has_ended_everything_is_refused():
    gate = threading.Event()

    def load() -> Engine:
        assert gate.wait(PATIENCE)
        return Engine()

    engine_core = EngineCore(load)
    engine_core.start()
    assert engine_core.state is State.LOADING
    with pytest.raises(Busy, match="being loaded") as caught:
        engine_core.engine()
    assert (caught.value.status, caught.value.retry_after) == (503, 5)
    gate.set()
    assert engine_core.wait_until_loaded(PATIENCE) is State.READY
    engine_core.drain(PATIENCE)


def test_a_model_that_fails_its_self_test_is_dead():
    deaths: list[Exception] = []
    error = ArtefactError("dvae/weights.safetensors is truncated")
    with started(Engine(tests=[error]), on_death=deaths.append) as engine_core:
        assert engine_core.state is State.DEAD
        assert engine_core.cause == "dvae/weights.safetensors is truncated"
        with pytest.raises(Busy, match="does not work") as caught:
            submit(engine_core, Work())
        assert caught.value.retry_after is None
    assert deaths == [error]
    assert not engine_core.was_ready


def test_an_error_of_ours_ends_one_request_only():
    with started(Engine()) as engine_core:
        request = submit(engine_core, Work(error=ZeroDivisionError("oops")).opened())
        assert isinstance(error_of(request), ZeroDivisionError)
        assert isinstance(last_event(submit(engine_core, Work().opened())), GenerateResult)


def test_an_engine_that_fails_its_test_after_an_error_is_dead():
    engine = Engine(tests=[None, RuntimeError("device lost")])
    with started(engine) as engine_core:
        broken, waiting = Work(error=RuntimeError("device lost")), Work()
        request = submit(engine_core, broken)
        next_request = submit(engine_core, waiting)
        broken.gate.set()
        assert isinstance(error_of(request), RuntimeError)
        assert isinstance(error_of(next_request), RuntimeError)
        assert engine_core.state is State.DEAD
        assert engine_core.was_ready


def test_a_full_device_ends_one_request_only():
    with started(Engine()) as engine_core:
        full = PlatformError("the device's memory is full", code="out_of_memory")
        assert error_of(submit(engine_core, Work(error=full).opened())) is full
        assert engine_core.state is State.READY


def test_an_engine_without_progress_counts_as_dead():
    class Hanging(Engine):
        def run(self, work: Work) -> Result:
            work.begun.set()
            work.gate.wait(PATIENCE)
            raise work.stop_error()

    with started(Hanging(), stall_seconds=0.0) as engine_core:
        work = Work()
        submit(engine_core, work)
        assert work.begun.wait(PATIENCE)
        assert engine_core.state is State.DEAD
        assert engine_core.cause == "no progress for 0 seconds"
        work.gate.set()


def test_a_drain_ends_what_was_accepted_and_refuses_the_rest():
    engine = Engine()
    with started(engine) as engine_core:
        running, waiting = Work(), Work().opened()
        requests = [submit(engine_core, running), submit(engine_core, waiting)]
        assert running.begun.wait(PATIENCE)
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(engine_core.drain(PATIENCE)))
        drain.start()
        while engine_core.state is not State.STOPPING:
            pass
        with pytest.raises(Busy, match="stopping") as caught:
            submit(engine_core, Work())
        assert caught.value.status == 503
        running.gate.set()
        drain.join(PATIENCE)
        assert drained == [True]
        assert all(isinstance(last_event(request), GenerateResult) for request in requests)


def test_a_drain_waits_for_the_models_thread_to_end(monkeypatch):
    turn = EngineCore._take_turn
    last_turn, gate = threading.Event(), threading.Event()

    def with_a_long_end(self, *arguments):
        if goes_on := turn(self, *arguments):
            return goes_on
        last_turn.set()
        assert gate.wait(PATIENCE)
        return False

    monkeypatch.setattr(EngineCore, "_take_turn", with_a_long_end)
    with started(Engine()) as engine_core:
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(engine_core.drain(PATIENCE)))
        drain.start()
        assert last_turn.wait(PATIENCE)
        assert drained == []
        gate.set()
        drain.join(PATIENCE)
        assert drained == [True]
        assert not engine_core._thread.is_alive()


@pytest.mark.slow
def test_a_drain_brings_deadlines_forward():
    class OneThenHold(Engine):
        def run(self, work: Work) -> Result:
            work.opened()
            work.put(Candidate(0, -1.0, None, -1.0, np.zeros((4, 4, 3), np.uint8)))
            work.units = 1
            while work.may_continue():
                pass
            return GenerateResult(
                [Candidate(0, -1.0, None, -1.0, np.zeros((4, 4, 3), np.uint8))],
                "log_likelihood",
                0,
                2,
                0.0,
                0.0,
                0.0,
            )

    with started(OneThenHold()) as engine_core:
        request = submit(engine_core, Work(units=2), seconds=3600)
        assert isinstance(request.next_event(PATIENCE), Candidate)
        assert engine_core.drain(1.0), "an hour's work was cut short"
        result = last_event(request)
        assert isinstance(result, GenerateResult)
        assert len(result.ranked) < result.num_candidates
