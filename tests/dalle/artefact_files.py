"""Files of an artefact, changed by tests, and a disk that is too small."""

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle.types import STAGES

FILES = [
    *[f"{name}/{file}" for name in STAGES for file in ("config.json", "weights.safetensors")],
    "tokenizer/tokenizer.json",
]
"""Files of an artefact with every component."""


def read(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return content


def rewrite(directory: Path, **fields: object) -> None:
    (directory / "manifest.json").write_text(json.dumps(read(directory) | fields))


def replace_file(directory: Path, name: str, content: bytes) -> None:
    """Replace a file and its hash in the manifest."""
    (directory / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(directory, files=read(directory)["files"] | {name: digest})


def files_under(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


@contextmanager
def small_disk() -> Iterator[None]:
    """Limit every file to 1000 bytes, in place of a small disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
