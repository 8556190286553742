"""Fixtures of the tests of the image: the image, training pairs, one finished job and its model.

Nothing runs unless a test asks for it.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infra.docker import docker, image_name, why_no_docker
from infra.local.opt_ml import OptMl, pack_model, start_training
from infra.local.serving import unpack_model
from training import rainbow

TINY = {
    "size": '"tiny"',
    "tokenizer_kind": "word",
    "text_length": "8",
    "batch_size": "8",
    "image_size": "32",
}
HARDENED = (
    "--user",
    "12345:54321",
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--network",
    "none",
)


@pytest.fixture(scope="session")
def image() -> str:
    """The image's name. Skips where it cannot be run, and fails there instead when
    DALLE_REQUIRE_DOCKER=1, which `make test-image` sets."""
    reason = why_no_docker()
    if reason and os.environ.get("DALLE_REQUIRE_DOCKER") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    return image_name()


@pytest.fixture(scope="session")
def image_config(image) -> dict[str, Any]:
    """Config of the image: Cmd, Env, Labels, ..."""
    config: dict[str, Any] = json.loads(
        docker("image", "inspect", "--format", "{{json .Config}}", image)
    )
    return config


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Sixty-four pairs of the rainbow, and stray files that occur in channels."""
    directory: Path = tmp_path_factory.mktemp("pairs")
    directory.chmod(0o755)  # as the platform leaves it: every user may read
    for number, sample in enumerate(rainbow.samples()[::144]):
        Image.fromarray(sample.picture()).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(sample.caption)
    (directory / "_SUCCESS").write_bytes(b"")
    (directory / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (directory / "notes.md").write_text("not a pair")
    return directory


@pytest.fixture(scope="session")
def job(image, pairs, tmp_path_factory):
    """A finished job as on the platform: its tree, exit status, log, and written files."""
    tree = OptMl(tmp_path_factory.mktemp("ml"), "platform")
    for name in ("train", "validation"):
        tree.add_channel(name)
    steps = {
        "max_steps": "20",
        "num_validations": "1",
        "qk_norm": "True",
        "attention_kinds": '["full", "axial_row"]',
    }
    tree.set_hyperparameters(**TINY, **steps)
    channels = {"train": pairs, "validation": pairs}
    limits = ("--memory", "2g", "--network", "none")
    with start_training(tree, *limits, channels=channels) as container:
        status = container.wait()
        return tree, status, container.log, container.written()


@pytest.fixture(scope="session")
def archive(job) -> Path:
    tree, *_ = job
    return pack_model(tree.root / "model", tree.root / "model.tar.gz")


@pytest.fixture(scope="session")
def model(archive, tmp_path_factory) -> Path:
    return unpack_model(archive, tmp_path_factory.mktemp("endpoint") / "model")
