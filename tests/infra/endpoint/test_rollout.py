"""An endpoint moves to new hosts in steps, and back when an alarm rings."""

from typing import Any

import pytest

from tests.infra.aws_account import BUCKET, NUMBER

MODEL = f"s3://{BUCKET}/models/job/output/model.tar.gz"
REALTIME = ["deploy", "--mode", "realtime", "--instance-type", "ml.m5.large", "--model", MODEL]
ALARMS = [{"AlarmName": "dalle-errors"}, {"AlarmName": "dalle-latency"}]
TOPIC = f"arn:aws:sns:us-east-1:{NUMBER}:team"


@pytest.fixture
def ready(account, infra):
    """An account with a stack, an image and a model."""
    infra("bootstrap")
    account.put_image()
    account.put_object("models/job/output/model.tar.gz")
    return account


def test_an_update_by_canary_makes_the_alarms_that_take_it_back(ready, infra):
    canary = ["--min-instances", 2, "--rollout", "canary", "--step-percent", 50]
    assert infra(*REALTIME, *canary).code == 0
    assert not ready.requests["UpdateEndpoint"]
    result = infra(*REALTIME, *canary, "--env", "DALLE_QUEUE=7")
    assert result.code == 0, result.err
    (update,) = ready.bodies("UpdateEndpoint")
    routing = {
        "Type": "CANARY",
        "WaitIntervalInSeconds": 300,
        "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 50},
    }
    assert update["DeploymentConfig"] == {
        "BlueGreenUpdatePolicy": {
            "TrafficRoutingConfiguration": routing,
            "TerminationWaitInSeconds": 300,
        },
        "AutoRollbackConfiguration": {"Alarms": ALARMS},
    }
    found = ready.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert [alarm["AlarmName"] for alarm in found] == ["dalle-errors", "dalle-latency"]


def test_without_a_rollout_an_update_has_no_configuration_and_no_alarm(ready, infra):
    infra(*REALTIME)
    infra(*REALTIME, "--env", "DALLE_QUEUE=7")
    (update,) = ready.bodies("UpdateEndpoint")
    assert "DeploymentConfig" not in update
    assert ready.client("cloudwatch").describe_alarms()["MetricAlarms"] == []


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        (
            "linear",
            {
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {
                        "Type": "LINEAR",
                        "WaitIntervalInSeconds": 60,
                        "LinearStepSize": {"Type": "CAPACITY_PERCENT", "Value": 25},
                    },
                    "TerminationWaitInSeconds": 120,
                }
            },
        ),
        (
            "rolling",
            {
                "RollingUpdatePolicy": {
                    "MaximumBatchSize": {"Type": "CAPACITY_PERCENT", "Value": 25},
                    "WaitIntervalInSeconds": 60,
                }
            },
        ),
        (
            "all-at-once",
            {
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {
                        "Type": "ALL_AT_ONCE",
                        "WaitIntervalInSeconds": 60,
                    },
                    "TerminationWaitInSeconds": 120,
                }
            },
        ),
    ],
)
def test_a_dry_run_shows_how_an_endpoint_that_exists_is_moved(infra, account, kind, policy):
    words = ["--min-instances", 2, "--rollout", kind, "--step-percent", 25, "--step-seconds", 60]
    words += ["--keep-old-seconds", 120, "--rollback-alarm", "queue-of-others"]
    result = infra(*REALTIME, *words, "--dry-run", "--json")
    assert result.code == 0, result.err
    sent = {request["operation"]: request["parameters"] for request in result.json["requests"]}
    rings = [*ALARMS, {"AlarmName": "queue-of-others"}]
    assert sent["UpdateEndpoint"]["DeploymentConfig"] == {
        **policy,
        "AutoRollbackConfiguration": {"Alarms": rings},
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rollout", "canary"], "needs --min-instances 2 or more, got 1"),
        (
            ["--rollout", "canary", "--min-instances", 2, "--step-percent", 60],
            "--step-percent must be 1 to 50 for canary, got 60",
        ),
        (
            ["--rollout", "linear", "--min-instances", 2, "--step-percent", 5],
            "--step-percent must be 10 to 50 for linear, got 5",
        ),
        (
            ["--rollout", "all-at-once", "--step-seconds", 4000],
            "--step-seconds must be 0 to 3600, got 4000",
        ),
        (
            [
                "--rollout",
                "all-at-once",
                *[word for n in "123456789" for word in ("--rollback-alarm", n)],
            ],
            "--rollback-alarm is given at most 8 times, got 9",
        ),
        (["--error-topic", TOPIC], "are for --mode async alone"),
        (["--rollback-alarm", "ours"], "--rollback-alarm: for an update with --rollout, which is"),
        (["--step-percent", 20, "--keep-old-seconds", 0], "--step-percent, --keep-old-seconds: "),
    ],
)
def test_an_update_that_the_platform_refuses_is_refused_before_any_request(
    account, infra, words, says
):
    result = infra(*REALTIME, *words)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0


def test_a_serverless_endpoint_has_no_rollout(account, infra):
    result = infra("deploy", "--mode", "serverless", "--model", MODEL, "--rollout", "all-at-once")
    assert result.code == 1
    assert "--rollout is for --mode realtime and async, not for serverless" in result.err


def test_topics_are_told_of_asynchronous_replies_and_failures(account, infra):
    infra("bootstrap", "--mail", "team@example.com")
    account.put_image()
    account.put_object("models/job/output/model.tar.gz")
    words = ["deploy", "--mode", "async", "--instance-type", "ml.m5.large", "--model", MODEL]
    result = infra(*words, "--success-topic", TOPIC, "--error-topic", "project")
    assert result.code == 0, result.err
    (config,) = account.bodies("CreateEndpointConfig")
    (topic,) = account.client("sns").list_topics()["Topics"]
    assert config["AsyncInferenceConfig"]["OutputConfig"]["NotificationConfig"] == {
        "SuccessTopic": TOPIC,
        "ErrorTopic": topic["TopicArn"],
    }


def test_the_topic_of_a_project_without_one_is_refused_with_the_way_to_it(ready, infra):
    words: list[Any] = ["deploy", "--mode", "async", "--model", MODEL, "--error-topic", "project"]
    result = infra(*words)
    assert result.code == 1
    assert "`python -m infra bootstrap --mail ADDRESS` makes one" in result.err
    assert not ready.requests["CreateModel"]
