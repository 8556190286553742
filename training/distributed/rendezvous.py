"""Rendezvous of a job's ranks before training, and their orderly end after it.

The first host listens on a fixed port and holds torch's store. The ranks register there, gloo and
NCCL exchange their addresses through it, and the heartbeats go through it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dalle.errors import HostError
from training.distributed import topology
from training.distributed.heartbeat import Beat, Heartbeat
from training.distributed.process_group import TorchProcessGroup
from training.distributed.topology import LOOPBACK, Place, Timeouts
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)

_COMPLETE, _CANCELLED = "complete", "cancelled"


@dataclass(frozen=True, eq=False)
class Rendezvous:
    """Membership of one rank in its job's process group. Made by `Rendezvous.join`."""

    place: Place
    store: TCPStore
    heartbeat: Heartbeat
    timeouts: Timeouts

    @classmethod
    def join(
        cls,
        place: Place,
        *,
        named_interface: str | None,
        port: int,
        listener: socket.socket | None,
        timeouts: Timeouts,
        stop: threading.Event,
        on_lost: Callable[[str], object],
    ) -> Self:
        """Wait for all other ranks and start the heartbeat.

        named_interface: the job's network_interface_name. port: of the first host. listener: an
        open socket on that port, for a first rank that was given one. on_lost: see `Heartbeat`;
        may be called until `leave`. Raises HostError naming the missing hosts, or Stopped.
        """
        seconds = timeouts.join
        own, first = LOOPBACK, LOOPBACK  # one host needs no name service
        if len(place.hosts) > 1:
            own = topology.resolve(place.host, seconds=seconds, stop=stop)
            first = topology.resolve(place.hosts[0], seconds=seconds, stop=stop)
        interface = topology.interface_of(own, named_interface)
        if interface is not None:
            topology.use_interface(interface)
        limit = timedelta(seconds=seconds)
        if place.rank == 0:
            listener = listener or topology.listen(first, port)
            store = TCPStore(
                first,
                listener.getsockname()[1],
                is_master=True,
                wait_for_workers=False,
                timeout=limit,
                master_listen_fd=listener.detach(),
            )
        else:
            topology.reach(place.hosts[0], first, port, seconds=seconds, stop=stop)
            store = TCPStore(first, port, wait_for_workers=False, timeout=limit)
        try:
            _register(store, place, seconds, stop)
            # A second connection: a call that waits blocks the first one for all threads.
            beats = TCPStore(first, store.port, wait_for_workers=False, timeout=limit)
        except dist.DistError as error:
            if stop.is_set():  # the first host was stopped too, and its store is gone
                raise Stopped from None
            raise HostError(f"host {place.hosts[0]} left during the rendezvous") from error
        keys = [_beat_key(rank) for rank in range(place.size)]

        def exchange(own: str) -> list[bytes]:
            beats.set(keys[place.rank], own)
            return beats.multi_get(keys)

        heartbeat = Heartbeat(exchange, place, timeouts=timeouts, stop=stop, on_lost=on_lost)
        heartbeat.start()
        logger.info(
            "rank %d of %d on %s, over %s at %s; the first rank is on host %s",
            *(place.rank, place.size, place.name(place.rank), interface, own, place.hosts[0]),
        )
        return cls(place, store, heartbeat, timeouts)

    def begin(self, device: torch.device) -> TorchProcessGroup:
        """Make the process group; from now on the rank must end by `leave` or `fail`."""
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.place.rank,
            world_size=self.place.size,
            timeout=timedelta(seconds=self.timeouts.collective),
        )
        return TorchProcessGroup()

    def leave(self) -> None:
        """Wait until every rank is done, then leave the group; the first rank leaves last.

        A platform may end all containers when the first one ends.
        """
        TorchProcessGroup().any(False)
        self.heartbeat.close()
        with suppress(dist.DistError):  # training is done: a rank lost now is no failure
            if self.place.rank == 0:
                others = [f"left/{rank}" for rank in range(1, self.place.size)]
                self.store.wait(others, timedelta(seconds=self.timeouts.silence))
            else:
                self.store.set(f"left/{self.place.rank}", "")
        dist.destroy_process_group()

    def fail(self, error: Exception, cause: str) -> None:
        """Send the cause of this rank's failure to the others.

        An error of torch may be the consequence of a lost rank. Then the heartbeat gets time to
        find it first, and calls `on_lost` before this returns.
        """
        if isinstance(error, RuntimeError):  # torch's errors, those of broken connections too
            self.heartbeat.wait_for_lost_rank()
        self.heartbeat.announce(cause)


def _register(store: TCPStore, place: Place, seconds: float, stop: Stop) -> None:
    """Write this rank's key into the store and wait for those of all others.

    Either all ranks return or all raise Stopped: the first outcome in the store counts, so that no
    rank goes on where another was stopped while it waited. Raises HostError naming the hosts that
    are missing, or whose numbers of devices differ.
    """
    try:
        _wait_for_all(store, place, seconds, stop)
    except Stopped:
        if _outcome(store, _CANCELLED) == _CANCELLED:
            raise
        return  # another rank has seen all of them; this one stops later, together with them
    if _outcome(store, _COMPLETE) == _CANCELLED:
        raise Stopped


def _outcome(store: TCPStore, proposed: str) -> str:
    """Return the outcome of the rendezvous: the first one that any rank proposed."""
    decided: bytes = store.compare_set("outcome", "", proposed)
    return decided.decode()


def _wait_for_all(store: TCPStore, place: Place, seconds: float, stop: Stop) -> None:
    host = place.hosts.index(place.host)
    if place.device == 0:
        store.set(f"host/{host}", str(place.num_devices))
    store.set(_beat_key(place.rank), Beat().encode())

    def missing(keys: list[str]) -> list[int]:
        return [index for index, key in enumerate(keys) if not store.check([key])]

    def wait_for(keys: list[str], late: str) -> None:
        def are_there() -> bool | None:
            if store.check(["outcome"]) and store.get("outcome").decode() == _CANCELLED:
                raise Stopped
            return None if missing(keys) else True

        topology.wait_for(are_there, seconds=seconds, stop=stop, late=late)

    host_keys = [f"host/{index}" for index in range(len(place.hosts))]
    try:
        wait_for(host_keys, "")
    except HostError as error:
        names = ", ".join(place.hosts[index] for index in missing(host_keys))
        raise HostError(
            f"these hosts did not come within {seconds:g} s: {names}; their own logs say why"
        ) from error
    counts = [int(count) for count in store.multi_get(host_keys)]
    if len(set(counts)) > 1:
        each = ", ".join(f"{h} {n}" for h, n in zip(place.hosts, counts, strict=True))
        raise HostError(f"the hosts must have equal numbers of devices, got {each}")
    beat_keys = [_beat_key(rank) for rank in range(place.size)]
    wait_for(beat_keys, "not all devices of every host came")


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
