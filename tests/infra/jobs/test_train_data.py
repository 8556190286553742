"""`train`: channels of the data, and what they refuse."""

import pytest

from tests.infra.aws_account import BUCKET

TRAIN = ["train", "--data", "pictures", "--set", "size=tiny"]


def test_shards_are_streamed_and_models_are_not(ready, infra):
    infra(*TRAIN, "--input-mode", "FastFile", "--artefact", f"s3://{BUCKET}/m/model.tar.gz")
    (job,) = ready.bodies("CreateTrainingJob")
    modes = {c["ChannelName"]: c["InputMode"] for c in job["InputDataConfig"]}
    assert modes == {"artefact": "File", "train": "FastFile", "validation": "FastFile"}


@pytest.mark.slow
def test_hosts_are_given_other_shards_of_the_training_data_alone(ready, infra):
    usual = infra(*TRAIN, "--json").json["jobs"]
    infra(*TRAIN, "--distribution", "ShardedByS3Key", "--instance-count", 2)
    jobs = ready.bodies("CreateTrainingJob")
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
    (job,) = ready.bodies("CreateTrainingJob")
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
    assert ready.bodies("CreateTrainingJob") == []


def keep_only(account, *keys):
    for key in account.keys_in():
        account.client("s3").delete_object(Bucket=BUCKET, Key=key)
    for key in keys:
        account.put_object(f"data/pictures/{key}")


def test_folders_of_other_names_are_the_channels_that_they_mean(ready, infra):
    keep_only(ready, "Training/0.txt", "val/0.txt", "test/0.txt")
    result = infra(*TRAIN)
    assert result.code == 0, result.err
    (job,) = ready.bodies("CreateTrainingJob")
    base = f"s3://{BUCKET}/data/pictures"
    assert {
        c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in job["InputDataConfig"]
    } == {"train": f"{base}/Training/", "validation": f"{base}/val/"}
    assert f"{base}/test/ is left out" in result.out


@pytest.mark.slow
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
    assert ready.bodies("CreateTrainingJob") == []


def test_data_that_is_not_there_is_reported_before_anything_is_started(ready, infra):
    result = infra("train", "--data", "stars")
    assert result.code == 1
    assert f"there is nothing at s3://{BUCKET}/data/stars/" in result.err
    assert "python -m infra upload FOLDER --name stars" in result.err


@pytest.mark.slow
def test_a_folder_of_images_is_the_channel_train_itself(ready, infra):
    ready.put_object("data/flat/0.txt")
    infra("train", "--data", f"s3://{BUCKET}/data/flat")
    (channel,) = ready.bodies("CreateTrainingJob")[0]["InputDataConfig"]
    assert channel["ChannelName"] == "train"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == f"s3://{BUCKET}/data/flat/"
