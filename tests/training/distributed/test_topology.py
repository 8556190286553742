"""training.distributed.topology: the rank of a process and the network to other hosts."""

import os
import socket
import threading

import psutil  # type: ignore[import-untyped]
import pytest

from dalle.errors import HostError
from dalle.platform.environment import read_job
from training.distributed import topology
from training.distributed.topology import Place
from training.stopping import Stopped

NEVER = threading.Event()


@pytest.mark.parametrize(("host", "rank"), [("algo-1", 0), ("algo-10", 1), ("algo-2", 2)])
def test_hosts_are_ranked_as_text_and_not_by_their_groups(opt_ml, host, rank):
    names = ["algo-2", "algo-10", "algo-1"]
    groups = [{"instance_group_name": "a", "instance_type": "ml.g5.xlarge", "hosts": names}]
    opt_ml.write(
        "resourceconfig", {"current_host": host, "hosts": names, "instance_groups": groups}
    )
    job = read_job(opt_ml.root, {})
    place = Place(job.hosts, job.current_host)
    assert (place.rank, place.size) == (rank, 3)
    assert place.name(rank) == f"host {host}"


def test_every_device_of_every_host_is_one_rank():
    names = ("algo-1", "algo-2")
    places = [Place(names, host, 4, device) for host in names for device in range(4)]
    assert [place.rank for place in places] == list(range(8))
    assert {place.size for place in places} == {8}
    assert places[0].name(6) == "host algo-2, device 2"


@pytest.mark.parametrize("named", ["ethwe", "lo", None])
def test_the_interface_is_the_one_that_owns_the_address_whatever_the_job_says(named):
    owned = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    assert owned
    for address, name in owned.items():
        assert topology.interface_of(address, named) == name


def test_every_loopback_address_is_the_loopback_interfaces():
    # Debian gives a machine's own name 127.0.1.1, which no interface lists.
    assert topology.interface_of("127.0.1.1", None) == topology.interface_of("127.0.0.1", None)


def test_the_interface_that_the_job_names_is_taken_only_if_it_exists(caplog):
    unowned = "203.0.113.77"
    loopback = topology.interface_of("127.0.0.1", None)
    assert topology.interface_of(unowned, loopback) == loopback
    assert topology.interface_of(unowned, "ethwe") is None
    assert "ethwe does not exist" in caplog.text


def test_the_interface_is_set_exactly_and_not_over_the_environments(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set below is undone
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    topology.use_interface("eth0")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth7"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    topology.use_interface("eth0")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth0"


def test_a_name_is_an_address_and_a_missing_one_is_named():
    assert topology.resolve("localhost", seconds=5, stop=NEVER).startswith("127.")
    with pytest.raises(HostError, match=r"host algo-2\.invalid did not resolve .+ within 0\.1 s"):
        topology.resolve("algo-2.invalid", seconds=0.1, stop=NEVER)


def test_waiting_ends_after_a_stop():
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        topology.resolve("algo-2.invalid", seconds=60, stop=stop)


def test_a_host_without_a_listener_is_named_with_its_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        topology.reach("algo-1", "127.0.0.1", port, seconds=5, stop=NEVER)
    with pytest.raises(HostError, match=rf"host algo-1 .+ on 127\.0\.0\.1:{port} within 0\.1 s"):
        topology.reach("algo-1", "127.0.0.1", port, seconds=0.1, stop=NEVER)


def test_a_port_in_use_says_how_to_choose_another():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(HostError, match="--rendezvous-port chooses another"):
            topology.listen("127.0.0.1", port)
