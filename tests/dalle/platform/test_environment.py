"""dalle.platform.environment: what is read from /opt/ml, and what is written when a job fails."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dalle.errors import JobError, PlatformError
from dalle.platform.environment import (
    FAILURE_CHARACTERS,
    Paths,
    parse_value,
    prepare_outputs,
    read_job,
    release_outputs,
    write_failure,
)
from tests import REPOSITORY
from tests.permissions import small_disk


def test_a_platform_shaped_tree_is_read_in_full(opt_ml):
    train = opt_ml.add_channel("train")
    opt_ml.set_hyperparameters(epochs=10, learning_rate="0.1", stage="dvae", sizes=[64, 128])
    job = read_job(opt_ml.root, {"TRAINING_JOB_NAME": "rainbow-1"})
    assert job.hyperparameters == {
        "epochs": "10",
        "learning_rate": "0.1",
        "stage": "dvae",
        "sizes": "[64, 128]",
    }
    assert job.channels["train"].directory == train
    assert job.channels["train"].content_type == "application/x-image"
    assert (job.current_host, job.hosts, job.rank) == ("algo-1", ("algo-1",), 0)
    assert job.network_interface_name == "eth0"
    assert job.job_name == "rainbow-1"


def test_a_local_mode_tree_with_fewer_keys_is_read(make_opt_ml):
    tree = make_opt_ml("local")
    tree.add_channel("train")
    job = read_job(tree.root, {})
    assert job.network_interface_name == "ethwe"
    assert job.channels["train"].content_type is None
    assert job.channels["train"].input_mode == "File"


def test_without_config_files_the_channels_are_the_directories(make_opt_ml):
    tree = make_opt_ml("empty")
    for name in ("train", "validation", "sm_drivers", ".cache"):
        tree.add_channel(name)
    (tree.root / "input" / "data" / "_SUCCESS").touch()
    job = read_job(tree.root, {})
    assert sorted(job.channels) == ["train", "validation"]
    assert (job.hosts, job.rank, job.hyperparameters) == (("algo-1",), 0, {})
    assert job.network_interface_name is None, "an interface must never be guessed"


def test_nothing_at_all_is_a_job_without_channels(tmp_path):
    assert read_job(tmp_path, {}).channels == {}


@pytest.mark.parametrize("name", ["sm_drivers", "code", "recipe"])
def test_channels_of_the_sdk_are_not_the_jobs(opt_ml, name):
    opt_ml.add_channel("train")
    opt_ml.add_channel(name)
    assert list(read_job(opt_ml.root, {}).channels) == ["train"]


def test_the_rank_is_the_place_among_hosts_sorted_as_text(opt_ml):
    opt_ml.write(
        "resourceconfig",
        {
            "current_host": "algo-10",
            "hosts": ["algo-1", "algo-10", "algo-2"],
            "instance_groups": [{"hosts": ["algo-2", "algo-10", "algo-1"]}],
        },
    )
    job = read_job(opt_ml.root, {})
    assert job.hosts == ("algo-1", "algo-10", "algo-2")
    assert job.rank == 1


def test_a_variable_puts_a_channel_elsewhere(opt_ml, tmp_path):
    opt_ml.add_channel("train")
    job = read_job(opt_ml.root, {"SM_CHANNEL_TRAIN": str(tmp_path), "SM_CHANNEL_CODE": "/code"})
    assert {name: c.directory for name, c in job.channels.items()} == {"train": tmp_path}


@pytest.mark.parametrize(
    ("local_path", "expected"),
    [
        ("/opt/ml/checkpoints", "{root}/checkpoints"),
        ("/opt/ml/checkpoints/mine", "{root}/checkpoints/mine"),
        ("/mnt/checkpoints", "/mnt/checkpoints"),
    ],
)
def test_checkpoints_go_where_the_platform_says(opt_ml, local_path, expected):
    opt_ml.write("checkpointconfig", {"LocalPath": local_path})
    checkpoints = read_job(opt_ml.root, {}).paths.checkpoints
    assert checkpoints == Path(expected.format(root=opt_ml.root))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("hyperparameters", "", "hyperparameters.json is not JSON: Expecting value at line 1"),
        ("hyperparameters", '{"a": "1",\n }', "at line 2, column 2"),
        ("hyperparameters", "[1, 2]", "must hold a JSON object, got a list"),
        ("hyperparameters", "[" * 100_000, "nested too deeply"),
        ("inputdataconfig", '{"train": "s3://b"}', "channel 'train' must be a JSON object"),
        ("inputdataconfig", '{"train": {"TrainingInputMode": 1}}', "must be a text, got 1"),
        ("resourceconfig", '{"hosts": "algo-1"}', "hosts must be a list of names"),
        ("resourceconfig", '{"hosts": ["a"], "current_host": "b"}', "'b' is not among hosts"),
        ("checkpointconfig", '{"LocalPath": "here"}', "LocalPath must be absolute, got 'here'"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_where(opt_ml, name, content, says):
    path = opt_ml.write(name, content)
    with pytest.raises(JobError, match=path.name) as caught:
        read_job(opt_ml.root, {})
    assert says in str(caught.value)


def test_a_file_that_is_not_utf8_is_an_error_that_says_where(opt_ml):
    opt_ml.write("hyperparameters", "").write_bytes(b'{"licence": "caf\xe9"}')
    with pytest.raises(JobError, match=r"hyperparameters\.json is not UTF-8: byte 16 is 0xe9"):
        read_job(opt_ml.root, {})


def test_an_unknown_device_is_refused(opt_ml):
    with pytest.raises(JobError, match="must be one of auto, cpu, cuda, got 'tpu'"):
        read_job(opt_ml.root, {"DALLE_DEVICE": "tpu"})


@pytest.mark.parametrize("empty", ["null", "{}", '\ufeff{"train": null}'])
def test_an_empty_description_is_as_good_as_none(opt_ml, empty):
    opt_ml.add_channel("train")
    opt_ml.write("inputdataconfig", empty)
    assert list(read_job(opt_ml.root, {}).channels) == ["train"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("0.1", 0.1),
        ("1e-4", 1e-4),
        ("true", True),
        ("True", True),
        ("False", False),
        ("None", None),
        ("[1, 2]", [1, 2]),
        ('"quoted"', "quoted"),
        ('"\\"twice\\""', '"twice"'),
        ("plain words", "plain words"),
        ("[" * 3000, "[" * 3000),
        ("", ""),
    ],
)
def test_a_value_is_what_its_text_stands_for(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_failure_begins_with_the_cause_and_ends_with_the_line_at_fault(tmp_path):
    paths = Paths(tmp_path)
    write_failure(paths, "epochs must be 1 or more", "Traceback\n" + "x" * 5000 + "\nlast line")
    text = paths.failure.read_text()
    assert text.startswith("epochs must be 1 or more\n")
    assert text.endswith("last line")
    assert len(text) <= FAILURE_CHARACTERS
    assert [path.name for path in paths.output.iterdir()] == ["failure"]


@pytest.mark.parametrize("length", [10, 900, 990, 1023, 1024, 1025, 100_000])
def test_a_failure_is_never_longer_than_what_is_shown(tmp_path, length):
    cause = "é" * length
    write_failure(Paths(tmp_path), cause, "Traceback " * 200)
    text = Paths(tmp_path).failure.read_text(encoding="utf-8")
    assert len(text) <= FAILURE_CHARACTERS
    assert text.startswith(cause[: FAILURE_CHARACTERS - 1])


def test_a_failure_that_cannot_be_written_is_not_another_failure(tmp_path):
    (tmp_path / "output").write_text("a file where the directory should be")
    write_failure(Paths(tmp_path), "cause")


def test_a_failure_has_its_room_on_a_disk_that_is_full(tmp_path):
    paths = Paths(tmp_path)
    with small_disk(paths.output, 64_000):
        prepare_outputs(paths)
        with suppress(OSError), (paths.output / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        with pytest.raises(OSError, match="No space left"):
            (paths.output / "more").write_bytes(b"x")
        write_failure(paths, "\udc80" * FAILURE_CHARACTERS)
        assert paths.failure.read_text() == "\\udc80" * FAILURE_CHARACTERS


def test_the_room_for_a_failure_is_given_back_when_there_was_none(tmp_path):
    paths = Paths(tmp_path)
    prepare_outputs(paths)
    release_outputs(paths)
    assert [path for path in paths.output.rglob("*") if path.is_file()] == []


def test_output_directories_are_made(tmp_path):
    paths = Paths(tmp_path)
    prepare_outputs(paths)
    for directory in (paths.model, paths.checkpoints, paths.output_data, paths.tensorboard):
        assert directory.is_dir()
        assert any(directory.is_relative_to(allowed) for allowed in paths.allowed)


def test_an_output_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(PlatformError, match=f"cannot make the directory {tmp_path}/model"):
        prepare_outputs(Paths(tmp_path))


def test_importing_the_contract_needs_the_standard_library_only():
    program = (
        "import sys, json; import dalle.platform.environment, dalle.errors;"
        "import dalle.platform.metric_lines;"
        "tops = {name.split('.')[0] for name in sys.modules};"
        "print(json.dumps(sorted(tops - set(sys.stdlib_module_names))))"
    )
    root = REPOSITORY / "container"
    command = [sys.executable, "-S", "-c", program]  # -S: without site-packages
    environment = {"PYTHONPATH": str(root)}
    printed = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    assert set(json.loads(printed.stdout)) <= {"__main__", "dalle"}
