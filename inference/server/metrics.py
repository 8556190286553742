"""Prometheus metrics of one server, in a registry that no other server shares."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from inference.api.rendering import GenerateResult
from inference.api.replies import Timings
from inference.engine.engine_core import EngineCore, State

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 3600)
_POSITIONS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """Counters, and gauges of an engine core. Any thread may call any method."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, engine_core: EngineCore) -> None:
        def of_engine(name: str) -> float:
            engine = engine_core.loaded_engine
            return 0.0 if engine is None else getattr(engine, name)

        registry = self._registry = CollectorRegistry()
        self._invocations = Counter(
            "dalle_invocations", "Answered invocations.", ["status"], registry=registry
        )
        self._invocation_seconds = Histogram(
            "dalle_invocation_seconds",
            "From a request's arrival to the end of its reply.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._stage_seconds = Histogram(
            "dalle_stage_seconds",
            "Seconds of one generation spent in a stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._candidates = Counter("dalle_candidates", "Finished candidates.", registry=registry)
        self._positions = Histogram(
            "dalle_positions_per_step",
            "Positions of a candidate that a decoding step sampled, mean of one generation.",
            buckets=_POSITIONS,
            registry=registry,
        )
        self._cut_short = Counter(
            "dalle_cut_short", "Generations that a deadline ended early.", registry=registry
        )
        gauges: dict[tuple[str, str], Callable[[], float]] = {
            ("dalle_queue_depth", "Requests that wait or run."): lambda: engine_core.queue_depth,
            ("dalle_num_requests_running", "Requests that the model has begun."): (
                lambda: engine_core.num_running
            ),
            ("dalle_num_requests_waiting", "Requests that wait for the model."): (
                lambda: engine_core.num_waiting
            ),
            ("dalle_ready", "1 when requests are answered."): (
                lambda: engine_core.state is State.READY
            ),
            ("dalle_busy_slots", "Sequences that are being sampled."): (
                lambda: of_engine("busy_slots")
            ),
            ("dalle_threads", "Threads that compute on the CPU; 0 while loading."): (
                lambda: of_engine("threads")
            ),
        }
        for (name, description), value in gauges.items():
            Gauge(name, description, registry=registry).set_function(value)

    def count_invocation(self, status: int, seconds: float) -> None:
        """Count one answered request of POST /invocations."""
        self._invocations.labels(str(status)).inc()
        self._invocation_seconds.observe(seconds)

    def count_candidates(self, number: int) -> None:
        """Count candidates alone: those of a stream that ended before its generation."""
        self._candidates.inc(number)

    def count_generation(self, result: GenerateResult, timings: Timings) -> None:
        """Count one finished generation, whole or cut short."""
        self.count_candidates(len(result.ranked))
        if result.is_cut_short:
            self._cut_short.inc()
        for stage in ("queue", "sample", "decode", "rank", "encode"):
            self._stage_seconds.labels(stage).observe(getattr(timings, f"{stage}_seconds"))
        self._positions.observe(result.positions_per_step)

    def render(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)
