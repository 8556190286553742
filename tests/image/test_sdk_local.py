"""The SageMaker Python SDK's local mode trains, hosts and batch-transforms the image.

What it leaves behind is removed afterwards, and nothing outside this machine is called."""

import json
import socketserver
import tarfile
import tempfile
import threading

import boto3
import pytest

from dalle.errors import JobError, PlatformError
from infra.docker import docker
from tests.image import sdk_local as sdk
from tests.image.docker_fixtures import TINY

STEPS = TINY | {"max_steps": "4", "num_validations": "1"}

pytestmark = [
    pytest.mark.docker,
    pytest.mark.usefixtures("image", "outside"),
    # The SDK warns of its own import, and leaves pipes and temporary directories open.
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <(_io|finalize):pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module")
def asked():
    """A proxy for everything beyond loopback that never answers: its first request lines."""
    lines = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            lines.append(self.rfile.readline())

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield lines, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def outside(asked):
    """Send whatever leaves this machine to the proxy, and fail if anything did; then check that
    no container and no network is left."""
    lines, address = asked
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
            patch.setenv(name, address)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        yield
    assert lines == []
    if not docker("ps", "--quiet", "--filter", f"network={sdk.NETWORK}"):  # somebody else's
        assert docker("network", "ls", "--quiet", "--filter", f"name={sdk.NETWORK}") == ""


@pytest.fixture(scope="module")
def trained(image, outside, pairs, tmp_path_factory):
    """The directory of a finished job of the SDK's, from directories of this machine."""
    out = tmp_path_factory.mktemp("sdk")
    archive = sdk.train({"train": pairs, "validation": pairs}, out, hyperparameters=STEPS)
    assert archive == out / "model.tar.gz"
    return out


@pytest.fixture(scope="module")
def endpoint(trained):
    with sdk.hosted(trained / "model.tar.gz", memory="2g", cpus=1.0) as endpoint:
        yield endpoint


def names_in(archive):
    with tarfile.open(archive) as tar:
        return tar.getnames()


def stages_of(archive):
    """What the manifest of a model says of each stage that trained it."""
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile("manifest.json"))["stages"]


def test_local_directories_become_a_model_and_a_report(trained):
    assert {"manifest.json", "dvae/weights.safetensors"} <= set(names_in(trained / "model.tar.gz"))
    assert "data/report.html" in names_in(trained / "output.tar.gz")


def test_a_finished_job_leaves_two_archives_and_no_container(trained):
    assert sorted(p.name for p in trained.iterdir()) == ["model.tar.gz", "output.tar.gz"]
    assert sdk.containers(trained) == []


def test_channels_in_s3_are_trained_on_as_local_ones_are(
    trained, pairs, tmp_path, moto_address, monkeypatch
):
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://{moto_address}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="sdk-local")
    for path in pairs.iterdir():
        s3.upload_file(str(path), "sdk-local", f"pairs/{path.name}")
    s3.close()
    channels = {"train": "s3://sdk-local/pairs/", "validation": pairs}
    archive = sdk.train(channels, tmp_path, hyperparameters=STEPS)
    here, there = (stages_of(path)[0] for path in (trained / "model.tar.gz", archive))
    assert there["dataset_fingerprint"] == here["dataset_fingerprint"]
    assert there["dataset_counts"] == here["dataset_counts"] == {"train": 64, "validation": 64}


def test_a_job_that_fails_says_why_and_leaves_nothing(pairs, tmp_path):
    with pytest.raises(JobError, match="learning_rat is unknown; did you mean learning_rate"):
        sdk.train({"train": pairs}, tmp_path, hyperparameters={"learning_rat": "0.1"})
    assert list(tmp_path.iterdir()) == []
    assert sdk.containers(tmp_path) == []


def test_the_command_train_of_a_source_code_trains_as_the_image_does(trained, pairs, tmp_path):
    channels = {"train": pairs, "validation": pairs}
    archive = sdk.train(channels, tmp_path, hyperparameters=STEPS, source_code={"command": "train"})
    alone, there = stages_of(trained / "model.tar.gz"), stages_of(archive)
    assert [stage["metrics"] for stage in there] == [stage["metrics"] for stage in alone]


