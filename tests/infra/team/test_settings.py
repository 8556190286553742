"""A team's network, keys, role and tags reach every request that starts paid work."""

from typing import Any

import pytest

from dalle.errors import UserError
from infra.aws.client import Aws
from infra.aws.limits import has_own_disk
from infra.aws.output import Output
from infra.aws.project import Project
from infra.setup import push
from tests.infra.aws_account import BUCKET, NUMBER

KEY = f"arn:aws:kms:us-east-1:{NUMBER}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OTHER_KEY = KEY.replace("1234abcd", "9876abcd")
ROLE = f"arn:aws:iam::{NUMBER}:role/sagemaker"
SUBNETS = ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"]
GROUPS = ["sg-0123456789abcdef0"]
NETWORK = ["--subnets", ",".join(SUBNETS), "--security-groups", ",".join(GROUPS)]
VPC = {"SecurityGroupIds": GROUPS, "Subnets": SUBNETS}
PLAN = f"arn:aws:sagemaker:us-east-1:{NUMBER}:training-plan/ours"
MODEL = f"s3://{BUCKET}/models/job/output/model.tar.gz"
TRAIN = ["train", "--data", "pictures", "--instance-type", "ml.m5.xlarge", "--no-wait"]
TUNE = [
    *["tune", "--data", "pictures", "--instance-type", "ml.m5.xlarge", "--no-wait"],
    *["--float", "learning_rate=0.0001:0.01"],
]
ASYNC = ["deploy", "--mode", "async", "--instance-type", "ml.m5.xlarge", "--model", MODEL]


@pytest.fixture
def team(account, infra):
    """An account in which `bootstrap` was given a network, keys and a tag."""
    words = [*NETWORK, "--kms-key", KEY, "--resource-tag", "team=vision"]
    assert infra("bootstrap", *words).code == 0
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    account.put_object("models/job/output/model.tar.gz")
    return account


@pytest.fixture
def planned(infra, monkeypatch):
    """A function: a command line -> the one request for an operation in its dry run."""
    monkeypatch.setenv("AWS_REGION", "us-east-1")

    def plan(operation: str, *words: object) -> Any:
        result = infra(*words, "--dry-run", "--json")
        assert result.code == 0, result.err
        (found,) = (
            request["parameters"]
            for request in result.json["requests"]
            if request["operation"] == operation
        )
        return found

    return plan


def tags_of(request: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in request["Tags"]}


TEAM_TAGS = {"dalle:project": "dalle", "team": "vision"}


def test_a_job_runs_where_and_as_the_stack_says(team, infra):
    assert infra(*TRAIN).code == 0
    (job,) = team.bodies("CreateTrainingJob")
    assert job["VpcConfig"] == VPC
    assert job["ResourceConfig"]["VolumeKmsKeyId"] == KEY
    assert job["OutputDataConfig"]["KmsKeyId"] == KEY
    assert tags_of(job) == TEAM_TAGS


def test_a_search_runs_where_and_as_the_stack_says(team, infra):
    assert infra(*TUNE).code == 0
    (search,) = team.bodies("CreateHyperParameterTuningJob")
    job = search["TrainingJobDefinition"]
    assert job["VpcConfig"] == VPC
    assert (job["ResourceConfig"]["VolumeKmsKeyId"], job["OutputDataConfig"]["KmsKeyId"]) == (
        KEY,
        KEY,
    )
    assert tags_of(search) == TEAM_TAGS


def test_an_endpoint_runs_where_and_as_the_stack_says(team, infra):
    result = infra(*ASYNC)
    assert result.code == 0, result.err
    (model,) = team.bodies("CreateModel")
    (config,) = team.bodies("CreateEndpointConfig")
    assert model["VpcConfig"] == VPC
    assert config["KmsKeyId"] == KEY
    assert config["AsyncInferenceConfig"]["OutputConfig"]["KmsKeyId"] == KEY
    for request in (model, config, *team.bodies("CreateEndpoint")):
        assert tags_of(request) == TEAM_TAGS
    (alarm,) = team.client("cloudwatch").describe_alarms()["MetricAlarms"]
    listed = team.client("cloudwatch").list_tags_for_resource(ResourceARN=alarm["AlarmArn"])
    assert tags_of(listed) == TEAM_TAGS


