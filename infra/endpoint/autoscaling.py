"""How many instances an endpoint has: by the requests in progress, or by the queue down to none.

An asynchronous endpoint goes to zero by its backlog for each instance. That number does not exist
while there is no instance, so a second policy wakes the first one: an alarm on
HasBacklogWithoutCapacity adds an instance as soon as anything waits.
"""

from __future__ import annotations

from typing import Any

from infra.aws.limits import Deployment
from infra.aws.project import Project
from infra.aws.request import Call, placeholder

DIMENSION = "sagemaker:variant:DesiredInstanceCount"
SCALE_IN_SECONDS = 300
SCALE_OUT_SECONDS = 60
WAKE_COOLDOWN_SECONDS = 300
BACKLOG_TARGET = 2.0
"""Waiting requests for each instance that another one is started for."""


def resource(endpoint: str, variant: str) -> dict[str, str]:
    """What the service calls the number of instances of one endpoint."""
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{endpoint}/variant/{variant}",
        "ScalableDimension": DIMENSION,
    }


def alarm_name(endpoint: str) -> str:
    return f"{endpoint}-wake"


def is_wanted(wanted: Deployment) -> bool:
    """Whether the number of instances may move at all."""
    return wanted.mode != "serverless" and wanted.max_instances > wanted.min_instances


def scale(opened: Project, wanted: Deployment, variant: str) -> None:
    """Give the endpoint the scaling it wants, or take it away; what is right already stays."""
    aws, console = opened.aws, opened.console
    where = resource(wanted.name, variant)
    targets = list(
        aws.items(
            Call(
                "application-autoscaling",
                "DescribeScalableTargets",
                {"ServiceNamespace": "sagemaker", "ResourceIds": [where["ResourceId"]]},
            ),
            "ScalableTargets",
        )
    )
    if not is_wanted(wanted):
        if targets:
            remove(opened, wanted.name, where)
            console.item(f"scaling of {wanted.name}", "removed")
        return
    asked = Call(
        "application-autoscaling",
        "DescribeScalingPolicies",
        {"ServiceNamespace": "sagemaker", "ResourceId": where["ResourceId"]},
    )
    there = {policy["PolicyName"]: policy for policy in aws.items(asked, "ScalingPolicies")}
    bounds = {"MinCapacity": wanted.min_instances, "MaxCapacity": wanted.max_instances}
    same = bool(targets) and bounds.items() <= targets[0].items()
    if not same:
        aws.call(Call("application-autoscaling", "RegisterScalableTarget", {**where, **bounds}))
    for policy in policies(wanted, where):
        name = policy.parameters["PolicyName"]
        found = there.get(name)
        if found is None or not _says(found, policy.parameters):
            same = False
            found = aws.call(policy, answer={"PolicyARN": placeholder(f"ARN of policy {name}")})
        if policy.parameters["PolicyType"] == "StepScaling":
            same = _ensure_alarm(opened, wanted.name, found["PolicyARN"]) and same
    words = f"{wanted.min_instances} to {wanted.max_instances} instances"
    console.item(f"scaling of {wanted.name}", f"{words}, {'already there' if same else 'made'}")


def policies(wanted: Deployment, where: dict[str, str]) -> list[Call]:
    """The requests for the policies of a real-time endpoint, or of an asynchronous one."""
    if wanted.mode == "realtime":
        return [_tracking(where, f"{wanted.name}-requests", _by_requests(wanted))]
    return [
        _tracking(where, f"{wanted.name}-backlog", _by_backlog(wanted.name)),
        Call(
            "application-autoscaling",
            "PutScalingPolicy",
            {
                **where,
                "PolicyName": alarm_name(wanted.name),
                "PolicyType": "StepScaling",
                "StepScalingPolicyConfiguration": {
                    "AdjustmentType": "ChangeInCapacity",
                    "MetricAggregationType": "Average",
                    "Cooldown": WAKE_COOLDOWN_SECONDS,
                    "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
                },
            },
        ),
    ]


def wake_alarm(endpoint: str, policy_arn: str, tags: list[dict[str, str]]) -> Call:
    """The alarm that starts the first instance: one minute with a backlog and nobody to do it."""
    return Call(
        "cloudwatch",
        "PutMetricAlarm",
        {
            "AlarmName": alarm_name(endpoint),
            "AlarmDescription": f"Requests wait at endpoint {endpoint}, which has no instance.",
            "Namespace": "AWS/SageMaker",
            "MetricName": "HasBacklogWithoutCapacity",
            "Dimensions": [{"Name": "EndpointName", "Value": endpoint}],
            "Statistic": "Average",
            "Period": 60,
            "EvaluationPeriods": 1,
            "Threshold": 1.0,
            "ComparisonOperator": "GreaterThanOrEqualToThreshold",
            "TreatMissingData": "notBreaching",
            "AlarmActions": [policy_arn],
            "Tags": tags,
        },
    )


def _ensure_alarm(opened: Project, endpoint: str, policy_arn: str) -> bool:
    """True when the alarm was there already, for this policy."""
    asked = Call("cloudwatch", "DescribeAlarms", {"AlarmNames": [alarm_name(endpoint)]})
    there = list(opened.aws.items(asked, "MetricAlarms"))
    if there and there[0].get("AlarmActions") == [policy_arn]:
        return True
    opened.aws.call(wake_alarm(endpoint, policy_arn, opened.tags))
    return False


def remove(opened: Project, endpoint: str, where: dict[str, str]) -> None:
    """Take the scaling away; its policies go with it, the alarm does not."""
    opened.aws.find(Call("application-autoscaling", "DeregisterScalableTarget", where))
    opened.aws.call(Call("cloudwatch", "DeleteAlarms", {"AlarmNames": [alarm_name(endpoint)]}))


def _tracking(where: dict[str, str], name: str, configuration: dict[str, Any]) -> Call:
    return Call(
        "application-autoscaling",
        "PutScalingPolicy",
        {
            **where,
            "PolicyName": name,
            "PolicyType": "TargetTrackingScaling",
            "TargetTrackingScalingPolicyConfiguration": {
                **configuration,
                "ScaleInCooldown": SCALE_IN_SECONDS,
                "ScaleOutCooldown": SCALE_OUT_SECONDS,
            },
        },
    )


def _by_requests(wanted: Deployment) -> dict[str, Any]:
    # Requests in progress, not those that arrive: one drawing can fill an instance for a minute.
    metric = "SageMakerVariantConcurrentRequestsPerModelHighResolution"
    return {
        "TargetValue": float(wanted.concurrent_per_instance),
        "PredefinedMetricSpecification": {"PredefinedMetricType": metric},
    }


def _by_backlog(endpoint: str) -> dict[str, Any]:
    return {
        "TargetValue": BACKLOG_TARGET,
        "CustomizedMetricSpecification": {
            "MetricName": "ApproximateBacklogSizePerInstance",
            "Namespace": "AWS/SageMaker",
            "Dimensions": [{"Name": "EndpointName", "Value": endpoint}],
            "Statistic": "Average",
        },
    }


def _says(there: dict[str, Any], wanted: Any) -> bool:
    """Whether a policy is as wanted; the service adds fields of its own."""
    if isinstance(wanted, dict):
        return all(key in there and _says(there[key], value) for key, value in wanted.items())
    return bool(there == wanted)
