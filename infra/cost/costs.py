"""The cost of images: arithmetic from measured speed and dated prices. No files, no network.

Values that are neither measured nor prices are in `infra.cost.assumptions`. Rates are requests; a
request samples several candidates and returns several images, and the cost is given for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dalle.errors import UserError
from infra.cost.assumptions import Assumptions

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The measured speed of one instance.

    requests_per_second: under full load. seconds_per_request: mean with one client; None where one
    client alone was not measured. gigabytes_per_request: in and out.
    """

    requests_per_second: float
    seconds_per_request: float | None
    images_per_request: float
    candidates_per_request: float
    gigabytes_per_request: float

    def __post_init__(self) -> None:
        if self.requests_per_second <= 0:
            raise UserError("a run without an answered request has no cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class HourlyPrices:
    """An instance's prices in USD: its hours, its disk, and the data in and out."""

    usd_per_hour: float
    usd_per_volume_gb_month: float
    usd_per_data_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BusyCost:
    """USD of an instance that is never idle: price per second / requests per second."""

    usd_per_hour: float
    requests_per_second: float
    usd_per_1000_requests: float
    usd_per_1000_images: float
    usd_per_1000_candidates: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Month:
    """The cost of a month at a number of requests a day.

    usd: the sum of the other usd_ fields. mean_instances: paid for, averaged over the month;
    busy_instances: needed in the busy hours; both None where nothing is paid by the hour.
    cold_share: of the requests, those without a warm instance. added_seconds: their extra wait.
    """

    requests_per_day: float
    usd: float = field(init=False)
    usd_compute: float
    usd_volume: float = 0.0
    usd_data: float = 0.0
    usd_requests: float = 0.0
    mean_instances: float | None = None
    busy_instances: int | None = None
    cold_share: float
    added_seconds: float

    def __post_init__(self) -> None:
        total = self.usd_compute + self.usd_volume + self.usd_data + self.usd_requests
        object.__setattr__(self, "usd", total)


def busy(speed: Speed, usd_per_hour: float) -> BusyCost:
    """Return USD per 1,000 requests, images and candidates of an instance that is never idle."""
    usd = usd_per_hour / SECONDS_PER_HOUR / speed.requests_per_second * 1000
    return _per_thousand(speed, usd_per_hour, usd)


def busy_by_the_second(speed: Speed, usd_per_gb_second: float, memory_gb: float) -> BusyCost:
    """Return the same for a price by memory and seconds; needs `seconds_per_request`."""
    usd = usd_per_gb_second * memory_gb * _alone(speed) * 1000
    usd_per_hour = usd_per_gb_second * memory_gb * SECONDS_PER_HOUR
    return _per_thousand(speed, usd_per_hour, usd)


def _per_thousand(speed: Speed, usd_per_hour: float, usd: float) -> BusyCost:
    return BusyCost(
        usd_per_hour=usd_per_hour,
        requests_per_second=usd_per_hour / SECONDS_PER_HOUR / usd * 1000,
        usd_per_1000_requests=usd,
        usd_per_1000_images=usd / speed.images_per_request,
        usd_per_1000_candidates=usd / speed.candidates_per_request,
    )


def _alone(speed: Speed) -> float:
    if speed.seconds_per_request is None:
        raise UserError("a price by the second needs a run with one client: benchmark --clients 1")
    return speed.seconds_per_request


def always_on(
    speed: Speed, requests_per_day: float, assumptions: Assumptions, prices: HourlyPrices
) -> Month:
    """Return the cost of at least one instance; more of them follow the load in the busy hours.

    So works a real-time endpoint with a target-tracking policy. Instances are not rounded up to
    whole ones, so that costs have no steps.
    """
    rate = assumptions.busy_rate(requests_per_day)
    load = rate / (speed.requests_per_second * assumptions.target_utilisation)
    instances = 1 + max(0.0, load - 1) / assumptions.peak_to_mean
    return _by_the_hour(speed, requests_per_day, assumptions, prices, instances, load)


def scale_to_zero(
    speed: Speed, requests_per_day: float, assumptions: Assumptions, prices: HourlyPrices
) -> Month:
    """Return the cost of an asynchronous endpoint that has no instance without requests.

    In the busy hours requests arrive at random (Poisson). An instance stays for its idle tail after
    each reply; a request after that waits for a cold start, which is paid for too. Above the
    capacity of one instance their number follows the load.
    """
    rate = assumptions.busy_rate(requests_per_day)
    work = 1 / speed.requests_per_second
    load = rate * work / assumptions.async_utilisation
    cold = cold_share(
        rate,
        warm_seconds=work + assumptions.async_idle_tail_seconds,
        cold_start_seconds=assumptions.async_cold_start_seconds,
    )
    instances = max(1 - cold, load) / assumptions.peak_to_mean
    return _by_the_hour(
        speed,
        requests_per_day,
        assumptions,
        prices,
        instances,
        load,
        cold=cold,
        added_seconds=assumptions.async_cold_start_seconds,
    )


def cold_share(rate_per_second: float, *, warm_seconds: float, cold_start_seconds: float) -> float:
    """Return the share of requests without an instance, which is also the share of time without.

    Gaps between requests are exponential. After a warm request the instance stays for
    `warm_seconds`, after a cold one for the cold start in addition. With a, b the chances of a
    longer gap, the share p of cold requests satisfies p = p b + (1 - p) a. As random arrivals see
    time averages, p is also the share of time without an instance.
    """
    longer_than_warm = math.exp(-rate_per_second * warm_seconds)
    longer_than_cold = math.exp(-rate_per_second * (warm_seconds + cold_start_seconds))
    return longer_than_warm / (1 + longer_than_warm - longer_than_cold)


def _by_the_hour(
    speed: Speed,
    requests_per_day: float,
    assumptions: Assumptions,
    prices: HourlyPrices,
    instances: float,
    load: float,
    *,
    cold: float = 0.0,
    added_seconds: float = 0.0,
) -> Month:
    compute = instances * prices.usd_per_hour * assumptions.hours_per_month
    volume = instances * assumptions.volume_gb * prices.usd_per_volume_gb_month
    data = _gigabytes(speed, requests_per_day, assumptions) * prices.usd_per_data_gb
    return Month(
        requests_per_day=requests_per_day,
        usd_compute=compute,
        usd_volume=volume,
        usd_data=data,
        mean_instances=instances,
        busy_instances=max(1, math.ceil(load - 1e-9)),
        cold_share=cold,
        added_seconds=added_seconds,
    )


def serverless(
    speed: Speed,
    requests_per_day: float,
    assumptions: Assumptions,
    *,
    usd_per_gb_second: float,
    usd_per_data_gb: float,
) -> Month:
    """Return the cost of a serverless endpoint without provisioned concurrency."""
    month = requests_per_day * assumptions.days_per_month
    memory = assumptions.serverless_memory_gb
    compute = month * _alone(speed) * memory * usd_per_gb_second
    data = _gigabytes(speed, requests_per_day, assumptions) * usd_per_data_gb
    return Month(
        requests_per_day=requests_per_day,
        usd_compute=compute,
        usd_data=data,
        cold_share=_idle_share(speed, requests_per_day, assumptions),
        added_seconds=assumptions.serverless_cold_start_seconds,
    )


def lambda_function(
    speed: Speed,
    requests_per_day: float,
    assumptions: Assumptions,
    *,
    usd_per_gb_second: float,
    usd_per_million_requests: float,
) -> Month:
    """Return the cost of a Lambda function: seconds of work and of cold starts, and requests."""
    month = requests_per_day * assumptions.days_per_month
    cold = _idle_share(speed, requests_per_day, assumptions)
    seconds = _alone(speed) + cold * assumptions.lambda_cold_start_seconds
    compute = month * seconds * assumptions.lambda_memory_gb * usd_per_gb_second
    requests = month * usd_per_million_requests / 1e6
    return Month(
        requests_per_day=requests_per_day,
        usd_compute=compute,
        usd_requests=requests,
        cold_share=cold,
        added_seconds=assumptions.lambda_cold_start_seconds,
    )


def _idle_share(speed: Speed, requests_per_day: float, assumptions: Assumptions) -> float:
    rate = assumptions.busy_rate(requests_per_day)
    return math.exp(-rate * (assumptions.keep_warm_seconds + _alone(speed)))


def _gigabytes(speed: Speed, requests_per_day: float, assumptions: Assumptions) -> float:
    return requests_per_day * assumptions.days_per_month * speed.gigabytes_per_request


def crossings(
    first: Callable[[float], float],
    second: Callable[[float], float],
    *,
    low: float = 1.0,
    high: float = 1e6,
    points: int = 600,
) -> list[float]:
    """Return the requests a day, between low and high, at which two monthly costs are equal.

    Signs are compared at `points` points, evenly spaced in the logarithm, then bisected. Costs that
    jump past each other cross where they jump.
    """
    step = (math.log(high) - math.log(low)) / (points - 1)
    places = [math.exp(math.log(low) + step * number) for number in range(points)]
    signs = [first(place) < second(place) for place in places]
    found = []
    for number in range(1, points):
        if signs[number] != signs[number - 1]:
            left, right = places[number - 1], places[number]
            for _ in range(60):
                middle = (left + right) / 2
                if (first(middle) < second(middle)) == signs[number - 1]:
                    left = middle
                else:
                    right = middle
            found.append(right)
    return found
