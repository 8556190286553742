"""Signs of life between the ranks, so that a lost host is noticed within seconds.

A killed host breaks its connections, but one that is frozen or cut off leaves the others waiting
in a collective for as long as its time limit, which must be long: the first rank's report is
waited for too. So every rank tells a common store every few seconds that it lives, and looks at
what the others told it. Two threads: one talks to the store, and may hang if the store's host is
the lost one; the other only counts, and cannot.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from training.distributed.topology import Patience, Place

ROUNDS_OF_SILENCE = 15
"""After so many rounds without a new sign a rank is lost; a round is patience.silence / 15."""


@dataclass(frozen=True)
class Sign:
    """What a rank tells the others.

    beat: grows with every sign. is_stopping: it was asked to stop. ending: why it ends now.
    """

    beat: int = 0
    is_stopping: bool = False
    ending: str | None = None

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Sign:
        return cls(**json.loads(text))


class Watch:
    """The signs of all ranks, exchanged until it is closed.

    exchange: puts this rank's encoded sign into the store and returns those of all, by rank; may
        hang, and may raise when the store is gone.
    stop: is set when another rank was asked to stop.
    on_lost: called once, from a thread, with the reason to end this process: some rank failed or
        is lost. The main thread may hang in a collective by then.
    """

    def __init__(
        self,
        exchange: Callable[[str], Sequence[bytes]],
        place: Place,
        *,
        patience: Patience,
        stop: threading.Event,
        on_lost: Callable[[str], object],
    ) -> None:
        self._exchange = exchange
        self._place = place
        self._silence = patience.silence
        self._interval = patience.silence / ROUNDS_OF_SILENCE
        self._stop = stop
        self._on_lost = on_lost
        self._closed = threading.Event()
        self._ending: str | None = None
        self._signs: list[Sign] = []
        self._num_rounds = 0
        self._broken: Exception | None = None
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._talk, "signs-of-life"), (self._judge, "watch"))
        ]

    def start(self) -> None:
        """Begin. The first signs of all ranks must be in the store."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the exchange: from now on no rank counts as lost.

        Waits for both threads, but no longer than the patience with a silent rank: a store whose
        host is gone may keep one of them for minutes. `training.job.process.leave` then ends the
        process regardless.
        """
        self._closed.set()
        deadline = time.monotonic() + self._silence
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def announce(self, cause: str) -> None:
        """Tell the others why this rank ends, and wait until they end too, but not for long."""
        own = self._place.rank
        self._end_together(f"{self._place.name(own)} failed: {cause}", besides=own)

    def wait_for_verdict(self) -> None:
        """Wait for as long as it takes to find a lost host; `on_lost` is then called meanwhile."""
        self._closed.wait(self._silence + 4 * self._interval)

    def _talk(self) -> None:
        beat = 0
        while not self._closed.is_set():
            beat += 1
            own = Sign(beat, self._stop.is_set(), self._ending)
            try:
                signs = [Sign.decode(text) for text in self._exchange(own.encode())]
            except Exception as error:  # in whichever way the store is gone
                self._broken = error
                return
            self._signs = signs
            self._num_rounds += 1
            if any(sign.is_stopping for sign in signs) and not self._stop.is_set():
                self._stop.set()
            # Whoever ends has no time to lose.
            self._closed.wait(self._interval / (10 if self._ending else 1))

    def _judge(self) -> None:
        """Find a reason to end, in rounds of its own.

        Rounds, not a clock: a host that was frozen itself must not take the others for lost.
        """
        last_round, last_beats = -1, [-1] * self._place.size
        rounds_without_store, rounds_without_sign = 0, [0] * self._place.size
        while not self._closed.wait(self._interval):
            if self._ending is not None:
                return
            if self._broken is not None:
                reason = str(self._broken).split("\n")[0]
                self._on_lost(f"{self._place.name(0)} is lost: the connection broke ({reason})")
                return
            if self._num_rounds == last_round:
                rounds_without_store += 1
                if rounds_without_store == ROUNDS_OF_SILENCE:
                    self._on_lost(self._silent(0))
                    return
                continue
            last_round, rounds_without_store = self._num_rounds, 0
            for rank, sign in enumerate(self._signs):
                is_new = sign.beat != last_beats[rank]
                rounds_without_sign[rank] = 0 if is_new else rounds_without_sign[rank] + 1
                last_beats[rank] = sign.beat
                ending = sign.ending
                if ending is None and rounds_without_sign[rank] == ROUNDS_OF_SILENCE:
                    ending = self._silent(rank)
                if ending is not None:
                    self._end_together(ending, besides=rank)
                    self._on_lost(ending)
                    return

    def _silent(self, rank: int) -> str:
        return (
            f"{self._place.name(rank)} is lost: no sign of life for {self._silence:g} s, it was "
            "killed, frozen or cut off. Started again, the job goes on from its newest checkpoint"
        )

    def _end_together(self, reason: str, *, besides: int) -> None:
        """Pass the reason on, and wait a few rounds until every other rank has one to end.

        besides: the rank that is the reason. The first rank has the store: if it went before the
        others know, they would blame it.
        """
        self._ending = reason
        deadline = time.monotonic() + 3 * self._interval
        while time.monotonic() < deadline and self._broken is None:
            nobody = {besides, self._place.rank}
            others = [sign for rank, sign in enumerate(self._signs) if rank not in nobody]
            if self._signs and all(sign.ending is not None for sign in others):
                return
            time.sleep(self._interval / 10)
