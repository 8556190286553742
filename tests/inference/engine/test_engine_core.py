"""The queue before the model: order, refusals, deadlines, cancellation, draining, death."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from dalle.errors import ArtefactError, PlatformError
from inference.api.rendering import Candidate, GenerateResult, Preview, Result
from inference.engine.control import Cancelled, Control, DeadlineExceeded
from inference.engine.engine_core import Scheduler, State
from inference.engine.request import Failed, Job
from inference.engine.request_queue import Busy

PATIENCE = 20.0  # seconds until a test that waits for another thread gives up


@dataclass
class Work:
    """Work of the engine below: does `units` steps, each when `gate` lets it."""

    units: int = 1
    kind: str = "generate"
    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def opened(self) -> "Work":
        self.gate.set()
        return self


@dataclass
class Engine:
    """Not a model: an engine whose steps and failures a test decides."""

    tests: list[Exception | None] = field(default_factory=list)
    done: list[Work] = field(default_factory=list)
    image_size: int | None = 4
    clip_size: int | None = 4
    threads: int = 1
    busy_slots: int = 0

    def prepare(self, request: object) -> object:
        return request

    def self_test(self) -> None:
        if self.tests and (error := self.tests.pop(0)) is not None:
            raise error

    def run(self, work: Work, control: Control) -> Result:
        work.begun.set()
        finished: list[Candidate] = []
        for number in range(work.units):
            while control.keep_going() and not work.gate.wait(0.01):
                pass
            if not control.keep_going():
                break
            candidate = Candidate(number, -1.0, None, -1.0, np.zeros((4, 4, 3), np.uint8))
            finished.append(candidate)
            control.finished(candidate)
        if work.error is not None:
            raise work.error
        if control.cancelled or not finished:
            raise control.error()
        self.done.append(work)
        return GenerateResult(finished, "log_likelihood", 0, work.units, 0.0, 0.0, 0.0)


@contextmanager
def started(engine: Engine, **options: object) -> Iterator[Scheduler]:
    scheduler = Scheduler(lambda: engine, **options)  # type: ignore[arg-type]
    scheduler.start()
    assert scheduler.wait_until_loaded(PATIENCE) is not State.LOADING
    yield scheduler
    scheduler.cancel_all()
    scheduler.drain(PATIENCE)


def submit(scheduler: Scheduler, work: Work, seconds: float = 600.0, **options: bool) -> Job:
    now = time.monotonic()
    return scheduler.submit(work, arrival=now, deadline=now + seconds, **options)


def last_event(job: Job) -> Result | Failed:
    while isinstance(event := job.next_event(PATIENCE), Preview | Candidate):
        pass
    assert event is not None, "the job did not end"
    return event


def error_of(job: Job) -> Exception:
    event = last_event(job)
    assert isinstance(event, Failed)
    return event.error


def test_work_is_done_in_the_order_of_arrival():
    engine, first = Engine(), Work()
    with started(engine) as scheduler:
        jobs = [submit(scheduler, first)]
        later = [Work().opened() for _ in range(3)]
        jobs += [submit(scheduler, work) for work in later]
        first.gate.set()
        for job in jobs:
            assert isinstance(last_event(job), GenerateResult)
    assert engine.done == [first, *later]


def test_candidates_arrive_before_the_result():
    with started(Engine()) as scheduler:
        job = submit(scheduler, Work(units=2).opened())
        events = [job.next_event(PATIENCE) for _ in range(3)]
    assert [type(event) for event in events] == [Candidate, Candidate, GenerateResult]


def test_a_slow_reader_misses_previews_but_no_candidate():
    job = Job(Work(), arrival=0.0, deadline=math.inf)
    pixels = np.zeros((4, 4, 3), np.uint8)
    for number in range(1000):
        job.control.previewed(Preview(number, 1, pixels))
        job.control.finished(Candidate(number, -1.0, None, -1.0, pixels))
    events = []
    while (event := job.next_event(0.0)) is not None:
        events.append(event)
    candidates = [event.number for event in events if isinstance(event, Candidate)]
    assert candidates == list(range(1000))
    assert 1 <= len(events) - len(candidates) <= 64


def test_a_full_queue_refuses_with_the_time_to_come_back():
    with started(Engine(), queue_size=1) as scheduler:
        running, waiting = Work(), Work()
        submit(scheduler, running)
        assert running.begun.wait(PATIENCE)
        submit(scheduler, waiting)
        with pytest.raises(Busy) as caught:
            submit(scheduler, Work())
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1


def test_a_cancelled_request_gives_its_place_in_the_queue_back():
    with started(Engine(), queue_size=1) as scheduler:
        running = Work()
        submit(scheduler, running)
        assert running.begun.wait(PATIENCE)
        submit(scheduler, Work()).cancel()
        submit(scheduler, Work())


def test_who_waits_for_a_place_gets_it_when_one_is_free():
    with started(Engine(), queue_size=1) as scheduler:
        running, waiting = Work(), Work().opened()
        submit(scheduler, running)
        assert running.begun.wait(PATIENCE)
        submit(scheduler, waiting)
        threading.Timer(0.05, running.gate.set).start()
        job = submit(scheduler, Work().opened(), wait=True)
        assert isinstance(last_event(job), GenerateResult)


def test_who_waits_for_a_place_waits_no_longer_than_the_deadline():
    with started(Engine(), queue_size=1) as scheduler:
        running = Work()
        submit(scheduler, running)
        assert running.begun.wait(PATIENCE)
        submit(scheduler, Work())
        with pytest.raises(DeadlineExceeded, match="waited for its turn"):
            submit(scheduler, Work(), seconds=0.05, wait=True)


def test_work_that_could_not_begin_before_its_deadline_is_refused():
    engine = Engine()
    with started(engine) as scheduler:
        slow = Work()
        job = submit(scheduler, slow)
        assert slow.begun.wait(PATIENCE)
        threading.Timer(0.3, slow.gate.set).start()
        last_event(job)  # measured: at least 0.3 s a unit
        behind = Work(units=100)
        submit(scheduler, behind)
        with pytest.raises(Busy) as caught:
            submit(scheduler, Work(), seconds=5)
        assert (caught.value.status, caught.value.code) == (503, "too_busy")
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 5


@pytest.mark.parametrize("wait", [False, True])
def test_work_whose_deadline_has_passed_is_refused_by_an_idle_server_too(wait):
    with started(Engine()) as scheduler, pytest.raises(DeadlineExceeded, match="could be queued"):
        submit(scheduler, Work(), seconds=-1, wait=wait)


def test_work_whose_deadline_passed_in_the_queue_is_not_begun():
    engine = Engine()
    with started(engine) as scheduler:
        running, late = Work(), Work().opened()
        submit(scheduler, running)
        assert running.begun.wait(PATIENCE)
        now = time.monotonic()
        job = scheduler.submit(late, arrival=now, deadline=now + 0.01)
        threading.Timer(0.05, running.gate.set).start()
        assert isinstance(error_of(job), DeadlineExceeded)
    assert not late.begun.is_set()


def test_a_deadline_counts_from_arrival_and_leaves_what_is_done():
    with started(Engine()) as scheduler:
        now = time.monotonic()
        job = scheduler.submit(Work(units=3).opened(), arrival=now - 100, deadline=now + 100)
        assert isinstance(last_event(job), GenerateResult)
        assert job.queue_seconds >= 100


def test_cancelled_work_stops_and_the_next_goes_on():
    with started(Engine()) as scheduler:
        unwanted = Work()
        job = submit(scheduler, unwanted)
        assert unwanted.begun.wait(PATIENCE)
        job.cancel()
        assert isinstance(error_of(job), Cancelled)
        assert isinstance(last_event(submit(scheduler, Work().opened())), GenerateResult)


def test_before_loading_has_ended_everything_is_refused():
    gate = threading.Event()

    def load() -> Engine:
        assert gate.wait(PATIENCE)
        return Engine()

    scheduler = Scheduler(load)
    scheduler.start()
    assert scheduler.state is State.LOADING
    with pytest.raises(Busy, match="being loaded") as caught:
        scheduler.engine()
    assert (caught.value.status, caught.value.retry_after) == (503, 5)
    gate.set()
    assert scheduler.wait_until_loaded(PATIENCE) is State.READY
    scheduler.drain(PATIENCE)


def test_a_model_that_fails_its_self_test_is_dead():
    deaths: list[Exception] = []
    error = ArtefactError("dvae/weights.safetensors is truncated")
    with started(Engine(tests=[error]), on_death=deaths.append) as scheduler:
        assert scheduler.state is State.DEAD
        assert scheduler.cause == "dvae/weights.safetensors is truncated"
        with pytest.raises(Busy, match="does not work") as caught:
            submit(scheduler, Work())
        assert caught.value.retry_after is None
    assert deaths == [error]
    assert not scheduler.was_ready


def test_an_error_of_ours_ends_one_request_only():
    with started(Engine()) as scheduler:
        job = submit(scheduler, Work(error=ZeroDivisionError("oops")).opened())
        assert isinstance(error_of(job), ZeroDivisionError)
        assert isinstance(last_event(submit(scheduler, Work().opened())), GenerateResult)


def test_an_engine_that_fails_its_test_after_an_error_is_dead():
    engine = Engine(tests=[None, RuntimeError("device lost")])
    with started(engine) as scheduler:
        broken, waiting = Work(error=RuntimeError("device lost")), Work()
        job = submit(scheduler, broken)
        next_job = submit(scheduler, waiting)
        broken.gate.set()
        assert isinstance(error_of(job), RuntimeError)
        assert isinstance(error_of(next_job), RuntimeError)
        assert scheduler.state is State.DEAD
        assert scheduler.was_ready


def test_a_full_device_ends_one_request_only():
    with started(Engine()) as scheduler:
        full = PlatformError("the device's memory is full", code="out_of_memory")
        assert error_of(submit(scheduler, Work(error=full).opened())) is full
        assert scheduler.state is State.READY


def test_an_engine_without_progress_counts_as_dead():
    class Hanging(Engine):
        def run(self, work: Work, control: Control) -> Result:
            work.begun.set()
            work.gate.wait(PATIENCE)
            raise control.error()

    with started(Hanging(), stall_seconds=0.0) as scheduler:
        work = Work()
        submit(scheduler, work)
        assert work.begun.wait(PATIENCE)
        assert scheduler.state is State.DEAD
        assert scheduler.cause == "no progress for 0 seconds"
        work.gate.set()


def test_a_drain_ends_what_was_accepted_and_refuses_the_rest():
    engine = Engine()
    with started(engine) as scheduler:
        running, waiting = Work(), Work().opened()
        jobs = [submit(scheduler, running), submit(scheduler, waiting)]
        assert running.begun.wait(PATIENCE)
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(scheduler.drain(PATIENCE)))
        drain.start()
        while scheduler.state is not State.STOPPING:
            pass
        with pytest.raises(Busy, match="stopping") as caught:
            submit(scheduler, Work())
        assert caught.value.status == 503
        running.gate.set()
        drain.join(PATIENCE)
        assert drained == [True]
        assert all(isinstance(last_event(job), GenerateResult) for job in jobs)


def test_a_drain_waits_for_the_models_thread_to_end(monkeypatch):
    turn = Scheduler._take_turn
    last_turn, gate = threading.Event(), threading.Event()

    def with_a_long_end(self, *arguments):
        if goes_on := turn(self, *arguments):
            return goes_on
        last_turn.set()
        assert gate.wait(PATIENCE)
        return False

    monkeypatch.setattr(Scheduler, "_take_turn", with_a_long_end)
    with started(Engine()) as scheduler:
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(scheduler.drain(PATIENCE)))
        drain.start()
        assert last_turn.wait(PATIENCE)
        assert drained == []
        gate.set()
        drain.join(PATIENCE)
        assert drained == [True]
        assert not scheduler._thread.is_alive()


def test_a_drain_brings_deadlines_forward():
    class OneThenHold(Engine):
        def run(self, work: Work, control: Control) -> Result:
            work.opened()
            control.finished(Candidate(0, -1.0, None, -1.0, np.zeros((4, 4, 3), np.uint8)))
            work.units = 1
            while control.keep_going():
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

    with started(OneThenHold()) as scheduler:
        job = submit(scheduler, Work(units=2), seconds=3600)
        assert isinstance(job.next_event(PATIENCE), Candidate)
        assert scheduler.drain(1.0), "an hour's work was cut short"
        result = last_event(job)
        assert isinstance(result, GenerateResult)
        assert len(result.ranked) < result.num_candidates
