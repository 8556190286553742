"""RUN.json: the results of one benchmark, with hardware and workload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle.errors import UserError
from inference.bench.load import HTTP, RETRY, STAGES, Measurement, Record
from inference.bench.workload import Workload
from infra.aws.output import write_file

SATURATED_SHARE = 0.95
MAX_LATENCIES = 2_000  # stored of one scenario, evenly spaced in their order

Device = Literal["cpu", "cuda"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Distribution(_Part):
    """The distribution of durations in seconds; percentiles by linear interpolation."""

    count: int
    mean: float
    minimum: float
    p50: float
    p95: float
    p99: float
    maximum: float


class Scenario(_Part):
    """One load and its results. Rates are of answered requests, per second of the window.

    by_round: requests a second of each round, which differ on a busy machine.
    outcomes: counted requests by status or failure. refusals: 429 and 503 responses beside them,
    after which the closed loop sent the request again. cut_short: answered with fewer candidates
    than requested. stages: of answered requests; they add up to the latency. latencies_seconds:
    rising. warm_up_seconds: latencies of the warm-up, which count nowhere else. late: delay of the
    benchmark's own sending. cpu_seconds: of the server, in the window.
    others_share: of all processors' time, used by neither server nor client; None: not known.
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
    latency: Distribution | None
    stages: dict[str, Distribution]
    late: Distribution | None
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
        """Counted requests without a reply."""
        return self.requests - self.outcomes.get("200", 0)


class Hardware(_Part):
    """The server's hardware. cpu_limit: processors it was limited to, None for no limit.

    processor, num_cpus, memory_bytes: None for a server on another machine.
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
        """Return the hardware in one line."""
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
    """One benchmark of one server.

    date: UTC, to the second. kind: how the server was reached. target: its URL without
    credentials, image or endpoint name. device: of the server. stands_for: the instance types (or
    `serverless`, `lambda`) whose prices this run is compared with, given by the user.
    ready_seconds: from the container's start to the first 200 of /ping.
    peak_memory_bytes: of the server's container. load_average: of the measuring machine, over a
    minute, before the first request. interleaved_with: runs measured in alternation with this one.
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
        """The closed loop with one client."""
        found = (each for each in self.scenarios if each.load == "closed" and each.clients == 1)
        return next(found, None)

    @property
    def saturated(self) -> Scenario | None:
        """The closed loop at full load: the one with the fewest clients whose rate is within 5 % of
        the highest. More clients only wait longer."""
        closed = [each for each in self.scenarios if each.load == "closed" and each.clients]
        most = max((each.requests_per_second for each in closed), default=0.0)
        enough = [each for each in closed if each.requests_per_second >= SATURATED_SHARE * most > 0]
        return min(enough, key=lambda each: each.clients or 0, default=None)

    @property
    def others_share(self) -> float | None:
        """The largest share of the processors that other programs used in a scenario."""
        known = [each.others_share for each in self.scenarios if each.others_share is not None]
        return max(known, default=None)


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """Return the distribution of values; None for no values."""
    if not seconds:
        return None
    values = np.asarray(seconds, dtype=float)
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return Distribution(
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
    """Return the rounds of one load as a scenario, of `clients` (closed loop) or of a rate."""
    measured = sum(rounds, Measurement([], 0.0))
    answered = [each for each in measured.records if each.is_answered]
    window = measured.window_seconds or 1.0  # without a reply every rate is 0
    latencies = sorted(each.latency_seconds for each in answered)
    stages = {
        name: distribution([each.stages[name] for each in answered]) for name in (*STAGES, HTTP)
    }
    retries = [each.stages[RETRY] for each in answered]
    if any(retries):
        stages[RETRY] = distribution(retries)
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
        latency=distribution(latencies),
        stages={name: each for name, each in stages.items() if each is not None},
        late=distribution([each.late_seconds for each in measured.records])
        if clients is None
        else None,
        latencies_seconds=[round(each, 5) for each in thinned(latencies, MAX_LATENCIES)],
        request_bytes=_mean([each.request_bytes for each in measured.records]),
        reply_bytes=_mean([each.reply_bytes for each in answered]),
        warm_up_seconds=[round(each.latency_seconds, 5) for each in warm_up],
        cpu_seconds=cpu_seconds,
        others_share=others_share,
    )


def thinned(values: Sequence[float], most: int) -> list[float]:
    """Return at most `most` of the values, evenly spaced in their order, with first and last."""
    if len(values) <= most:
        return list(values)
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, most)]


def save_run(run: Run, path: Path) -> None:
    """Write RUN.json, whole or not at all. Raises UserError."""
    write_file(path, run.model_dump_json(indent=1) + "\n")


def load_run(path: Path) -> Run:
    """Read RUN.json. Raises UserError that names the file and its fault."""
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
