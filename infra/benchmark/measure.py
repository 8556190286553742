"""What is measured in which order: every load on every server, in rounds that take turns.

Servers that are compared are asked the same requests in each round, one after the other, so that
their ratio does not depend on what else the machine did meanwhile. Knows nothing of how a server
is reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from infra.benchmark.load import Measurement, Record, arrivals, closed_loop, open_loop
from infra.benchmark.machine import Clock
from infra.benchmark.run_file import Scenario, summarise
from infra.benchmark.targets import Subject
from infra.benchmark.workload import Workload

# Of each client at least. With fewer, a loop would end while most clients wait for their first
# answer, and only the quickest would have been counted.
ROUND_TRIPS = 2
WARM_UP_FIRST = 1_000_000  # numbers of requests that no measurement reaches


@dataclass(frozen=True, slots=True)
class Load:
    """One scenario to be measured: so many clients, or so many arrivals a second."""

    clients: int | None = None
    rate_per_second: float | None = None


@dataclass
class Plan:
    """What is measured: each load on each subject, in rounds."""

    workload: Workload
    loads: Sequence[Load]
    requests: int
    warm_up: int
    rounds: int
    max_seconds: float


@dataclass
class _Tally:
    """One load on one subject, over the rounds."""

    rounds: list[Measurement] = field(default_factory=list)
    warm_up: list[Record] = field(default_factory=list)
    cpu_seconds: float | None = 0.0
    others: list[float] = field(default_factory=list)


def measure(
    plan: Plan, subjects: Sequence[Subject], say: Callable[[str], None]
) -> list[list[Scenario]]:
    """The scenarios of each subject. Every subject is asked the same requests in every round."""
    tallies = {(s, load): _Tally() for s in range(len(subjects)) for load in plan.loads}
    share = math.ceil(plan.requests / plan.rounds)
    for number in range(plan.rounds):
        for load in plan.loads:
            for place, subject in enumerate(subjects):
                tally = tallies[place, load]
                if number == 0 and plan.warm_up:
                    tally.warm_up = _warm_up(plan, subject, load)
                used, clock = subject.cpu_seconds(), Clock()
                part = _one_round(plan, subject, load, number, share)
                after = subject.cpu_seconds()
                tally.rounds.append(part)
                if used is None or after is None or tally.cpu_seconds is None:
                    tally.cpu_seconds = None
                else:
                    tally.cpu_seconds += after - used
                    others = clock.others_share(after - used)
                    tally.others += [] if others is None else [others]
                say(_progress(plan, subject, load, number, part))
    return [
        [
            summarise(
                tallies[place, load].rounds,
                clients=load.clients,
                rate_per_second=load.rate_per_second,
                warm_up=tallies[place, load].warm_up,
                cpu_seconds=tallies[place, load].cpu_seconds,
                others_share=_mean(tallies[place, load].others),
            )
            for load in plan.loads
        ]
        for place in range(len(subjects))
    ]


def _warm_up(plan: Plan, subject: Subject, load: Load) -> list[Record]:
    warmed = closed_loop(
        subject.target,
        plan.workload,
        clients=min(load.clients or 1, plan.warm_up),
        requests=plan.warm_up,
        first=WARM_UP_FIRST,
        max_seconds=plan.max_seconds,
    )
    return warmed.records


def _one_round(plan: Plan, subject: Subject, load: Load, number: int, share: int) -> Measurement:
    first = number * share
    if load.clients is not None:
        return closed_loop(
            subject.target,
            plan.workload,
            clients=load.clients,
            requests=max(share, ROUND_TRIPS * load.clients),
            first=first,
            max_seconds=plan.max_seconds / plan.rounds,
        )
    assert load.rate_per_second is not None
    times = arrivals(load.rate_per_second, share, plan.workload.seed + number)
    kept = [each for each in times if each <= plan.max_seconds / plan.rounds]
    return open_loop(subject.target, plan.workload, times=kept or times[:1], first=first)


def _progress(plan: Plan, subject: Subject, load: Load, number: int, part: Measurement) -> str:
    loaded = f"{load.clients} clients" if load.clients else f"{load.rate_per_second:g}/s"
    answered = sum(each.is_answered for each in part.records)
    of = f"round {number + 1} of {plan.rounds}, " if plan.rounds > 1 else ""
    rate = f"{part.answered_per_second:.3g}"
    name = f"{subject.name}, " if subject.name else ""
    return f"{of}{name}{loaded}: {answered} of {len(part.records)} answered, {rate} requests/s"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
