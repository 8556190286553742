"""Entry point of the image: the command that it runs, and its log lines about the GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

import entrypoint
from entrypoint import Cuda, why_no_cuda

FILE = Path(entrypoint.__file__)
FOUND = Cuda(library=True, driver="550.163.01", cuda=12_040, devices=("NVIDIA A10G",))


def start(*arguments, **variables):
    container = FILE.parent
    path = f"{container}:{container.parent}"
    return subprocess.run(
        [sys.executable, FILE, *arguments],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_driver_that_is_new_enough_is_no_problem():
    assert why_no_cuda(FOUND) == ""


@pytest.mark.parametrize(
    ("cuda", "says"),
    [
        (Cuda(), "no NVIDIA driver (a CPU instance), or docker was started without --gpus all"),
        (Cuda(driver="550.163.01"), "550.163.01 is not mounted into the container"),
        (
            Cuda(library=True, driver="470.256.02", cuda=11_040, error=803),
            "470.256.02 offers CUDA 11.4, and this image needs CUDA 12 (driver 525 or later): "
            "on an endpoint choose hosts with a newer driver by InferenceAmiVersion=",
        ),
        (
            Cuda(library=True, driver="550.163.01", cuda=12_040, error=100),
            "shows no GPU to this container (NVIDIA_VISIBLE_DEVICES is void)",
        ),
        (
            Cuda(library=True, cuda=12_040, error=802, error_name="CUDA_ERROR_SYSTEM_NOT_READY"),
            "driver of unknown version does not start CUDA: CUDA_ERROR_SYSTEM_NOT_READY (802)",
        ),
    ],
)
def test_the_cause_of_a_cuda_failure_and_its_remedy_are_named(cuda, says, monkeypatch):
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "void")
    assert says in why_no_cuda(cuda)


def test_the_probe_in_another_process_gives_the_same_result():
    assert entrypoint.probe() == entrypoint.ask_driver()


def test_another_command_is_refused_naming_the_two():
    done = start("bash")
    assert done.returncode == 2
    assert "must be one of train, serve, got 'bash'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "serve"])
def test_versions_and_host_are_logged_before_the_commands_help(command):
    done = start(command, "--help", DALLE_GIT_REVISION="abc")
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"container: {command} python=3.")
    assert " torch=2." in lines[0]
    assert lines[0].endswith("revision=abc")
    assert lines[1].startswith("container: host kernel=")
    assert lines[2].startswith("container: GPU: ")
    assert f"usage: {command} " in done.stdout
    assert done.returncode == 0


@pytest.mark.skipif(not why_no_cuda(entrypoint.probe()), reason="a GPU works here")
def test_a_gpu_that_is_demanded_and_not_there_fails_the_job_with_the_cause(tmp_path):
    done = start("train", "--root", str(tmp_path), DALLE_DEVICE="cuda")
    assert done.returncode == 1
    failure = (tmp_path / "output" / "failure").read_text()
    assert failure.startswith("DALLE_DEVICE=cuda, but the host")
    assert failure in done.stderr


def test_importing_torch_is_left_to_the_command():
    code = "import sys, entrypoint as e; e.versions(); e.host(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FILE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
