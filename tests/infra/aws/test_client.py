"""AWS's errors as advice, retries, and dry runs that send nothing: against real HTTP servers."""

import argparse
import json
import re
from datetime import UTC, datetime, timedelta

import pytest

from dalle.errors import AccessError, AwsError, PlanError
from infra.__main__ import COMMANDS
from infra.aws import client as aws
from infra.aws.client import Aws
from infra.aws.output import Output
from infra.aws.request import Request
from tests.infra.aws_account import LACKING

LIST = Request("sagemaker", "ListModels")


@pytest.fixture
def connected(account):
    return Aws(Output())


@pytest.mark.slow
def test_a_throttled_request_is_sent_again_until_it_passes(account, connected):
    account.refuse("ListModels", "ThrottlingException", "Rate exceeded", times=2)
    assert connected.call(LIST)["Models"] == []
    assert account.requests["ListModels"] == 3


@pytest.mark.slow
def test_throttling_without_end_says_what_to_do(account, connected, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    account.refuse("ListModels", "ThrottlingException", "Rate exceeded", times=5)
    with pytest.raises(AwsError, match="throttled sagemaker:ListModels, the last of 2 attempts"):
        connected.call(LIST)
    assert account.requests["ListModels"] == 2


def test_a_server_error_is_tried_again(account, connected):
    account.refuse("ListModels", "InternalFailure", "oops", status=500, times=1)
    assert connected.call(LIST)["Models"] == []


@pytest.mark.parametrize(
    ("code", "message", "says"),
    [
        ("ExpiredTokenException", "The security token is expired", "credentials have expired; log"),
        ("UnrecognizedClientException", "token is invalid", "does not know these credentials"),
        (
            "AccessDeniedException",
            "User: arn:aws:iam::1:user/me is not authorized to perform: sagemaker:ListModels on "
            "resource: x",
            "these credentials may not do sagemaker:ListModels; ask for that permission",
        ),
        ("ResourceLimitExceeded", "The account-level service limit is 0", "Service Quotas"),
        ("ValidationException", "ModelName is bad", "refused: ValidationException: ModelName is"),
    ],
)
def test_an_error_is_reported_as_what_to_do(account, connected, code, message, says):
    account.refuse("ListModels", code, message)
    with pytest.raises((AccessError, AwsError), match=re.escape(says)):
        connected.call(LIST)


def test_the_permission_that_lacks_is_named_as_aws_names_it(account, connected):
    message = "User: me is not authorized to perform: s3:ListBucket on resource: arn:aws:s3:::b"
    account.refuse("GET /b", "AccessDenied", message, status=403)
    with pytest.raises(AccessError, match="may not do s3:ListBucket"):
        connected.call(Request("s3", "ListObjectsV2", Bucket="b"))


def test_a_page_of_html_is_reported_as_a_line(account, connected, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    account.refuse("DescribeStacks", "500", "<!doctype html>\n<h1>Server\nError</h1>", status=500)
    with pytest.raises(AwsError) as result:
        connected.call(Request("cloudformation", "DescribeStacks"))
    assert "\n" not in str(result.value)
    assert "<" not in str(result.value)


def test_missing_credentials_are_reported_before_anything_is_sent(account, connected, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessError, match="no AWS credentials were found; log in again"):
        connected.call(LIST)
    assert account.requests.total() == 0


def test_a_missing_region_is_reported(account, connected, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(AccessError, match="no AWS region is chosen; give --region, or set AWS_REG"):
        connected.call(LIST)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert connected.call(LIST)["Models"] == []


def test_an_unknown_profile_is_reported(account):
    with pytest.raises(AccessError, match="mars.*aws configure list-profiles"):
        Aws(Output(), profile="mars").call(LIST)


def test_a_server_that_does_not_answer_is_reported(account, connected, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(AwsError, match="did not answer sagemaker:ListModels.*check the network"):
        connected.call(LIST)


def test_an_invocation_is_never_sent_twice(account, connected):
    request = Request("sagemaker-runtime", "InvokeEndpoint", EndpointName="e", Body=b"{}")
    account.refuse("POST /endpoints/e/invocations", "InternalFailure", "x", status=500, times=3)
    with pytest.raises(AwsError):
        connected.call(request)
    assert account.requests["POST /endpoints/e/invocations"] == 1


@pytest.mark.slow
def test_what_is_not_there_is_found_as_none(connected):
    assert connected.find(Request("sagemaker", "DescribeModel", ModelName="m")) is None
    assert connected.find(Request("cloudformation", "DescribeStacks", StackName="s")) is None
    assert connected.read("no-such-bucket", "key") is None


def test_a_refusal_is_no_absence(account, connected):
    account.refuse("DescribeModel", "AccessDeniedException", "no")
    with pytest.raises(AccessError):
        connected.find(Request("sagemaker", "DescribeModel", ModelName="m"))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "ModelName"),
        ({"ModelName": "m", "Colour": 3}, "Colour"),
        ({"ModelName": "m" * 64}, "CreateModel.ModelName must be 0 to 63 characters, got 64"),
        ({"ModelName": "a_b"}, "CreateModel.ModelName must match"),
        ({"ModelName": "m", "Containers": [{}] * 16}, "Containers must be 0 to 15 items, got 16"),
        ({"ModelName": "m", "Containers": [{"Mode": "Multi"}]}, "Mode is 'Multi', which"),
    ],
)
def test_a_wrong_request_is_refused_before_it_is_sent(account, connected, parameters, says):
    with pytest.raises(PlanError, match=re.escape(says)):
        connected.call(Request("sagemaker", "CreateModel", **parameters))
    assert account.requests.total() == 0


# The options that each command needs besides --dry-run. `prices`, `cost`, `benchmark` and `compare`
# make nothing at AWS and have no dry run.
DRY = {
    "bootstrap": [],
    "upload": ["FOLDER", "--name", "pictures"],
    "train": ["--data", "pictures", "--stages", "dvae,transformer,clip", "--spot"],
    "tune": ["--data", "pictures", "--float", "learning_rate=0.001:0.1:log"],
    "status": [],
    "logs": [],
    "deploy": ["--mode", "async", "--instance-type", "ml.g5.xlarge"],
    "invoke": ["big filled orange star"],
    "monitor": [],
    "register": [],
    "pipeline": ["--data", "pictures", "--require", "clip_validation_loss=2", "--start"],
    "teardown": [],
}


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_prints_requests_and_sends_none(account, infra, monkeypatch, tmp_path, name):
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable)
    (tmp_path / "0.txt").write_text("a star")
    words = [str(tmp_path) if word == "FOLDER" else word for word in DRY[name]]
    result = infra(name, *words, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert account.requests.total() == 0
    assert result.json["dry_run"] is True
    assert result.json["requests"]
    for request in result.json["requests"]:
        assert set(request) == {"service", "operation", "parameters"}


PICTURES = ["--data", "pictures"]
EVERY_WAY = {
    "train": [
        [
            *PICTURES,
            "--instance-count",
            "2",
            "--distribution",
            "ShardedByS3Key",
            "--input-mode",
            "FastFile",
        ],
        [*PICTURES, "--legacy", "s3://b/cub/", "--stages", "transformer"],
        [*PICTURES, "--artefact", "s3://b/model.tar.gz", "--clip", "s3://b/clip.pt", "--isolate"],
        [
            *PICTURES,
            "--tokenizer-model",
            "s3://b/vqgan/",
            "--validation",
            "s3://b/val",
            "--env",
            "A=b",
        ],
        [
            *PICTURES,
            "--keep-alive-minutes",
            "5",
            "--run",
            "again",
            "--set",
            "size=tiny",
            "--no-wait",
        ],
    ],
    "tune": [[*PICTURES, "--int", "batch_size=8:16", "--choice", "size=tiny,small"]],
    "deploy": [
        ["--mode", "realtime", "--max-instances", "3"],
        ["--mode", "realtime", "--instance-type", "ml.p5.4xlarge", "--name", "stars"],
        ["--mode", "serverless", "--provisioned-concurrency", "2", "--no-wait"],
        ["--instance-type", "ml.m5.large", "--min-instances", "1", "--volume-gb", "60"],
        ["--mode", "batch", "--captions", "CAPTIONS", "--concurrent", "4"],
    ],
    "invoke": [["a star", "--stream"], ["a star", "--seed", "1", "--format", "webp"]],
    "logs": [["dalle-job"]],
    "status": [["dalle-job"]],
    "bootstrap": [["--read-bucket", "pictures"]],
    "teardown": [["--keep-storage"]],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        *DRY.items(),
        *((name, way) for name, ways in EVERY_WAY.items() for way in ways),
    ],
)
def test_botocores_validator_accepts_every_request_of_every_dry_run(
    connected, infra, tmp_path, name, words
):
    (tmp_path / "0.txt").write_text("a star\n")
    places = {"FOLDER": str(tmp_path), "CAPTIONS": str(tmp_path / "0.txt")}
    given = [places.get(word, word) for word in words]
    result = infra(name, *given, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert result.json["requests"]
    for each in result.json["requests"]:
        connected.check(Request(each["service"], each["operation"], **each["parameters"]))


def test_a_dry_run_names_what_only_aws_knows(account, infra):
    result = infra("deploy", "--mode", "async", "--dry-run", "--json")
    made = {request["operation"]: request["parameters"] for request in result.json["requests"]}
    assert made["CreateModel"]["ExecutionRoleArn"] == "<RoleArn of stack dalle>"
    assert "<digest of the image>" in made["CreateModel"]["PrimaryContainer"]["Image"]
    assert made["PutMetricAlarm"]["AlarmActions"] == ["<ARN of policy dalle-wake>"]


def test_a_dry_run_for_people_prints_a_json_object_for_each_request(account, infra):
    result = infra("bootstrap", "--dry-run")
    decoder, rest, found = json.JSONDecoder(), result.out.strip(), []
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value["operation"])
        rest = rest[end:].strip()
    assert found[0] == "CreateStack"


