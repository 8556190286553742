"""`train` and `tune`: the requests, the chain of stages, second runs, failures, refused plans."""

import re
from typing import Any

import pytest

from dalle.platform.metric_lines import METRIC_DEFINITIONS
from tests.infra.aws_account import BUCKET

TRAIN = ["train", "--data", "pictures", "--set", "size=tiny"]


@pytest.fixture
def ready(account, infra):
    """An account with a stack, an image and data."""
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    account.put_object("data/pictures/validation/0.txt")
    return account


def requests(account, operation: str = "CreateTrainingJob") -> list[dict[str, Any]]:
    return [body for name, body in account.sent if name == operation]


@pytest.mark.slow
def test_one_job_trains_all_stages(ready, infra):
    result = infra(*TRAIN)
    assert result.code == 0, result.err
    (job,) = requests(ready)
    assert job["HyperParameters"] == {"size": "tiny", "stage": "all"}
    channels = {channel["ChannelName"]: channel for channel in job["InputDataConfig"]}
    assert set(channels) == {"train", "validation"}
    source = channels["train"]["DataSource"]["S3DataSource"]
    assert source["S3Uri"] == f"s3://{BUCKET}/data/pictures/train/"
    assert job["AlgorithmSpecification"]["MetricDefinitions"] == list(METRIC_DEFINITIONS)
    assert job["TensorBoardOutputConfig"]["LocalPath"] == "/opt/ml/output/tensorboard"
    assert job["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert job["Tags"] == [{"Key": "dalle:project", "Value": "dalle"}]
    assert job["AlgorithmSpecification"]["TrainingImage"].count("@sha256:") == 1
    assert "EnableManagedSpotTraining" not in job
    name = job["TrainingJobName"]
    assert f"model: s3://{BUCKET}/models/{name}/output/model.tar.gz" in result.out


@pytest.mark.slow
def test_a_chain_hands_the_artefact_on(ready, infra):
    result = infra(*TRAIN, "--stages", "dvae,transformer,clip")
    assert result.code == 0, result.err
    jobs = requests(ready)
    assert [job["HyperParameters"]["stage"] for job in jobs] == ["dvae", "transformer", "clip"]
    for before, after in zip(jobs, jobs[1:], strict=False):
        channels = {c["ChannelName"]: c for c in after["InputDataConfig"]}
        uri = channels["artefact"]["DataSource"]["S3DataSource"]["S3Uri"]
        assert uri == f"s3://{BUCKET}/models/{before['TrainingJobName']}/output/model.tar.gz"
        assert channels["artefact"]["InputMode"] == "File"
    assert "artefact" not in {c["ChannelName"] for c in jobs[0]["InputDataConfig"]}
    folders = {job["CheckpointConfig"]["S3Uri"] for job in jobs}
    assert len(folders) == 3, "no two jobs may share a folder of checkpoints"


@pytest.mark.slow
def test_spot_waits_longer_than_it_runs(ready, infra):
    infra(*TRAIN, "--spot", "--max-hours", 2)
    (job,) = requests(ready)
    assert job["EnableManagedSpotTraining"] is True
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400}
    assert "CheckpointConfig" in job


def test_shards_are_streamed_and_models_are_not(ready, infra):
    infra(*TRAIN, "--input-mode", "FastFile", "--artefact", f"s3://{BUCKET}/m/model.tar.gz")
    (job,) = requests(ready)
    modes = {c["ChannelName"]: c["InputMode"] for c in job["InputDataConfig"]}
    assert modes == {"artefact": "File", "train": "FastFile", "validation": "FastFile"}


@pytest.mark.slow
def test_hosts_are_given_other_shards_of_the_training_data_alone(ready, infra):
    usual = infra(*TRAIN, "--json").json["jobs"]
    infra(*TRAIN, "--distribution", "ShardedByS3Key", "--instance-count", 2)
    jobs = requests(ready)
    found = {
        c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3DataDistributionType"]
        for c in jobs[-1]["InputDataConfig"]
    }
    assert found == {"train": "ShardedByS3Key", "validation": "FullyReplicated"}
    assert jobs[-1]["TrainingJobName"] not in usual


