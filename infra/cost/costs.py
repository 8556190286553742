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

    @property
    def alone(self) -> float:
        """Seconds of a request alone. Raises UserError where they were not measured."""
        if self.seconds_per_request is None:
            raise UserError(
                "a price by the second needs a run with one client: benchmark --clients 1"
            )
        return self.seconds_per_request


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
    usd = usd_per_gb_second * memory_gb * speed.alone * 1000
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


@dataclass(frozen=True, slots=True)
class MonthlyCost:
    """The cost of a month with one measured speed, by the number of requests a day."""

    speed: Speed
    assumptions: Assumptions

    def always_on(self, requests_per_day: float, prices: HourlyPrices) -> Month:
        """Return the cost of at least one instance; more of them follow the load in busy hours.

        So works a real-time endpoint with a target-tracking policy. Instances are not rounded up to
        whole ones, so that costs have no steps.
        """
        rate = self.assumptions.busy_rate(requests_per_day)
        load = rate / (self.speed.requests_per_second * self.assumptions.target_utilisation)
        instances = 1 + max(0.0, load - 1) / self.assumptions.peak_to_mean
        return self._by_the_hour(requests_per_day, prices, instances, load)

    def scale_to_zero(self, requests_per_day: float, prices: HourlyPrices) -> Month:
        """Return the cost of an asynchronous endpoint that has no instance without requests.

        In the busy hours requests arrive at random (Poisson). An instance stays for its idle tail
        after each reply; a request after that waits for a cold start, which is paid for too. Above
        the capacity of one instance their number follows the load.
        """
        assumed = self.assumptions
        rate = assumed.busy_rate(requests_per_day)
        work = 1 / self.speed.requests_per_second
        load = rate * work / assumed.async_utilisation
        starting = assumed.async_cold_start_seconds
        warm = work + assumed.async_idle_tail_seconds
        cold = cold_share(rate, warm_seconds=warm, cold_start_seconds=starting)
        instances = max(1 - cold, load) / assumed.peak_to_mean
        return self._by_the_hour(requests_per_day, prices, instances, load, cold, starting)

    def _by_the_hour(
        self,
        requests_per_day: float,
        prices: HourlyPrices,
        instances: float,
        load: float,
        cold: float = 0.0,
        added_seconds: float = 0.0,
    ) -> Month:
        assumed = self.assumptions
        return Month(
            requests_per_day=requests_per_day,
            usd_compute=instances * prices.usd_per_hour * assumed.hours_per_month,
            usd_volume=instances * assumed.volume_gb * prices.usd_per_volume_gb_month,
            usd_data=self._gigabytes(requests_per_day) * prices.usd_per_data_gb,
            mean_instances=instances,
            busy_instances=max(1, math.ceil(load - 1e-9)),
            cold_share=cold,
            added_seconds=added_seconds,
        )

    def serverless(
        self, requests_per_day: float, *, usd_per_gb_second: float, usd_per_data_gb: float
    ) -> Month:
        """Return the cost of a serverless endpoint without provisioned concurrency."""
        assumed = self.assumptions
        seconds = requests_per_day * assumed.days_per_month * self.speed.alone
        return Month(
            requests_per_day=requests_per_day,
            usd_compute=seconds * assumed.serverless_memory_gb * usd_per_gb_second,
            usd_data=self._gigabytes(requests_per_day) * usd_per_data_gb,
            cold_share=self._idle_share(requests_per_day),
            added_seconds=assumed.serverless_cold_start_seconds,
        )

    def lambda_function(
        self, requests_per_day: float, *, usd_per_gb_second: float, usd_per_million_requests: float
    ) -> Month:
        """Return the cost of a Lambda function: seconds of work, of cold starts, and requests."""
        assumed = self.assumptions
        requests = requests_per_day * assumed.days_per_month
        cold = self._idle_share(requests_per_day)
        seconds = self.speed.alone + cold * assumed.lambda_cold_start_seconds
        return Month(
            requests_per_day=requests_per_day,
            usd_compute=requests * seconds * assumed.lambda_memory_gb * usd_per_gb_second,
            usd_requests=requests * usd_per_million_requests / 1e6,
            cold_share=cold,
            added_seconds=assumed.lambda_cold_start_seconds,
        )

    def _idle_share(self, requests_per_day: float) -> float:
        rate = self.assumptions.busy_rate(requests_per_day)
        return math.exp(-rate * (self.assumptions.keep_warm_seconds + self.speed.alone))

    def _gigabytes(self, requests_per_day: float) -> float:
        requests = requests_per_day * self.assumptions.days_per_month
        return requests * self.speed.gigabytes_per_request


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