def test_a_batch_runs_where_and_as_the_options_say(planned, tmp_path):
    (tmp_path / "captions.txt").write_text("big filled orange star\n")
    words = ["deploy", "--mode", "batch", "--instance-type", "ml.m5.xlarge", "--model", MODEL]
    words += ["--captions", tmp_path / "captions.txt", *NETWORK, "--kms-key", KEY]
    job = planned("CreateTransformJob", *words)
    assert job["TransformResources"]["VolumeKmsKeyId"] == KEY
    assert job["TransformOutput"]["KmsKeyId"] == KEY
    assert planned("CreateModel", *words)["VpcConfig"] == VPC


def test_an_option_of_a_command_is_before_the_stacks(team, infra):
    words = ["--role", ROLE, "--output-kms-key", OTHER_KEY, "--resource-tag", "team=language"]
    assert infra(*TRAIN, *words, "--volume-kms-key", "").code == 0
    (job,) = team.bodies("CreateTrainingJob")
    assert job["RoleArn"] == ROLE
    assert job["OutputDataConfig"]["KmsKeyId"] == OTHER_KEY
    assert "VolumeKmsKeyId" not in job["ResourceConfig"]
    assert tags_of(job)["team"] == "language"


def test_without_any_of_it_no_request_has_a_field_of_it(planned):
    job = planned("CreateTrainingJob", *TRAIN)
    assert "VpcConfig" not in job
    assert "KmsKeyId" not in job["OutputDataConfig"]
    assert "VolumeKmsKeyId" not in job["ResourceConfig"]
    assert tags_of(job) == {"dalle:project": "dalle"}


def test_the_key_of_the_stack_is_left_out_for_a_disk_that_encrypts_itself(team, infra):
    assert infra(*TRAIN, "--instance-type", "ml.g5.xlarge").code == 0
    (job,) = team.bodies("CreateTrainingJob")
    assert "VolumeKmsKeyId" not in job["ResourceConfig"]
    assert job["OutputDataConfig"]["KmsKeyId"] == KEY


def test_a_network_that_the_role_of_the_stack_cannot_reach_is_refused(account, infra):
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    result = infra(*TRAIN, *NETWORK)
    assert result.code == 1
    assert "the role of project dalle may not connect hosts to subnets subnet-0" in result.err
    assert not account.requests["CreateTrainingJob"]
    result = infra(*TRAIN, *NETWORK, "--role", ROLE)
    assert result.code == 0, result.err


def test_types_with_built_in_disks_are_known():
    types = ["ml.g5.xlarge", "ml.g4dn.xlarge", "ml.p5.48xlarge", "ml.m5d.large", "ml.c6id.xlarge"]
    types += ["ml.p6-b200.48xlarge", "ml.p6-b300.48xlarge"]
    assert all(map(has_own_disk, types))
    assert not any(map(has_own_disk, ["ml.m5.large", "ml.c7i.large", "ml.r5.large"]))


