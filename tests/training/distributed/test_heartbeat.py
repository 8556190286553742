"""training.distributed.heartbeat: a silent rank ends the others, and nothing else does."""

import queue
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from training.distributed.heartbeat import ROUNDS_OF_SILENCE, Beat, Heartbeat
from training.distributed.topology import Place, Timeouts

HOSTS = ("algo-1", "algo-10", "algo-2")
SILENCE = 0.75
ROUND = SILENCE / ROUNDS_OF_SILENCE


class Member:
    """One rank's heartbeat over a real store. Freezing it stops its exchange, as SIGSTOP would."""

    def __init__(self, rank, port):
        self.stop = threading.Event()
        self.reasons = queue.Queue()
        self.exchanges = 0
        self._is_running = threading.Event()
        self._is_running.set()
        store = TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=300))
        keys = [f"beat/{each}" for each in range(len(HOSTS))]

        def exchange(own):
            self._is_running.wait()
            store.set(keys[rank], own)
            beats = store.multi_get(keys)
            self.exchanges += 1
            return beats

        store.set(keys[rank], Beat().encode())
        self.heartbeat = Heartbeat(
            exchange,
            Place(HOSTS, HOSTS[rank]),
            timeouts=Timeouts(silence=SILENCE),
            stop=self.stop,
            on_lost=self.reasons.put,
        )

    def freeze(self):
        self._is_running.clear()

    def thaw(self):
        self._is_running.set()

    def reason(self):
        """Wait for the reason of its end."""
        return self.reasons.get(timeout=300)

    def wait_for_exchanges(self, more):
        wanted = self.exchanges + more
        while self.exchanges < wanted:
            threading.Event().wait(ROUND / 4)


@pytest.fixture
def members():
    """The heartbeats of a job of three hosts, started."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [Member(rank, server.port) for rank in range(len(HOSTS))]
    for member in members:
        member.heartbeat.start()
    yield members
    for member in members:
        member.thaw()
        member.heartbeat.close()


def test_a_rank_without_a_sign_of_life_ends_the_others_by_its_name(members):
    members[2].freeze()
    for member in members[:2]:
        assert member.reason().startswith(f"host algo-2 is lost: no sign of life for {SILENCE} s")


def test_where_the_store_does_not_answer_its_host_is_the_lost_one(members):
    # A frozen or cut-off first host leaves the others' exchange hanging.
    for member in members:
        member.freeze()
    for member in members[1:]:
        assert member.reason().startswith("host algo-1 is lost: no sign of life")


def test_where_the_store_is_gone_its_host_is_the_lost_one():
    def exchange(own):
        raise dist.DistNetworkError("Failed to recv, got 0 bytes.\nmore")

    reasons = queue.Queue()
    heartbeat = Heartbeat(
        exchange,
        Place(HOSTS[:2], HOSTS[1]),
        timeouts=Timeouts(silence=SILENCE),
        stop=threading.Event(),
        on_lost=reasons.put,
    )
    heartbeat.start()
    said = "host algo-1 is lost: the connection broke (Failed to recv, got 0 bytes.)"
    assert reasons.get(timeout=300) == said
    heartbeat.close()


def test_a_failure_is_passed_on_with_its_cause(members):
    members[1].heartbeat.announce("the disk is full")
    for member in (members[0], members[2]):
        assert member.reason() == "host algo-10 failed: the disk is full"
    assert members[1].reasons.empty(), "it has its own cause"


def test_a_stop_of_one_rank_reaches_all(members):
    members[1].stop.set()
    for member in members:
        assert member.stop.wait(timeout=300)
    assert all(member.reasons.empty() for member in members)


def test_ranks_that_live_are_not_lost_however_long_it_takes(members):
    members[0].wait_for_exchanges(3 * ROUNDS_OF_SILENCE)
    assert all(member.reasons.empty() for member in members)


def test_no_rank_is_lost_after_the_end(members):
    for member in members:
        member.heartbeat.close()
    members[0].heartbeat.wait_for_lost_rank()
    assert all(member.reasons.empty() for member in members)
