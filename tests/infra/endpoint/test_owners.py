"""What another team or another project has is left alone, and named."""

import pytest

from infra.endpoint.options import endpoint_name
from tests.infra.aws_account import BUCKET

MODEL = f"s3://{BUCKET}/models/job/output/model.tar.gz"
ASYNC = ["deploy", "--mode", "async", "--instance-type", "ml.g4dn.xlarge", "--model", MODEL]
TEAM = [{"Key": "team", "Value": "vision"}]
WAKE = {
    "AlarmName": "dalle-wake",
    "MetricName": "CPUUtilization",
    "Namespace": "AWS/EC2",
    "Statistic": "Average",
    "Period": 60,
    "EvaluationPeriods": 1,
    "Threshold": 90.0,
    "ComparisonOperator": "GreaterThanThreshold",
}
EMPTY = '{"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}'


@pytest.fixture
def ready(account, infra):
    """An account with a stack and an image."""
    infra("bootstrap")
    account.put_image()
    return account


def make_endpoint(account, name, tags):
    sagemaker = account.client("sagemaker")
    role = "arn:aws:iam::123456789012:role/other"
    sagemaker.create_model(
        ModelName="theirs", PrimaryContainer={"Image": "x"}, ExecutionRoleArn=role
    )
    variant = {"VariantName": "v", "ModelName": "theirs", "InstanceType": "ml.m5.large"}
    sagemaker.create_endpoint_config(
        EndpointConfigName="theirs", ProductionVariants=[{**variant, "InitialInstanceCount": 1}]
    )
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName="theirs", Tags=tags)


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        (TEAM, "left alone: its tags are team=vision;"),
        ([], "it has no tag"),
        ([{"Key": "dalle:project", "Value": "stars"}], "it is project stars's"),
    ],
)
def test_an_endpoint_of_others_is_not_taken_over(ready, infra, tags, says):
    make_endpoint(ready, "dalle", tags)
    result = infra(*ASYNC)
    assert result.code == 1
    assert "endpoint dalle is not project dalle's and is left alone" in result.err
    assert says in result.err
    assert not ready.requests["UpdateEndpoint"] + ready.requests["DeleteEndpoint"]
    assert infra(*ASYNC, "--name", "mine").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "endpoint_config", "endpoint", "training_job"])
def test_what_has_lost_the_projects_tag_is_nobodys_and_left_alone(ready, infra, kind):
    ready.put_object("data/pictures/train/0.txt")
    ready.put_object("models/job/output/model.tar.gz")
    train = ["train", "--data", "pictures", "--instance-type", "ml.m5.xlarge"]
    words = train if kind == "training_job" else ASYNC
    assert infra(*words).code == 0
    sagemaker = ready.client("sagemaker")
    (name,) = ready.names(f"{kind}s")
    key = f"{kind.title().replace('_', '')}"
    arn = getattr(sagemaker, f"describe_{kind}")(**{f"{key}Name": name})[f"{key}Arn"]
    sagemaker.delete_tags(ResourceArn=arn, TagKeys=["dalle:project"])
    made = ready.requests.copy()
    result = infra(*words)
    assert result.code == 1
    assert f"{name} is not project dalle's and is left alone: it has no tag" in result.err
    assert infra("teardown", "--yes", "--keep-storage").code == 0
    again = [name for name in ready.requests - made if name.startswith(("Create", "Update"))]
    assert again == []
    assert ready.names(f"{kind}s") == [name]


def test_an_alarm_of_others_is_neither_replaced_nor_deleted(ready, infra):
    cloudwatch = ready.client("cloudwatch")
    cloudwatch.put_metric_alarm(**WAKE, Tags=TEAM)
    result = infra(*ASYNC)
    assert result.code == 1
    assert "alarm dalle-wake is not project dalle's" in result.err
    assert infra("teardown", "--yes").code == 0
    (alarm,) = cloudwatch.describe_alarms()["MetricAlarms"]
    assert alarm["MetricName"] == "CPUUtilization"


@pytest.mark.parametrize("command", [["bootstrap"], ["teardown", "--yes"], ["status"]])
def test_a_stack_of_others_is_neither_changed_nor_deleted(account, infra, command):
    cloudformation = account.client("cloudformation")
    cloudformation.create_stack(StackName="dalle", TemplateBody=EMPTY, Tags=TEAM)
    result = infra(*command)
    assert result.code == 1
    assert "stack dalle is not project dalle's and is left alone" in result.err
    (stack,) = cloudformation.describe_stacks(StackName="dalle")["Stacks"]
    assert stack["Tags"] == TEAM


def test_endpoints_of_two_projects_cannot_have_one_name():
    projects = ["dalle", "dalle-rt", "dalle-rt-rt"]
    names = [endpoint_name(project, name) for project in projects for name in (None, "rt", "rt-rt")]
    assert len(set(names)) == len(names)
    assert endpoint_name("dalle", "dalle--rt") == endpoint_name("dalle", "rt") == "dalle--rt"
