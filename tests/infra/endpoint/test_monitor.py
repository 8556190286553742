"""`monitor`: alarms and a dashboard of one endpoint, which `teardown` deletes."""

import json

import pytest

from tests.infra.aws_account import BUCKET

MODEL = f"s3://{BUCKET}/models/job/output/model.tar.gz"
ASYNC = ["deploy", "--mode", "async", "--instance-type", "ml.m5.large", "--model", MODEL]
REALTIME = ["deploy", "--mode", "realtime", "--instance-type", "ml.m5.large", "--model", MODEL]


@pytest.fixture
def served(account, infra):
    """A function: words of `deploy` -> an account with that endpoint."""

    def serve(*words: object):
        infra("bootstrap", "--mail", "team@example.com", "--resource-tag", "team=vision")
        account.put_image()
        account.put_object("models/job/output/model.tar.gz")
        result = infra(*words)
        assert result.code == 0, result.err
        return account

    return serve


def alarms(account):
    found = account.client("cloudwatch").describe_alarms()["MetricAlarms"]
    return {alarm["AlarmName"]: alarm for alarm in found}


def test_an_asynchronous_endpoint_has_four_alarms_that_tell_the_projects_topic(served, infra):
    account = served(*ASYNC)
    result = infra("monitor", "--latency-seconds", 20, "--queue", 7)
    assert result.code == 0, result.err
    found = alarms(account)
    found.pop("dalle-wake")
    assert {name: alarm["MetricName"] for name, alarm in found.items()} == {
        "dalle-errors": "Invocation5XXErrors",
        "dalle-latency": "ModelLatency",
        "dalle-queue": "ApproximateBacklogSize",
        "dalle-memory": "MemoryUtilization",
    }
    (topic,) = account.client("sns").list_topics()["Topics"]
    assert all(alarm["AlarmActions"] == [topic["TopicArn"]] for alarm in found.values())
    assert found["dalle-latency"]["Threshold"] == 20e6  # microseconds
    assert found["dalle-queue"]["Threshold"] == 7
    assert all(alarm["TreatMissingData"] == "notBreaching" for alarm in found.values())
    arn = found["dalle-errors"]["AlarmArn"]
    tags = account.client("cloudwatch").list_tags_for_resource(ResourceARN=arn)["Tags"]
    assert {"Key": "team", "Value": "vision"} in tags


def test_a_dashboard_shows_latency_errors_queue_and_memory(served, infra):
    account = served(*ASYNC)
    infra("monitor")
    found = account.client("cloudwatch").get_dashboard(DashboardName="dalle")
    widgets = json.loads(found["DashboardBody"])["widgets"]
    shown = {metric[1] for each in widgets for metric in each["properties"].get("metrics", [])}
    assert {
        "ModelLatency",
        "Invocation5XXErrors",
        "ApproximateBacklogSize",
        "MemoryUtilization",
        "GPUMemoryUtilization",
    } <= shown


def test_a_second_run_changes_only_what_differs(served, infra):
    account = served(*REALTIME)
    infra("monitor")
    assert "dalle-queue" not in alarms(account)  # a realtime endpoint has none
    sent = account.requests["PutMetricAlarm"], account.requests["PutDashboard"]
    result = infra("monitor")
    assert (account.requests["PutMetricAlarm"], account.requests["PutDashboard"]) == sent
    states = {line.split("  ")[-1].strip() for line in result.out.splitlines() if line}
    assert states == {"already there"}
    result = infra("monitor", "--errors", 3)
    assert "changed" in result.out
    assert account.requests["PutMetricAlarm"] == sent[0] + 1


def test_teardown_deletes_alarms_and_dashboard(served, infra):
    account = served(*REALTIME)
    infra("monitor")
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert "dashboard dalle" in result.out
    assert alarms(account) == {}
    assert account.client("cloudwatch").list_dashboards()["DashboardEntries"] == []


def test_a_dashboard_of_others_is_neither_changed_nor_deleted(served, infra):
    account = served(*REALTIME)
    theirs = json.dumps({"widgets": []})
    account.client("cloudwatch").put_dashboard(DashboardName="dalle", DashboardBody=theirs)
    result = infra("monitor")
    assert result.code == 1
    assert "dashboard dalle is not project dalle's and is left alone" in result.err
    infra("teardown", "--yes")
    found = account.client("cloudwatch").get_dashboard(DashboardName="dalle")
    assert found["DashboardBody"] == theirs


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--errors", 0], "--errors must be more than 0, got 0"),
        (["--latency-seconds", -1], "--latency-seconds must be more than 0, got -1"),
        (["--latency-seconds", "nan"], "--latency-seconds must be more than 0, got nan"),
        (["--memory-percent", 101], "--memory-percent must be 1 to 100, got 101"),
    ],
)
def test_a_threshold_that_rings_always_or_never_is_refused(account, infra, words, says):
    result = infra("monitor", *words)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0


def test_a_queue_of_an_endpoint_without_one_is_refused(served, infra):
    account = served(*REALTIME)
    result = infra("monitor", "--queue", 7)
    assert result.code == 1
    assert "--queue is for an async endpoint, and dalle is realtime" in result.err
    assert "dalle-errors" not in alarms(account)


def test_an_endpoint_that_is_not_there_is_named(account, infra):
    infra("bootstrap")
    result = infra("monitor", "--endpoint", "stars")
    assert result.code == 1
    assert "there is no endpoint dalle--stars" in result.err


@pytest.mark.slow
def test_each_of_several_models_has_alarms_that_teardown_deletes(served, infra):
    account = served(*REALTIME, "--component", "stars")
    result = infra("monitor", "--latency-seconds", 20)
    assert result.code == 0, result.err
    found = alarms(account)
    assert set(found) == {
        *("dalle--stars-copy", "dalle--stars-copy--errors", "dalle--stars-copy--latency"),
        "dalle-memory",
    }
    by_model = [{"Name": "InferenceComponentName", "Value": "dalle--stars"}]
    assert found["dalle--stars-copy--errors"]["Dimensions"] == by_model
    assert found["dalle--stars-copy--latency"]["Threshold"] == 20e6
    assert infra("teardown", "--yes").code == 0
    assert alarms(account) == {}


def test_a_dry_run_shows_alarms_and_dashboard(account, infra):
    result = infra("monitor", "--dry-run", "--json")
    operations = [request["operation"] for request in result.json["requests"]]
    assert operations.count("PutMetricAlarm") == 4
    assert "PutDashboard" in operations


def test_an_asynchronous_reply_has_an_address_for_others(served, infra):
    account = served(*ASYNC)
    headers = [
        ("Content-Type", "application/json"),
        ("X-Amzn-SageMaker-OutputLocation", f"s3://{BUCKET}/async/dalle/replies/1.json"),
        ("X-Amzn-SageMaker-FailureLocation", f"s3://{BUCKET}/async/dalle/failures/1.json"),
    ]
    account.runtime = lambda path, given, body: (202, headers, b'{"InferenceId": "1"}')
    result = infra("invoke", "big filled orange star", "--presign-hours", 2, "--json")
    assert result.code == 0, result.err
    assert "/async/dalle/replies/1.json" in result.json["reply"]
    assert "X-Amz-Expires=7200" in result.json["reply"]
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in result.json["failure"]
    assert infra("invoke", "a star", "--presign-hours", 200).code == 1
