"""`--local`: the same commands with the image on this machine, and no AWS at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests import REPOSITORY
from tests.image.docker_fixtures import TINY

SECONDS = 300
NO_AWS = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def program(*words: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "infra", *map(str, words)]


def environment() -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    path = f"{REPOSITORY / 'container'}{os.pathsep}{REPOSITORY}"
    return {**kept, **NO_AWS, "PYTHONPATH": path}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program(*words),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@contextmanager
def deployed(model: object):
    """`deploy --local`, and the port it serves on; ended by Ctrl-C."""
    words = ("deploy", "--local", "--mode", "realtime", "--model", model, "--port", 0)
    process = subprocess.Popen(
        program(*words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            found = re.search(r"RUNTIME=http://127.0.0.1:(\d+)", line)
            if found:
                break
        else:
            raise AssertionError("".join(lines))
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 0


@pytest.mark.docker
def test_training_leaves_the_model_and_one_json_object(image, pairs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs, data / "train")
    hyperparameters = {**TINY, "size": "tiny", "max_steps": "4", "num_validations": "1"}
    sets = [word for name, text in hyperparameters.items() for word in ("--set", f"{name}={text}")]
    out = tmp_path / "out"
    done = run("train", "--local", "--data", data, "--out", out, "--json", *sets)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"model": str(out / "model.tar.gz"), "stages": ["all"]}
    assert (out / "model.tar.gz").is_file()


@pytest.mark.docker
def test_a_deployed_image_is_invoked_and_ended_by_an_interrupt(image, archive, tmp_path):
    with deployed(archive) as port:
        ask = ("invoke", "big filled orange star", "--local", "--port", port, "--seed", 3)
        done = run(*ask, "--num-candidates", 3, "--out", tmp_path / "plain", "--json")
        assert done.returncode == 0, done.stderr
        best = json.loads(done.stdout)["images"][0]
        done = run(*ask, "--num-candidates", 3, "--stream", "--out", tmp_path / "stream", "--json")
        assert done.returncode == 0, done.stderr
        streamed = json.loads(done.stdout)["ranking"][0]
        assert streamed["clip_score"] == pytest.approx(best["clip_score"], abs=1e-5)
        refused = run(*ask, "--num-candidates", 513)
        assert (
            refused.stderr
            == "the endpoint answered 422: num_candidates must be 1 to 512, got 513\n"
        )


@pytest.mark.docker
def test_a_batch_is_drawn(image, archive, tmp_path):
    (tmp_path / "captions.txt").write_text("big filled orange star\nsmall blue circle\n")
    files = ("--captions", tmp_path / "captions.txt", "--out", tmp_path / "out")
    done = run("deploy", "--local", "--mode", "batch", "--model", archive, *files, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["pictures"] == 8
    assert len(list((tmp_path / "out").iterdir())) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["deploy", "--local"], "--local needs --model, such as out/local/model.tar.gz"),
        (["deploy", "--local", "--model", "m", "--dry-run"], "--local makes none"),
        (["train", "--local", "--data", "d", "--dry-run"], "--local makes none"),
        (["train", "--local", "--data", "d"], "no-such-docker is not installed"),
        (
            ["train", "--local", "--data", "d", "--distribution", "ShardedByS3Key"],
            "gives every host the whole channel; --distribution ShardedByS3Key needs a job at AWS",
        ),
        (["train", "--local", "--data", "d", "--input-mode", "Pipe"], "has no Pipe mode"),
        (["deploy", "--local", "--model", "m"], "no-such-docker is not installed"),
    ],
)
def test_what_is_missing_is_told(account, infra, monkeypatch, words, says):
    monkeypatch.setenv("DOCKER", "no-such-docker")
    told = infra(*words)
    assert told.code == 1
    assert says in told.err
    assert account.requests.total() == 0
