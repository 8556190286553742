"""Several models on the hosts of one real-time endpoint, which scale to none."""

from typing import Any

import boto3
import pytest

from infra.endpoint.calls import direct
from infra.endpoint.fleet.copies import component_name
from tests.infra.aws_account import BUCKET

MODEL = f"s3://{BUCKET}/models/job/output/model.tar.gz"
OTHER = f"s3://{BUCKET}/models/other/output/model.tar.gz"
REALTIME = ["deploy", "--mode", "realtime", "--model", MODEL]
STARS = [*REALTIME, "--component", "stars", "--instance-type", "ml.m5.xlarge"]
MOONS = ["deploy", "--mode", "realtime", "--model", OTHER, "--component", "moons"]


@pytest.fixture
def ready(account, infra):
    """An account with a stack, an image and two models."""
    infra("bootstrap")
    account.put_image()
    for model in (MODEL, OTHER):
        account.put_object(model.partition(f"{BUCKET}/")[2])
    return account


@pytest.fixture
def dry(account, infra):
    """A function: words of `deploy` -> operation -> parameters of its request in a dry run."""

    def plan(*words: object) -> dict[str, Any]:
        result = infra(*words, "--dry-run", "--json")
        assert result.code == 0, result.err
        return {each["operation"]: each["parameters"] for each in result.json["requests"]}

    return plan


def test_the_hosts_scale_to_none_and_name_no_model(dry):
    sent = dry(*STARS, "--max-instances", 3, "--startup-seconds", 900)
    (variant,) = sent["CreateEndpointConfig"]["ProductionVariants"]
    assert variant["ManagedInstanceScaling"] == {
        "Status": "ENABLED",
        "MinInstanceCount": 0,
        "MaxInstanceCount": 3,
    }
    assert not {"ModelName", "ContainerStartupHealthCheckTimeoutInSeconds"} & set(variant)
    assert "ExecutionRoleArn" in sent["CreateEndpointConfig"]
    component = sent["CreateInferenceComponent"]
    assert component["InferenceComponentName"] == "dalle--stars"
    assert component["VariantName"] == variant["VariantName"]
    assert component["RuntimeConfig"] == {"CopyCount": 1}
    assert component["Specification"] == {
        "ModelName": sent["CreateModel"]["ModelName"],
        "StartupParameters": {
            "ModelDataDownloadTimeoutInSeconds": 600,
            "ContainerStartupHealthCheckTimeoutInSeconds": 900,
        },
        "ComputeResourceRequirements": {
            "MinMemoryRequiredInMb": 4096,
            "NumberOfCpuCoresRequired": 2.0,
        },
    }


def test_a_copy_on_a_host_with_gpus_takes_one_of_them_and_no_cores(dry):
    sent = dry(*REALTIME, "--component", "stars", "--instance-type", "ml.g5.12xlarge")
    needs = sent["CreateInferenceComponent"]["Specification"]["ComputeResourceRequirements"]
    assert needs == {"MinMemoryRequiredInMb": 4096, "NumberOfAcceleratorDevicesRequired": 1}
    (variant,) = sent["CreateEndpointConfig"]["ProductionVariants"]
    assert variant["InferenceAmiVersion"].endswith("gpu-3-1")


def test_the_network_is_that_of_the_hosts_and_not_of_the_model(dry):
    network = ["--subnets", "subnet-12345678", "--security-groups", "sg-12345678", "--isolate"]
    sent = dry(*STARS, *network)
    assert sent["CreateEndpointConfig"]["EnableNetworkIsolation"]
    assert sent["CreateEndpointConfig"]["VpcConfig"]["Subnets"] == ["subnet-12345678"]
    assert not {"VpcConfig", "EnableNetworkIsolation"} & set(sent["CreateModel"])


@pytest.mark.slow
def test_copies_scale_to_none_and_a_request_that_meets_none_starts_one(ready, infra):
    result = infra(*STARS, "--max-copies", 2)
    assert result.code == 0, result.err
    assert "scaling of dalle--stars" in result.out
    assert "0 to 2 copies, made" in result.out
    assert "nothing without requests" in result.out
    scaling = boto3.client("application-autoscaling")
    (target,) = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert target["ResourceId"] == "inference-component/dalle--stars"
    assert target["ScalableDimension"] == "sagemaker:inference-component:DesiredCopyCount"
    assert (target["MinCapacity"], target["MaxCapacity"]) == (0, 2)
    policies = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    arns = {policy["PolicyName"]: policy["PolicyARN"] for policy in policies}
    assert set(arns) == {"dalle--stars-requests", "dalle--stars-copy"}
    (alarm,) = ready.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert alarm["MetricName"] == "NoCapacityInvocationFailures"
    assert alarm["Dimensions"] == [{"Name": "InferenceComponentName", "Value": "dalle--stars"}]
    assert alarm["AlarmActions"] == [arns["dalle--stars-copy"]]


