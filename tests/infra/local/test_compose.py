"""What `docker compose` leaves behind: found, judged and removed, by root and by others."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from infra.docker import docker
from infra.local import compose
from tests import REPOSITORY

pytestmark = pytest.mark.docker

SOMEBODY = 12345
SOCKET = Path("/var/run/docker.sock")


@pytest.fixture
def directory():
    """Of somebody who is not root, with a copy of the code that they may read."""
    path = Path(tempfile.mkdtemp())
    shutil.copytree(REPOSITORY / "infra" / "local", path / "infra" / "local")
    for each in [path, *path.rglob("*")]:
        os.chown(each, SOMEBODY, SOMEBODY)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(
    os.getuid() != 0 or not SOCKET.exists(), reason="needs root, to become somebody else"
)
def test_what_root_wrote_in_a_container_can_be_removed_by_its_owner_elsewhere(image, directory):
    volume = f"{directory}:/there"
    code = "import pathlib as p; d = p.Path('/there/left/deep'); d.mkdir(0o700, parents=True)"
    code += "; (d / 'file').touch(0o600)"
    docker("run", "--rm", "--volume", volume, "--entrypoint", "python3", image, "-c", code)
    assert (directory / "left" / "deep" / "file").stat().st_uid == 0
    remove = f"compose.remove_tree('left', {image!r})"
    subprocess.run(
        ["/usr/bin/env", "python3", "-c", f"from infra.local import compose; {remove}"],
        cwd=directory,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        user=SOMEBODY,
        group=SOMEBODY,
        extra_groups=[SOCKET.stat().st_gid],
        check=True,
    )
    assert not (directory / "left").exists()


@pytest.fixture
def start(image, tmp_path):
    """A function: service, shell command, directory -> a container as compose would label it."""
    started = []

    def start(service, command, directory=tmp_path):
        labels = (f"{compose.SERVICE}={service}", f"{compose.DIRECTORY}={directory}")
        options = [word for label in labels for word in ("--label", label)]
        shell = ("--network", "none", "--entrypoint", "sh", image, "-c", command)
        started.append(docker("run", "--detach", *options, *shell).strip())
        return started[-1]

    yield start
    for container in started:
        docker("rm", "--force", container, check=False)


def test_containers_are_found_by_where_their_compose_file_stood(start, tmp_path):
    docker("wait", start("algo-2", "exit 3", tmp_path / "job"))
    docker("wait", start("algo-1", "true", tmp_path / "job"))
    start("algo-3", "sleep 100", tmp_path / "job")
    start("algo-1", "sleep 100", tmp_path.parent)
    found = compose.containers(tmp_path)
    assert [c.service for c in found] == ["algo-1", "algo-2", "algo-3"]
    assert [c.ended_well for c in found] == [True, False, False]
    assert [c.lives for c in found] == [False, False, True]


def test_removing_takes_the_running_ones_too_and_nobody_elses(start, tmp_path):
    start("algo-1", "sleep 100", tmp_path / "job")
    other = start("algo-1", "sleep 100", tmp_path.parent)
    compose.remove(tmp_path, "network-that-is-not-there")
    assert compose.containers(tmp_path) == []
    assert docker("inspect", "--format", "{{.State.Running}}", other).strip() == "true"


def test_the_log_of_a_container_that_ended_before_it_answered_is_told(start, tmp_path):
    start("algo-1", "echo out of cheese; exit 4")
    with pytest.raises(RuntimeError, match=r"(?s)Exited \(4\).*out of cheese"):
        compose.wait_for_pings(tmp_path, port=9)
