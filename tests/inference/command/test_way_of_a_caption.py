"""The modules of ours that one caption passes in `serve`, from its connection to its reply."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.inference.raw_http import Reply, connect, header
from tests.inference.served import Served, command

pytestmark = pytest.mark.slow

MOST = 26
LOG = {"inference.__main__"}  # formats the lines of the log
PAGE = REPOSITORY / "inference" / "INTERNALS.md"
COMPILED = {"dalle.decoding.cpu.step", "dalle.decoding.windows"}
BY_TORCH = {"dalle.decoding.cpu.torch_step", "dalle.decoding.torch_decoder"}


@pytest.fixture(scope="module")
def passed(tiny_artefact: Path, tmp_path_factory) -> set[str]:
    """The modules whose functions a warmed-up worker process calls for one caption."""
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    with command(root, module="tests.inference.profiled_serve", CALLS_DIR=str(root)) as served:
        served.ready().ask().raise_for_status()
        began = time.monotonic()
        send_in_two(served)
        served.process.terminate()
        served.end()
    processes = [json.loads(path.read_text("utf-8")) for path in root.glob("*.json")]
    (calls,) = [each for each in processes if "inference.server.app" in each]
    return {module for module, last in calls.items() if last >= began} - LOG


def send_in_two(served: Served) -> None:
    """Send a caption whose header arrives first, and its body when the server asks for it."""
    body = b'{"caption": "a red square", "num_candidates": 2, "seed": 7}'
    expects = header(len(body)).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    with connect(served) as client:
        client.sendall(expects)
        assert client.recv(1_024).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert Reply(client).status == 200


def test_a_caption_passes_few_modules(passed):
    assert len(passed) <= MOST, "\n".join(sorted(passed))


def test_internals_lists_the_modules_that_a_caption_passes(passed):
    listed = re.findall(
        r"^((?:dalle|inference)\.[\w.]+) {2,}\S", PAGE.read_text("utf-8"), re.MULTILINE
    )
    assert len(listed) == len(set(listed))
    unused = BY_TORCH if passed >= COMPILED else COMPILED
    assert sorted(passed) == sorted(set(listed) - unused)