def test_an_augmented_manifest_is_piped_in_records(ready, infra):
    manifest, held_out = f"s3://{BUCKET}/all.manifest", f"s3://{BUCKET}/held-out.manifest"
    options = ["--input-mode", "Pipe", "--attributes", "source-ref,caption"]
    result = infra("train", "--data", manifest, *options, "--validation", held_out)
    assert result.code == 0, result.err
    (job,) = requests(ready)
    channels = {channel["ChannelName"]: channel for channel in job["InputDataConfig"]}
    assert {name: c["InputMode"] for name, c in channels.items()} == {
        "train": "Pipe",
        "validation": "Pipe",
    }
    assert channels["train"]["RecordWrapperType"] == "RecordIO"
    assert channels["train"]["DataSource"]["S3DataSource"] == {
        "S3DataType": "AugmentedManifestFile",
        "S3Uri": manifest,
        "S3DataDistributionType": "FullyReplicated",
        "AttributeNames": ["source-ref", "caption"],
    }
    assert channels["validation"]["DataSource"]["S3DataSource"]["S3Uri"] == held_out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--data", "s3://b/m.manifest", "--attributes", "a,b"],
            "needs --input-mode Pipe, got File",
        ),
        (
            ["--data", "pictures", "--attributes", "a,b", "--input-mode", "Pipe"],
            "--data is an augmented manifest in S3, got pictures",
        ),
        (
            [
                "--data",
                "s3://b/m",
                "--input-mode",
                "Pipe",
                "--attributes",
                ",".join("abcdefghijklmnopq"),
            ],
            "at most 16 names, got 17",
        ),
    ],
)
def test_a_manifest_that_the_platform_would_refuse_is_refused_first(ready, infra, options, says):
    result = infra("train", *options)
    assert result.code != 0
    assert says in result.err
    assert requests(ready) == []


def test_a_warm_pool_volume_and_isolation(ready, infra):
    infra(*TRAIN, "--keep-alive-minutes", 10, "--volume-gb", 80, "--isolate", "--env", "A=b")
    (job,) = requests(ready)
    assert job["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert job["ResourceConfig"]["VolumeSizeInGB"] == 80
    assert job["EnableNetworkIsolation"] is True
    assert job["Environment"] == {"A": "b"}


@pytest.mark.slow
def test_a_second_run_finds_the_job(ready, infra):
    first = infra(*TRAIN, "--json").json
    ready.leave_model(first["jobs"][0])
    second = infra(*TRAIN)
    assert second.code == 0
    assert f"training job {first['jobs'][0]}" in second.out
    assert "already there, Completed" in second.out
    assert ready.requests["CreateTrainingJob"] == 1


@pytest.mark.slow
def test_a_job_whose_model_is_gone_is_run_again(ready, infra):
    infra(*TRAIN)
    result = infra(*TRAIN, "--json")
    assert result.json["jobs"][0].endswith("-all-2")
    assert "Completed, but its model is gone; another attempt" in result.err


def test_new_data_and_another_artefact_are_another_run(ready, infra):
    model = f"s3://{BUCKET}/models/old/output/model.tar.gz"
    ready.put_object("models/old/output/model.tar.gz")
    names = []
    for change in ("", "data/pictures/train/1.txt", "data/pictures/validation/1.txt"):
        if change:
            ready.put_object(change)
        names.append(infra(*TRAIN, "--json").json["jobs"][0])
    names.append(infra(*TRAIN, "--artefact", model, "--json").json["jobs"][0])
    assert len({*names}) == 4
    ready.leave_model(names[-1])
    again = infra(*TRAIN, "--artefact", model)
    assert "already there, Completed" in again.out
    assert "--run NAME trains anew" in again.out


def keep_only(account, *keys):
    for key in account.keys_in():
        account.client("s3").delete_object(Bucket=BUCKET, Key=key)
    for key in keys:
        account.put_object(f"data/pictures/{key}")


def test_folders_of_other_names_are_the_channels_that_they_mean(ready, infra):
    keep_only(ready, "Training/0.txt", "val/0.txt", "test/0.txt")
    result = infra(*TRAIN)
    assert result.code == 0, result.err
    (job,) = requests(ready)
    base = f"s3://{BUCKET}/data/pictures"
    assert {
        c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in job["InputDataConfig"]
    } == {"train": f"{base}/Training/", "validation": f"{base}/val/"}
    assert f"{base}/test/ is left out" in result.out


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["0.txt", "validation/0.txt"], "pictures/ would be the channel train, and it holds valid"),
        (["0.txt", "test/0.txt"], "holds test/: pictures that are held out would be trained on"),
        (["train-000.tar", "val-000.tar"], "holds val-000.tar: pictures that are held out"),
        (["train/train/0.txt", "train/validation/0.txt"], "pictures/train/ would be the channel"),
        (["train/0.txt", "training/0.txt"], "has train/ and training/, and the channel train can"),
    ],
)
def test_data_of_which_held_out_pictures_would_be_trained_on_are_refused(ready, infra, keys, says):
    keep_only(ready, *keys)
    result = infra(*TRAIN)
    assert result.code == 1
    assert says in result.err
    assert requests(ready) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "batchsize=4"], "batchsize is unknown; did you mean batch_size?"),
        (["--set", "learning_rate=fast"], "learning_rate must be a number"),
        (["--set", "epochs=1", "--set", "max_steps=2"], "epochs and max_steps are given together"),
        (["--set", "clip_patch_size=7"], "clip: patch_size must divide the image size"),
        (["--stages", "dvae,clip", "--set", "image_size=9"], "dvae: "),
        (["--env", "DALLE_DEVIC=cpu"], "DALLE_DEVIC=cpu is unknown and has no effect"),
        (["--env", "DALLE_DEVICE=gpu"], "DALLE_DEVICE must be one of auto, cpu, cuda, got 'gpu'"),
    ],
)
def test_settings_that_the_job_would_refuse_are_refused_before_any_request(
    account, infra, words, says
):
    result = infra("train", "--data", "pictures", *words)
    assert result.code == 1
    assert says in result.err
    assert sum(account.requests.values()) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--float", "learning_rate=0.1:2"], "learning_rate must be a number above 0 to 1, got"),
        (["--choice", "size=tiny,huge"], "size must be tiny, .*, got 'huge'"),
    ],
)
def test_a_search_over_values_that_a_job_would_refuse_is_refused_before_any_request(
    account, infra, words, says
):
    result = infra("tune", "--data", "pictures", *words)
    assert result.code == 1
    assert re.search(says, result.err)
    assert sum(account.requests.values()) == 0


