"""The job that is read from /opt/ml."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dalle.errors import JobError
from dalle.platform.environment import parse_value, read_job, unknown_variables
from tests import REPOSITORY


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


def test_an_empty_root_is_a_job_without_channels(tmp_path):
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
        (
            "checkpointconfig",
            '{"LocalPath": "/opt/ml/../x"}',
            "must be without '..', got",
        ),
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
def test_an_empty_input_data_config_counts_as_missing(opt_ml, empty):
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
def test_a_text_is_parsed_to_its_value(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_importing_the_contract_needs_the_standard_library_only():
    program = (
        "import sys, json; import dalle.platform.environment, dalle.platform.outputs, dalle.errors;"
        "import dalle.platform.metric_lines;"
        "tops = {name.split('.')[0] for name in sys.modules};"
        "print(json.dumps(sorted(tops - set(sys.stdlib_module_names))))"
    )
    root = REPOSITORY / "container"
    command = [sys.executable, "-S", "-c", program]  # -S: without site-packages
    environment = {"PYTHONPATH": str(root)}
    printed = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    assert set(json.loads(printed.stdout)) <= {"__main__", "dalle"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DALLE_PRECISON": "int8"}, ["DALLE_PRECISON=int8 is unknown .* mean DALLE_PRECISION"]),
        ({"dalle_precision": "int8"}, ["dalle_precision=int8 .*did you mean DALLE_PRECISION"]),
        ({"DALE_PRECISION": "int8"}, ["DALE_PRECISION=int8 .*did you mean DALLE_PRECISION"]),
        ({"DALLE_ZZ": "1", "DALLE_A": ""}, ["DALLE_A= ", "DALLE_ZZ=1 .*; known are DALLE_DEV"]),
        ({"DALLE_DEVICE": "cpu", "DALLE_GIT_REVISION": "x", "PATH": "/", "SAGEMAKER_BAT": ""}, []),
    ],
)
def test_a_misspelt_variable_is_said_with_the_nearest_name(variables, says):
    known = ("DALLE_DEVICE", "DALLE_PRECISION", "SAGEMAKER_BATCH")
    found = unknown_variables(variables, known)
    assert len(found) == len(says)
    assert all(re.search(each, sentence) for each, sentence in zip(says, found, strict=True))
