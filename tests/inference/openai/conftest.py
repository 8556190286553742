"""A real `serve` with tiny models, and OpenAI's own Python client for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.inference.served import PATIENCE, Served, running

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="package")
def served(tiny_artefact: Path, tmp_path_factory) -> Iterator[Served]:
    """A running `serve`; its pictures have 16 pixels a side, in a grid of four rows."""
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    with running(root) as served:
        yield served.ready()


@pytest.fixture(scope="package")
def api(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's client as its users make it, which repeats nothing."""
    import openai  # takes seconds, and few tests need it

    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client