def test_a_dry_run_finds_a_wrong_request_too(account, infra):
    result = infra("deploy", "--mode", "realtime", "--instance-type", "ml.t3.medium", "--dry-run")
    assert result.code == 1
    assert "'ml.t3.medium', which this service does not offer; near: ml.t2.medium" in result.err


def test_every_command_that_makes_something_has_a_dry_run():
    makes_nothing = {"prices", "cost", "benchmark", "compare"}
    needs_docker = {"push"}
    assert set(COMMANDS) == set(DRY) | makes_nothing | needs_docker


@pytest.mark.parametrize(("service", "operation"), LACKING)
def test_what_moto_lacks_is_checked_against_botocores_model(
    account, connected, monkeypatch, service, operation
):
    request = Request(service, operation, **LACKING[service, operation])
    connected.check(request)
    with pytest.raises(PlanError):
        connected.check(Request(service, operation, **request.parameters, Colour="red"))
    # As soon as moto has it, it leaves the list.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    account.handlers.clear()
    with pytest.raises(AwsError):
        connected.call(request)


def test_the_options_of_aws_are_the_same_for_all():
    parser = argparse.ArgumentParser()
    aws.add_arguments(parser)
    options = parser.parse_args(["--region", "eu-west-1", "--profile", "p", "--dry-run"])
    assert aws.connect(options).dry_run
    assert aws.connect(options).region == "eu-west-1"


@pytest.mark.slow
def test_a_bearer_token_is_that_of_the_sagemaker_sdk(monkeypatch):
    from sagemaker.core.token_generator import generate_token  # takes a while

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    now = datetime.now(UTC)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: now)
    token = Aws(Output(), region="eu-west-1").bearer_token(300)
    assert token == generate_token(region="eu-west-1", expiry=timedelta(seconds=300))


def test_without_credentials_there_is_no_bearer_token(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(AccessError, match="no AWS credentials were found"):
        Aws(Output(), region="eu-west-1").bearer_token(300)


def test_an_address_for_others_names_the_region_of_its_bucket(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    address = Aws(Output(), region="eu-west-1").presigned("our-bucket", "async/1.json", 60)
    assert address.startswith("https://our-bucket.s3.eu-west-1.amazonaws.com/async/1.json?")
