"""The measurement: every load on every server, in alternating rounds.

Servers that are compared get the same requests in each round, one server after the other, so that
their ratio does not depend on other load of the machine. Knows nothing of how a server is reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inference.bench.load import Measurement, Record, arrivals, closed_loop, open_loop
from inference.bench.workload import Workload
from infra.benchmark.machine import CpuClock
from infra.benchmark.run_file import Scenario, summarise
from infra.benchmark.targets import Server

# At least so many requests of each client. With fewer, a loop would end while most clients wait for
# their first reply, and only the quickest requests would count.
ROUND_TRIPS = 2
WARM_UP_FIRST = 1_000_000  # request numbers that no measurement reaches


@dataclass(frozen=True, slots=True)
class Load:
    """One load: a number of clients, or a rate of arrivals a second."""

    clients: int | None = None
    rate_per_second: float | None = None


@dataclass
class Plan:
    """Each load on each server, in rounds."""

    workload: Workload
    loads: Sequence[Load]
    requests: int
    warm_up: int
    rounds: int
    max_seconds: float


@dataclass
class _Tally:
    """The measurements of one load on one server, over the rounds."""

    rounds: list[Measurement] = field(default_factory=list)
    warm_up: list[Record] = field(default_factory=list)
    cpu_seconds: list[float | None] = field(default_factory=list)
    others: list[float | None] = field(default_factory=list)


def measure(
    plan: Plan, servers: Sequence[Server], line: Callable[[str], None]
) -> list[list[Scenario]]:
    """Return the scenarios of each server. Every server gets the same requests in every round."""
    tallies = {(s, load): _Tally() for s in range(len(servers)) for load in plan.loads}
    share = math.ceil(plan.requests / plan.rounds)
    for number in range(plan.rounds):
        for load in plan.loads:
            for place, server in enumerate(servers):
                tally = tallies[place, load]
                if number == 0 and plan.warm_up:
                    tally.warm_up = _warm_up(plan, server, load)
                used, clock = server.cpu_seconds(), CpuClock()
                part = _one_round(plan, server, load, number, share)
                after = server.cpu_seconds()
                taken = None if used is None or after is None else after - used
                tally.rounds.append(part)
                tally.cpu_seconds.append(taken)
                tally.others.append(clock.others_share(taken))
                line(_progress(plan, server, load, number, part))
    return [
        [_scenario(load, tallies[place, load]) for load in plan.loads]
        for place in range(len(servers))
    ]


def _scenario(load: Load, tally: _Tally) -> Scenario:
    known = [each for each in tally.cpu_seconds if each is not None]
    others = [each for each in tally.others if each is not None]
    return summarise(
        tally.rounds,
        clients=load.clients,
        rate_per_second=load.rate_per_second,
        warm_up=tally.warm_up,
        cpu_seconds=sum(known) if len(known) == len(tally.rounds) else None,
        others_share=sum(others) / len(others) if others else None,
    )


def _warm_up(plan: Plan, server: Server, load: Load) -> list[Record]:
    warmed = closed_loop(
        server.target,
        plan.workload,
        clients=min(load.clients or 1, plan.warm_up),
        requests=plan.warm_up,
        first=WARM_UP_FIRST,
        max_seconds=plan.max_seconds,
    )
    return warmed.records


def _one_round(plan: Plan, server: Server, load: Load, number: int, share: int) -> Measurement:
    first = number * share
    if load.clients is not None:
        return closed_loop(
            server.target,
            plan.workload,
            clients=load.clients,
            requests=max(share, ROUND_TRIPS * load.clients),
            first=first,
            max_seconds=plan.max_seconds / plan.rounds,
        )
    assert load.rate_per_second is not None
    times = arrivals(load.rate_per_second, share, plan.workload.seed + number)
    kept = [each for each in times if each <= plan.max_seconds / plan.rounds]
    return open_loop(server.target, plan.workload, times=kept or times[:1], first=first)


def _progress(plan: Plan, server: Server, load: Load, number: int, part: Measurement) -> str:
    loaded = f"{load.clients} clients" if load.clients else f"{load.rate_per_second:g}/s"
    answered = sum(each.is_answered for each in part.records)
    of = f"round {number + 1} of {plan.rounds}, " if plan.rounds > 1 else ""
    rate = f"{part.answered_per_second:.3g}"
    name = f"{server.name}, " if server.name else ""
    return f"{of}{name}{loaded}: {answered} of {len(part.records)} answered, {rate} requests/s"
