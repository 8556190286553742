"""`benchmark`: latency and throughput of one workload on a URL, the local image or an endpoint.

Writes RUN.json, prints a table, and ends with one line of JSON. `infra.benchmark.measure` runs the
measurement, `inference.bench.load` sends the requests, `infra.benchmark.targets` has the servers.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dalle.errors import AwsError, UserError
from inference.bench.http_target import TIMEOUT_SECONDS
from inference.bench.workload import Workload, read_captions
from infra.aws import client as aws
from infra.aws.output import Output, aligned
from infra.benchmark.machine import load_average
from infra.benchmark.measure import Load, Plan, measure
from infra.benchmark.run_file import Run, save_run
from infra.benchmark.targets import Server, endpoint_server, image_servers, url_server
from infra.cost.command import add_table_argument
from infra.cost.prices import load_prices

DEFAULT_CLIENTS = (1, 8, 64)
P_NAMES = ("p50", "p95", "p99")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `benchmark`."""
    where = parser.add_argument_group("the server (one of the first three)")
    target = where.add_mutually_exclusive_group(required=True)
    target.add_argument("--url", help="a running server, such as http://127.0.0.1:8080")
    target.add_argument("--image", metavar="NAME", help="the local image, started here by Docker")
    target.add_argument("--endpoint", metavar="NAME", help="a SageMaker endpoint, by boto3")
    where.add_argument("--model", type=Path, help="of --image: a model.tar.gz or its directory")
    where.add_argument(
        "--cpus",
        type=float,
        action="append",
        help="of --image: processors; repeatable, measured in alternating rounds",
    )
    where.add_argument("--memory", metavar="LIMIT", help="of --image: such as 6g")
    where.add_argument(
        "--docker-option",
        action="append",
        default=[],
        metavar="WORD",
        help="of --image: a further option of `docker run`, such as --docker-option=--gpus=all",
    )
    where.add_argument(
        "--device", choices=("cpu", "cuda"), help="of the server, where it is not known here"
    )
    where.add_argument("--processor", help="of --url: the name of its processor or GPU")
    where.add_argument(
        "--as",
        dest="stands_for",
        action="append",
        default=[],
        metavar="TYPE",
        help="the instance type (or serverless, lambda) whose price this run is compared with; "
        "printed as your assumption; repeatable",
    )
    work = parser.add_argument_group("the requests")
    work.add_argument("--captions", type=Path, metavar="FILE", help="one caption a line")
    work.add_argument("--caption", action="append", metavar="TEXT", help="repeatable")
    work.add_argument("--num-candidates", type=int, default=16, help="default %(default)s")
    work.add_argument("--num-images", type=int, default=4, help="default %(default)s")
    work.add_argument("--format", choices=("png", "jpeg", "webp"), default="png")
    work.add_argument("--guidance-scale", type=float, default=1.0, help="default %(default)s: off")
    work.add_argument("--seed", type=int, default=0, help="of request 0; default %(default)s")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--clients",
        type=int,
        action="append",
        help="closed loop: clients at once; repeatable; default 1, 8 and 64",
    )
    load.add_argument(
        "--rate", type=float, action="append", help="open loop: arrivals a second; repeatable"
    )
    load.add_argument(
        "--requests",
        type=int,
        default=100,
        help="of each load; default %(default)s, and in each round at least 2 for each client",
    )
    load.add_argument("--warm-up", type=int, default=3, help="for each load; default %(default)s")
    load.add_argument("--rounds", type=int, help="default 1, with several --cpus 3")
    load.add_argument(
        "--max-seconds", type=float, default=120.0, help="of each load; default %(default)s"
    )
    load.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds; default 70")
    parser.add_argument("--out", type=Path, default=Path("RUN.json"), help="default %(default)s")
    add_table_argument(parser)
    aws.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, write RUN.json and print it. Raises UserError, AccessError, AwsError."""
    output = Output(as_json=options.json, dry_run=options.dry_run)
    plan = _plan(options)
    if options.dry_run:
        print(json.dumps(_dry_run(options, plan), ensure_ascii=False, indent=1))
        return 0
    before = load_average()
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with _servers(options, output) as servers:
        scenarios = measure(plan, servers, output.line)
        runs = {
            _out(options.out, server, len(servers)): Run(
                date=now,
                kind=server.kind,
                target=server.address,
                device=server.device,
                stands_for=options.stands_for or server.stands_for,
                hardware=server.hardware,
                versions=server.versions,
                workload=plan.workload,
                scenarios=found,
                ready_seconds=server.ready_seconds,
                peak_memory_bytes=server.peak_memory_bytes(),
                load_average=before,
                rounds=plan.rounds,
                interleaved_with=[each.name for each in servers if each is not server],
            )
            for server, found in zip(servers, scenarios, strict=True)
        }
    if not any(each.outcomes.get("200") for each in sum(scenarios, [])):
        outcomes = {name: n for each in sum(scenarios, []) for name, n in each.outcomes.items()}
        raise AwsError(f"no request was answered: {outcomes or 'all got 429 or 503'}")
    for path, each in runs.items():
        save_run(each, path)
        output.line(f"\n{path}: {each.hardware.describe()}\n{render_run(each)}")
    if len(runs) > 1:
        output.line(f"\n{render_ratios(list(runs.values()))}")
    print(json.dumps({"runs": [_brief(path, each) for path, each in runs.items()]}))
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    problems = [
        f"--{name.replace('_', '-')} must be {least} or more, got {value}"
        for name, least in (("requests", 1), ("warm_up", 0), ("rounds", 1))
        if (value := getattr(options, name)) is not None and value < least
    ]
    problems += [f"--clients must be 1 to 512, got {n}" for n in options.clients or () if n < 1]
    problems += [f"--rate must be above 0, got {rate}" for rate in options.rate or () if rate <= 0]
    if bool(options.image) != bool(options.model):
        problems.append("--image and --model go together")
    if problems:
        raise UserError("; ".join(problems))
    captions = read_captions(options.captions, options.caption)
    fields = {name: getattr(options, name) for name in Workload.model_fields}
    workload = Workload(**fields | {"captions": captions})
    workload.check()
    clients = options.clients or (() if options.rate else DEFAULT_CLIENTS)
    loads = [Load(clients=each) for each in clients]
    loads += [Load(rate_per_second=each) for each in options.rate or ()]
    rounds = options.rounds or (3 if len(options.cpus or ()) > 1 else 1)
    rounds = min(rounds, options.requests)
    return Plan(workload, loads, options.requests, options.warm_up, rounds, options.max_seconds)


@contextlib.contextmanager
def _servers(options: argparse.Namespace, output: Output) -> Iterator[list[Server]]:
    if options.url:
        yield [
            url_server(
                options.url,
                device=options.device,
                processor=options.processor,
                timeout_seconds=options.timeout,
            )
        ]
    elif options.image:
        with image_servers(
            options.image,
            options.model,
            cpus=options.cpus or (),
            memory=options.memory,
            options=options.docker_option,
            timeout_seconds=options.timeout,
            line=output.line,
        ) as servers:
            yield servers
    else:
        account = aws.connect(options, output)
        table = load_prices(options.prices)
        yield [endpoint_server(account, options.endpoint, table, device=options.device)]


def _out(out: Path, server: Server, servers: int) -> Path:
    if servers == 1:
        return out
    return out.with_name(f"{out.stem}-{server.name.replace(' ', '')}{out.suffix}")


def _dry_run(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    return {
        "target": options.url or options.image or options.endpoint,
        "cpus": options.cpus,
        "workload": plan.workload.describe(),
        "loads": [
            {"clients": each.clients} if each.clients else {"rate": each.rate_per_second}
            for each in plan.loads
        ],
        "requests": plan.requests,
        "rounds": plan.rounds,
        "first_request": json.loads(plan.workload.request(0)),
    }


def render_run(run: Run) -> str:
    """Return a table for the terminal, one line a scenario."""
    head = ["load", "requests", "failed", "requests/s", "images/s", *P_NAMES]
    lines: list[Sequence[str]] = [[*head, "mean seconds by stage"]]
    for each in run.scenarios:
        seconds = [f"{getattr(each.latency, p):.3f}" if each.latency else "-" for p in P_NAMES]
        stages = " ".join(f"{name} {found.mean:.3f}" for name, found in each.stages.items())
        rates = [f"{each.requests_per_second:.3g}", f"{each.images_per_second:.3g}"]
        lines.append([each.name, str(each.requests), str(each.errors), *rates, *seconds, stages])
    notes = [
        f"sent again after: {each.refusals} ({each.name})"
        for each in run.scenarios
        if each.refusals
    ]
    return "\n".join([*aligned(lines), *notes])


def render_ratios(runs: Sequence[Run]) -> str:
    """Return the ratio of each run's requests a second to the first run's, for each load.

    It is the median of the rounds' ratios, which a disturbance in one round does not change.
    """
    first = runs[0]
    lines = []
    for place, base in enumerate(first.scenarios):
        for other in runs[1:]:
            pairs = zip(base.by_round, other.scenarios[place].by_round, strict=True)
            ratios = [theirs / ours for ours, theirs in pairs if ours]
            if ratios and base.load == "closed":
                span = f", {min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
                lines.append(
                    f"{base.name}: {_limit(other)} answer {statistics.median(ratios):.2f} times "
                    f"the requests of {_limit(first)} (median of {len(ratios)} rounds{span})"
                )
    return "\n".join(lines)


def _limit(run: Run) -> str:
    limit = run.hardware.cpu_limit
    return f"{limit:g} processors" if limit else "all processors"


def _brief(path: Path, run: Run) -> dict[str, Any]:
    return {
        "out": str(path),
        "device": run.device,
        "hardware": run.hardware.describe(),
        "peak_memory_bytes": run.peak_memory_bytes,
        "scenarios": {
            each.name: {
                "requests_per_second": round(each.requests_per_second, 4),
                "images_per_second": round(each.images_per_second, 4),
                **{p: round(getattr(each.latency, p), 4) for p in P_NAMES if each.latency},
                "failed": each.errors,
            }
            for each in run.scenarios
        },
    }
