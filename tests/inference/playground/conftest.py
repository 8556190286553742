"""A browser, a real `serve` with tiny models, and pages that must make no error.

The tests need Debian's package `chromium`, or another build of it in the path. Without one they are
skipped, unless DALLE_REQUIRE_BROWSER=1.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dalle import artefact as artefacts
from dalle.manifest import Manifest
from tests.inference import slow_serve
from tests.inference.served import Served, running

CAPTIONS = ["big filled red star", "small halftone cyan circle", "bigger shaded blue square"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 180_000.0  # milliseconds until a test that waits for the page gives up


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; skips the test where there is none."""
    reason = ""
    if importlib.util.find_spec("playwright") is None:
        reason = "needs the Python package playwright"
    elif (executable := shutil.which("chromium")) is None:
        reason = "needs Debian's package chromium"
    if reason and os.environ.get("DALLE_REQUIRE_BROWSER") == "1":
        pytest.fail(f"DALLE_REQUIRE_BROWSER=1, but this test {reason}")
    if reason:
        pytest.skip(reason)
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="package")
def root(browser, tiny_models, tmp_path_factory) -> Path:
    """A folder with an artefact for `serve`."""
    root: Path = tmp_path_factory.mktemp("ml")
    manifest = Manifest(captions=CAPTIONS, licence="MIT")
    artefacts.save(root / "model", replace(tiny_models, manifest=manifest))
    return root


@pytest.fixture(scope="package")
def served(root) -> Iterator[Served]:
    with running(root, DALLE_PLAYGROUND="1") as served:
        yield served.ready()


@pytest.fixture
def slow_served(root) -> Iterator[Served]:
    """A server on which 512 candidates take so long that each machine can cancel them."""
    with running(root, work=slow_serve.serve, DALLE_PLAYGROUND="1") as served:
        yield served.ready()


@pytest.fixture
def new_page(browser, served) -> Iterator[Callable[..., Any]]:
    """A function: options of a browser context -> a page with the playground, ready.

    Whatever the pages do, they ask no other host and leave no error in the console. server: other
    than `served`. errors: what the console may say.
    """
    contexts: list[Any] = []
    others: set[str] = set()
    complaints: list[str] = []

    def make(
        fragment: str = "", *, server: Served = served, errors: str = "no error", **options: Any
    ) -> Any:
        ours = {urlsplit(server.url).netloc, ""}
        context = browser.new_context(accept_downloads=True, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        context.on("request", lambda sent: others.update({urlsplit(sent.url).netloc} - ours))

        def read(message: Any) -> None:
            if message.type in ("error", "warning") and errors not in message.text:
                complaints.append(message.text)

        page = context.new_page()
        page.on("console", read)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{server.url}/{fragment}")
        if not fragment:
            page.wait_for_selector("#generate:enabled")
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []
    assert others == set(), "a request left for another host"
