"""The image itself by `docker run`, as SageMaker runs it: train, pack, serve, stop.

Skipped without a Docker engine or the image, with the reason; an error there instead when
DALLE_REQUIRE_DOCKER=1, which `make test-image` sets.
"""

import json
import os
import re
import tarfile
import threading
from pathlib import Path

import pytest
from PIL import Image

from harness import (
    IMAGE,
    STOP_SERVING_SECONDS,
    STOP_TRAINING_SECONDS,
    Container,
    OptMl,
    Serving,
    docker,
    pack_model,
    start_training,
    unpack_model,
    why_no_docker,
)
from training import rainbow

pytestmark = pytest.mark.docker

MAX_IMAGE_BYTES = 8_000_000_000
TINY = {
    "size": '"tiny"',
    "tokenizer_kind": "word",
    "text_length": "8",
    "batch_size": "8",
    "image_size": "32",
}
HARDENED = (
    "--user",
    "12345:54321",
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--network",
    "none",
)
PYTHON = "/opt/venv/bin/python"


@pytest.fixture(scope="session", autouse=True)
def image():
    reason = why_no_docker()
    if reason and os.environ.get("DALLE_REQUIRE_DOCKER") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    return IMAGE


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Sixty-four pairs of the rainbow, and what else turns up in channels."""
    directory: Path = tmp_path_factory.mktemp("pairs")
    directory.chmod(0o755)  # as the platform leaves it: every user may read
    for number, sample in enumerate(rainbow.samples()[::144]):
        Image.fromarray(sample.picture()).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(sample.caption)
    (directory / "_SUCCESS").write_bytes(b"")
    (directory / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (directory / "notes.md").write_text("not a pair")
    return directory


@pytest.fixture
def make_tree(tmp_path, pairs):
    """A function: shape, hyperparameters -> a tree with the pairs as channel `train`."""

    def make(shape: str = "platform", **hyperparameters: str) -> OptMl:
        tree = OptMl(tmp_path / shape, shape)
        tree.add_channel("train")
        if shape != "empty":
            tree.set_hyperparameters(**{**TINY, **hyperparameters})
        return tree

    return make


@pytest.fixture(scope="module")
def job(pairs, tmp_path_factory):
    """A finished job, shaped like the platform's: its tree, exit status, log, and what it wrote."""
    tree = OptMl(tmp_path_factory.mktemp("ml"), "platform")
    for name in ("train", "validation"):
        tree.add_channel(name)
    steps = {
        "max_steps": "20",
        "num_validations": "1",
        "qk_norm": "True",
        "attention_kinds": '["full", "axial_row"]',
    }
    tree.set_hyperparameters(**TINY, **steps)
    channels = {"train": pairs, "validation": pairs}
    limits = ("--memory", "2g", "--network", "none")
    with start_training(tree, *limits, channels=channels) as container:
        status = container.wait()
        return tree, status, container.log, container.written()


@pytest.fixture(scope="module")
def archive(job) -> Path:
    tree, *_ = job
    return pack_model(tree.root / "model", tree.root / "model.tar.gz")


@pytest.fixture(scope="module")
def model(archive, tmp_path_factory) -> Path:
    return unpack_model(archive, tmp_path_factory.mktemp("endpoint") / "model")


@pytest.fixture(scope="module")
def serving(model):
    """One candidate at a time and many of them: a generation lasts as long as a test needs."""
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


def config():
    return json.loads(docker("image", "inspect", "--format", "{{json .Config}}", IMAGE))


def inside(*command, entrypoint="/bin/sh", options=("--user", "12345:54321")):
    """The output of a command in a container of its own."""
    return docker(
        "run", "--rm", "--network", "none", *options, "--entrypoint", entrypoint, IMAGE, *command
    )


def test_the_image_is_small_enough_for_every_kind_of_endpoint():
    size = int(docker("image", "inspect", "--format", "{{.Size}}", IMAGE))
    assert size <= MAX_IMAGE_BYTES, f"{size:,} bytes"


