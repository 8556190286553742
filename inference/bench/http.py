"""`python -m inference.bench.http`: throughput through HTTP over that of the engine alone.

    python -m inference.bench.http --model out/demo/ml/model --clients 8

Starts the real `serve` on a free port of loopback and, in this process, the same engine without a
server. Both get the same requests, `--clients` at a time, in turns of `--requests`; the load is the
closed loop of `inference.bench.load`. Each turn gives
the ratio of its two throughputs, so that other load on the machine affects both; the result is the
median ratio. After that /ping is timed beside the same load, where it cannot change the ratio. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle.platform.user import name_user
from inference.api.rendering import GenerateResult
from inference.api.schema import GenerateRequest
from inference.bench import steps as bench_steps
from inference.bench.http_target import HttpTarget
from inference.bench.load import closed_loop
from inference.bench.workload import DEFAULT_CAPTIONS, Workload
from inference.engine.model_runner import ModelRunner

_PATIENCE = 600.0  # seconds for a request
_PING_PAUSE = 0.02  # seconds between two pings
_LARGE_CLIENTS = 8  # clients that send large images with --image-mb


@dataclass(frozen=True)
class Turn:
    """One turn: images per second either way, and seconds of each ping beside the load."""

    engine: float
    http: float
    pings: list[float]


def main(arguments: Sequence[str] | None = None) -> None:
    name_user()
    parser = argparse.ArgumentParser(
        prog="python -m inference.bench.http",
        description="Measure the engine's throughput through HTTP beside its own.",
    )
    parser.add_argument("--model", type=Path, required=True, help="an artefact's directory")
    parser.add_argument(
        "--clients", type=bench_steps.at_least_one, default=8, help="default %(default)s"
    )
    parser.add_argument("--num-candidates", type=int, default=16, help="default %(default)s")
    parser.add_argument("--num-images", type=int, default=4, help="default %(default)s")
    parser.add_argument(
        "--requests",
        type=bench_steps.at_least_one,
        default=24,
        help="of a turn; default %(default)s",
    )
    parser.add_argument(
        "--turns", type=bench_steps.at_least_one, default=5, help="default %(default)s"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; default 1")
    parser.add_argument("--precision", default="fp32", help="default %(default)s")
    parser.add_argument(
        "--image-mb", type=float, default=0.0, help="beside pings, 8 clients send such images"
    )
    given = parser.parse_args(arguments)
    workload = Workload(
        captions=list(DEFAULT_CAPTIONS),
        num_candidates=given.num_candidates,
        num_images=given.num_images,
    )
    runner = ModelRunner.load(
        given.model, given.device, threads=given.threads, precision=given.precision
    )
    runner.self_test()
    with serving(given) as target:
        turns = [measure(runner, target, workload, given) for _ in range(given.turns + 1)]
    machine = bench_steps.describe_machine(torch.device(given.device))
    print(json.dumps(machine | figures(turns[1:], given)))  # the first one warms up


def figures(turns: Sequence[Turn], given: argparse.Namespace) -> dict[str, Any]:
    """Print each turn and return the result."""
    ratios = [turn.http / turn.engine for turn in turns]
    pings = sorted(ping for turn in turns for ping in turn.pings)
    for turn, ratio in zip(turns, ratios, strict=True):
        print(f"engine {turn.engine:.2f} images/s, HTTP {turn.http:.2f}: {ratio:.3f}", flush=True)
    return {
        "clients": given.clients,
        "num_candidates": given.num_candidates,
        "image_mb": given.image_mb,
        "engine_images_per_second": round(statistics.median(turn.engine for turn in turns), 3),
        "http_images_per_second": round(statistics.median(turn.http for turn in turns), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in ratios],
        "pings": len(pings),
        "ping_p50_ms": round(1000 * pings[len(pings) // 2], 2) if pings else None,
        "ping_p99_ms": round(1000 * pings[int(0.99 * len(pings))], 2) if pings else None,
        "ping_max_ms": round(1000 * pings[-1], 2) if pings else None,
    }


def measure(
    runner: ModelRunner, target: HttpTarget, workload: Workload, given: argparse.Namespace
) -> Turn:
    """Run one turn: the same requests by the engine alone, through HTTP, and beside pings."""
    engine = _by_engine(runner, workload, given.clients, given.requests)
    through = _by_http(target, workload, given.clients, given.requests)
    pings: list[float] = []
    works = [lambda: _ping(target, pings)]
    if given.image_mb:
        body = _large_body(int(1e6 * given.image_mb))
        works += [lambda: _classify(target, body)] * _LARGE_CLIENTS
    with beside(*works):
        _by_http(target, workload, given.clients, given.requests)
    return Turn(engine, through, pings)


def _by_engine(runner: ModelRunner, workload: Workload, clients: int, requests: int) -> float:
    """Images per second of the first `requests` that end, with `clients` begun at any time."""
    bodies = map(workload.request, itertools.count())
    begun = ended = completed = 0
    began = time.perf_counter()
    while ended < requests:
        while begun - ended < clients and runner.has_room:
            runner.add(runner.prepare(GenerateRequest.model_validate_json(next(bodies))))
            begun += 1
        for each in runner.step():
            assert isinstance(each.outcome, GenerateResult)
            ended += 1
            completed += len(each.outcome.ranked)
    seconds = time.perf_counter() - began
    runner.abandon()  # what is in progress at the end counts on neither side
    return completed / seconds


def _by_http(target: HttpTarget, workload: Workload, clients: int, requests: int) -> float:
    """Images per second of clients that send their next request when the last is answered."""
    measured = closed_loop(target, workload, clients=clients, requests=requests)
    if refused := Counter(each.outcome for each in measured.records if not each.is_answered):
        raise RuntimeError(f"the server did not answer every request: {dict(refused)}")
    completed = sum(each.completed_candidates for each in measured.records)
    return completed / measured.window_seconds


@contextmanager
def beside(*works: Callable[[], None]) -> Iterator[None]:
    """Repeat each of the works in a thread while the block runs."""
    over = threading.Event()

    def repeat(work: Callable[[], None]) -> None:
        while not over.is_set():
            work()

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _ping(target: HttpTarget, pings: list[float]) -> None:
    """Note the seconds of one ping on a new connection, as the platform sends it."""
    began = time.perf_counter()
    target.get("/ping")
    pings.append(time.perf_counter() - began)
    time.sleep(_PING_PAUSE)


def _classify(target: HttpTarget, body: bytes) -> None:
    with closing(target.connect()) as connection:
        connection.send(body)  # it may be refused before all of it was read


def _large_body(size: int) -> bytes:
    """A classification request with one image, noise as BMP, of about `size` bytes in base64."""
    side = int((size * 0.75 / 3) ** 0.5)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="BMP")
    image = base64.b64encode(file.getvalue()).decode()
    return json.dumps({"images": [image], "classes": ["a star", "a circle"]}).encode()


@contextmanager
def serving(given: argparse.Namespace) -> Iterator[HttpTarget]:
    """Run `serve` on a free port. Raises RuntimeError with its log where it does not start."""
    with TemporaryDirectory() as directory:
        (Path(directory) / "model").symlink_to(given.model.resolve())
        environment = os.environ | {
            "DALLE_DEVICE": given.device,
            "DALLE_THREADS": str(given.threads),
            "DALLE_PRECISION": given.precision,
            "DALLE_QUEUE_SIZE": str(max(16, given.clients)),
            "DALLE_DEADLINE_SECONDS": f"{_PATIENCE:g}",
        }
        words = ["--root", directory, "--host", "127.0.0.1", "--port", "0"]
        process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", "inference", *words],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        with process.stderr as log:
            reader = threading.Thread(target=log.read)  # the log would fill its pipe
            try:
                url = _url_when_ready(log)
                reader.start()
                yield HttpTarget(url, timeout_seconds=_PATIENCE)
            finally:
                process.terminate()
                process.wait()
                if reader.ident is not None:
                    reader.join()


def _url_when_ready(log: Iterable[str]) -> str:
    url, lines = "", []
    for line in log:
        lines.append(line)
        if found := re.search(r"Listening at: (http://[\d.]+:\d+)", line):
            url = found[1]
        if line.rstrip().endswith(": ready"):
            return url
    raise RuntimeError("serve did not start:\n" + "".join(lines))


if __name__ == "__main__":
    main()
