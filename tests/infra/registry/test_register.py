"""`register`: a trained model in the Model Registry, and `deploy --registered`."""

import json

import pytest

from infra.registry.card import MAX_CARD, Trained, card
from tests.infra.aws_account import BUCKET

LOSSES = "transformer_step=20; transformer_validation_loss=4.25;"
TRAINED = Trained(
    job="dalle-1-all",
    arn="arn:aws:sagemaker:us-east-1:123456789012:training-job/dalle-1-all",
    image="123456789012.dkr.ecr.us-east-1.amazonaws.com/dalle@sha256:1",
    model="s3://b/models/dalle-1-all/output/model.tar.gz",
    data={"train": "s3://b/data/train/", "validation": "s3://b/data/validation/"},
    hyperparameters={"size": "tiny"},
    metrics={"clip_loss": 1.5, "clip_validation_loss": 1.75},
)


@pytest.fixture
def trained(account, infra):
    """An account with a completed job, its model and its log; and the job's name."""
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    assert infra("train", "--data", "pictures", "--set", "size=tiny").code == 0
    (job,) = account.names("training_jobs")
    account.leave_model(job)
    account.write_log("/aws/sagemaker/TrainingJobs", f"{job}/algo-1-1", [LOSSES])
    return account, job


def packages(account):
    sagemaker = account.client("sagemaker")
    return [
        sagemaker.describe_model_package(ModelPackageName=found["ModelPackageArn"])
        for found in sagemaker.list_model_packages(ModelPackageGroupName="dalle")[
            "ModelPackageSummaryList"
        ]
    ]


@pytest.mark.slow
def test_a_model_is_registered_with_its_metrics_and_waits_for_approval(trained, infra):
    account, job = trained
    result = infra("register")
    assert result.code == 0, result.err
    (found,) = packages(account)
    assert found["ModelPackageGroupName"] == "dalle"
    assert found["ModelApprovalStatus"] == "PendingManualApproval"
    (container,) = found["InferenceSpecification"]["Containers"]
    assert container["ModelDataUrl"] == f"s3://{BUCKET}/models/{job}/output/model.tar.gz"
    assert "@sha256:" in container["Image"]
    uri = found["ModelMetrics"]["ModelQuality"]["Statistics"]["S3Uri"]
    body = account.client("s3").get_object(Bucket=BUCKET, Key=uri.split("/", 3)[3])["Body"].read()
    metrics = json.loads(body)["generation_metrics"]
    assert metrics["transformer_validation_loss"]["value"] == 4.25
    (sent,) = account.bodies("CreateModelPackage")
    content = json.loads(sent["ModelCard"]["ModelCardContent"])
    details = content["training_details"]["training_job_details"]
    assert {"name": "size", "value": "tiny"} in details["hyper_parameters"]
    assert details["training_datasets"] == [f"s3://{BUCKET}/data/pictures/train/"]


@pytest.mark.slow
def test_a_second_run_registers_nothing(trained, infra):
    account, job = trained
    infra("register", job)
    result = infra("register", job)
    assert "already there" in result.out
    assert account.requests["CreateModelPackage"] == 1


@pytest.mark.slow
def test_a_model_that_waits_is_approved_by_a_second_run(trained, infra):
    account, job = trained
    infra("register", job)
    result = infra("register", job, "--approve")
    assert result.code == 0, result.err
    assert "approved" in result.out
    (found,) = packages(account)
    assert found["ModelApprovalStatus"] == "Approved"
    assert "already there" in infra("register", job, "--approve").out


@pytest.mark.parametrize("option", ["--role", "--subnets", "--kms-key", "--output-kms-key"])
def test_what_a_registered_model_does_not_have_is_no_option(account, infra, option):
    result = infra("register", option, "x")
    assert result.code == 2
    assert option in result.err


@pytest.mark.slow
def test_a_group_has_the_tags_of_the_team(trained, infra):
    account, _ = trained
    infra("register", "--resource-tag", "team=vision")
    (group,) = account.bodies("CreateModelPackageGroup")
    assert {tag["Key"]: tag["Value"] for tag in group["Tags"]} == {
        "dalle:project": "dalle",
        "team": "vision",
    }


@pytest.mark.slow
def test_only_an_approved_model_is_served(trained, infra):
    account, job = trained
    deploy = ["deploy", "--mode", "async", "--instance-type", "ml.m5.large", "--registered"]
    infra("register")
    result = infra(*deploy)
    assert result.code == 1
    assert "project dalle has no approved model; `python -m infra register --approve`" in result.err
    (found,) = packages(account)
    account.client("sagemaker").update_model_package(
        ModelPackageArn=found["ModelPackageArn"], ModelApprovalStatus="Approved"
    )
    # A later push does not change what serves a registered model.
    account.put_image(layers=[{"digest": "sha256:" + "c" * 64, "size": 1, "mediaType": "x"}])
    result = infra(*deploy)
    assert result.code == 0, result.err
    (model,) = account.bodies("CreateModel")
    (container,) = found["InferenceSpecification"]["Containers"]
    assert model["PrimaryContainer"]["Image"] == container["Image"]
    assert model["PrimaryContainer"]["ModelDataUrl"] == container["ModelDataUrl"]


def test_a_job_that_has_not_completed_is_refused(trained, infra):
    account, job = trained
    account.handlers["DescribeTrainingJob"] = lambda request: {
        "TrainingJobName": job,
        "TrainingJobArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{job}",
        "TrainingJobStatus": "Stopped",
    }
    result = infra("register", job)
    assert result.code == 1
    assert f"training job {job} is Stopped, and only the model of a completed one" in result.err


def test_a_dry_run_shows_how_a_job_is_registered(account, infra, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    result = infra("register", "dalle-1-all", "--dry-run", "--json")
    assert result.code == 0, result.err
    sent = {request["operation"]: request["parameters"] for request in result.json["requests"]}
    assert sent["CreateModelPackage"]["ModelPackageDescription"] == "Training job dalle-1-all"
    assert account.requests.total() == 0


def test_a_job_that_is_not_there_is_named(account, infra):
    infra("bootstrap")
    result = infra("register", "dalle-none")
    assert result.code == 1
    assert "there is no training job dalle-none" in result.err


@pytest.mark.slow
def test_a_group_of_others_is_left_alone(trained, infra):
    account, _ = trained
    account.client("sagemaker").create_model_package_group(
        ModelPackageGroupName="dalle", Tags=[{"Key": "team", "Value": "vision"}]
    )
    result = infra("register")
    assert result.code == 1
    assert "model group dalle is not project dalle's and is left alone" in result.err
    assert not account.requests["CreateModelPackage"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "s3://b/model.tar.gz"], "--registered and --model both name a model"),
        (["--tag", "trial"], "the image that trained its model: leave --tag trial out"),
    ],
)
def test_registered_names_model_and_image(account, infra, words, says):
    result = infra("deploy", "--registered", *words)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0


@pytest.mark.slow
def test_the_card_is_one_that_the_sdk_reads():
    from sagemaker.core.shapes.model_card_shapes import ModelCardContent  # takes a while

    content = card(TRAINED, creator="dalle")
    read = ModelCardContent.model_validate(content)
    assert set(content) <= set(ModelCardContent.model_fields)
    (evaluation,) = read.evaluation_details
    assert [metric.value for metric in evaluation.metric_groups[0].metric_data] == [1.75]
    assert len(json.dumps(content)) < MAX_CARD
