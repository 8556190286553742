"""Heartbeats between the ranks: a lost host is found within seconds.

A killed host breaks its connections. A frozen or disconnected one leaves the others in a
collective until its timeout, which must be long because the collective also waits for the first
rank's report. So every rank writes a beat into a common store every few seconds and reads those of
the others. Two threads: one talks to the store and hangs when the store's host is the lost one;
the other only counts rounds and cannot hang.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass

from training.distributed.topology import Place, Timeouts

ROUNDS_OF_SILENCE = 15
"""Rounds without a new beat after which a rank is lost; a round takes timeouts.silence / 15."""


@dataclass(frozen=True)
class Beat:
    """Message of one rank to all others.

    number: grows with every beat. is_stopping: the rank got SIGTERM or Ctrl-C. ending: why the rank
    ends now, None while it runs.
    """

    number: int = 0
    is_stopping: bool = False
    ending: str | None = None

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Beat:
        return cls(**json.loads(text))


@dataclass(eq=False)
class Heartbeat:
    """Exchange of beats between all ranks, until it is closed.

    exchange: writes this rank's encoded beat into the store and returns those of all ranks, by
        rank. It may hang, and raise when the store is gone.
    stop: set when any rank is stopping.
    on_lost: called once, from a thread, with the reason to end this process: another rank failed
        or is lost. The main thread may hang in a collective meanwhile.
    """

    exchange: Callable[[str], Sequence[bytes]]
    place: Place
    _: KW_ONLY
    timeouts: Timeouts
    stop: threading.Event
    on_lost: Callable[[str], object]

    def __post_init__(self) -> None:
        self._silence = self.timeouts.silence
        self._interval = self._silence / ROUNDS_OF_SILENCE
        self._closed = threading.Event()
        self._ending: str | None = None
        self._beats: list[Beat] = []
        self._num_rounds = 0
        self._broken: Exception | None = None
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in (
                (self._send_and_receive, "heartbeat"),
                (self._find_lost, "heartbeat-check"),
            )
        ]

    def start(self) -> None:
        """Start both threads. The first beat of every rank must be in the store already."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop both threads; from now on no rank counts as lost.

        Waits for them for at most `timeouts.silence`: a call to a store whose host is gone can take
        minutes. `training.job.process.leave` then ends the process regardless.
        """
        self._closed.set()
        deadline = time.monotonic() + self._silence
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def announce(self, cause: str) -> None:
        """Send the cause of this rank's failure and wait a few rounds for the others to end."""
        own = self.place.rank
        self._end_together(f"{self.place.name(own)} failed: {cause}", except_rank=own)

    def wait_for_lost_rank(self) -> None:
        """Wait for as long as a lost rank goes unnoticed; `on_lost` is called if there is one."""
        self._closed.wait(self._silence + 4 * self._interval)

    def _send_and_receive(self) -> None:
        number = 0
        while not self._closed.is_set():
            number += 1
            own = Beat(number, self.stop.is_set(), self._ending)
            try:
                beats = [Beat.decode(text) for text in self.exchange(own.encode())]
            except Exception as error:  # torch raises several kinds when the store is gone
                self._broken = error
                return
            self._beats = beats
            self._num_rounds += 1
            if any(beat.is_stopping for beat in beats):
                self.stop.set()
            # A rank that ends must tell the others before its process is gone.
            self._closed.wait(self._interval / (10 if self._ending else 1))

    def _find_lost(self) -> None:
        """Call `on_lost` when a rank failed or is silent for too many rounds.

        Counts rounds instead of reading a clock: a host that was frozen and goes on must not count
        the others as lost.
        """
        last_round, last_numbers = -1, [-1] * self.place.size
        rounds_without_store, rounds_without_beat = 0, [0] * self.place.size
        while not self._closed.wait(self._interval):
            if self._ending is not None:
                return
            if self._broken is not None:
                reason = str(self._broken).split("\n")[0]
                self.on_lost(f"{self.place.name(0)} is lost: the connection broke ({reason})")
                return
            if self._num_rounds == last_round:
                rounds_without_store += 1
                if rounds_without_store == ROUNDS_OF_SILENCE:
                    self.on_lost(self._silent(0))
                    return
                continue
            last_round, rounds_without_store = self._num_rounds, 0
            for rank, beat in enumerate(self._beats):
                is_new = beat.number != last_numbers[rank]
                rounds_without_beat[rank] = 0 if is_new else rounds_without_beat[rank] + 1
                last_numbers[rank] = beat.number
                ending = beat.ending
                if ending is None and rounds_without_beat[rank] == ROUNDS_OF_SILENCE:
                    ending = self._silent(rank)
                if ending is not None:
                    self._end_together(ending, except_rank=rank)
                    self.on_lost(ending)
                    return

    def _silent(self, rank: int) -> str:
        return (
            f"{self.place.name(rank)} is lost: no sign of life for {self._silence:g} s, it was "
            "killed, frozen or cut off. Started again, the job goes on from its newest checkpoint"
        )

    def _end_together(self, reason: str, *, except_rank: int) -> None:
        """Send the reason and wait a few rounds until every other rank has one to end.

        except_rank: the rank that failed or is lost. The first rank holds the store: if its process
        ended earlier, the others would name it as the lost one.
        """
        self._ending = reason
        deadline = time.monotonic() + 3 * self._interval
        while time.monotonic() < deadline and self._broken is None:
            ended = {except_rank, self.place.rank}
            others = [beat for rank, beat in enumerate(self._beats) if rank not in ended]
            if self._beats and all(beat.ending is not None for beat in others):
                return
            time.sleep(self._interval / 10)