@pytest.mark.slow
def test_other_hyperparameters_are_another_run(ready, infra):
    names = {
        infra(*TRAIN, *more, "--json").json["jobs"][0]
        for more in (
            [],
            ["--set", "seed=2"],
            ["--run", "again"],
            ["--instance-type", "ml.m5.large"],
        )
    }
    assert len(names) == 4
    assert sum(name.startswith("dalle-again-") for name in names) == 1


FAILED = {
    "TrainingJobStatus": "Failed",
    "FailureReason": "AlgorithmError: hyperparameter size must be tiny, small or base",
    "SecondaryStatusTransitions": [
        {"Status": "Starting", "StatusMessage": "Preparing", "StartTime": 0},
        {"Status": "Failed", "StatusMessage": "Training job failed", "StartTime": 0},
    ],
}


@pytest.mark.slow
def test_a_failed_job_is_reported_with_its_reason_and_where_its_log_is(ready, infra):
    ready.refuse("DescribeTrainingJob", "ValidationException", "Requested resource not found.")
    ready.handlers["DescribeTrainingJob"] = lambda request: FAILED
    result = infra(*TRAIN)
    assert result.code == 1
    assert "AlgorithmError: hyperparameter size must be tiny, small or base" in result.err
    assert "its log: python -m infra logs dalle-" in result.err
    assert "  Starting     Preparing\n  Failed       Training job failed\n" in result.out


@pytest.mark.slow
def test_attempts_end(ready, infra):
    ready.handlers["DescribeTrainingJob"] = lambda request: FAILED
    result = infra(*TRAIN)
    assert result.code == 1
    assert "20 attempts at dalle-" in result.err
    assert ready.requests["CreateTrainingJob"] == 0


@pytest.mark.slow
def test_another_attempt_has_the_same_checkpoints(ready, infra):
    infra(*TRAIN)  # its model is not there, as moto trains nothing
    infra(*TRAIN)
    first, second = requests(ready)
    assert second["TrainingJobName"] == f"{first['TrainingJobName']}-2"
    assert second["CheckpointConfig"] == first["CheckpointConfig"]


@pytest.mark.slow
def test_no_wait_returns_at_once_but_a_chain_waits_for_all_but_the_last(ready, infra):
    infra(*TRAIN, "--no-wait")
    assert ready.requests["DescribeTrainingJob"] == 1  # whether it is there
    assert ready.requests["FilterLogEvents"] == 0
    infra(*TRAIN, "--run", "chain", "--stages", "dvae,transformer", "--no-wait")
    assert ready.requests["FilterLogEvents"] == 1


