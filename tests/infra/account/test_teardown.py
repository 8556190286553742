"""`teardown`: finds by tag, prices, deletes in order, verifies; after any crash, and twice."""

from typing import Any

import pytest

from infra.setup import upload
from tests.infra.aws_account import BUCKET

pytestmark = pytest.mark.slow

ASYNC = ["deploy", "--mode", "async", "--instance-type", "ml.g4dn.xlarge"]
ENDPOINT_LOG = "/aws/sagemaker/Endpoints/dalle"


@pytest.fixture
def full(account, infra):
    """A project with everything: stack, image, data, a trained model, an endpoint that scales."""
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    infra("train", "--data", "pictures")
    assert infra(*ASYNC).code == 0
    account.write_log(ENDPOINT_LOG, "main/i-1", ["ready"])
    return account


def left(account) -> dict[str, list[Any]]:
    """What costs money or stands around: empty lists after a teardown."""
    scaling = account.client("application-autoscaling")
    cloudwatch = account.client("cloudwatch")
    groups = account.client("logs").describe_log_groups()["logGroups"]
    return {
        "endpoints": account.names("endpoints"),
        "configurations": account.names("endpoint_configs"),
        "models": account.names("models"),
        "scaling": scaling.describe_scalable_targets(ServiceNamespace="sagemaker")[
            "ScalableTargets"
        ],
        "alarms": cloudwatch.describe_alarms()["MetricAlarms"],
        "logs": [group["logGroupName"] for group in groups if "Endpoints" in group["logGroupName"]],
        "buckets": [b["Name"] for b in account.client("s3").list_buckets()["Buckets"]],
        "repositories": account.client("ecr").describe_repositories()["repositories"],
        "roles": account.client("iam").list_roles()["Roles"],
    }


NOTHING = dict.fromkeys(
    (
        "endpoints",
        "configurations",
        "models",
        "scaling",
        "alarms",
        "logs",
        "buckets",
        "repositories",
        "roles",
    ),
    [],
)


def test_with_yes_nothing_is_left_and_the_monthly_cost_that_stops_is_shown(full, infra):
    before = left(full)
    result = infra("teardown")
    assert result.code == 1
    assert "nothing was deleted; give --yes" in result.err
    assert left(full) == before

    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert left(full) == NOTHING
    assert full.requests["DeleteTrainingJob"] == 1
    assert "records of 1 job" in result.out
    assert result.out.rstrip().endswith("nothing is left")
    # 730 hours of ml.g4dn.xlarge at 0.7364 USD, the figure of the price table
    assert "endpoint       dalle  537.57 USD a month (1 x 0.7364 USD per hour" in result.out
    assert "deleting it stops 537.57 USD a month" in result.out

    result = infra("teardown", "--yes")
    assert (result.code, result.out) == (0, "project dalle has nothing to delete\n")


def test_an_unknown_price_is_an_error_and_not_guessed(full, infra, monkeypatch):
    full.client("sagemaker").create_endpoint_config(
        EndpointConfigName="dalle-zz-0123456789",
        ProductionVariants=[
            {
                "VariantName": "main",
                "ModelName": full.names("models")[0],
                "InstanceType": "ml.g4dn.8xlarge",
                "InitialInstanceCount": 1,
            }
        ],
        Tags=[{"Key": "dalle:project", "Value": "dalle"}],
    )
    full.client("sagemaker").create_endpoint(
        EndpointName="dalle-zz",
        EndpointConfigName="dalle-zz-0123456789",
        Tags=[{"Key": "dalle:project", "Value": "dalle"}],
    )
    result = infra("teardown", "--yes", "--json")
    assert result.json["unpriced"] == ["dalle-zz"]
    assert result.json["usd_per_month_stopped"] == pytest.approx(537.57, abs=0.01)
    assert "no price is known for ml.g4dn.8xlarge" in result.err
    assert "and the unknown cost of dalle-zz" in result.err


def test_storage_may_be_kept(full, infra):
    result = infra("teardown", "--yes", "--keep-storage")
    assert result.code == 0, result.err
    assert full.requests["DeleteTrainingJob"] == 0, "the model is found by its job"
    remains = {key: value for key, value in left(full).items() if value}
    assert set(remains) == {"buckets", "repositories", "roles"}
    assert "data/pictures/train/0.txt" in full.keys_in()
    assert infra(*ASYNC).code == 0  # and can be served again


def test_another_projects_things_stay(full, infra):
    sagemaker = full.client("sagemaker")
    image = {"Image": "x", "ModelDataUrl": "s3://b/m.tar.gz"}
    role = "arn:aws:iam::123456789012:role/other"
    for name, tags in {
        "dalle-x-model": [{"Key": "dalle:project", "Value": "dalle-x"}],
        "dalle-hand-made": [],
        "dallex": [{"Key": "dalle:project", "Value": "dalle"}],
    }.items():
        sagemaker.create_model(
            ModelName=name, PrimaryContainer=image, ExecutionRoleArn=role, Tags=tags
        )
    full.write_log("/aws/sagemaker/Endpoints/dalle-x", "s", ["theirs"])
    assert infra("teardown", "--yes").code == 0
    assert full.names("models") == ["dalle-hand-made", "dalle-x-model", "dallex"]
    assert left(full)["logs"] == ["/aws/sagemaker/Endpoints/dalle-x"]


