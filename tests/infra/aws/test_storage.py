"""Addresses in S3 that a job could not read, or that would bring more than they name."""

import pytest

from tests.infra.aws_account import BUCKET

TRAIN = ["train", "--data", "pictures", "--set", "size=tiny"]
DEPLOY = ["deploy", "--mode", "async", "--instance-type", "ml.g4dn.xlarge"]


@pytest.fixture
def ready(account, infra):
    """An account with a stack, an image, data, and three other buckets."""
    infra("bootstrap", "--read-bucket", "ours")
    account.put_image()
    s3 = account.client("s3")
    for name in ("ours", "theirs"):
        s3.create_bucket(Bucket=name)
    place = {"LocationConstraint": "eu-west-1"}
    s3.create_bucket(Bucket="far", CreateBucketConfiguration=place)
    for key in ("train/0.txt", "validation/0.txt"):
        account.put_object(f"data/pictures/{key}")
    return account


def uri_of(account, channel):
    (job,) = account.bodies("CreateTrainingJob")
    uris = {
        c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in job["InputDataConfig"]
    }
    return uris[channel]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--artefact", "s3://theirs/model.tar.gz"], "may not read the bucket theirs; `python -m"),
        (["--clip", "s3://far/clip.pt"], "the bucket far is in eu-west-1, and in us-east-1"),
        (["--validation", "s3://nowhere/val/"], "there is no bucket nowhere"),
        (["--data", "s3://theirs/pictures/"], "`python -m infra bootstrap --read-bucket theirs`"),
    ],
)
def test_an_input_that_the_job_could_not_read_is_refused_before_the_job(ready, infra, words, says):
    result = infra(*TRAIN, *words)
    assert result.code == 1
    assert says in result.err
    assert ready.requests["CreateTrainingJob"] == 0


@pytest.mark.parametrize(("bucket", "says"), [("theirs", "may not read"), ("far", "eu-west-1")])
def test_a_model_that_the_endpoint_could_not_read_is_refused_before_it_is_made(
    ready, infra, bucket, says
):
    result = infra(*DEPLOY, "--model", f"s3://{bucket}/model.tar.gz")
    assert result.code == 1
    assert says in result.err
    assert ready.requests["CreateModel"] == 0


def test_what_a_role_of_others_may_read_is_not_judged(account, infra):
    role = "arn:aws:iam::123456789012:role/theirs"
    assert infra("bootstrap", "--role", role).code == 0
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    account.client("s3").create_bucket(Bucket="theirs")
    assert infra(*TRAIN, "--artefact", "s3://theirs/model.tar.gz").code == 0


def test_the_bucket_that_the_role_may_read_is_read(ready, infra):
    ready.put_object("m/model.tar.gz", bucket="ours")
    assert infra(*TRAIN, "--artefact", "s3://ours/m/model.tar.gz").code == 0
    assert uri_of(ready, "artefact") == "s3://ours/m/model.tar.gz"


def test_a_folder_takes_no_other_along_whose_name_begins_alike(ready, infra):
    for key in ("val/0.txt", "val_old/0.txt"):
        ready.put_object(f"held/{key}")
    assert infra(*TRAIN, "--validation", f"s3://{BUCKET}/held/val").code == 0
    assert uri_of(ready, "validation") == f"s3://{BUCKET}/held/val/"


def test_a_dry_run_presumes_a_folder_where_a_name_has_no_suffix(infra):
    result = infra(*TRAIN, "--validation", "s3://b/val", "--dry-run", "--json")
    (job,) = [r for r in result.json["requests"] if r["operation"] == "CreateTrainingJob"]
    uris = [c["DataSource"]["S3DataSource"]["S3Uri"] for c in job["parameters"]["InputDataConfig"]]
    assert "s3://b/val/" in uris


def test_a_file_takes_no_other_along_whose_name_begins_alike(ready, infra):
    for key in ("clip.pt", "clip.pt.bak"):
        ready.put_object(f"m/{key}")
    result = infra(*TRAIN, "--clip", f"s3://{BUCKET}/m/clip.pt")
    assert result.code == 1
    assert "would bring m/clip.pt.bak along" in result.err


def test_folders_with_a_year_are_the_splits_that_they_name(ready, infra):
    for key in ("train2017/0.txt", "val2017/0.txt"):
        ready.put_object(f"data/coco/{key}")
    assert infra("train", "--data", "coco").code == 0
    assert uri_of(ready, "train") == f"s3://{BUCKET}/data/coco/train2017/"
    assert uri_of(ready, "validation") == f"s3://{BUCKET}/data/coco/val2017/"


def test_captions_beside_folders_with_a_year_are_not_left_out_without_a_word(ready, infra):
    for key in ("train2017/0.jpg", "val2017/0.jpg", "annotations/captions.json"):
        ready.put_object(f"data/coco/{key}")
    result = infra("train", "--data", "coco")
    assert result.code == 1
    assert "has annotations/ beside train2017/" in result.err


def test_a_hint_is_a_command_that_can_be_given(ready, infra):
    result = infra("train", "--data", "s3://ours/nothing/")
    assert result.code == 1
    assert "there is nothing at s3://ours/nothing/" in result.err
    assert "--name" not in result.err
