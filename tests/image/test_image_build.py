"""Content, labels and size of the image."""

import re
from pathlib import Path

import pytest

from infra.docker import docker, image_name
from tests import REPOSITORY

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("image")]

MAX_IMAGE_BYTES = 8_000_000_000
PYTHON = "/opt/venv/bin/python"


def inside(*command, entrypoint="/bin/sh", options=("--user", "12345:54321")):
    """Return the output of a command in a new container."""
    return docker(
        "run",
        "--rm",
        "--network",
        "none",
        *options,
        "--entrypoint",
        entrypoint,
        image_name(),
        *command,
    )


def test_the_image_is_small_enough_for_every_kind_of_endpoint():
    size = int(docker("image", "inspect", "--format", "{{.Size}}", image_name()))
    assert size <= MAX_IMAGE_BYTES, f"{size:,} bytes"


def test_the_labels_name_revision_lock_and_a_port_that_can_be_chosen(image_config):
    labels = image_config["Labels"]
    assert labels["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert re.fullmatch(r"[0-9a-f]{64}", labels["dalle.lock.sha256"])


def test_the_platform_finds_the_command_the_user_and_the_gpu_as_it_expects(image_config):
    assert image_config["Cmd"] == ["train"]
    assert image_config.get("User", "") == ""
    variables = dict(text.split("=", 1) for text in image_config["Env"])
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert [name for name in variables if name.startswith("NVIDIA_REQUIRE")] == []


def test_no_compiler_installer_or_index_address_of_the_build_stays_inside(image_config):
    programs = inside("-c", "for n in cc c++ gcc g++ ld nvcc uv; do command -v $n; done; true")
    assert programs == ""
    names = "-name pip.conf -o -name uv.toml -o -name uv-receipt.json -o -name ca.crt"
    left = inside(
        "-c", f"find / -xdev \\( {names} \\) 2>/dev/null; ls -d /build /layers /src /opt/uv; true"
    )
    assert [line for line in left.splitlines() if "cannot access" not in line] == []
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image_name())
    assert "index" not in history.lower()
    assert [text for text in image_config["Env"] if "INDEX" in text or "CERT" in text] == []


def test_kernels_for_a_gpu_are_compiled_without_a_compiler_of_c():
    script = REPOSITORY / "tests/dalle/decoding/compile_kernels.py"
    mounted = ("--volume", f"{script}:/tmp/compile_kernels.py:ro", "--user", "12345:54321")
    words = "90", "bfloat16", "relu2", "layer"
    compiled = inside("/tmp/compile_kernels.py", *words, entrypoint=PYTHON, options=mounted)
    assert "attend" in compiled.split()


def test_no_certificate_of_the_building_machine_stays_inside():
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    theirs = inside("-c", f"cat {bundle}")
    ours = bundle.read_text().split("-----END CERTIFICATE-----") if bundle.is_file() else []
    extra = [text.split("\n")[-3] for text in ours if text.strip() and text.strip() not in theirs]
    for line in extra:
        search = 'find /etc /opt /usr /var -xdev -type f -size -1024k -exec grep -lF -- "$0" {} +'
        assert inside("-c", f"{search}; true", line, options=()) == ""


def test_every_user_can_read_all_of_it():
    unreadable = "find /opt \\( -type f -not -readable -o -type d -not -executable \\) 2>&1"
    assert inside("-c", unreadable) == ""


def test_everything_is_compiled_before_it_is_run():
    ours = "training.job.components, inference.server.server, inference.engine.model_runner"
    log = inside("-v", "-c", f"import torch, torchvision, {ours}", entrypoint=PYTHON)
    assert "inference/engine/model_runner" in log
    assert sorted(set(re.findall(r"code object from '?(/opt/\S+\.py)'?$", log, re.MULTILINE))) == []


def test_no_library_of_torch_lacks_a_removed_file():
    site = inside("-c", "import torch; print(torch.__path__[0])", entrypoint=PYTHON).strip()
    listed = inside("-c", f"ldd {site}/lib/*.so")
    missing = {line.split()[0] for line in listed.splitlines() if "not found" in line}
    assert missing == {"libcuda.so.1"}, "the driver's own library comes from the host"


@pytest.mark.parametrize(
    "module",
    [
        "torch.distributed",
        "torchvision",
        "triton",
        "deepspeed",
        "tensorboard",
        "matplotlib.pyplot",
        "clip",
    ],
)
def test_the_libraries_that_training_needs_can_be_imported(module):
    inside("-c", f"import {module}", entrypoint=PYTHON)
