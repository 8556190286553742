"""Rank of this process among a job's hosts and devices, and the network to the others. No torch.

SageMaker starts the same command on every host and gives it the list of host names. DNS resolves
them, but only after some seconds. The network interface is the one that owns this host's address:
resourceconfig.json names a wrong one in the SDK's local mode (`ethwe`, where there is `eth0`).
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
"""Port on which the first host listens; the one of AWS's training toolkit."""

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2

LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
"""Environment variable of torch's launchers, and of `training.job.launch`."""

T = TypeVar("T")


def local_world_size() -> int:
    """Return the number of this host's processes that train, as launchers tell it; else 1."""
    told = os.environ.get(LOCAL_WORLD_SIZE, "")
    return max(1, int(told)) if told.isdecimal() else 1


@dataclass(frozen=True)
class Timeouts:
    """Limits on waiting for other hosts, in seconds.

    join: for all of them to start. silence: after which a rank without a heartbeat is lost; the
    others end a few seconds later. collective: for a rank that is alive, such as the first one
    while it writes the report.
    """

    join: float = 600.0
    silence: float = 30.0
    collective: float = 3600.0


@dataclass(frozen=True)
class Place:
    """Position of one process among a job's: there is one process per device of each host.

    hosts: sorted as text, as in `Job`. num_devices: of every host. device: of this process, from 0.
    """

    hosts: tuple[str, ...]
    host: str
    num_devices: int = 1
    device: int = 0

    @property
    def size(self) -> int:
        """Number of processes of the job."""
        return len(self.hosts) * self.num_devices

    @property
    def rank(self) -> int:
        """Number of this process; rank 0 writes the artefact, checkpoints, metrics and report."""
        return self.hosts.index(self.host) * self.num_devices + self.device

    def name(self, rank: int) -> str:
        """Return a rank's name for messages: `host algo-2`, or `host algo-2, device 1`."""
        host, device = divmod(rank, self.num_devices)
        which = f", device {device}" if self.num_devices > 1 else ""
        return f"host {self.hosts[host]}{which}"


def wait_for(ready: Callable[[], T | None], *, seconds: float, stop: Stop, late: str) -> T:
    """Call `ready` a few times a second and return its first result that is not None.

    Raises HostError with the text `late` after `seconds`, or Stopped.
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
    """Return the IPv4 address of a host. Raises HostError naming it, or Stopped."""

    def look_up() -> str | None:
        try:
            return socket.gethostbyname(host)
        except (OSError, UnicodeError):
            return None

    late = f"the name of host {host} did not resolve to an address"
    return wait_for(look_up, seconds=seconds, stop=stop, late=late)


def interface_of(address: str, named: str | None) -> str | None:
    """Return the network interface that owns an IPv4 address, or else the named one if it exists.

    Returns None with a warning when there is neither: gloo and NCCL then choose one.
    """
    interfaces = psutil.net_if_addrs()
    is_loopback = ipaddress.ip_address(address).is_loopback
    for name, entries in interfaces.items():
        for entry in entries:
            if entry.family != socket.AF_INET:
                continue
            # The loopback interface owns all of 127.0.0.0/8 but lists only 127.0.0.1.
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
    """Set the interface for gloo and NCCL, unless the environment sets one already."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this one, not a prefix


def listen(address: str, port: int) -> socket.socket:
    """Open the socket on which the first host waits for the others. Raises HostError."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        raise HostError(
            f"the first host cannot listen on {address}:{port} ({error.strerror}); "
            "another job may use the port, --rendezvous-port chooses another"
        ) from error


def reach(name: str, address: str, port: int, *, seconds: float, stop: Stop) -> None:
    """Wait until a TCP server listens there. Raises HostError naming the host, or Stopped."""

    def connect() -> bool | None:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError:
            return None
        return True

    late = f"host {name} could not be reached on {address}:{port}"
    wait_for(connect, seconds=seconds, stop=stop, late=late)
