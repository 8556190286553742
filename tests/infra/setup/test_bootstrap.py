"""`bootstrap`: one stack, made once, changed when the template or its parameters change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.setup import bootstrap
from tests.infra.aws_account import BUCKET, NUMBER


@pytest.mark.slow
def test_the_template_passes_the_linter():
    linter = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run(
        [linter, "--non-zero-exit-code", "informational", bootstrap.TEMPLATE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_makes_bucket_repository_and_role(account, infra):
    result = infra("bootstrap", "--json")
    assert result.code == 0, result.err
    assert result.json["bucket"] == BUCKET
    assert result.json["repository"] == "dalle"
    assert result.json["role_arn"].startswith(f"arn:aws:iam::{NUMBER}:role/")
    assert [b["Name"] for b in account.client("s3").list_buckets()["Buckets"]] == [BUCKET]
    repositories = account.client("ecr").describe_repositories()["repositories"]
    assert [r["repositoryName"] for r in repositories] == ["dalle"]


def test_callers_may_invoke_the_projects_endpoints_and_nothing_else(account, infra, role_policy):
    infra("bootstrap")
    statements = role_policy("CallerPolicy")
    endpoint = f"arn:aws:sagemaker:us-east-1:{NUMBER}:endpoint/dalle"
    bucket = f"arn:aws:s3:::{BUCKET}"
    invoke = "sagemaker:InvokeEndpoint"
    assert {name: (each["Action"], each["Resource"]) for name, each in statements.items()} == {
        "InvokeTheEndpoints": (
            [invoke, f"{invoke}Async", f"{invoke}WithResponseStream"],
            [
                endpoint,
                f"{endpoint}--*",
                f"{endpoint}--*".replace(":endpoint/", ":inference-component/"),
            ],
        ),
        "CallWithBearerTokens": ("sagemaker:CallWithBearerToken", "*"),
        "SendAsynchronousRequests": (
            "s3:PutObject",
            [f"{bucket}/async/dalle/requests/*", f"{bucket}/async/dalle--*/requests/*"],
        ),
        "ReadAsynchronousReplies": (
            "s3:GetObject",
            [f"{bucket}/async/dalle/*", f"{bucket}/async/dalle--*"],
        ),
    }


def test_a_second_run_changes_nothing(account, infra):
    infra("bootstrap")
    result = infra("bootstrap")
    assert result.code == 0
    assert {line.split("  ")[-1].strip() for line in result.out.splitlines()} == {"already there"}
    assert account.requests["CreateStack"] == 1
    assert account.requests["UpdateStack"] == 0


def test_the_role_reads_another_bucket_when_it_is_named(account, infra, role_policy):
    infra("bootstrap", "--read-bucket", "our-pictures")
    other = role_policy()["ReadAnotherBucket"]
    assert other["Resource"] == ["arn:aws:s3:::our-pictures", "arn:aws:s3:::our-pictures/*"]
    assert set(other["Action"]) == {"s3:GetObject", "s3:ListBucket"}


def test_the_role_reads_no_other_bucket_by_itself(account, infra, role_policy):
    infra("bootstrap")
    assert "ReadAnotherBucket" not in role_policy()


@pytest.mark.slow
def test_a_changed_parameter_updates_the_stack_and_is_remembered(account, infra):
    def read_bucket() -> str:
        (stack,) = account.client("cloudformation").describe_stacks()["Stacks"]
        values = {p["ParameterKey"]: p["ParameterValue"] for p in stack["Parameters"]}
        return str(values["ReadBucket"])

    infra("bootstrap")
    assert "brought up to date" in infra("bootstrap", "--read-bucket", "our-pictures").out
    assert read_bucket() == "our-pictures"
    assert "already there" in infra("bootstrap").out
    assert read_bucket() == "our-pictures"
    assert "brought up to date" in infra("bootstrap", "--read-bucket", "").out
    assert read_bucket() == ""


def test_the_role_may_write_nothing_outside_its_project(account, infra, role_policy):
    infra("bootstrap")
    for name, statement in role_policy().items():
        actions = statement["Action"]
        actions = [actions] if isinstance(actions, str) else actions
        assert not any(action.endswith("*") for action in actions), name
        if statement["Resource"] == "*":
            assert set(actions) <= {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}
    assert role_policy()["UseItsObjects"]["Resource"] == f"arn:aws:s3:::{BUCKET}/*"
    assert role_policy()["WriteMetrics"]["Condition"]


def test_two_projects_live_side_by_side(account, infra):
    infra("bootstrap")
    assert infra("bootstrap", "--project", "stars").code == 0
    names = {b["Name"] for b in account.client("s3").list_buckets()["Buckets"]}
    assert names == {BUCKET, BUCKET.replace("dalle", "stars")}


def test_the_project_may_come_from_the_environment(account, infra, monkeypatch):
    monkeypatch.setenv("DALLE_PROJECT", "stars")
    assert infra("bootstrap", "--json").json["repository"] == "stars"


@pytest.mark.parametrize("name", ["Stars", "a" * 21, "1st", "a--b", "a_b", ""])
def test_a_name_that_a_bucket_could_not_have_is_refused(account, infra, name):
    result = infra("bootstrap", "--project", name)
    assert result.code == 2
    assert "project's name is 1 to 20 small letters" in result.err
    assert account.requests.total() == 0


def test_a_stack_that_cannot_be_made_is_reported_with_its_reason(account, infra):
    account.refuse("CreateStack", "InsufficientCapabilitiesException", "needs CAPABILITY_IAM")
    result = infra("bootstrap")
    assert result.code == 1
    assert result.err == (
        "cloudformation:CreateStack was refused: InsufficientCapabilitiesException: "
        "needs CAPABILITY_IAM\n"
    )


def test_the_template_keeps_the_image_of_an_endpoint_whose_tag_has_moved_on():
    template = bootstrap.TEMPLATE.read_text("utf-8")
    text = template[template.index("LifecyclePolicyText: |") :].split("|", 1)[1]
    rules, _ = json.JSONDecoder().raw_decode(text.strip())
    (rule,) = rules["rules"]
    assert rule["selection"]["tagStatus"] == "any"
    assert rule["selection"]["countType"] == "imageCountMoreThan"