def test_requirements_of_a_source_code_are_refused_in_words(pairs, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    (source / "requirements.txt").write_text("numpy\n")
    code = {"command": "train", "source_dir": str(source), "requirements": "requirements.txt"}
    with pytest.raises(JobError, match=r"this image installs no packages \(`pip install -r req"):
        sdk.train({"train": pairs}, out, hyperparameters=STEPS, source_code=code)


def test_a_hosted_model_answers_and_refuses_as_on_an_endpoint(endpoint):
    picture = endpoint.invoke(b"red circle", "text/plain", "image/png")
    assert (picture.status, picture.headers["content-type"]) == (200, "image/png")
    assert picture.body.startswith(b"\x89PNG")
    assert endpoint.invoke(b"{", "application/json").status == 400


def test_a_hosted_model_is_limited_and_reached_from_this_machine_only(endpoint):
    (container,) = docker("ps", "--quiet", "--filter", f"publish={endpoint.port}").split()
    host = json.loads(docker("inspect", "--format", "{{json .HostConfig}}", container))
    assert (host["Memory"], host["NanoCpus"]) == (2 * 2**30, 10**9)
    assert host["PortBindings"] == {
        "8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(endpoint.port)}]
    }


# The SDK's thread that reads the log of a container raises when it ends by itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_cannot_be_served_is_told_with_the_containers_log(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with (
        pytest.raises(PlatformError, match=r"(?s)Exited \(4\).*loading failed"),
        sdk.hosted(tmp_path),
    ):
        pass
    assert sdk.containers(tmp_path) == []


def test_a_batch_transform_answers_every_line_in_order_and_errors_in_their_line(trained, tmp_path):
    requests, results = tmp_path / "requests", tmp_path / "results"
    requests.mkdir()
    lines = [f'{{"caption": "red circle", "num_candidates": 1, "seed": {n}}}\n' for n in range(3)]
    lines[1] = "{\n"
    (requests / "a.jsonl").write_text("".join(lines))
    (requests / "b.jsonl").write_text(lines[2])
    first, second = sdk.transform(trained / "model.tar.gz", requests, results)
    assert (first.name, second.name) == ("a.jsonl.out", "b.jsonl.out")
    replies = [json.loads(line) for line in first.read_text().splitlines()]
    assert [reply.get("seed") for reply in replies] == [0, None, 2]
    assert replies[1]["error"]["code"] == "malformed_body"
    (picture,) = replies[2]["images"]
    assert json.loads(second.read_text())["images"] == [picture]


def test_a_transform_that_the_container_refuses_fails_with_its_words_and_leaves_nothing(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "a.npy").write_bytes(b"\x93NUMPY\0")
    with pytest.raises(PlatformError, match="answered 415"):
        sdk.transform(
            trained / "model.tar.gz",
            tmp_path / "requests",
            tmp_path / "results",
            content_type="application/x-npy",
            split_lines=False,
        )
    assert sdk.containers(tmp_path) == []


def test_two_hosts_train_one_model_as_one_host_does(trained, pairs, tmp_path, capsys):
    channels = {"train": pairs, "validation": pairs}
    archive = sdk.train(channels, tmp_path, hyperparameters=STEPS, instance_count=2)
    log = capsys.readouterr().out
    for rank, host in enumerate(("algo-1", "algo-2")):
        assert f"rank {rank} of 2 on host {host}, over eth0" in log
    alone = stages_of(trained / "model.tar.gz")
    together = stages_of(archive)
    assert [stage["stage"] for stage in together] == ["dvae", "transformer", "clip"]
    for one, two in zip(alone, together, strict=True):
        assert two["dataset_fingerprint"] == one["dataset_fingerprint"]
        assert two["metrics"]["validation_loss"] == pytest.approx(
            one["metrics"]["validation_loss"], rel=1e-3
        )
