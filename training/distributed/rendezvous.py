"""How the ranks of a job come together before training, and part after it.

The first host listens on a fixed port. It has the store in which the others register, through
which gloo and NCCL exchange their addresses, and by which the ranks watch over one another.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dalle.errors import HostError
from training.distributed import topology as hosts
from training.distributed.heartbeat import Sign, Watch
from training.distributed.process_group import Together
from training.distributed.topology import LOOPBACK, Patience, Place
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)

_COMPLETE, _CANCELLED = "complete", "cancelled"


class Meeting:
    """A rank's membership in the process group of its job. Made by `Meeting.join`."""

    def __init__(self, place: Place, store: TCPStore, watch: Watch, patience: Patience) -> None:
        self._place = place
        self._store = store
        self._watch = watch
        self._patience = patience

    @classmethod
    def join(
        cls,
        place: Place,
        *,
        named_interface: str | None,
        port: int,
        listener: socket.socket | None,
        patience: Patience,
        stop: threading.Event,
        on_lost: Callable[[str], object],
    ) -> Self:
        """Meet all other ranks, and watch over one another from then on.

        named_interface: the contract's network_interface_name. port: of the first host. listener:
        an open socket there, for a first rank that was given one. on_lost: see `Watch`; called
        from now on until `leave`. Raises HostError naming who is missing, or Stopped.
        """
        seconds = patience.join
        own, first = LOOPBACK, LOOPBACK  # the ranks of one host need no name service
        if len(place.hosts) > 1:
            own = hosts.resolve(place.host, seconds=seconds, stop=stop)
            first = hosts.resolve(place.hosts[0], seconds=seconds, stop=stop)
        interface = hosts.interface_of(own, named_interface)
        if interface is not None:
            hosts.use_interface(interface)
        limit = timedelta(seconds=seconds)
        if place.rank == 0:
            listener = listener or hosts.listen(first, port)
            store = TCPStore(
                first,
                listener.getsockname()[1],
                is_master=True,
                wait_for_workers=False,
                timeout=limit,
                master_listen_fd=listener.detach(),
            )
        else:
            hosts.reach(place.hosts[0], first, port, seconds=seconds, stop=stop)
            store = TCPStore(first, port, wait_for_workers=False, timeout=limit)
        try:
            _register(store, place, seconds, stop)
            # A second connection: the first one is taken while this rank waits for something.
            signs = TCPStore(first, store.port, wait_for_workers=False, timeout=limit)
        except dist.DistError as error:
            if stop.is_set():  # as the first host was, which went with its store
                raise Stopped from None
            raise HostError(f"host {place.hosts[0]} left while the hosts met") from error
        keys = [_sign_key(rank) for rank in range(place.size)]

        def exchange(own_sign: str) -> list[bytes]:
            signs.set(_sign_key(place.rank), own_sign)
            return signs.multi_get(keys)

        watch = Watch(exchange, place, patience=patience, stop=stop, on_lost=on_lost)
        watch.start()
        logger.info(
            "rank %d of %d on %s, over %s at %s; the first rank is on host %s",
            *(place.rank, place.size, place.name(place.rank), interface, own, place.hosts[0]),
        )
        return cls(place, store, watch, patience)

    def begin(self, device: torch.device) -> Together:
        """Make the process group; from now on a rank that ends must `leave` or `fail`."""
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", self._store),
            rank=self._place.rank,
            world_size=self._place.size,
            timeout=timedelta(seconds=self._patience.collective),
        )
        return Together()

    def leave(self) -> None:
        """Wait until every rank is done, then part; the first rank goes last.

        Whoever started the containers may end all of them when one ends.
        """
        Together().any(False)
        self._watch.close()
        if self._place.rank == 0:
            others = [f"left/{rank}" for rank in range(1, self._place.size)]
            with suppress(dist.DistError):  # a rank that is lost now is nobody's loss
                self._store.wait(others, timedelta(seconds=self._patience.silence))
        else:
            with suppress(dist.DistError):
                self._store.set(f"left/{self._place.rank}", "")
        dist.destroy_process_group()

    def fail(self, error: Exception, cause: str) -> None:
        """Tell the other ranks why this one ends.

        When the reason may be that another rank is lost, that is found out first; `on_lost` is
        then called before this returns.
        """
        if isinstance(error, RuntimeError):  # torch's own errors, those of broken connections too
            self._watch.wait_for_verdict()
        self._watch.announce(cause)


def _register(store: TCPStore, place: Place, seconds: float, stop: Stop) -> None:
    """Leave this rank's mark and wait for those of all others.

    A rank that is stopped meanwhile leaves with Stopped, and so do then all others: whoever has
    found everybody there may not find that somebody has left again. Raises HostError naming the
    hosts that are missing or unlike.
    """
    try:
        _await_everybody(store, place, seconds, stop)
    except Stopped:
        if _outcome(store, _CANCELLED) == _CANCELLED:
            raise
        return  # somebody saw all of them there, this rank too: it stops as one of them
    if _outcome(store, _COMPLETE) == _CANCELLED:
        raise Stopped


def _outcome(store: TCPStore, proposed: str) -> str:
    """How the meeting ended: as the first rank said that proposed anything."""
    decided: bytes = store.compare_set("outcome", "", proposed)
    return decided.decode()


def _await_everybody(store: TCPStore, place: Place, seconds: float, stop: Stop) -> None:
    host = place.hosts.index(place.host)
    if place.device == 0:
        store.set(f"host/{host}", str(place.num_devices))
    store.set(_sign_key(place.rank), Sign().encode())

    def missing(keys: list[str]) -> list[int]:
        return [index for index, key in enumerate(keys) if not store.check([key])]

    def is_cancelled() -> bool:
        return store.check(["outcome"]) and store.get("outcome").decode() == _CANCELLED

    host_keys = [f"host/{index}" for index in range(len(place.hosts))]

    def are_hosts_there() -> bool | None:
        if is_cancelled():
            raise Stopped
        return None if missing(host_keys) else True

    try:
        hosts.wait_for(are_hosts_there, seconds=seconds, stop=stop, late="")
    except HostError as error:
        names = ", ".join(place.hosts[index] for index in missing(host_keys))
        raise HostError(
            f"these hosts did not come within {seconds:g} s: {names}; their own logs say why"
        ) from error
    counts = [int(count) for count in store.multi_get(host_keys)]
    if len(set(counts)) > 1:
        each = ", ".join(f"{h} {n}" for h, n in zip(place.hosts, counts, strict=True))
        raise HostError(f"the hosts must have equal numbers of devices, got {each}")
    sign_keys = [_sign_key(rank) for rank in range(place.size)]

    def are_ranks_there() -> bool | None:
        if is_cancelled():
            raise Stopped
        return None if missing(sign_keys) else True

    hosts.wait_for(
        are_ranks_there, seconds=seconds, stop=stop, late="not all devices of every host came"
    )


def _sign_key(rank: int) -> str:
    return f"sign/{rank}"
