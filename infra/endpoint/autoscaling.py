"""Autoscaling: instances by the requests in progress, or by the queue down to none.

The number of instances of an asynchronous endpoint follows its backlog for each instance. That
metric does not exist without an instance, so a second policy starts the first one: an alarm on
HasBacklogWithoutCapacity adds an instance as soon as a request waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.aws.limits import Deployment
from infra.aws.project import Project
from infra.aws.request import Request, placeholder

SERVICE = "application-autoscaling"
NAMESPACE = {"ServiceNamespace": "sagemaker"}
DIMENSION = "sagemaker:variant:DesiredInstanceCount"
SCALE_IN_SECONDS = 300
SCALE_OUT_SECONDS = 60
WAKE_COOLDOWN_SECONDS = 300
BACKLOG_TARGET = 2.0
"""Waiting requests for each instance, above which another one is started."""


def scalable_target(endpoint: str, variant: str) -> dict[str, str]:
    """Return the service's identifier of the number of instances of one endpoint."""
    return {
        **NAMESPACE,
        "ResourceId": f"endpoint/{endpoint}/variant/{variant}",
        "ScalableDimension": DIMENSION,
    }


def alarm_name(endpoint: str) -> str:
    return f"{endpoint}-wake"


def is_wanted(deployment: Deployment) -> bool:
    """Return whether the number of instances may change at all."""
    return deployment.mode != "serverless" and deployment.max_instances > deployment.min_instances


def scale(
    project: Project, deployment: Deployment, variant: str, tags: list[dict[str, str]]
) -> None:
    """Create or remove the endpoint's scaling; leave unchanged what is right already."""
    aws, output = project.aws, project.output
    where = scalable_target(deployment.name, variant)
    target = bounds_of(project, where)
    if not is_wanted(deployment):
        if target is not None:
            remove(project, deployment.name, where)
            output.item(f"scaling of {deployment.name}", "removed")
        return
    request = Request(
        SERVICE, "DescribeScalingPolicies", **NAMESPACE, ResourceId=where["ResourceId"]
    )
    there = {policy["PolicyName"]: policy for policy in aws.items(request, "ScalingPolicies")}
    bounds = {"MinCapacity": deployment.min_instances, "MaxCapacity": deployment.max_instances}
    same = target is not None and bounds.items() <= target.items()
    if not same:
        aws.call(Request(SERVICE, "RegisterScalableTarget", **where, **bounds))
    for policy in policies(deployment, where):
        name = policy.parameters["PolicyName"]
        found = there.get(name)
        if found is None or not _says(found, policy.parameters):
            same = False
            found = aws.call(policy, answer={"PolicyARN": placeholder(f"ARN of policy {name}")})
        if policy.parameters["PolicyType"] == "StepScaling":
            same = _ensure_alarm(project, deployment.name, found["PolicyARN"], tags) and same
    words = f"{deployment.min_instances} to {deployment.max_instances} instances"
    output.item(f"scaling of {deployment.name}", f"{words}, {'already there' if same else 'made'}")


def bounds_of(project: Project, where: dict[str, str]) -> dict[str, Any] | None:
    """Return the scalable target as the service describes it; None when there is none."""
    ids = [where["ResourceId"]]
    request = Request(SERVICE, "DescribeScalableTargets", **NAMESPACE, ResourceIds=ids)
    return next(iter(project.aws.items(request, "ScalableTargets")), None)


def policies(deployment: Deployment, where: dict[str, str]) -> list[Request]:
    """Return the requests for the policies of a real-time or an asynchronous endpoint."""
    if deployment.mode == "realtime":
        return [_tracking(where, f"{deployment.name}-requests", _by_requests(deployment))]
    step = {
        "AdjustmentType": "ChangeInCapacity",
        "MetricAggregationType": "Average",
        "Cooldown": WAKE_COOLDOWN_SECONDS,
        "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
    }
    return [
        _tracking(where, f"{deployment.name}-backlog", _by_backlog(deployment.name)),
        _policy(where, alarm_name(deployment.name), "StepScaling", step),
    ]


def wake_alarm(endpoint: str, policy_arn: str, tags: list[dict[str, str]]) -> Request:
    """Return the alarm that starts the first instance: one minute of backlog without capacity."""
    return Request(
        "cloudwatch",
        "PutMetricAlarm",
        AlarmName=alarm_name(endpoint),
        AlarmDescription=f"Requests wait at endpoint {endpoint}, which has no instance.",
        Namespace="AWS/SageMaker",
        MetricName="HasBacklogWithoutCapacity",
        Dimensions=[{"Name": "EndpointName", "Value": endpoint}],
        Statistic="Average",
        Period=60,
        EvaluationPeriods=1,
        Threshold=1.0,
        ComparisonOperator="GreaterThanOrEqualToThreshold",
        TreatMissingData="notBreaching",
        AlarmActions=[policy_arn],
        Tags=tags,
    )


def _ensure_alarm(
    project: Project, endpoint: str, policy_arn: str, tags: list[dict[str, str]]
) -> bool:
    """Create the alarm unless it exists for this policy; return whether it existed."""
    alarm = _find_alarm(project, endpoint)
    if alarm is not None and alarm.get("AlarmActions") == [policy_arn]:
        return True
    project.aws.call(wake_alarm(endpoint, policy_arn, tags))
    return False


def _find_alarm(project: Project, endpoint: str) -> dict[str, Any] | None:
    """Return the endpoint's alarm. Raises UserError for one that is not the project's."""
    name = alarm_name(endpoint)
    request = Request("cloudwatch", "DescribeAlarms", AlarmNames=[name])
    alarm = next(iter(project.aws.items(request, "MetricAlarms")), None)
    if alarm is not None:
        project.check_owner(f"alarm {name}", alarm_tags(project, alarm))
    return alarm


def alarm_tags(project: Project, alarm: dict[str, Any]) -> list[Mapping[str, str]]:
    request = Request("cloudwatch", "ListTagsForResource", ResourceARN=alarm["AlarmArn"])
    return list(project.aws.call(request)["Tags"])


def remove(project: Project, endpoint: str, where: dict[str, str]) -> None:
    """Remove the scalable target, and with it its policies; and remove the alarm."""
    project.aws.find(Request(SERVICE, "DeregisterScalableTarget", **where))
    if _find_alarm(project, endpoint) is not None:
        project.aws.call(Request("cloudwatch", "DeleteAlarms", AlarmNames=[alarm_name(endpoint)]))


def _tracking(where: dict[str, str], name: str, configuration: dict[str, Any]) -> Request:
    cooldowns = {"ScaleInCooldown": SCALE_IN_SECONDS, "ScaleOutCooldown": SCALE_OUT_SECONDS}
    return _policy(where, name, "TargetTrackingScaling", {**configuration, **cooldowns})


def _policy(where: dict[str, str], name: str, kind: str, settings: dict[str, Any]) -> Request:
    named = {"PolicyName": name, "PolicyType": kind, f"{kind}PolicyConfiguration": settings}
    return Request(SERVICE, "PutScalingPolicy", **where, **named)


def _by_requests(deployment: Deployment) -> dict[str, Any]:
    # Requests in progress, not arriving: one request can keep an instance busy for a minute.
    metric = "SageMakerVariantConcurrentRequestsPerModelHighResolution"
    return {
        "TargetValue": float(deployment.concurrent_per_instance),
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


def _says(there: dict[str, Any], deployment: Any) -> bool:
    """Return whether a policy has the wanted values; the service adds further fields."""
    if isinstance(deployment, dict):
        return all(key in there and _says(there[key], value) for key, value in deployment.items())
    return bool(there == deployment)
