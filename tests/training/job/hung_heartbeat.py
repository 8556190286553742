"""A device's process whose heartbeat is inside a call of torch's store when it ends."""

import sys
import threading
import time
from datetime import timedelta
from functools import partial

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from training.distributed.heartbeat import Beat, Heartbeat
from training.distributed.topology import Place, Timeouts
from training.job import launch

STORE_SECONDS = 2.0


class SlowEnd:
    """Keeps Python's own end busy until the store's call has returned."""

    def __del__(self, sleep=time.sleep):
        sleep(2 * STORE_SECONDS)


def run_device(port):
    """`launch._run_device` with a training that succeeds at once."""
    vars(sys)["slow_end"] = SlowEnd()  # the module that goes last
    launch._run_device(partial(_run_rank, port), None, 2)


def _run_rank(port, stop):
    store = TCPStore("127.0.0.1", port, wait_for_workers=False)
    is_inside = threading.Event()

    def exchange(own):
        is_inside.set()
        store.wait(["never"], timedelta(seconds=STORE_SECONDS))
        return [Beat().encode()] * 2

    heartbeat = Heartbeat(
        exchange,
        Place(("algo-1",), "algo-1", num_devices=2, device=1),
        timeouts=Timeouts(silence=0.1),
        stop=threading.Event(),
        on_lost=lambda reason: None,
    )
    heartbeat.start()
    is_inside.wait()
    heartbeat.close()
    print("trained", end="")  # not flushed: the output is a file
    return 0
