"""The real `serve` process over HTTP: start, answer, drain, refuse, fail."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from inference.settings import VARIABLES, read_settings
from tests import REPOSITORY
from tests.inference.served import PATIENCE, Served, command, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tiny_artefact: Path, tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    return root


@pytest.fixture(scope="module")
def served(root) -> Iterator[Served]:
    # One candidate at a time, and many of them: a generation that lasts as long as a test needs.
    variables = {
        "DALLE_CHUNK_SIZE": "1",
        "DALLE_MAX_CANDIDATES": "512",
        "DALLE_MAX_REQUEST_MB": "1",
    }
    with command(root, **variables) as served:
        yield served.ready()


def test_a_caption_is_answered_with_ranked_images(served):
    response = served.ask(num_candidates=3, num_images=2)
    assert response.status_code == 200
    reply = response.json()
    assert [image["rank"] for image in reply["images"]] == [1, 2]
    assert (reply["seed"], reply["completed_candidates"], reply["ranked_by"]) == (7, 3, "clip")


def test_the_same_seed_gives_the_same_image_to_concurrent_requests(served):
    replies: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda n=n: replies.append(served.ask(num_candidates=n).json()))
        for n in (1, 4, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    images = {
        image["image"] for reply in replies for image in reply["images"] if image["candidate"] == 0
    }
    assert len(replies) == 3
    assert len(images) == 1


def test_accept_image_png_gets_a_png(served):
    response = served.ask(accept="image/png")
    assert response.headers["Content-Type"] == "image/png"
    assert response.content.startswith(b"\x89PNG")
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in response.content
    assert b'dalle:seed="7"' in response.content
    assert float(response.headers["X-Dalle-Clip-Score"]) <= 1


def test_ping_and_metrics_are_answered_while_candidates_are_streamed(served):
    # With previews of every row, so that no machine ends the stream before it is asked.
    fields = {"num_candidates": 512, "preview_rows": 1, "guidance_scale": 3.0}
    with served.ask(**fields, accept="application/jsonlines", stream=True) as response:
        assert response.headers["Transfer-Encoding"] == "chunked"
        lines = response.iter_lines(chunk_size=1)
        while (first := json.loads(next(lines)))["event"] == "preview":
            pass
        assert (first["event"], first["candidate"]) == ("candidate", 0)
        assert served.get("/ping").status_code == 200
        metrics = served.get("/metrics")
        assert metrics.headers["Content-Type"].startswith("text/plain")
        assert "dalle_queue_depth 1.0" in metrics.text, "the stream has not ended"


def test_closing_the_connection_cancels_the_request(served):
    body = b'{"caption": "red", "num_candidates": 512, "deadline_seconds": 600}'
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        while "dalle_queue_depth 1.0" not in served.get("/metrics").text:
            pass
    assert served.ask(deadline_seconds=600).status_code == 200
    served.wait_for("cancelled: the client closed the connection")


def test_closing_a_stream_of_previews_cancels_the_request(served):
    stream = served.ask(
        num_candidates=512,
        preview_rows=1,
        guidance_scale=3.0,
        deadline_seconds=600,
        accept="application/jsonlines",
        stream=True,
    )
    lines = stream.iter_lines(chunk_size=1)
    first = json.loads(next(lines))
    assert (first["event"], first["candidate"], first["rows"]) == ("preview", 0, 1)
    while json.loads(next(lines))["event"] == "preview":
        pass
    before = cancellations(served)
    stream.close()
    while cancellations(served) == before:
        pass
    while "dalle_queue_depth 0.0" not in served.get("/metrics").text:
        pass


def cancellations(served: Served) -> int:
    return sum("cancelled: the client closed" in line for line in served.lines)


def test_the_log_of_a_server_has_no_caption_and_no_picture(served):
    picture = served.ask(num_candidates=1, caption="zebra").json()["images"][0]["image"]
    for fields in ({}, {"num_candidates": 513}, {"zebra": 1}, {"caption": "zebra " * 99}):
        served.ask(**{"caption": "a zebra", "prime_image": picture, "prime_rows": 1, **fields})
    with served.ask(caption="zebra", accept="application/jsonlines", stream=True) as response:
        assert response.iter_lines()
    served.ask(caption="zebra", prime_image=picture[:-9], prime_rows=1)
    url = f"{served.url}/invocations?zebra"
    served.http.post(url, data="zebra {", headers={"X-Zebra": "zebra"}, timeout=PATIENCE)
    assert served.get("/zebra").status_code == 404
    log = "\n".join(served.lines)
    assert "refused: status=422" in log
    assert "zebra" not in log.lower()
    assert picture[:24] not in log


def test_a_deadline_is_kept_with_the_best_so_far(served):
    # With guidance, which takes twice as long, so that no machine finishes all of them in time.
    reply = served.ask(num_candidates=512, guidance_scale=3.0, deadline_seconds=0.5).json()
    assert 1 <= reply["completed_candidates"] < 512


def test_lines_are_answered_one_by_one_and_in_order(served):
    lines = [b'{"caption": "red", "num_candidates": 1, "seed": %d}' % seed for seed in range(4)]
    lines[2] = b"\xff"
    response = requests.post(
        f"{served.url}/invocations",
        data=b"\n".join(lines),
        headers={"Content-Type": "application/jsonlines"},
        timeout=PATIENCE,
    )
    replies = [json.loads(line) for line in response.text.splitlines()]
    assert [reply.get("seed") for reply in replies] == [0, 1, None, 3]
    assert replies[2]["error"]["code"] == "malformed_body"


def test_refusals_come_as_json_over_real_http_too(served):
    assert served.ask(caption="red " * 9).json()["error"]["code"] == "caption_too_long"
    assert served.get("/nothing").json()["error"]["code"] == "not_found"


def test_the_first_line_of_the_log_names_the_versions(served):
    assert re.search(
        r"serve python=3\S+ dalle-sagemaker=\S+ torch=2\S+ .*gunicorn=", served.lines[0]
    )


def test_sigterm_ends_what_runs_refuses_what_is_new_and_exits_with_0(root):
    variables = {
        "DALLE_CHUNK_SIZE": "1",
        "DALLE_MAX_CANDIDATES": "512",
        "DALLE_DRAIN_SECONDS": "4",
        "DALLE_PARALLEL_POSITIONS": "1",
    }
    with command(root, **variables) as served:
        served.ready()
        # With previews of every row, so that no machine finishes all of them while it drains.
        stream = served.ask(
            num_candidates=512,
            preview_rows=1,
            guidance_scale=3.0,
            deadline_seconds=600,
            accept="application/jsonlines",
            stream=True,
        )
        lines = stream.iter_lines()
        while json.loads(next(lines))["event"] == "preview":
            pass
        served.process.send_signal(signal.SIGTERM)
        while (ping := served.get("/ping")).status_code == 200:
            pass
        assert (ping.status_code, ping.json()["status"]) == (503, "stopping")
        refused = served.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopping")
        assert "Retry-After" in refused.headers
        last = json.loads(list(lines)[-1])
        assert last["event"] == "ranking"
        assert 1 <= last["completed_candidates"] < 512
        # Sooner than gunicorn's graceful_timeout, though these clients keep their connections.
        assert served.process.wait(20) == 0
        assert not any("Traceback" in line for line in served.lines)


def test_the_port_is_open_before_the_model_is_loaded(root):
    with command(root) as served:
        assert served.listening().get("/ping").status_code == 503
        response = served.ask()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_loading")
        served.wait_for(r": ready$")
        assert served.get("/ping").status_code == 200


def test_the_platforms_port_is_honoured_and_parameters_are_integers(root):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"SAGEMAKER_BIND_TO_PORT": str(port), "SAGEMAKER_BATCH": "true"}
    with running(root, "--host", "127.0.0.1", **variables) as served:
        assert served.listening().url.endswith(f":{port}")
        parameters = served.get("/execution-parameters").json()
        assert {
            type(parameters[name]) for name in ("MaxConcurrentTransforms", "MaxPayloadInMB")
        } == {int}


def test_nothing_is_written_beside_the_model_or_at_home(root, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    for path in (root / "model").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(root.rglob("*"))
    with command(root, HOME=str(home)) as served:
        served.ready()
        assert served.ask().status_code == 200
        assert sorted(home.iterdir()) == []
        assert sorted(root.rglob("*")) == before


def test_a_damaged_artefact_ends_the_process_with_its_reason(tiny_artefact, tmp_path):
    shutil.copytree(tiny_artefact, tmp_path / "model")
    weights = tmp_path / "model" / "dvae" / "weights.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with running(tmp_path) as served:
        assert served.end() == 4
        served.wait_for(r"loading failed: .*weights.safetensors does not match its sha256")
        assert "weights.safetensors does not match its sha256" in served.lines[-1]
        assert not any("Traceback" in line for line in served.lines)


def test_an_empty_model_directory_ends_the_process_with_its_reason(tmp_path):
    (tmp_path / "model").mkdir()
    with running(tmp_path) as served:
        assert served.end() == 4
        assert re.search("serve cannot begin: .*/model must hold manifest.json", served.lines[-1])


def test_a_process_that_is_killed_while_it_loads_is_started_three_times(root, tmp_path):
    # Loading blocks for ever: the manifest is a FIFO that nobody writes to.
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "manifest.json")
    with running(tmp_path) as served:
        for number in range(1, 4):
            wait_for_worker(served, number)
            os.kill(workers(served.lines)[-1], signal.SIGKILL)
        assert served.end() == 4
        assert "ended 3 times in a row before it was ready" in served.lines[-1]


def workers(lines: list[str]) -> list[int]:
    """Ids of the processes that were started to hold the model."""
    found = (re.search(r"Booting worker with pid: (\d+)", line) for line in lines)
    return [int(match[1]) for match in found if match]


def wait_for_worker(served: Served, number: int) -> None:
    served.wait_until(lambda lines: len(workers(lines)) == number)


def wait_until_ready(served: Served, since: int) -> None:
    """Wait for a process that has said so behind that line of the log."""
    served.wait_until(lambda lines: any(line.endswith(": ready") for line in lines[since:]))


def test_a_process_that_is_killed_when_it_was_ready_is_started_again(root):
    with running(root) as served:
        served.ready()
        for _ in range(4):
            before = len(served.lines)
            os.kill(workers(served.lines)[-1], signal.SIGKILL)
            wait_until_ready(served, before)
            assert served.ask().status_code == 200


def test_no_directory_to_write_to_ends_the_process_with_its_reason(root):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # every file is as if on a full disk
    try:
        served = command(root)
        server = served.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert server.end() == 3
    assert "serve cannot begin: no directory for temporary files can be written" in server.lines[-1]
    assert "/dev/shm: " in server.lines[-1]
    served.__exit__(None, None, None)


def test_an_installation_that_is_broken_ends_the_process_with_its_reason(root, tmp_path):
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('half installed')")
    paths = (tmp_path, REPOSITORY / "container", REPOSITORY)
    with command(root, PYTHONPATH=os.pathsep.join(map(str, paths))) as served:
        assert served.end() == 3
        assert served.lines[-1].endswith("serve cannot begin: ImportError: half installed")


def test_a_port_that_is_taken_ends_the_process_with_its_reason(root):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with running(root, "--port", str(port)) as served:
            assert served.end() == 1
            assert str(port) in served.lines[-1]


def test_a_missing_model_directory_is_an_error_at_once(tmp_path):
    with running(tmp_path) as served:
        assert served.end() == 2
        served.wait_for("model is not a directory; --root must be")


def test_a_misspelt_variable_is_said_in_the_log(tmp_path):
    (tmp_path / "model").mkdir()
    with running(tmp_path, DALLE_PRECISON="int8") as served:
        served.wait_for("WARNING .*DALLE_PRECISON=int8 is unknown.*did you mean DALLE_PRECISION?")


def test_every_variable_that_is_wrong_is_named(root):
    wrong = {"DALLE_QUEUE_SIZE": "0", "DALLE_DEVICE": "tpu", "DALLE_DEADLINE_SECONDS": "soon"}
    with running(root, **wrong) as served:
        assert served.end() == 2
        line = served.wait_for("DALLE_QUEUE_SIZE must be a whole number from 1 to 512, got '0'")
    assert "DALLE_DEVICE must be auto, cpu" in line.string
    assert "DALLE_DEADLINE_SECONDS must be a number from 1 to 3600, got 'soon'" in line.string


def test_help_documents_every_variable():
    help_text = subprocess.run(
        [sys.executable, "-m", "inference", "--help"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY / 'container'}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    ).stdout
    for name, field in VARIABLES.items():
        assert name in help_text
        assert field.description in help_text


@pytest.mark.parametrize(
    ("variables", "has_break"),
    [
        ({}, True),
        ({"SAGEMAKER_BATCH_STRATEGY": "MULTI_RECORD"}, True),
        ({"SAGEMAKER_BATCH": "true", "SAGEMAKER_BATCH_STRATEGY": "SINGLE_RECORD"}, True),
        ({"SAGEMAKER_BATCH": "true", "SAGEMAKER_BATCH_STRATEGY": "MULTI_RECORD"}, False),
    ],
)
def test_a_batch_of_several_records_adds_the_last_line_break_itself(variables, has_break):
    assert read_settings(variables).last_line_break is has_break


def test_a_batch_job_has_its_own_deadline_and_payload():
    limits = read_settings({"SAGEMAKER_BATCH": "true", "SAGEMAKER_MAX_PAYLOAD_IN_MB": "40"}).limits
    assert (limits.deadline_seconds, limits.max_request_bytes) == (590, 40_000_000)
    assert read_settings({"SAGEMAKER_MAX_PAYLOAD_IN_MB": "40"}).limits.deadline_seconds == 55
    both = {"SAGEMAKER_BATCH": "true", "DALLE_DEADLINE_SECONDS": "30"}
    assert read_settings(both).limits.deadline_seconds == 30
