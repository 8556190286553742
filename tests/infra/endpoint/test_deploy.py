"""`deploy`: the requests of each mode, second runs, updates, and a crash in the middle."""

from typing import Any

import pytest

from infra.endpoint import update
from tests.infra.aws_account import BUCKET

pytestmark = pytest.mark.slow

ASYNC = ["deploy", "--mode", "async", "--instance-type", "ml.g4dn.xlarge"]
MODEL = f"s3://{BUCKET}/models/job/output/model.tar.gz"


@pytest.fixture
def ready(account, infra):
    """An account with a stack, an image and a trained model."""
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    assert infra("train", "--data", "pictures").code == 0
    return account


def described(account, name: str = "dalle") -> tuple[dict[str, Any], dict[str, Any]]:
    """The endpoint's configuration and model, as SageMaker describes them."""
    sagemaker = account.client("sagemaker")
    endpoint = sagemaker.describe_endpoint(EndpointName=name)
    config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    (variant,) = config["ProductionVariants"]
    return config, sagemaker.describe_model(ModelName=variant["ModelName"])


def test_an_async_endpoint_sleeps_and_is_woken(ready, infra):
    result = infra(*ASYNC, "--max-instances", 2)
    assert result.code == 0, result.err
    config, model = described(ready)
    assert config["AsyncInferenceConfig"]["ClientConfig"] == {
        "MaxConcurrentInvocationsPerInstance": 1
    }
    output = config["AsyncInferenceConfig"]["OutputConfig"]
    assert output["S3OutputPath"] == f"s3://{BUCKET}/async/dalle/replies/"
    scaling = ready.client("application-autoscaling")
    (target,) = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (0, 2)
    policies = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    kinds = {policy["PolicyName"]: policy["PolicyType"] for policy in policies}
    assert kinds == {"dalle-backlog": "TargetTrackingScaling", "dalle-wake": "StepScaling"}
    (alarm,) = ready.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert alarm["MetricName"] == "HasBacklogWithoutCapacity"
    assert alarm["AlarmActions"] == [
        p["PolicyARN"] for p in policies if p["PolicyName"] == "dalle-wake"
    ]
    assert model["PrimaryContainer"]["Environment"]["DALLE_DEVICE"] == "cuda"
    assert model["PrimaryContainer"]["Environment"]["DALLE_DEADLINE_SECONDS"] == "890"


def test_a_gpu_endpoint_names_its_host_software(ready, infra):
    infra(*ASYNC)
    config, _ = described(ready)
    (variant,) = config["ProductionVariants"]
    assert variant["InferenceAmiVersion"] == "al2-ami-sagemaker-inference-gpu-3-1"
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 600
    assert variant["ModelDataDownloadTimeoutInSeconds"] == 600