def test_the_image_says_what_it_was_built_from_and_that_its_port_can_be_chosen():
    labels = config()["Labels"]
    assert labels["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert re.fullmatch(r"[0-9a-f]{64}", labels["dalle.lock.sha256"])


def test_the_platform_finds_the_command_the_user_and_the_gpu_as_it_expects():
    assert config()["Cmd"] == ["train"]
    assert config().get("User", "") == ""
    variables = dict(text.split("=", 1) for text in config()["Env"])
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert [name for name in variables if name.startswith("NVIDIA_REQUIRE")] == []


def test_no_compiler_installer_or_index_address_of_the_build_stays_inside():
    programs = inside("-c", "for n in cc c++ gcc g++ ld nvcc uv; do command -v $n; done; true")
    assert programs == ""
    names = "-name pip.conf -o -name uv.toml -o -name uv-receipt.json -o -name ca.crt"
    left = inside(
        "-c", f"find / -xdev \\( {names} \\) 2>/dev/null; ls -d /build /layers /src /opt/uv; true"
    )
    assert [line for line in left.splitlines() if "cannot access" not in line] == []
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    assert "index" not in history.lower()
    assert [text for text in config()["Env"] if "INDEX" in text or "CERT" in text] == []


def test_no_certificate_of_the_building_machine_stays_inside():
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    theirs = inside("-c", f"cat {bundle}")
    ours = bundle.read_text().split("-----END CERTIFICATE-----") if bundle.is_file() else []
    extra = [text.split("\n")[-3] for text in ours if text.strip() and text.strip() not in theirs]
    for line in extra:
        search = 'find /etc /opt /usr /var -xdev -type f -size -1024k -exec grep -lF -- "$0" {} +'
        assert inside("-c", f"{search}; true", line, options=()) == ""


def test_every_user_can_read_all_of_it():
    unreadable = "find /opt \\( -type f -not -readable -o -type d -not -executable \\) 2>&1"
    assert inside("-c", unreadable) == ""


def test_everything_is_compiled_before_it_is_run():
    code = "import torch, torchvision, training.workshop, inference.server, inference.generator"
    log = inside("-v", "-c", code, entrypoint=PYTHON)
    assert "inference/generator" in log
    assert sorted(set(re.findall(r"code object from '?(/opt/\S+\.py)'?$", log, re.MULTILINE))) == []


def test_what_was_left_out_is_missed_by_no_library_of_torch():
    site = inside("-c", "import torch; print(torch.__path__[0])", entrypoint=PYTHON).strip()
    listed = inside("-c", f"ldd {site}/lib/*.so")
    missing = {line.split()[0] for line in listed.splitlines() if "not found" in line}
    assert missing == {"libcuda.so.1"}, "the driver's own library comes from the host"


@pytest.mark.parametrize(
    "module",
    [
        "torch.distributed",
        "torchvision",
        "triton",
        "deepspeed",
        "tensorboard",
        "matplotlib.pyplot",
        "clip",
    ],
)
def test_the_libraries_that_training_needs_can_be_imported(module):
    inside("-c", f"import {module}", entrypoint=PYTHON)


def test_a_job_shaped_like_the_platforms_leaves_a_model_and_a_report(job):
    tree, status, log, _ = job
    assert status == 0, log
    manifest = json.loads((tree.root / "model" / "manifest.json").read_text())
    assert manifest["git_revision"] == config()["Labels"]["org.opencontainers.image.revision"]
    for name in ("dvae", "transformer", "clip"):
        assert (tree.root / "model" / name / "weights.safetensors").is_file()
    assert (tree.root / "output" / "data" / "report.html").is_file()
    assert list((tree.root / "checkpoints").rglob("*.tmp")) == []


def test_nothing_is_written_outside_the_directories_of_the_contract(job):
    *_, written = job
    added = [line.split(" ", 1)[1] for line in written if not line.startswith("C ")]
    assert [p for p in added if not p.startswith(("/tmp/", "/opt/ml"))] == []


def test_the_first_lines_of_the_log_name_versions_host_and_gpu(job):
    _, _, log, _ = job
    first, second, third, *_ = log.splitlines()
    assert re.match(
        r"container: train python=3\.\S+ dalle-sagemaker=\S+ torch=2\.10\.0 nvidia-cuda", first
    )
    assert " memory=2.0GiB " in second
    assert third.startswith("container: GPU: none is used: the host has no NVIDIA driver")


def test_metrics_are_printed_as_the_published_patterns_expect(job):
    _, _, log, _ = job
    assert re.search(r"\bdvae_loss=(-?[0-9]+(?:[.][0-9]+)?(?:e[+-]?[0-9]+)?);", log)


def test_a_random_user_trains_on_a_read_only_root_without_a_network(make_tree, pairs):
    tree = make_tree("local", max_steps="2", num_validations="0")
    with start_training(tree, *HARDENED, channels={"train": pairs}) as container:
        assert container.wait() == 0, container.log
    assert (tree.root / "model" / "manifest.json").is_file()


def test_no_argument_trains_and_sigterm_in_mid_epoch_leaves_what_there_is(make_tree, pairs):
    tree = make_tree("empty")
    with start_training(tree, command=(), channels={"train": pairs}) as container:
        container.wait_for("training dvae, ")
        assert container.stop(STOP_TRAINING_SECONDS) == 0, container.log
    assert (tree.root / "model" / "dvae" / "weights.safetensors").is_file()
    assert list((tree.root / "checkpoints").rglob("*")) != []


def test_a_killed_job_goes_on_from_its_newest_checkpoint(make_tree, pairs):
    tree = make_tree(
        max_steps="100000", checkpoint_minutes="0.001", log_every="1", num_validations="0"
    )
    folder = tree.root / "checkpoints" / "dvae"
    with start_training(tree, channels={"train": pairs}) as container:
        container.wait_for("dvae_loss=")
        while not [p for p in folder.glob("*") if p.suffix != ".tmp"]:
            assert container.state()["Running"], container.log
        container.kill()
        assert container.state()["ExitCode"] == 137
    (folder / "step-999999999.pt.tmp").write_bytes(b"half")
    with start_training(tree, channels={"train": pairs}) as container:
        step = int(container.wait_for(r"dvae continues at step (\d+)")[1])
        assert container.stop(STOP_TRAINING_SECONDS) == 0
    assert step >= 1
    assert not (folder / "step-999999999.pt.tmp").exists()


def test_a_hyperparameter_that_is_wrong_fails_the_job_with_its_name_first(make_tree, pairs):
    tree = make_tree(learning_rat="0.1", max_steps="ten")
    with start_training(tree, channels={"train": pairs}) as container:
        assert container.wait() == 1
    assert len((tree.root / "output" / "failure").read_text()) <= 1024
    assert "learning_rat is unknown; did you mean learning_rate?" in tree.failure
    assert "max_steps must be a whole number from 1 to 1,000,000,000, got 'ten'" in tree.failure


def test_a_gpu_that_is_demanded_and_not_there_fails_the_job(make_tree, pairs):
    tree = make_tree()
    with start_training(tree, "--env", "DALLE_DEVICE=cuda", channels={"train": pairs}) as container:
        assert container.wait() == 1
    assert tree.failure.startswith("DALLE_DEVICE=cuda, but the host has no NVIDIA driver")


def test_another_command_is_refused():
    with Container(IMAGE, "bash") as container:
        assert container.wait() == 2
        container.wait_for("must be one of train, serve, got 'bash'")


def test_the_packed_model_holds_files_and_directories_only(archive):
    with tarfile.open(archive) as tar:
        assert {m.name for m in tar.getmembers() if not (m.isfile() or m.isdir())} == set()
        assert "manifest.json" in tar.getnames()


def test_pings_are_answered_503_while_the_model_loads_and_then_200(model):
    with Serving(model) as serving:
        assert serving.wait_until_ready() == [503, 200]


def test_a_caption_is_answered_with_ranked_pictures(serving):
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
    body = json.dumps({"caption": "red circle", "num_candidates": 512, "seed": 7})
    headers = {"Content-Type": "application/json", "Accept": "application/jsonlines"}
    connection.request("POST", "/invocations", body, headers)
    response = connection.getresponse()
    assert json.loads(response.readline())["event"] == "candidate"
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


def test_another_port_and_a_batch_job_are_what_the_environment_says(model):
    options = ("--env", "SAGEMAKER_BIND_TO_PORT=9191", "--env", "SAGEMAKER_BATCH=true")
    with Serving(model, *options, inside=9191) as serving:
        serving.wait_until_ready()
        parameters = serving.ask("/execution-parameters").json()
        assert {type(parameters[n]) for n in ("MaxConcurrentTransforms", "MaxPayloadInMB")} == {int}


def test_sigterm_in_mid_request_lets_it_end_and_refuses_what_is_new(model):
    options = (
        "--env",
        "DALLE_CHUNK_SIZE=1",
        "--env",
        "DALLE_MAX_CANDIDATES=512",
        "--env",
        "DALLE_DRAIN_SECONDS=6",
    )
    with Serving(model, *options) as serving:
        serving.wait_until_ready()
        connection = serving.connect()
        body = json.dumps(
            {"caption": "red circle", "num_candidates": 512, "deadline_seconds": 600, "seed": 7}
        )
        headers = {"Content-Type": "application/json", "Accept": "application/jsonlines"}
        connection.request("POST", "/invocations", body, headers)
        response = connection.getresponse()
        assert json.loads(response.readline())["event"] == "candidate"
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
        serving.wait_for("scheduler: ready$")
        code = (
            "import urllib.request as u\n"
            'b = b\'{"caption": "red circle", "num_candidates": 2}\'\n'
            "h = {'Content-Type': 'application/json'}\n"
            "print(u.urlopen(u.Request('http://127.0.0.1:8080/invocations', b, h)).status)"
        )
        assert serving.python(code).strip() == "200"
        assert serving.stop(STOP_SERVING_SECONDS) == 0
        assert not serving.state()["OOMKilled"]