@pytest.mark.slow
def test_a_copy_may_always_be_there(ready, infra):
    result = infra(*STARS, "--min-instances", 1)
    assert result.code == 0, result.err
    assert "always on" in result.out
    assert not ready.requests["RegisterScalableTarget"]


@pytest.mark.slow
def test_a_second_model_takes_the_hosts_that_are_there(ready, infra):
    infra(*STARS, "--max-instances", 2)
    result = infra(*MOONS)
    assert result.code == 0, result.err
    assert ready.requests["CreateEndpointConfig"] == ready.requests["CreateEndpoint"] == 1
    assert not ready.requests["UpdateEndpoint"]
    assert sorted(ready.components.found) == ["dalle--moons", "dalle--stars"]
    first, second = (
        each["Specification"]["ModelName"] for each in ready.bodies("CreateInferenceComponent")
    )
    assert first != second
    shown = infra("status", "--json").json
    assert [each["name"] for each in shown["components"]] == ["dalle--stars", "dalle--moons"]
    assert {each["copies"] for each in shown["components"]} == {"1 of 1 copies"}


@pytest.mark.slow
def test_a_second_run_makes_nothing_and_a_new_model_replaces_the_old_one(ready, infra):
    at_most = ["--max-instances", 2]
    infra(*STARS, *at_most)
    made = ready.requests.copy()
    result = infra(*STARS[:-2], *at_most)  # the type is that of the hosts
    assert result.code == 0, result.err
    again = ready.requests - made
    assert not [name for name in again if name.startswith(("Create", "Put", "Update", "Register"))]
    assert infra(*[OTHER if word == MODEL else word for word in STARS], *at_most).code == 0
    (update,) = ready.bodies("UpdateInferenceComponent")
    assert (
        update["Specification"]["ModelName"]
        != (ready.bodies("CreateInferenceComponent")[0]["Specification"]["ModelName"])
    )
    assert not ready.requests["UpdateEndpoint"]


@pytest.mark.slow
def test_types_that_are_named_replace_the_hosts_of_every_model(ready, infra):
    infra(*STARS)
    result = infra(*MOONS, "--instance-type", "ml.m5.2xlarge")
    assert result.code == 0, result.err
    assert ready.requests["UpdateEndpoint"] == 1
    result = infra(*MOONS, "--max-instances", 3, "--isolate")
    assert result.code == 1
    assert "--max-instances, --isolate would change the hosts of endpoint dalle" in result.err


@pytest.mark.slow
def test_an_endpoint_of_one_model_takes_no_second_one_and_the_other_way_round(ready, infra):
    infra(*STARS)
    result = infra(*REALTIME, "--instance-type", "ml.m5.large")
    assert result.code == 1
    assert "endpoint dalle has several models, named by --component" in result.err
    infra(*REALTIME, "--name", "one", "--instance-type", "ml.m5.large")
    result = infra(*STARS, "--name", "one")
    assert result.code == 1
    assert "endpoint dalle--one has one model, which an update cannot change" in result.err


@pytest.mark.slow
def test_a_component_of_others_is_left_alone(ready, infra):
    infra(*STARS)
    arn = ready.components.found["dalle--stars"]["InferenceComponentArn"]
    tag = {"Key": "dalle:project", "Value": "theirs"}
    boto3.client("sagemaker").add_tags(ResourceArn=arn, Tags=[tag])
    result = infra(*STARS)
    assert result.code == 1
    assert "component dalle--stars is not project dalle's and is left alone" in result.err


