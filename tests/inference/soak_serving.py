"""A soak of the real `serve`: clients of every kind at random times.

    python -m tests.inference.soak_serving --minutes 10 --signals 200        make soak-serving

Clients request images, read streams, send lines, set short deadlines, close early, send too much
or nonsense. Every accepted request is answered once, with the reference's images of its seed;
refusals have a Retry-After. At the end no slot is busy, nothing waits, every request was counted
once, and the server's memory is that after the warm-up. Then its processes are killed and stopped
(`tests.inference.interruptions`). The last line is JSON.
"""

import argparse
import itertools
import json
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle import artefact as artefacts
from inference.server.bodies import NUM_PROCESSES
from tests.conftest import build_tiny_models
from tests.inference.interruptions import interrupt
from tests.inference.served import Served, running
from tests.inference.serving_work import PATIENCE, Clients, Reference

MOST_SECONDS_TO_ANSWER = 5.0  # a ping, after a process was killed or stopped
CLIENTS = 12  # more than are answered at once, so that the queue is full at times
QUEUE = 4
MOST_MB = 1
MEAN_PAUSE = 0.05  # seconds of a client between two calls
WARM_UP = 100  # calls, until every path was used
GROWTH = 1.1  # of the memory after the warm-up, and
GROWTH_BYTES = 20 * 2**20  # for the calls that are running at the time


def soak(
    artefact: Path,
    reference: Reference,
    *,
    calls: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Make so many calls, or calls for so long, after the warm-up, and return their counts.

    Raises AssertionError for a wrong reply, a leak or an error in the log.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        shutil.copytree(artefact, root / "model")
        variables = {
            "DALLE_QUEUE_SIZE": str(QUEUE),
            "DALLE_CHUNK_SIZE": "4",
            "DALLE_MAX_REQUEST_MB": str(MOST_MB),
        }
        with running(root, **variables) as served:
            served.ready()
            clients = Clients(served.url, reference, MOST_MB * 1_000_000)
            numbers = itertools.count()
            call(clients, numbers, seed, lambda number: number >= WARM_UP)
            settle(served, clients)
            warm = memory_bytes(served)
            ends = time.monotonic() + (seconds or 0.0)
            most = None if calls is None else WARM_UP + CLIENTS + calls
            call(
                clients,
                numbers,
                seed,
                lambda number: number >= most if most else time.monotonic() > ends,
            )
            settle(served, clients)
            end = memory_bytes(served)
            assert served.get("/ping").status_code == 200
            readers = children(worker_of(served))
            assert 1 <= len(readers) <= NUM_PROCESSES, "processes read the large bodies"
    failures = [line for line in served.lines if "Traceback" in line or "internal error" in line]
    until = time.monotonic() + PATIENCE
    while any(is_running(each) for each in readers):
        assert time.monotonic() < until, "the child process outlives the server"
        time.sleep(0.05)
    assert failures == [], "\n".join(served.lines[-50:])
    assert end <= GROWTH * warm + GROWTH_BYTES, f"{warm:,} bytes became {end:,}"
    return {
        "calls": sum(clients.sent.values()),
        "counts": dict(sorted(clients.counts.items())),
        "warm_mb": round(warm / 1e6, 1),
        "end_mb": round(end / 1e6, 1),
    }


def call(
    clients: Clients, numbers: "itertools.count[int]", seed: int, is_enough: Callable[[int], bool]
) -> None:
    """Run the clients until there were enough calls; raise their first error."""
    errors: list[BaseException] = []
    over = threading.Event()

    def client(name: int) -> None:
        chance = random.Random(f"{seed} client {name}")
        try:
            while not over.wait(chance.expovariate(1 / MEAN_PAUSE)):
                number = next(numbers)
                if is_enough(number):
                    return
                clients.one(number, seed)
        except BaseException as error:
            errors.append(error)
            over.set()

    threads = [threading.Thread(target=client, args=(name,)) for name in range(CLIENTS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]


def settle(served: Served, clients: Clients) -> None:
    """Wait until nothing runs; check that every call was counted once and no slot is busy."""
    until = time.monotonic() + PATIENCE
    while True:
        text = served.get("/metrics").text
        answered = sum(
            float(each) for each in re.findall(r"dalle_invocations_total{.*} (\S+)", text)
        )
        busy, waiting = (
            float(re.findall(rf"^dalle_{name} (\S+)$", text, re.MULTILINE)[0])
            for name in ("busy_slots", "queue_depth")
        )
        sent = sum(clients.sent.values())
        if (answered, busy, waiting) == (sent, 0, 0):
            return
        assert time.monotonic() < until, (
            f"of {sent} requests {answered:g} were answered; {busy:g} slots are still busy, "
            f"{waiting:g} requests wait or run"
        )
        time.sleep(0.05)


def worker_of(served: Served) -> int:
    """The process that holds the model."""
    (worker,) = children(served.process.pid)
    return worker


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(each) for task in tasks for each in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def memory_bytes(served: Served) -> int:
    """Resident memory of the process that holds the model."""
    status = Path(f"/proc/{worker_of(served)}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.inference.soak_serving", description=__doc__
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all chance")
    parser.add_argument(
        "--signals", type=int, default=200, help="that kill or stop a process; default %(default)s"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        artefacts.save(Path(directory), build_tiny_models())
        reference = Reference(Path(directory))
        done = soak(Path(directory), reference, seconds=60 * options.minutes, seed=options.seed)
        print(json.dumps({"seed": options.seed} | done), flush=True)
        done = interrupt(Path(directory), reference, options.signals, options.seed)
    assert done["most_seconds_to_answer"] <= MOST_SECONDS_TO_ANSWER, done
    print(json.dumps({"seed": options.seed} | done))


if __name__ == "__main__":
    main()
