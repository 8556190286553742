"""Networks for tests of several hosts: each host in a network namespace of its own, on one bridge.

Where namespaces are not permitted, the hosts are addresses of the loopback interface: all but a cut
can be tried there too.
"""

import ctypes
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.permissions import not_permitted

CLONE_NEWNET = 0x40000000


class Refused(Exception):  # noqa: N818 - by the machine
    """There can be no network namespaces here."""


@dataclass(frozen=True)
class Network:
    """Hosts by their addresses. namespaces: of the same hosts, None where they have none.

    interface: what every host calls its own. switch: the namespace of the bridge.
    """

    hosts: tuple[str, ...]
    interface: str
    namespaces: tuple[str | None, ...]
    switch: str | None = None

    def first(self, num_hosts):
        """The same network, of which a job uses so many hosts only."""
        hosts, namespaces = self.hosts[:num_hosts], self.namespaces[:num_hosts]
        return replace(self, hosts=hosts, namespaces=namespaces)

    @contextmanager
    def cut(self, number):
        """Drop one host's packets in both directions, silently."""
        if self.switch is None:
            not_permitted("a host can be cut off where network namespaces are permitted alone")
        _ip("-n", self.switch, "link", "set", f"port{number}", "down")
        try:
            yield
        finally:
            _ip("-n", self.switch, "link", "set", f"port{number}", "up")


@contextmanager
def network(num_hosts):
    """A network of namespaces, or of loopback addresses where there can be none."""
    names = tuple(f"dalle-{os.getpid()}-{number}" for number in range(num_hosts))
    switch = f"dalle-{os.getpid()}-switch"
    try:
        try:
            yield _wired(names, switch)
        except Refused as error:
            if os.environ.get("DALLE_REQUIRE_ROOT") == "1":
                not_permitted(str(error))
            hosts = tuple(f"127.0.0.{number + 1}" for number in range(num_hosts))
            yield Network(hosts, "lo", (None,) * num_hosts)
    finally:
        if shutil.which("ip") is not None:
            for name in (*names, switch):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def enter(namespace):
    """Move this process, which must have one thread, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns comes with Python 3.12
    with (Path("/run/netns") / namespace).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)


def _wired(names, switch):
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise Refused("network namespaces need root and the command `ip` (iproute2)")
    for name in (switch, *names):
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
    _ip("-n", switch, "link", "set", "bridge0", "up")
    hosts = tuple(f"192.0.2.{number + 1}" for number in range(len(names)))
    for number, (name, address) in enumerate(zip(names, hosts, strict=True)):
        port = f"port{number}"
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
        _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
    return Network(hosts, "eth0", names, switch)


def _ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused(f"`ip {' '.join(words)}` is refused here: {done.stderr.strip()}")