@pytest.mark.parametrize("operation", ["CreateEndpointConfig", "CreateEndpoint"])
def test_a_deployment_that_broke_off_is_found(account, infra, operation):
    infra("bootstrap")
    account.put_image()
    account.refuse(operation, "ResourceLimitExceeded", "limit is 0")
    assert infra(*ASYNC, "--model", f"s3://{BUCKET}/m.tar.gz").code == 1
    assert account.names("models")
    assert infra("teardown", "--yes").code == 0
    assert left(account) == NOTHING


IN_ORDER = [
    "DeregisterScalableTarget",
    "DeleteAlarms",
    "DeleteEndpoint",
    "DeleteLogGroup",
    "DeleteModel",
    "DeleteEndpointConfig",
    "DeleteTrainingJob",
    f"POST /{BUCKET}",
    "BatchDeleteImage",
    "DeleteStack",
]


def test_a_teardown_that_broke_off_anywhere_is_taken_up(full, infra):
    for operation in IN_ORDER:
        full.refuse(operation, "AccessDeniedException", "no", status=403)
        result = infra("teardown", "--yes")
        assert result.code == 1, operation
        assert "these credentials may not do" in result.err, operation
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert left(full) == NOTHING


def test_what_stays_after_all_is_named(full, infra):
    full.handlers["DeleteModel"] = lambda request: {}
    (model,) = full.names("models")
    result = infra("teardown", "--yes")
    assert result.code == 1
    assert f"not deleted: model {model}" in result.err


def test_a_running_job_is_stopped_before_the_bucket_goes(full, infra):
    """moto's jobs end at once and cannot be stopped: this one runs until StopTrainingJob."""
    arn = "arn:aws:sagemaker:us-east-1:123456789012:training-job/dalle-long"
    status = ["InProgress"]
    order = []

    def listed(request: dict[str, Any]) -> dict[str, Any]:
        job = {
            "TrainingJobName": "dalle-long",
            "TrainingJobArn": arn,
            "CreationTime": 0,
            "TrainingJobStatus": status[0],
        }
        wanted = request.get("StatusEquals") == status[0] and "WarmPool" not in str(request)
        return {"TrainingJobSummaries": [job] if wanted else []}

    def stop(request: dict[str, Any]) -> dict[str, Any]:
        order.append("stop")
        status[0] = "Stopped"
        return {}

    full.handlers["ListTrainingJobs"] = listed
    full.handlers["ListTags"] = lambda request: (
        {"Tags": [{"Key": "dalle:project", "Value": "dalle"}]}
    )
    full.handlers["StopTrainingJob"] = stop
    full.handlers["DescribeTrainingJob"] = lambda request: {
        "TrainingJobName": "dalle-long",
        "TrainingJobStatus": status[0],
    }
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert order == ["stop"]
    operations = [name for name, _ in full.sent]
    assert operations.index("StopTrainingJob") < operations.index(f"POST /{BUCKET}")
    assert operations.index("StopTrainingJob") < operations.index("DeleteTrainingJob")
    assert full.bodies("DeleteTrainingJob") == [{"TrainingJobName": "dalle-long"}]
    assert "training job dalle-long" in result.out


def test_a_warm_pool_is_ended(full, infra):
    arn = "arn:aws:sagemaker:us-east-1:123456789012:training-job/dalle-warm"
    kept = [True]

    def listed(request: dict[str, Any]) -> dict[str, Any]:
        job = {
            "TrainingJobName": "dalle-warm",
            "TrainingJobArn": arn,
            "CreationTime": 0,
            "TrainingJobStatus": "Completed",
            "WarmPoolStatus": {"Status": "Available" if kept[0] else "Terminated"},
        }
        return {"TrainingJobSummaries": [job] if "WarmPoolStatusEquals" in request else []}

    def update(request: dict[str, Any]) -> dict[str, Any]:
        assert request["ResourceConfig"] == {"KeepAlivePeriodInSeconds": 0}
        kept[0] = False
        return {"TrainingJobArn": arn}

    full.handlers["ListTrainingJobs"] = listed
    full.handlers["ListTags"] = lambda request: (
        {"Tags": [{"Key": "dalle:project", "Value": "dalle"}]}
    )
    full.handlers["UpdateTrainingJob"] = update
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert "warm pool of dalle-warm" in result.out


def test_a_bucket_with_old_versions_and_unfinished_uploads_is_emptied(full, infra):
    s3 = full.client("s3")
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    full.put_object("twice", b"one")
    full.put_object("twice", b"two")
    s3.delete_object(Bucket=BUCKET, Key="twice")
    s3.create_multipart_upload(Bucket=BUCKET, Key="unfinished")
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert left(full) == NOTHING


def test_more_objects_than_one_request_can_delete(full, infra, monkeypatch):
    monkeypatch.setattr(upload, "DELETED_TOGETHER", 2)
    for number in range(4):
        full.put_object(f"data/{number}")
    assert infra("teardown", "--yes").code == 0
    assert full.requests[f"POST /{BUCKET}"] == 3
    assert left(full) == NOTHING
