"""What a team chooses once by `bootstrap`: network, keys, tags, and what exists already."""

import re
from typing import Any

import pytest
import yaml

from infra.aws.team.tags import merged, own_tags
from infra.setup import bootstrap
from tests.infra.aws_account import NUMBER

KEY = f"arn:aws:kms:us-east-1:{NUMBER}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ROLE = f"arn:aws:iam::{NUMBER}:role/team/sagemaker"
SUBNETS = "subnet-0123456789abcdef0,subnet-0123456789abcdef1"
GROUPS = "sg-0123456789abcdef0"
NETWORK = ["--subnets", SUBNETS, "--security-groups", GROUPS]


def stack(account) -> Any:
    (found,) = account.client("cloudformation").describe_stacks()["Stacks"]
    return found


def parameters(account) -> dict[str, str]:
    """The parameters that are not empty."""
    found = {p["ParameterKey"]: p["ParameterValue"] for p in stack(account)["Parameters"]}
    return {key: value for key, value in found.items() if value and key != "Project"}


def template() -> Any:
    """The template's resources, with its functions as `{"If": […]}` and the like."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML with CloudFormation's short forms."""

    def read(loader, name, node):
        is_list = isinstance(node, yaml.SequenceNode)
        return {name: loader.construct_sequence(node, deep=True) if is_list else node.value}

    Loader.add_multi_constructor("!", read)
    return yaml.load(bootstrap.TEMPLATE.read_text("utf-8"), Loader)["Resources"]


def test_network_and_keys_are_remembered_until_they_are_taken_away(account, infra):
    result = infra("bootstrap", *NETWORK, "--kms-key", KEY)
    assert result.code == 0, result.err
    wanted = {"Subnets": SUBNETS, "SecurityGroups": GROUPS, "VolumeKmsKey": KEY}
    assert parameters(account) == {**wanted, "OutputKmsKey": KEY}
    assert "already there" in infra("bootstrap").out
    assert infra("bootstrap", "--output-kms-key", "").code == 0
    assert parameters(account) == wanted


def test_the_role_may_use_the_network_and_the_keys_and_no_others(account, infra, role_policy):
    words = [*NETWORK, "--kms-key", KEY, "--bucket-kms-key", KEY]
    assert infra("bootstrap", *words).code == 0
    found = role_policy()
    keys = {name: each["Resource"] for name, each in found.items() if "Key" in name}
    assert keys == dict.fromkeys(
        ("UseTheKeyOfVolumes", "UseTheKeyOfOutputs", "UseTheKeyOfTheBucket"), KEY
    )
    assert set(found["DescribeTheNetwork"]["Action"]) == {
        "ec2:DescribeDhcpOptions",
        "ec2:DescribeNetworkInterfaces",
        "ec2:DescribeSecurityGroups",
        "ec2:DescribeSubnets",
        "ec2:DescribeVpcs",
    }
    ends = [arn.split(":", 4)[4] for arn in found["ConnectToTheNetwork"]["Resource"]]
    # A VPC may be another account's, which shares it.
    assert ends == [f"{NUMBER}:network-interface/*", "*:security-group/*", "*:subnet/*"]


