"""RUN.json: what one benchmark measured, on what and how.."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle.errors import UserError
from dalle.platform.disk import write_atomically
from infra.benchmark.load import HTTP, RETRY, STAGES, Measurement, Record
from infra.benchmark.workload import Workload

NEARLY = 0.95
MAX_LATENCIES = 2_000  # stored of one scenario, evenly spaced in their order

Device = Literal["cpu", "cuda"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Part):
    """How some seconds are distributed; percentiles by linear interpolation."""

    count: int
    mean: float
    minimum: float
    p50: float
    p95: float
    p99: float
    maximum: float


class Scenario(_Part):
    """One load and what came of it. Rates are of answered requests, per second of the window.

    by_round: requests a second of each round, which differ where the machine is not quiet.
    outcomes: counted requests by status or failure. refusals: "not now" answers beside them, which
    the closed loop asked again. cut_short: answered with fewer candidates than asked for.
    stages: of answered requests; together they are the latency. latencies_seconds: rising.
    warm_up_seconds: latencies of the requests before, which count nowhere. late: how late the
    measuring program itself was. cpu_seconds: of the server, in the window.
    others_share: of all processors' time, what neither server nor client used; None: not known.
    """

    load: Literal["closed", "open"]
    clients: int | None = Field(default=None, ge=1)
    rate_per_second: float | None = Field(default=None, gt=0)
    requests: int
    outcomes: dict[str, int]
    refusals: dict[str, int]
    cut_short: int
    window_seconds: float
    requests_per_second: float
    images_per_second: float
    candidates_per_second: float
    by_round: list[float]
    latency: Spread | None
    stages: dict[str, Spread]
    late: Spread | None
    latencies_seconds: list[float]
    request_bytes: float
    reply_bytes: float
    warm_up_seconds: list[float]
    cpu_seconds: float | None = None
    others_share: float | None = None

    @property
    def name(self) -> str:
        """`8 clients` or `0.5 requests/s`."""
        if self.load == "open":
            return f"{self.rate_per_second:g} requests/s arriving"
        return f"{self.clients} client" + ("s" if self.clients != 1 else "")

    @property
    def errors(self) -> int:
        """Counted requests without an answer."""
        return self.requests - self.outcomes.get("200", 0)


class Hardware(_Part):
    """What the server ran on. cpu_limit: processors it was allowed, None for all of them.

    processor, num_cpus, memory_bytes: None where the server's machine cannot be seen.
    instance_type: of an endpoint.
    """

    processor: str | None = None
    num_cpus: int | None = None
    memory_bytes: int | None = None
    cpu_limit: float | None = None
    memory_limit: str | None = None
    threads: int | None = None
    gpu: str | None = None
    instance_type: str | None = None

    def describe(self) -> str:
        """One line for people."""
        parts = [self.instance_type or "", self.processor or "processor not known"]
        if self.num_cpus:
            parts.append(f"{self.num_cpus} processors")
        if self.cpu_limit:
            parts.append(f"limited to {self.cpu_limit:g}")
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 2**30:.1f} GiB")
        if self.memory_limit:
            parts.append(f"memory limit {self.memory_limit}")
        parts.append(self.gpu or "no GPU")
        return ", ".join(filter(None, parts))


class Run(_Part):
    """One benchmark of one target.

    date: UTC, to the second. kind: how the server was reached. target: its URL without
    credentials, image or endpoint name. device: what the server computed on. stands_for: the
    instance types (or `serverless`, `lambda`) whose price this run is joined with, as the person
    who measured says. ready_seconds: from the container's start to the first 200 of /ping.
    peak_memory_bytes: of the server's container. load_average: of the measuring machine, over a
    minute, before the first request. interleaved_with: runs that took turns with this one.
    """

    format: Literal[1] = 1
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    kind: Literal["url", "image", "endpoint"]
    target: str
    device: Device
    stands_for: list[str] = []
    hardware: Hardware
    versions: dict[str, str]
    workload: Workload
    scenarios: list[Scenario] = Field(min_length=1)
    ready_seconds: float | None = None
    peak_memory_bytes: int | None = None
    load_average: float | None = None
    rounds: int = 1
    interleaved_with: list[str] = []

    @property
    def alone(self) -> Scenario | None:
        """The scenario of one client that waits for each answer."""
        found = (each for each in self.scenarios if each.load == "closed" and each.clients == 1)
        return next(found, None)

    @property
    def saturated(self) -> Scenario | None:
        """The closed loop that shows what the server can do: the one with the fewest clients that
        answers nearly as many requests a second as the best. More clients only wait longer."""
        closed = [each for each in self.scenarios if each.load == "closed" and each.clients]
        most = max((each.requests_per_second for each in closed), default=0.0)
        enough = [each for each in closed if each.requests_per_second >= NEARLY * most > 0]
        return min(enough, key=lambda each: each.clients or 0, default=None)

    @property
    def others_share(self) -> float | None:
        """The largest share of the processors that others had while a scenario was measured."""
        known = [each.others_share for each in self.scenarios if each.others_share is not None]
        return max(known, default=None)


def spread(seconds: Sequence[float]) -> Spread | None:
    """How values are distributed; None for none."""
    if not seconds:
        return None
    values = np.asarray(seconds, dtype=float)
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return Spread(
        count=len(values),
        mean=float(values.mean()),
        minimum=float(values.min()),
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        maximum=float(values.max()),
    )


def summarise(
    rounds: Sequence[Measurement],
    *,
    clients: int | None,
    rate_per_second: float | None,
    warm_up: Sequence[Record],
    cpu_seconds: float | None = None,
    others_share: float | None = None,
) -> Scenario:
    """Rounds of one load as RUN.json keeps them. One of clients (closed loop) and rate is given."""
    measured = sum(rounds, Measurement([], 0.0))
    answered = [each for each in measured.records if each.is_answered]
    window = measured.window_seconds or 1.0  # nothing was answered: every rate is 0
    latencies = sorted(each.latency_seconds for each in answered)
    stages = {name: spread([each.stages[name] for each in answered]) for name in (*STAGES, HTTP)}
    retries = [each.stages[RETRY] for each in answered]
    if any(retries):
        stages[RETRY] = spread(retries)
    return Scenario(
        load="open" if clients is None else "closed",
        clients=clients,
        rate_per_second=rate_per_second,
        requests=len(measured.records),
        outcomes=dict(Counter(each.outcome for each in measured.records)),
        refusals=dict(measured.refusals),
        cut_short=sum(each.is_cut_short for each in answered),
        window_seconds=measured.window_seconds,
        requests_per_second=len(answered) / window,
        images_per_second=sum(each.num_images for each in answered) / window,
        candidates_per_second=sum(each.completed_candidates for each in answered) / window,
        by_round=[each.answered_per_second for each in rounds],
        latency=spread(latencies),
        stages={name: each for name, each in stages.items() if each is not None},
        late=spread([each.late_seconds for each in measured.records]) if clients is None else None,
        latencies_seconds=[round(each, 5) for each in thinned(latencies, MAX_LATENCIES)],
        request_bytes=_mean([each.request_bytes for each in measured.records]),
        reply_bytes=_mean([each.reply_bytes for each in answered]),
        warm_up_seconds=[round(each.latency_seconds, 5) for each in warm_up],
        cpu_seconds=cpu_seconds,
        others_share=others_share,
    )


def thinned(values: Sequence[float], most: int) -> list[float]:
    """At most so many of the values, evenly spaced in their order, with first and last."""
    if len(values) <= most:
        return list(values)
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, most)]


def save_run(run: Run, path: Path) -> None:
    """Write RUN.json, at once or not at all."""
    write_atomically(path, run.model_dump_json(indent=1) + "\n")


def load_run(path: Path) -> Run:
    """Read RUN.json. Raises UserError that names the file and what is wrong in it."""
    try:
        return Run.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"the run {path} cannot be read: {error}") from error
    except ValidationError as error:
        raise UserError(
            f"{path} is no run as `python -m infra benchmark` writes them: {error}"
        ) from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
