"""Load on `serve`: a closed loop of clients, or an open loop of arrivals at a rate.

    closed_loop   N clients, each sends its next request when the last one is answered: shows the
                  throughput, and how long N users wait
    open_loop     requests arrive at a rate, whatever the server does: shows the latency for users
                  who do not wait for each other. It counts from the intended arrival, so that a
                  server, or a client, that falls behind cannot hide it

Knows nothing of HTTP, containers, AWS or prices: a `Target` takes bytes and returns a response.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from pydantic import ValidationError

from inference.api.replies import GenerateReply
from inference.bench.http_target import Connection, Response, Target
from inference.bench.workload import Workload

STAGES = ("queue", "sample", "decode", "rank", "encode")
HTTP = "http"  # the rest of the latency: reading, sending, JSON, the network
RETRY = "retry"  # from the first 429 or 503 to the attempt that was accepted
DEFAULT_RETRY_SECONDS = 1.0
MAX_IN_FLIGHT = 256  # of the open loop; further arrivals wait, and their latency includes it
BUSY = ("429", "503")  # responses with Retry-After; the closed loop sends the request again


@dataclass(frozen=True, slots=True)
class Record:
    """One request of a measurement, answered or failed.

    outcome: `200`, another status, `timeout`, `connection`, or `bad reply` for a 200 with an
    unknown body. latency_seconds: from the intended sending (closed loop: the first sending) to
    the last byte of the response. late_seconds: delay of the sending against its intended time,
    caused by this program. stages: seconds by stage, where the reply has them.
    """

    number: int
    outcome: str
    latency_seconds: float
    late_seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    num_images: int = 0
    completed_candidates: int = 0
    is_cut_short: bool = False
    request_bytes: int = 0
    reply_bytes: int = 0

    @property
    def is_answered(self) -> bool:
        return self.outcome == "200"


@dataclass(slots=True)
class Measurement:
    """The requests of one loop. window_seconds: from the first sent to the last one counted.

    refusals: the number of 429 and 503 responses, after which the closed loop sent it again.
    """

    records: list[Record]
    window_seconds: float
    refusals: Counter[str] = field(default_factory=Counter)

    @property
    def answered_per_second(self) -> float:
        """Answered requests per second of the window; 0 without any."""
        answered = sum(each.is_answered for each in self.records)
        return answered / self.window_seconds if answered else 0.0

    def __add__(self, other: Measurement) -> Measurement:
        """Return two rounds of the same load as one."""
        return Measurement(
            self.records + other.records,
            self.window_seconds + other.window_seconds,
            self.refusals + other.refusals,
        )


def closed_loop(
    target: Target,
    workload: Workload,
    *,
    clients: int,
    requests: int,
    first: int = 0,
    max_seconds: float = 600.0,
) -> Measurement:
    """Run `clients` clients at once until `requests` requests are answered or the time is over.

    All clients stay busy to the end, so that throughput is that of full load; requests in progress
    at the end are awaited and not counted. After a 429 or 503 a request is sent again after
    Retry-After, and its latency counts from the first time. first: the number of the first request.
    """
    numbers = itertools.count(first)
    lock = threading.Lock()
    enough = threading.Event()
    result = Measurement([], 0.0)
    began = time.perf_counter()

    def until_answered(connection: Connection, number: int) -> Record | None:
        """Send one request until it is accepted; return None when the loop ends before."""
        body = workload.request(number)
        first_sent = sent = time.perf_counter()
        while (answer := connection.send(body)).outcome in BUSY:
            with lock:
                if not enough.is_set():
                    result.refusals[answer.outcome] += 1
            pause = DEFAULT_RETRY_SECONDS if answer.retry_after is None else answer.retry_after
            if enough.wait(pause):
                return None
            sent = time.perf_counter()
        latency = time.perf_counter() - first_sent
        return _record(number, answer, body, latency, refused=sent - first_sent)

    def client() -> None:
        try:
            with closing(target.connect()) as connection:
                while not enough.is_set():
                    with lock:
                        number = next(numbers)
                    record = until_answered(connection, number)
                    with lock:
                        if record is None or enough.is_set():
                            return
                        result.records.append(record)
                        result.window_seconds = time.perf_counter() - began
                        if len(result.records) >= requests:
                            enough.set()
        finally:
            enough.set()  # an error in one client ends the others too

    timer = threading.Timer(max_seconds, enough.set)
    timer.start()
    try:
        with ThreadPoolExecutor(clients, thread_name_prefix="client") as pool:
            try:
                for each in [pool.submit(client) for _ in range(clients)]:
                    each.result()
            finally:
                enough.set()  # before the pool waits for its threads
    finally:
        timer.cancel()
        timer.join()
    return result


def arrivals(rate_per_second: float, requests: int, seed: int) -> list[float]:
    """Return arrival times in seconds from the start: a Poisson process, fixed by the seed."""
    chance = random.Random(seed)  # noqa: S311 - load, no secret
    gaps = (chance.expovariate(rate_per_second) for _ in range(requests))
    return list(itertools.accumulate(gaps))


def open_loop(
    target: Target,
    workload: Workload,
    *,
    times: Sequence[float],
    first: int = 0,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> Measurement:
    """Send one request at each of the times (seconds from the start, rising), none twice."""
    lines: queue.LifoQueue[Connection] = queue.LifoQueue()
    opened: list[Connection] = []
    began = time.perf_counter()

    def send(place: int, intended: float) -> Record:
        sent = time.perf_counter() - began
        try:
            connection = lines.get_nowait()
        except queue.Empty:
            connection = target.connect()
            opened.append(connection)
        body = workload.request(first + place)
        answer = connection.send(body)
        lines.put(connection)
        latency = time.perf_counter() - began - intended
        return _record(first + place, answer, body, latency, late=max(0.0, sent - intended))

    try:
        with ThreadPoolExecutor(max_in_flight, thread_name_prefix="arrival") as pool:
            waiting = []
            for place, intended in enumerate(times):
                pause = intended - (time.perf_counter() - began)
                if pause > 0:
                    time.sleep(pause)
                waiting.append(pool.submit(send, place, intended))
            records = [each.result() for each in waiting]
    finally:
        for connection in opened:
            connection.close()
    refusals = Counter(each.outcome for each in records if each.outcome in BUSY)
    ends = [at + each.latency_seconds for at, each in zip(times, records, strict=True)]
    return Measurement(records, max(ends, default=0.0), refusals)


def _record(
    number: int,
    answer: Response,
    body: bytes,
    latency: float,
    *,
    late: float = 0.0,
    refused: float = 0.0,
) -> Record:
    outcome, reply = answer.outcome, None
    if outcome == "200":
        try:
            reply = GenerateReply.model_validate_json(answer.body)
        except ValidationError:
            outcome = "bad reply"
    if reply is None:
        return Record(number, outcome, latency, late, request_bytes=len(body))
    stages = {name: getattr(reply.timings, f"{name}_seconds") for name in STAGES}
    stages[RETRY] = refused
    stages[HTTP] = max(0.0, latency - late - sum(stages.values()))
    return Record(
        number,
        outcome,
        latency,
        late,
        stages,
        num_images=len(reply.images),
        completed_candidates=reply.completed_candidates,
        is_cut_short=reply.completed_candidates < reply.num_candidates,
        request_bytes=len(body),
        reply_bytes=len(answer.body),
    )