def test_the_bucket_keeps_versions_for_a_month_and_takes_a_key_of_the_team():
    bucket = template()["Bucket"]["Properties"]
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    rules = {rule["Id"]: rule for rule in bucket["LifecycleConfiguration"]["Rules"]}
    assert rules["earlier-versions"]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 30}
    chosen = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]["If"]
    assert chosen[0] == "HasBucketKmsKey"
    defaults = [rule["ServerSideEncryptionByDefault"] for (rule,) in chosen[1:]]
    assert defaults == [
        {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": {"Ref": "BucketKmsKey"}},
        {"SSEAlgorithm": "AES256"},
    ]


def test_a_budget_counts_the_project_alone_and_tells_the_address(account, infra):
    budget = template()["Budget"]["Properties"]
    (tag,) = budget["Budget"]["CostFilters"]["TagKeyValue"]
    assert tag == {"Join": ["", ["user:dalle:project$", {"Ref": "Project"}]]}
    for told in budget["NotificationsWithSubscribers"]:
        (subscriber,) = told["Subscribers"]
        assert subscriber["Address"] == {"Ref": "Mail"}
    assert infra("bootstrap", "--mail", "team@example.com", "--budget", "200").code == 0
    assert parameters(account) == {"Mail": "team@example.com", "BudgetUsd": "200"}
    (topic,) = account.client("sns").list_subscriptions()["Subscriptions"]
    assert (topic["Protocol"], topic["Endpoint"]) == ("email", "team@example.com")


def test_the_role_of_callers_has_their_policy():
    caller = template()["CallerRole"]["Properties"]
    assert caller["ManagedPolicyArns"] == [{"Ref": "CallerPolicy"}]
    assert "Policies" not in caller


def test_callers_read_the_projects_replies_with_its_keys_and_no_others(account, infra, role_policy):
    infra("bootstrap", "--bucket", "shared", "--output-kms-key", KEY)
    found = role_policy("CallerPolicy")
    assert found["ReadAsynchronousReplies"]["Resource"] == [
        "arn:aws:s3:::shared/async/dalle/*",
        "arn:aws:s3:::shared/async/dalle--*",
    ]
    assert found["SendAsynchronousRequests"]["Resource"] == [
        "arn:aws:s3:::shared/async/dalle/requests/*",
        "arn:aws:s3:::shared/async/dalle--*/requests/*",
    ]
    use = role_policy("CallerKeyPolicy")["UseTheKeysByTheBucket"]
    assert set(use["Action"]) == {"kms:Decrypt", "kms:GenerateDataKey"}
    # moto keeps in a list what AWS::NoValue takes out, as None.
    assert [arn for arn in use["Resource"] if arn] == [KEY]
    assert use["Condition"] == {"StringEquals": {"kms:ViaService": "s3.us-east-1.amazonaws.com"}}


def test_the_role_reads_the_alarms_that_take_an_update_back(account, infra, role_policy):
    infra("bootstrap")
    found = role_policy()["ReadTheAlarmsOfAnUpdate"]
    assert found["Action"] == "cloudwatch:DescribeAlarms"
    assert found["Resource"] == f"arn:aws:cloudwatch:us-east-1:{NUMBER}:alarm:*"


def test_every_tag_of_an_image_but_latest_stays_on_its_image(account, infra):
    infra("bootstrap")
    (found,) = account.client("ecr").describe_repositories()["repositories"]
    assert found["imageTagMutability"] == "IMMUTABLE_WITH_EXCLUSION"
    (excluded,) = found["imageTagMutabilityExclusionFilters"]
    assert excluded["filter"] == "latest"


def test_tags_of_a_team_are_on_the_stack_and_stay(account, infra):
    words = ["--resource-tag", "team=vision", "--resource-tag", "cost-center=42"]
    assert infra("bootstrap", *words).code == 0
    assert own_tags(stack(account)["Tags"]) == {"team": "vision", "cost-center": "42"}
    assert "already there" in infra("bootstrap").out
    # moto updates no stack of which tags alone have changed; CloudFormation does.
    words = ["--resource-tag", "team=language", "--read-bucket", "our-pictures"]
    assert "brought up to date" in infra("bootstrap", *words).out
    assert own_tags(stack(account)["Tags"]) == {"team": "language", "cost-center": "42"}


def test_an_empty_value_takes_a_tag_away():
    assert merged({"team": "vision", "cost-center": "42"}, [("team", "")]) == {"cost-center": "42"}


def test_what_exists_already_is_used_and_not_made(account, infra):
    words = ["--role", ROLE, "--bucket", "our-bucket", "--repository", "team/images"]
    result = infra("bootstrap", *words, "--json")
    assert result.code == 0, result.err
    assert (result.json["bucket"], result.json["repository"]) == ("our-bucket", "team/images")
    assert result.json["role_arn"] == ROLE
    assert account.client("s3").list_buckets()["Buckets"] == []
    assert account.client("ecr").describe_repositories()["repositories"] == []
    said = infra("bootstrap").out
    assert all(re.search(rf"{name} +given", said) for name in ("our-bucket", "images", "endpoints"))
    roles = [role["RoleName"] for role in account.client("iam").list_roles()["Roles"]]
    assert [name.startswith("dalle-CallerRole") for name in roles] == [True]


def test_the_role_of_the_stack_uses_a_bucket_that_exists(account, infra, role_policy):
    infra("bootstrap", "--bucket", "our-bucket")
    assert role_policy()["UseItsObjects"]["Resource"] == "arn:aws:s3:::our-bucket/*"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--subnets", SUBNETS], "needs both --subnets and --security-groups; --security-groups"),
        (["--security-groups", GROUPS], "--subnets is missing"),
        (["--kms-key", "alias/team"], "named by its ARN, since the policy of the role names it"),
        (
            ["--kms-key", KEY.replace("us-east-1", "eu-west-1")],
            "is of eu-west-1, and the requests go to us-east-1",
        ),
        (["--budget", "200"], "--budget needs --mail, the address that is told"),
        (["--bucket", "our", "--bucket-kms-key", KEY], "is for a bucket of the stack's"),
        (
            ["--repository", "our", "--repository-kms-key", KEY],
            "--repository-kms-key is for a repository of the stack's",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_made(account, infra, words, says):
    result = infra("bootstrap", *words)
    assert result.code == 1
    assert says in result.err
    assert not account.requests["CreateStack"]
    assert infra("bootstrap", "--dry-run", *words).code == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--subnets", "vpc-1"], "ids such as subnet-0123456789abcdef0"),
        (["--security-groups", f"{GROUPS},{GROUPS}"], "every id once was expected"),
        (["--kms-key", "key"], "a KMS key is named by its ARN"),
        (["--role", "sagemaker"], "123456789012:role/sagemaker was expected, got 'sagemaker'"),
        (["--bucket", "s3://our"], "such as our-pictures was expected, got 's3://our'"),
        (["--mail", "team"], "a mail address such as team@example.com was expected"),
        (["--budget", "0.00"], "an amount of US dollars such as 200 was expected, got '0.00'"),
        (["--budget", "much"], "an amount of US dollars such as 200 was expected"),
        (["--resource-tag", "aws:team=x"], "tags that begin with aws: or dalle: belong to others"),
        (["--resource-tag", "team"], "KEY=VALUE was expected, got 'team'"),
        (["--resource-tag", "team=a;b"], "a tag's value is at most 256 letters"),
    ],
)
def test_a_value_that_is_no_id_is_a_usage_error(account, infra, words, says):
    result = infra("bootstrap", *words)
    assert result.code == 2
    assert says in result.err
    assert account.requests.total() == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("--bucket", "other"), ("--repository", "other"), ("--repository-kms-key", KEY)],
)
def test_what_would_lose_stored_things_is_refused_on_a_stack_that_exists(
    account, infra, option, value
):
    infra("bootstrap")
    result = infra("bootstrap", option, value)
    assert result.code == 1
    assert f"{option} can be chosen only when the stack is made" in result.err
    assert not account.requests["UpdateStack"]


def test_more_tags_than_the_platform_takes_are_refused(account, infra):
    words = [word for n in range(49) for word in ("--resource-tag", f"tag-{n}=x")]
    result = infra("bootstrap", *words)
    assert result.code == 1
    assert "a resource has at most 48 tags of a team's, got 49" in result.err
