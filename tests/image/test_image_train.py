"""The image's `train` by `docker run`, as on SageMaker: started, stopped, killed, refused."""

import json
import re

import pytest

from infra.docker import Container, image_name
from infra.local.opt_ml import STOP_TRAINING_SECONDS, OptMl, start_training
from tests.image.docker_fixtures import HARDENED, TINY

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("image")]


@pytest.fixture
def make_tree(tmp_path, pairs):
    """Function: shape, hyperparameters -> a tree with the pairs as channel `train`."""

    def make(shape: str = "platform", **hyperparameters: str) -> OptMl:
        tree = OptMl(tmp_path / shape, shape)
        tree.add_channel("train")
        if shape != "empty":
            tree.set_hyperparameters(**{**TINY, **hyperparameters})
        return tree

    return make


def test_a_job_shaped_like_the_platforms_leaves_a_model_and_a_report(job, image_config):
    tree, status, log, _ = job
    assert status == 0, log
    manifest = json.loads((tree.root / "model" / "manifest.json").read_text())
    assert manifest["git_revision"] == image_config["Labels"]["org.opencontainers.image.revision"]
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


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])  # which must not want a compiler
def test_a_random_user_trains_on_a_read_only_root_without_a_network(make_tree, pairs, engine):
    tree = make_tree("local", max_steps="2", num_validations="0", engine=engine)
    with start_training(tree, *HARDENED, channels={"train": pairs}) as container:
        assert container.wait() == 0, container.log
    assert (tree.root / "model" / "manifest.json").is_file()


def test_no_argument_trains_and_sigterm_leaves_a_model_and_checkpoints(make_tree, pairs):
    tree = make_tree("empty")
    with start_training(tree, command=(), channels={"train": pairs}) as container:
        container.wait_for("dvae finished after ")
        assert container.stop(STOP_TRAINING_SECONDS) == 0, container.log
    assert (tree.root / "model" / "dvae" / "weights.safetensors").is_file()
    assert list((tree.root / "checkpoints").rglob("*")) != []


def test_a_killed_job_resumes_from_its_newest_checkpoint(make_tree, pairs):
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
    with Container(image_name(), "bash") as container:
        assert container.wait() == 2
        container.wait_for("must be one of train, serve, got 'bash'")