def test_reserved_hosts_and_encrypted_traffic_are_named_in_a_job(planned):
    words = ["--training-plan", PLAN, "--encrypt-traffic", "--instance-count", 2]
    job = planned("CreateTrainingJob", *TRAIN, *words)
    assert job["ResourceConfig"]["TrainingPlanArn"] == PLAN
    assert job["EnableInterContainerTrafficEncryption"] is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [*TRAIN, "--volume-kms-key", KEY, "--instance-type", "ml.g5.xlarge"],
            "ml.g5.xlarge has a built-in disk, which its own hardware encrypts",
        ),
        ([*TRAIN, "--volume-kms-key", "alias/team"], "takes a key by its id or its key's ARN"),
        ([*TRAIN, "--subnets", SUBNETS[0]], "--security-groups is missing"),
        (
            [*TRAIN, "--kms-key", KEY.replace("us-east-1", "eu-west-1")],
            "is of eu-west-1, and the requests go to us-east-1",
        ),
        ([*TRAIN, "--training-plan", PLAN, "--spot"], "leave --spot out"),
        ([*TRAIN, "--encrypt-traffic"], "is between the hosts of one job, and this job has 1"),
        (
            ["deploy", "--mode", "serverless", "--model", MODEL, *NETWORK],
            "a serverless endpoint cannot be in a network of the account",
        ),
        (
            ["deploy", "--mode", "serverless", "--model", MODEL, "--volume-kms-key", KEY],
            "a serverless endpoint has no disk",
        ),
    ],
)
def test_what_the_platform_refuses_is_refused_before_any_request(account, infra, words, says):
    for more in ([], ["--dry-run"]):
        result = infra(*words, *more)
        assert result.code == 1, result.out
        assert says in result.err
    assert account.requests.total() == 0


def test_a_serverless_endpoint_of_a_project_in_a_network_is_refused(team, infra):
    result = infra("deploy", "--mode", "serverless", "--model", MODEL)
    assert result.code == 1
    assert "a serverless endpoint cannot be in a network of the account" in result.err
    assert not team.requests["CreateModel"]


@pytest.mark.slow
def test_a_bucket_and_a_repository_that_were_given_outlive_the_project(account, infra):
    account.client("s3").create_bucket(Bucket="our-bucket")
    account.client("ecr").create_repository(repositoryName="ours")
    account.put_object("theirs.txt", bucket="our-bucket")
    infra("bootstrap", "--bucket", "our-bucket", "--repository", "ours")
    status = infra("status")
    assert "bucket our-bucket" in status.out
    assert "not counted" in status.out
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert "nothing is left but bucket our-bucket and repository ours" in result.out
    assert account.keys_in("our-bucket") == ["theirs.txt"]
    assert account.client("ecr").describe_repositories()["repositories"]
    assert account.client("iam").list_roles()["Roles"] == []


def test_a_tag_that_stays_on_its_image_is_refused_before_the_push(account, infra):
    infra("bootstrap")
    account.put_image("trial")
    account.put_image("latest")
    project = Project("dalle", Aws(Output()))
    repository = project.repository("dalle")
    there = push.read_manifest(project, "dalle", "trial")
    with pytest.raises(UserError, match="the tag 'trial' is on sha256:.*give another --tag"):
        push.check_tag(repository, "trial", there)
    push.check_tag(repository, "latest", there)
    push.check_tag(repository, "new", None)


@pytest.mark.slow
def test_tags_that_are_given_later_reach_what_exists_and_take_none_away(team, infra):
    sagemaker = team.client("sagemaker")
    assert infra(*ASYNC).code == 0
    arn = sagemaker.describe_endpoint(EndpointName="dalle")["EndpointArn"]
    sagemaker.add_tags(ResourceArn=arn, Tags=[{"Key": "audit", "Value": "passed"}])
    assert infra(*ASYNC).code == 0
    assert not team.requests["AddTags"]
    later = ["--resource-tag", "cost-center=42", "--resource-tag", "team=audio"]
    result = infra(*ASYNC, *later)
    assert result.code == 0, result.err
    assert not team.requests["UpdateEndpoint"]
    assert len(team.bodies("AddTags")) == 3  # of model, configuration and endpoint
    found = {tag["Key"]: tag["Value"] for tag in sagemaker.list_tags(ResourceArn=arn)["Tags"]}
    wanted = {"dalle:project": "dalle", "cost-center": "42", "team": "audio", "audit": "passed"}
    assert found == wanted
