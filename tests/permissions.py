"""What needs root, and being a user who may not read everything where the tests run as root."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

NOBODY = 65534


@contextmanager
def common_user() -> Iterator[None]:
    """Act as somebody without privileges; as who one is when that is the case already."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def directory_for_all() -> Iterator[Path]:
    """A temporary directory that every user may enter; pytest's own are for one."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def not_permitted(reason: str) -> NoReturn:
    """Skip what this machine does not permit; fail it there when DALLE_REQUIRE_ROOT=1, as in
    `.ci/run`, which is root and has everything."""
    if os.environ.get("DALLE_REQUIRE_ROOT") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def small_disk(directory: Path, num_bytes: int) -> Iterator[None]:
    """A file system of its own, of that size, in a directory."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        not_permitted("a small disk needs root and the command `mount`")
    directory.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        not_permitted(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)
