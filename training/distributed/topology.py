"""Which process of a job this is, and how its host finds the others. No torch.

SageMaker starts the same command on every host and gives it the list of names. They resolve by
DNS, but not at once. The interface to talk over is the one that owns the own host's address: the
name in resourceconfig.json is wrong in the SDK's local mode (`ethwe`, where there is `eth0`).
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil  # type: ignore[import-untyped]

from dalle.errors import HostError
from training.stopping import Stop, Stopped

logger = logging.getLogger(__name__)

RENDEZVOUS_PORT = 7777
"""Where the first host listens for the others; the port of AWS's own training toolkit."""

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to wait for other hosts, in seconds.

    join: until all of them are there. silence: until one that gives no sign of life is lost; the
    others have ended a few seconds later. collective: until a rank gives up waiting for another
    that is alive, as for the first one while it writes the report.
    """

    join: float = 600.0
    silence: float = 30.0
    collective: float = 3600.0


@dataclass(frozen=True)
class Place:
    """One process among all of a job's: there is one for each device of each host.

    hosts: sorted as text, as in `contract.Job`. device: of this process, from 0.
    """

    hosts: tuple[str, ...]
    host: str
    num_devices: int = 1
    device: int = 0

    @property
    def size(self) -> int:
        """Processes in all."""
        return len(self.hosts) * self.num_devices

    @property
    def rank(self) -> int:
        """This process's number; rank 0 writes what the job leaves."""
        return self.hosts.index(self.host) * self.num_devices + self.device

    def name(self, rank: int) -> str:
        """A rank for people: `host algo-2`, or `host algo-2, device 1`."""
        host, device = divmod(rank, self.num_devices)
        which = f", device {device}" if self.num_devices > 1 else ""
        return f"host {self.hosts[host]}{which}"


def wait_for(ready: Callable[[], T | None], *, seconds: float, stop: Stop, late: str) -> T:
    """What `ready` returns once that is not None; asked a few times a second.

    Raises HostError, saying `late` and the seconds, or Stopped.
    """
    deadline = time.monotonic() + seconds
    while (result := ready()) is None:
        if stop.is_set():
            raise Stopped
        if time.monotonic() >= deadline:
            raise HostError(f"{late} within {seconds:g} s")
        time.sleep(POLL_SECONDS)
    return result


def resolve(host: str, *, seconds: float, stop: Stop) -> str:
    """The IPv4 address of a host's name. Raises HostError naming it, or Stopped."""

    def ask() -> str | None:
        try:
            return socket.gethostbyname(host)
        except (OSError, UnicodeError):
            return None

    late = f"the name of host {host} did not resolve to an address"
    return wait_for(ask, seconds=seconds, stop=stop, late=late)


def interface_of(address: str, named: str | None) -> str | None:
    """The network interface that owns an IPv4 address, or the named one if only that exists.

    None, with a warning, when there is neither: the libraries then choose for themselves.
    """
    interfaces = psutil.net_if_addrs()
    is_loopback = ipaddress.ip_address(address).is_loopback
    for name, entries in interfaces.items():
        for entry in entries:
            if entry.family != socket.AF_INET:
                continue
            # All of 127.0.0.0/8 is the loopback interface's, which lists the first of them only.
            if entry.address == address or (
                is_loopback and ipaddress.ip_address(entry.address).is_loopback
            ):
                return str(name)
    if named in interfaces:
        logger.warning("no interface owns %s; using %s, as the job says", address, named)
        return named
    logger.warning(
        "no interface owns %s, and %s does not exist; there are %s",
        address,
        named or "one named by the job",
        ", ".join(interfaces),
    )
    return None


def use_interface(name: str) -> None:
    """Tell gloo and NCCL which interface to use, unless the environment does already."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this one, not a prefix


def listen(address: str, port: int) -> socket.socket:
    """The socket on which the first host awaits the others. Raises HostError when it cannot."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        raise HostError(
            f"the first host cannot listen on {address}:{port} ({error.strerror}); "
            "another job may use the port, --rendezvous-port chooses another"
        ) from error


def reach(name: str, address: str, port: int, *, seconds: float, stop: Stop) -> None:
    """Wait until somebody listens there. Raises HostError naming the host, or Stopped."""

    def knock() -> bool | None:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError:
            return None
        return True

    late = f"host {name} could not be reached on {address}:{port}"
    wait_for(knock, seconds=seconds, stop=stop, late=late)