@pytest.mark.slow
def test_progress_is_shown_while_it_trains(ready, infra):
    name = infra(*TRAIN, "--no-wait", "--json").json["jobs"][0]
    lines = ["loading", "dvae_step=50; dvae_loss=0.5;", "dvae_step=100; dvae_loss=0.25;"]
    ready.write_log("/aws/sagemaker/TrainingJobs", f"{name}/algo-1-1", lines)
    ready.leave_model(name)
    result = infra(*TRAIN)
    assert "  dvae_step=50; dvae_loss=0.5;\n  dvae_step=100; dvae_loss=0.25;\n" in result.out
    assert "loading" not in result.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--instance-type", "ml.p3.2xlarge"], "ml.p3.2xlarge has Volta GPUs"),
        (["--instance-type", "ml.m7g.large"], "ARM processor"),
        (["--max-hours", "700"], "a job may run for 1 s to 2,419,200 s (28 days), got 2,520,000"),
        (["--max-wait-hours", "30"], "--max-wait-hours is for --spot alone"),
        (["--spot", "--max-wait-hours", "3"], "must be at least --max-hours, which is 24, got 3"),
        (["--spot", "--keep-alive-minutes", "5"], "a warm pool (--keep-alive-minutes) cannot be"),
        (["--keep-alive-minutes", "400"], "at most 360 minutes, got 400"),
        (["--set", f"licence={'x' * 257}"], "licence has at most 256 characters, got 257"),
        (["--set", "stage=dvae"], "by --stages, not by --set stage"),
        (["--run", "a_b"], "--run is 1 to 15 letters, digits and single dashes, got 'a_b'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(ready, infra, words, says):
    result = infra(*TRAIN, *words)
    assert result.code == 1
    assert says in result.err
    assert ready.requests["CreateTrainingJob"] == 0


def test_too_many_hyperparameters_are_refused(ready, infra):
    many = [word for number in range(101) for word in ("--set", f"h{number}=1")]
    assert "at most 100 hyperparameters, got 101" in infra("train", "--data", "pictures", *many).err


@pytest.mark.parametrize("stages", ["clip,dvae", "all,dvae", "dvae,dvae", "paint", ""])
def test_a_chain_out_of_order_is_a_usage_error(ready, infra, stages):
    result = infra(*TRAIN, "--stages", stages)
    assert result.code == 2
    assert "expected all, or some of dvae,transformer,clip in this order" in result.err


def test_data_that_is_not_there_is_reported_before_anything_is_started(ready, infra):
    result = infra("train", "--data", "stars")
    assert result.code == 1
    assert f"there is nothing at s3://{BUCKET}/data/stars/" in result.err
    assert "python -m infra upload FOLDER --name stars" in result.err


@pytest.mark.slow
def test_a_folder_of_images_is_the_channel_train_itself(ready, infra):
    ready.put_object("data/flat/0.txt")
    infra("train", "--data", f"s3://{BUCKET}/data/flat")
    (channel,) = requests(ready)[0]["InputDataConfig"]
    assert channel["ChannelName"] == "train"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == f"s3://{BUCKET}/data/flat/"


# --- tune

TUNE = ["tune", "--data", "pictures", "--float", "learning_rate=0.0001:0.01:log"]


def test_a_search_has_ranges_an_objective_and_the_metrics(ready, infra):
    result = infra(
        *TUNE, "--int", "batch_size=16:64", "--choice", "size=tiny,small", "--max-jobs", 4
    )
    assert result.code == 0, result.err
    (job,) = requests(ready, "CreateHyperParameterTuningJob")
    config = job["HyperParameterTuningJobConfig"]
    assert config["ParameterRanges"] == {
        "ContinuousParameterRanges": [
            {
                "Name": "learning_rate",
                "MinValue": "0.0001",
                "MaxValue": "0.01",
                "ScalingType": "Logarithmic",
            }
        ],
        "IntegerParameterRanges": [
            {"Name": "batch_size", "MinValue": "16", "MaxValue": "64", "ScalingType": "Auto"}
        ],
        "CategoricalParameterRanges": [{"Name": "size", "Values": ["tiny", "small"]}],
    }
    assert config["HyperParameterTuningJobObjective"] == {
        "Type": "Minimize",
        "MetricName": "transformer_validation_loss",
    }
    assert len(job["HyperParameterTuningJobName"]) <= 32
    definition = job["TrainingJobDefinition"]
    assert definition["StaticHyperParameters"] == {"stage": "all"}
    assert "CheckpointConfig" not in definition, "all jobs would write into one folder"


def test_a_second_search_of_the_same_finds_the_first(ready, infra):
    infra(*TUNE)
    assert "already there" in infra(*TUNE).out
    assert ready.requests["CreateHyperParameterTuningJob"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--objective", "beauty"], "--objective must be a metric that `train` prints"),
        (["--float", "x=3:1"], "x needs LOW:HIGH or LOW:HIGH:log, two numbers"),
        (["--int", "x=1:2.5"], "two whole numbers of which the second is larger, got '1:2.5'"),
        (["--parallel", "9"], "--parallel must be 1 to --max-jobs, which is 8, got 9"),
        (["--set", "learning_rate=0.1"], "learning_rate cannot be both given and searched"),
    ],
)
def test_a_search_that_cannot_be_is_refused_by_name(ready, infra, words, says):
    result = infra(*TUNE, *words)
    assert result.code == 1
    assert says in result.err
    assert ready.requests["CreateHyperParameterTuningJob"] == 0


@pytest.mark.slow
def test_a_search_for_nothing_is_refused(ready, infra):
    assert "nothing to search" in infra("tune", "--data", "pictures").err