@pytest.mark.slow
def test_teardown_deletes_components_before_their_endpoint(ready, infra):
    infra(*STARS)
    infra(*MOONS)
    logs = ready.client("logs")
    logs.create_log_group(logGroupName="/aws/sagemaker/InferenceComponents/dalle--stars")
    logs.create_log_group(logGroupName="/aws/sagemaker/InferenceComponents/dalle-other")
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    left = [each["logGroupName"] for each in logs.describe_log_groups()["logGroups"]]
    assert left == ["/aws/sagemaker/InferenceComponents/dalle-other"]
    said = [line.partition("  ")[0] for line in result.out.splitlines() if "deleted" in line]
    assert said.index("component dalle--stars") < said.index("endpoint dalle")
    assert "alarm dalle--stars-copy" in said
    assert ready.components.found == {}
    assert ready.client("cloudwatch").describe_alarms()["MetricAlarms"] == []
    assert "nothing is left" in result.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mode", "async"], "--component is for --mode realtime: one of --mode async has one"),
        (["--copy-memory-mb", 64], "--copy-memory-mb must be 128 or more, got 64"),
        (["--copy-cpus", 0.1], "--copy-cpus must be 0.25 or more, got 0.1"),
        (["--copy-cpus", 5], "ml.m5.xlarge has 4 cores, and a copy would need 5"),
        (["--copy-memory-mb", 16384], "ml.m5.xlarge has 16,384 MiB of memory, of which"),
        (["--max-copies", 0], "--max-copies must be 1 or more, got 0"),
        (["--component", "a--b"], "with single dashes between them, got 'a--b'"),
        (["--component", "a" * 60], "a component's name has at most 63 characters"),
        (["--rollout", "all-at-once"], "--rollout is for an endpoint of one model"),
    ],
)
def test_copies_that_the_platform_refuses_are_refused_before_any_request(
    account, infra, words, says
):
    result = infra(*STARS, *words)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0


def test_options_of_copies_need_a_component(account, infra):
    result = infra(*REALTIME, "--max-copies", 2, "--copy-cpus", 1)
    assert result.code == 1
    assert "--copy-cpus, --max-copies: for a model of several, named by --component" in result.err
    assert account.requests.total() == 0


def test_components_of_two_endpoints_cannot_have_one_name():
    endpoints = ["dalle", "dalle--rt", "dalle--rt-a", "dalle-rt"]
    names = [component_name(each, name) for each in endpoints for name in ("rt", "a", "rt-a")]
    assert len(set(names)) == len(names)
    assert component_name("dalle", "dalle--rt") == component_name("dalle", "rt") == "dalle--rt"


def asked(account) -> list[tuple[str, str]]:
    """Path and component of every request to an endpoint, which the platform answers by itself."""
    found: list[tuple[str, str]] = []

    def answer(path, headers, body):
        given = {name.lower(): value for name, value in headers.items()}
        found.append((path, given.get("x-amzn-sagemaker-inference-component", "")))
        message = b'{"message": "Inference component dalle--stars has no capacity to process"}'
        kind = [("Content-Type", "application/json"), ("x-amzn-errortype", "ValidationError")]
        return 400, kind, message

    account.runtime = answer
    return found


@pytest.mark.slow
def test_a_request_names_its_model_and_waits_for_the_first_copy(ready, infra, monkeypatch):
    infra(*STARS)
    monkeypatch.setattr(direct, "COPY_POLL_SECONDS", 0.0)
    found = asked(ready)
    result = infra("invoke", "a star", "--timeout", 0)
    assert result.code == 1
    assert "has no capacity" in result.err
    assert found == [("/endpoints/dalle/invocations", "dalle--stars")]


@pytest.mark.slow
def test_a_model_must_be_named_where_there_are_several(ready, infra):
    infra(*STARS)
    infra(*MOONS)
    found = asked(ready)
    result = infra("invoke", "a star")
    assert result.code == 1
    assert "give --component, one of dalle--moons, dalle--stars" in result.err
    infra("invoke", "a star", "--component", "moons", "--timeout", 0)
    assert [component for _, component in found] == ["dalle--moons"]


@pytest.mark.slow
def test_an_endpoint_of_one_model_is_asked_without_a_component(ready, infra):
    infra(*REALTIME, "--instance-type", "ml.m5.large")
    found = asked(ready)
    result = infra("invoke", "a star", "--component", "stars")
    assert result.code == 1
    assert "endpoint dalle has one model: leave --component out" in result.err
    infra("invoke", "a star")
    assert [component for _, component in found] == [""]


def test_openais_clients_reach_a_component_by_its_path(infra, account):
    words = ["--openai", "--component", "stars", "--dry-run", "--json"]
    requests = infra("invoke", "a star", *words).json["requests"]
    path = "/endpoints/dalle/inference-components/dalle--stars/openai/v1/chat/completions"
    assert [each["operation"] for each in requests][-1] == f"POST {path}"