def test_a_realtime_endpoint_scales_by_requests_in_progress(ready, infra):
    result = infra(
        "deploy", "--mode", "realtime", "--instance-type", "ml.m5.large", "--max-instances", 3
    )
    assert result.code == 0, result.err
    config, model = described(ready)
    (variant,) = config["ProductionVariants"]
    assert "InferenceAmiVersion" not in variant
    assert variant["RoutingConfig"] == {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    assert "DataCaptureConfig" not in config or not config["DataCaptureConfig"]
    scaling = ready.client("application-autoscaling")
    (policy,) = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    wanted = policy["TargetTrackingScalingPolicyConfiguration"]
    assert wanted["PredefinedMetricSpecification"]["PredefinedMetricType"] == (
        "SageMakerVariantConcurrentRequestsPerModelHighResolution"
    )
    assert model["PrimaryContainer"]["Environment"]["DALLE_DEVICE"] == "cpu"


def test_a_realtime_endpoint_of_one_instance_does_not_scale(ready, infra):
    infra("deploy", "--mode", "realtime", "--instance-type", "ml.m5.large")
    assert ready.requests["RegisterScalableTarget"] == 0


def test_a_serverless_endpoint_has_memory_and_no_instances(ready, infra):
    result = infra("deploy", "--mode", "serverless", "--memory-mb", 3072, "--name", "small")
    assert result.code == 0, result.err
    config, model = described(ready, "dalle--small")
    (variant,) = config["ProductionVariants"]
    assert variant["ServerlessConfig"] == {"MemorySizeInMB": 3072, "MaxConcurrency": 5}
    assert "InstanceType" not in variant
    assert model["PrimaryContainer"]["Environment"]["DALLE_MAX_REPLY_MB"] == "3"


def test_the_model_is_the_newest_completed_jobs_and_the_image_is_named_by_digest(ready, infra):
    infra(*ASYNC)
    _, model = described(ready)
    (job,) = ready.names("training_jobs")
    container = model["PrimaryContainer"]
    assert container["ModelDataUrl"] == f"s3://{BUCKET}/models/{job}/output/model.tar.gz"
    assert "@sha256:" in container["Image"]


def test_the_model_of_another_project_is_not_taken(ready, infra):
    infra("bootstrap", "--project", "dalle-x")
    result = infra(*ASYNC, "--project", "dalle-x", "--tag", "latest")
    assert result.code == 1
    assert "the repository dalle-x has no image 'latest'; run `python -m infra push`" in result.err


def test_everything_carries_the_projects_tag(ready, infra):
    infra(*ASYNC)
    sagemaker = ready.client("sagemaker")
    config, model = described(ready)
    endpoint = sagemaker.describe_endpoint(EndpointName="dalle")
    for arn in (config["EndpointConfigArn"], model["ModelArn"], endpoint["EndpointArn"]):
        tags = sagemaker.list_tags(ResourceArn=arn)["Tags"]
        assert {"Key": "dalle:project", "Value": "dalle"} in tags


def test_a_second_run_makes_nothing(ready, infra):
    first = infra(*ASYNC)
    made = ready.requests.copy()
    second = infra(*ASYNC)
    assert second.code == 0
    again = ready.requests - made
    assert not [name for name in again if name.startswith(("Create", "Put", "Update", "Register"))]
    assert [line.rpartition("  ")[0] for line in first.out.splitlines()][:4] == [
        line.rpartition("  ")[0] for line in second.out.splitlines()
    ][:4]
    assert "made" not in second.out


def test_a_changed_option_updates_the_endpoint(ready, infra):
    infra(*ASYNC)
    before, _ = described(ready)
    result = infra(*ASYNC, "--startup-seconds", 900)
    assert result.code == 0, result.err
    assert "updated, in service" in result.out
    after, _ = described(ready)
    assert after["EndpointConfigName"] != before["EndpointConfigName"]
    assert ready.requests["CreateEndpoint"] == 1
    assert ready.requests["UpdateEndpoint"] == 1


def test_a_newly_pushed_image_makes_a_new_model(ready, infra):
    infra(*ASYNC)
    digest = ready.put_image(layers=[{"digest": "sha256:" + "c" * 64, "size": 1, "mediaType": "x"}])
    result = infra(*ASYNC)
    assert "updated, in service" in result.out
    _, model = described(ready)
    assert model["PrimaryContainer"]["Image"].endswith(f"@{digest}")


def test_scaling_goes_when_it_is_not_wanted_any_more(ready, infra):
    infra(*ASYNC)
    infra(*ASYNC, "--min-instances", 1)
    scaling = ready.client("application-autoscaling")
    assert not scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert ready.client("cloudwatch").describe_alarms()["MetricAlarms"] == []


def test_an_alarm_that_is_missing_is_made_again(ready, infra):
    infra(*ASYNC)
    ready.client("cloudwatch").delete_alarms(AlarmNames=["dalle-wake"])
    infra(*ASYNC)
    assert len(ready.client("cloudwatch").describe_alarms()["MetricAlarms"]) == 1


def test_a_crash_in_the_middle_is_taken_up_where_it_was(ready, infra):
    ready.refuse("CreateEndpoint", "ResourceLimitExceeded", "limit for ml.g4dn.xlarge is 0")
    result = infra(*ASYNC)
    assert result.code == 1
    assert "a quota of this account stops sagemaker:CreateEndpoint" in result.err
    assert "Traceback" not in result.err
    assert ready.names("endpoints") == []
    result = infra(*ASYNC)
    assert result.code == 0
    assert [line.split()[-1] for line in result.out.splitlines()[:3]] == [
        "there",
        "there",
        "service",
    ]
    assert len(ready.names("models")) == len(ready.names("endpoint_configs")) == 1


def test_a_plan_that_breaks_a_limit_makes_nothing(ready, infra):
    made = ready.requests.copy()
    result = infra("deploy", "--mode", "serverless", "--memory-mb", 7000)
    assert result.code == 1
    assert "1024 to 6144 MB of memory (6 GB) in steps of 1024, got 7000" in result.err
    result = infra("deploy", "--mode", "realtime", "--instance-type", "ml.t3.medium")
    assert result.code == 1
    assert not [name for name in ready.requests - made if name.startswith("Create")]


def test_an_endpoint_that_fails_is_reported_with_the_platforms_reason(ready, infra):
    describe = {"EndpointConfigName": "x", "EndpointStatus": "Failed", "EndpointName": "dalle"}
    failed = {**describe, "FailureReason": "The primary container did not pass the ping check"}
    seen = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        seen.append(request)
        return failed

    ready.handlers["DescribeEndpoint"] = lambda request: (
        answer(request) if ready.requests["CreateEndpoint"] else {"EndpointStatus": "Creating"}
    )
    ready.refuse("DescribeEndpoint", "ValidationException", 'Could not find endpoint "dalle"')
    result = infra(*ASYNC)
    assert result.code == 1
    assert "endpoint dalle is Failed: The primary container did not pass the ping" in result.err
    assert "python -m infra logs dalle" in result.err
    assert seen


def test_without_a_stack_it_says_what_comes_first(account, infra):
    result = infra(*ASYNC)
    assert result.code == 1
    assert "run `python -m infra bootstrap` first" in result.err


def test_without_a_trained_model_it_says_what_comes_first(account, infra):
    infra("bootstrap")
    account.put_image()
    result = infra(*ASYNC)
    assert result.code == 1
    assert "run `python -m infra train` first" in result.err
    assert infra(*ASYNC, "--model", MODEL).code == 0


def test_json_names_what_was_made(ready, infra):
    result = infra(*ASYNC, "--json")
    assert result.json["endpoint"] == "dalle"
    assert result.json["mode"] == "async"
    assert result.json["state"] == "made"
    assert result.json["configuration"] in ready.names("endpoint_configs")


def test_what_was_not_waited_for_gets_its_scaling_by_the_next_run(ready, infra):
    result = infra(*ASYNC, "--no-wait")
    assert "run the same command again once it is in service, to scale it" in result.out
    assert ready.requests["RegisterScalableTarget"] == 0
    infra(*ASYNC)
    assert ready.requests["RegisterScalableTarget"] == 1


def test_the_expected_cost_is_printed(ready, infra):
    assert "nothing without requests; an instance 0.7364 USD per hour" in infra(*ASYNC).out
    result = infra("deploy", "--mode", "realtime", "--instance-type", "ml.m5.large", "--name", "on")
    assert "83.95 USD a month always on (1 x 0.115 USD per hour" in result.out
    result = infra(
        "deploy", "--mode", "realtime", "--instance-type", "ml.m5.12xlarge", "--name", "x"
    )
    assert "no price is known for ml.m5.12xlarge in us-east-1" in result.out


def test_an_endpoint_that_had_failed_is_replaced(ready, infra, monkeypatch):
    monkeypatch.setattr(update, "POLL_SECONDS", 0.01)
    infra(*ASYNC)
    sagemaker = ready.client("sagemaker")
    arn = sagemaker.describe_endpoint(EndpointName="dalle")["EndpointArn"]
    failed = {
        "EndpointName": "dalle",
        "EndpointArn": arn,
        "EndpointConfigName": "x",
        "EndpointStatus": "Failed",
    }

    def describe(request: dict[str, Any]) -> dict[str, Any]:
        if not ready.requests["DeleteEndpoint"]:
            return failed
        ready.handlers.pop("DescribeEndpoint")
        ready.refuse("DescribeEndpoint", "ValidationException", "Could not find endpoint")
        return {"EndpointStatus": "Deleting"}

    ready.handlers["DescribeEndpoint"] = describe
    result = infra(*ASYNC)
    assert result.code == 0, result.err
    assert "had failed; deleted" in result.out
    assert sagemaker.describe_endpoint(EndpointName="dalle")["EndpointStatus"] == "InService"
