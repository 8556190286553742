"""The image's `serve` by `docker run`, on what its `train` made, packed and unpacked as SageMaker
does."""

import json
import tarfile
import threading

import pytest

from infra.local.serving import STOP_SERVING_SECONDS, Serving
from tests.image.docker_fixtures import HARDENED

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("image")]


@pytest.fixture(scope="module")
def serving(model):
    """Many candidates, one at a time, so that a generation lasts longer than a test."""
    variables = {
        "DALLE_CHUNK_SIZE": "1",
        "DALLE_MAX_CANDIDATES": "512",
        "DALLE_MAX_REQUEST_MB": "1",
    }
    options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    with Serving(model, "--memory", "2g", "--cpus", "1", *options) as serving:
        serving.wait_until_ready()
        yield serving
        assert not serving.state()["OOMKilled"]


def test_the_packed_model_has_only_files_and_directories(archive):
    with tarfile.open(archive) as tar:
        assert {m.name for m in tar.getmembers() if not (m.isfile() or m.isdir())} == set()
        assert "manifest.json" in tar.getnames()


def test_every_user_may_read_the_packed_model(archive):
    with tarfile.open(archive) as tar:
        modes = {member.name: member.mode for member in tar.getmembers()}
    assert {n: oct(mode) for n, mode in modes.items() if mode & 0o444 != 0o444} == {}


def test_pings_are_answered_503_while_the_model_loads_and_then_200(model):
    with Serving(model) as serving:
        assert serving.wait_until_ready() == [503, 200]


def test_a_caption_is_answered_with_ranked_images(serving):
    reply = serving.ask(
        "/invocations", {"caption": "red circle", "num_candidates": 3, "num_images": 2, "seed": 7}
    )
    assert reply.status == 200
    assert [image["rank"] for image in reply.json()["images"]] == [1, 2]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (
            b'{"caption": "red circle", "num_candidates": 1}',
            {"Content-Type": "application/json", "Accept": "*/*"},
            200,
        ),
        (b"red circle", {"Content-Type": "text/plain", "Accept": "image/png"}, 200),
        (b'{"caption": ', {"Content-Type": "application/json"}, 400),
        (b"red circle", {"Content-Type": "text/plain", "Accept": "audio/wav"}, 406),
        (b" " * 1_200_000, {"Content-Type": "application/json"}, 413),
        (b"\x93NUMPY", {"Content-Type": "application/x-npy"}, 415),
    ],
)
def test_every_kind_of_request_has_its_status(serving, body, headers, status):
    assert serving.ask("/invocations", body, headers).status == status


def test_lines_are_answered_one_by_one_and_in_order(serving):
    lines = [
        b'{"caption": "red circle", "num_candidates": 1, "seed": %d}' % seed for seed in range(3)
    ]
    lines[1] = b"{"
    reply = serving.ask(
        "/invocations", b"\n".join(lines), {"Content-Type": "application/jsonlines"}
    )
    assert [json.loads(line).get("seed") for line in reply.body.splitlines()] == [0, None, 2]


def test_pings_and_metrics_are_answered_while_candidates_are_streamed(serving):
    connection = serving.connect()
    # With previews of every row, so that no machine ends the stream before it is asked.
    body = json.dumps(
        {"caption": "red circle", "num_candidates": 512, "seed": 7}
        | {"preview_rows": 1, "guidance_scale": 2.0}
    )
    headers = {"Content-Type": "application/json", "Accept": "application/jsonlines"}
    connection.request("POST", "/invocations", body, headers)
    response = connection.getresponse()
    while json.loads(response.readline())["event"] != "candidate":
        pass
    assert serving.ask("/ping").status == 200
    metrics = serving.ask("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert b"dalle_queue_depth 1.0" in metrics.body, "the stream has not ended"
    connection.close()


def test_custom_attributes_come_back(serving):
    attributes = {
        "X-Amzn-SageMaker-Custom-Attributes": "trace=1",
        "X-Amzn-SageMaker-Session-Id": "NEW_SESSION",
    }
    reply = serving.ask("/invocations", {"caption": "red circle", "num_candidates": 1}, attributes)
    assert (reply.status, reply.headers["x-amzn-sagemaker-custom-attributes"]) == (200, "trace=1")


def test_port_and_batch_mode_follow_the_environment(model):
    options = ("--env", "SAGEMAKER_BIND_TO_PORT=9191", "--env", "SAGEMAKER_BATCH=true")
    with Serving(model, *options, inside=9191) as serving:
        serving.wait_until_ready()
        parameters = serving.ask("/execution-parameters").json()
        assert {type(parameters[n]) for n in ("MaxConcurrentTransforms", "MaxPayloadInMB")} == {int}


def test_sigterm_finishes_the_running_request_and_refuses_new_ones(model):
    options = (
        "--env",
        "DALLE_CHUNK_SIZE=1",
        "--env",
        "DALLE_MAX_CANDIDATES=512",
        "--env",
        "DALLE_DRAIN_SECONDS=4",
        "--env",
        "DALLE_PARALLEL_POSITIONS=1",
    )
    with Serving(model, *options) as serving:
        serving.wait_until_ready()
        connection = serving.connect()
        # With previews of every row, so that no machine finishes all of them while it drains.
        body = json.dumps(
            {"caption": "red circle", "num_candidates": 512, "deadline_seconds": 600, "seed": 7}
            | {"preview_rows": 1, "guidance_scale": 2.0}
        )
        headers = {"Content-Type": "application/json", "Accept": "application/jsonlines"}
        connection.request("POST", "/invocations", body, headers)
        response = connection.getresponse()
        while json.loads(response.readline())["event"] != "candidate":
            pass
        statuses: list[int] = []
        stopping = threading.Thread(
            target=lambda: statuses.append(serving.stop(STOP_SERVING_SECONDS))
        )
        stopping.start()
        while serving.ask("/ping").status == 200:
            pass
        assert serving.ask("/invocations", {"caption": "red circle"}).status == 503
        last = json.loads(response.read().splitlines()[-1])
        assert last["event"] == "ranking"
        assert 1 <= last["completed_candidates"] < 512
        stopping.join()
        connection.close()
        assert statuses == [0]


def test_a_random_user_serves_a_read_only_model_without_home_or_network(model):
    with Serving(model, *HARDENED, "--memory", "2g", "--env", "HOME=/nowhere") as serving:
        serving.wait_for(": ready$")
        code = (
            "import urllib.request as u\n"
            'b = b\'{"caption": "red circle", "num_candidates": 2}\'\n'
            "h = {'Content-Type': 'application/json'}\n"
            "print(u.urlopen(u.Request('http://127.0.0.1:8080/invocations', b, h)).status)"
        )
        assert serving.python(code).strip() == "200"
        assert serving.stop(STOP_SERVING_SECONDS) == 0
        assert not serving.state()["OOMKilled"]
