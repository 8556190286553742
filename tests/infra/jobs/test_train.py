"""`train`: the requests of one job and of a chain, and plans that are refused."""

import pytest

from dalle.platform.metric_lines import METRIC_DEFINITIONS
from tests.infra.aws_account import BUCKET

TRAIN = ["train", "--data", "pictures", "--set", "size=tiny"]


@pytest.mark.slow
def test_one_job_trains_all_stages(ready, infra):
    result = infra(*TRAIN)
    assert result.code == 0, result.err
    (job,) = ready.bodies("CreateTrainingJob")
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
    jobs = ready.bodies("CreateTrainingJob")
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
@pytest.mark.parametrize("channel", ["tokenizer_model", "legacy"])
def test_a_published_model_goes_to_the_first_job_of_a_chain_alone(channel, ready, infra):
    option = f"--{channel.replace('_', '-')}"
    words = ["--stages", "transformer,clip", option, f"s3://{BUCKET}/data/pictures/"]
    result = infra(*TRAIN, *words)
    assert result.code == 0, result.err
    first, second = (
        {channel["ChannelName"] for channel in job["InputDataConfig"]}
        for job in ready.bodies("CreateTrainingJob")
    )
    assert first == {"train", "validation", channel}
    assert second == {"train", "validation", "artefact"}


@pytest.mark.slow
def test_a_published_clip_goes_to_the_first_job_of_a_chain_alone(ready, infra):
    """The jobs after it find it in the artefact, and one that trains it on does so there."""
    words = ["--stages", "dvae,transformer,clip", "--clip", f"s3://{BUCKET}/data/pictures/"]
    result = infra(*TRAIN, *words)
    assert "set train_on=clip to train that one on" in result.err
    result = infra(*TRAIN, *words, "--set", "clip_fine_tune=true")
    assert result.code == 0, result.err
    channels = [
        {channel["ChannelName"] for channel in job["InputDataConfig"]} - {"train", "validation"}
        for job in ready.bodies("CreateTrainingJob")
    ]
    assert channels == [{"clip"}, {"artefact"}, {"artefact"}]


@pytest.mark.slow
def test_spot_waits_longer_than_it_runs(ready, infra):
    infra(*TRAIN, "--spot", "--max-hours", 2)
    (job,) = ready.bodies("CreateTrainingJob")
    assert job["EnableManagedSpotTraining"] is True
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400}
    assert "CheckpointConfig" in job


@pytest.mark.slow
def test_a_warm_pool_volume_and_isolation(ready, infra):
    infra(*TRAIN, "--keep-alive-minutes", 10, "--volume-gb", 80, "--isolate", "--env", "A=b")
    (job,) = ready.bodies("CreateTrainingJob")
    assert job["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert job["ResourceConfig"]["VolumeSizeInGB"] == 80
    assert job["EnableNetworkIsolation"] is True
    assert job["Environment"] == {"A": "b"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "batchsize=4"], "batchsize is unknown; did you mean batch_size?"),
        (["--set", "learning_rate=fast"], "learning_rate must be a number"),
        (["--set", "epochs=1", "--set", "max_steps=2"], "epochs and max_steps are given together"),
        (["--set", "clip_patch_size=7"], "clip: patch_size must divide the image size"),
        (["--stages", "dvae,clip", "--set", "image_size=9"], "dvae: "),
        (
            ["--tokenizer-model", "s3://a/b/", "--stages", "dvae"],
            "stage=dvae trains an image token",
        ),
        (["--tokenizer-model", "s3://a/b/", "--set", "num_blocks=2"], "num_blocks is of the stage"),
        (["--tokenizer-model", "s3://a/", "--artefact", "s3://b/m.tar.gz"], "both bring an image"),
        (["--tokenizer-model", "s3://a/", "--legacy", "s3://b/"], "both bring an image"),
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
