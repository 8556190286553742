"""A real `serve` with tiny models, and OpenAI's own Python client for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dalle.preprocess.images import ImageFormat, Pixels, encode_image
from inference.api import rendering
from tests.inference import slow_serve
from tests.inference.served import PATIENCE, Served, running


@pytest.fixture(scope="package")
def root(tiny_artefact: Path, tmp_path_factory) -> Path:
    """A folder with an artefact whose pictures have 16 pixels a side, in a grid of four rows."""
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    return root


@pytest.fixture(scope="package")
def served(root: Path) -> Iterator[Served]:
    with running(root) as served:
        yield served.ready()


@pytest.fixture
def slow_served(root: Path) -> Iterator[Served]:
    """A server on which 512 candidates take so long that each machine can cancel them."""
    with running(root, work=slow_serve.serve) as served:
        yield served.ready()


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The format of every picture that was encoded so far."""
    found: list[str] = []

    def note(pixels: Pixels, format: ImageFormat, *, xmp: str = "") -> bytes:
        found.append(format)
        return encode_image(pixels, format, xmp=xmp)

    monkeypatch.setattr(rendering, "encode_image", note)
    return found


@pytest.fixture(scope="package")
def api(served: Served) -> Iterator[Any]:
    with client_of(served) as client:
        yield client


def client_of(served: Served) -> Any:
    """OpenAI's client as its users make it, which repeats nothing."""
    import openai  # takes seconds, and few tests need it

    return openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE
    )
