"""Autoscaling: instances by the requests in progress, or by the queue down to none.

The number of instances of an asynchronous endpoint follows its backlog for each instance. That
metric does not exist without an instance, so a second policy starts the first one: an alarm on
HasBacklogWithoutCapacity adds an instance as soon as a request waits. Copies of a model that shares
hosts scale alike, by requests in progress and by requests that met no copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.aws.deployment import Copies, Deployment
from infra.aws.project import Project
from infra.aws.request import Request, includes, placeholder

SERVICE = "application-autoscaling"
NAMESPACE = {"ServiceNamespace": "sagemaker"}
INSTANCES = "sagemaker:variant:DesiredInstanceCount"
COPIES = "sagemaker:inference-component:DesiredCopyCount"
SCALE_IN_SECONDS = 300
SCALE_OUT_SECONDS = 60
WAKE_COOLDOWN_SECONDS = 300
BACKLOG_TARGET = 2.0
"""Waiting requests for each instance, above which another one is started."""


@dataclass(frozen=True)
class Scaling:
    """What scales, between which numbers, and how.

    name: of the endpoint or component, which policies and alarm are named after. unit: what is
    counted. where: the service's identifier. alarm: that starts the first one, without its action;
    empty where one is always there.
    """

    name: str
    unit: str
    where: dict[str, str]
    least: int
    most: int
    policies: list[Request]
    alarm: dict[str, Any] = field(default_factory=dict)

    @property
    def alarm_name(self) -> str:
        """The name of its alarm, whether there is one or not."""
        is_of_copies = self.where["ScalableDimension"] == COPIES
        return copies_alarm_name(self.name) if is_of_copies else alarm_name(self.name)

    @property
    def is_wanted(self) -> bool:
        """Whether the number may change at all."""
        return self.most > self.least


def scalable_target(endpoint: str, variant: str) -> dict[str, str]:
    """Return the service's identifier of the number of instances of one endpoint."""
    resource = f"endpoint/{endpoint}/variant/{variant}"
    return {**NAMESPACE, "ResourceId": resource, "ScalableDimension": INSTANCES}


def scalable_copies(component: str) -> dict[str, str]:
    """Return the service's identifier of the number of copies of one model."""
    resource = f"inference-component/{component}"
    return {**NAMESPACE, "ResourceId": resource, "ScalableDimension": COPIES}


def alarm_name(endpoint: str) -> str:
    return f"{endpoint}-wake"


def copies_alarm_name(component: str) -> str:
    return f"{component}-copy"


def of_instances(deployment: Deployment, variant: str) -> Scaling:
    """Return the scaling of an endpoint with one model; a serverless one has no instances."""
    where = scalable_target(deployment.name, variant)
    is_async = deployment.mode == "async"
    bounds = deployment.min_instances, deployment.max_instances
    return Scaling(
        deployment.name,
        "instances",
        where,
        *(bounds if deployment.mode != "serverless" else (0, 0)),
        policies=_by_queue(deployment.name, where)
        if is_async
        else [_tracking(where, f"{deployment.name}-requests", _by_requests(deployment))],
        alarm=wake_alarm(deployment.name) if is_async else {},
    )


def of_copies(copies: Copies, concurrent: int) -> Scaling:
    """Return the scaling of a model that shares hosts. concurrent: requests for each copy."""
    where, name = scalable_copies(copies.name), copies_alarm_name(copies.name)
    policies = [_tracking(where, f"{copies.name}-requests", _by_requests_of_copies(concurrent))]
    wakes = copies.least == 0
    return Scaling(
        copies.name,
        "copies",
        where,
        copies.least,
        copies.most,
        policies=[*policies, _one_more(where, name)] if wakes else policies,
        alarm=copies_alarm(copies.name) if wakes else {},
    )


def scale(project: Project, scaling: Scaling, tags: list[dict[str, str]]) -> None:
    """Create or remove the scaling; leave unchanged what is right already."""
    aws, output, where = project.aws, project.output, scaling.where
    target = bounds_of(project, where)
    if not scaling.is_wanted:
        if target is not None:
            remove(project, scaling)
            output.item(f"scaling of {scaling.name}", "removed")
        return
    request = Request(
        SERVICE, "DescribeScalingPolicies", **NAMESPACE, ResourceId=where["ResourceId"]
    )
    there = {policy["PolicyName"]: policy for policy in aws.items(request, "ScalingPolicies")}
    bounds = {"MinCapacity": scaling.least, "MaxCapacity": scaling.most}
    same = target is not None and bounds.items() <= target.items()
    if not same:
        aws.call(Request(SERVICE, "RegisterScalableTarget", **where, **bounds))
    for policy in scaling.policies:
        name = policy.parameters["PolicyName"]
        found = there.get(name)
        if found is None or not includes(found, policy.parameters):
            same = False
            found = aws.call(policy, answer={"PolicyARN": placeholder(f"ARN of policy {name}")})
        if policy.parameters["PolicyType"] == "StepScaling":
            same = _ensure_alarm(project, scaling, found["PolicyARN"], tags) and same
    words = f"{scaling.least} to {scaling.most} {scaling.unit}"
    output.item(f"scaling of {scaling.name}", f"{words}, {'already there' if same else 'made'}")


def bounds_of(project: Project, where: dict[str, str]) -> dict[str, Any] | None:
    """Return the scalable target as the service describes it; None when there is none."""
    ids = [where["ResourceId"]]
    request = Request(SERVICE, "DescribeScalableTargets", **NAMESPACE, ResourceIds=ids)
    return next(iter(project.aws.items(request, "ScalableTargets")), None)


def wake_alarm(endpoint: str) -> dict[str, Any]:
    """Return the alarm that starts the first instance: one minute of backlog without capacity."""
    return _alarm(
        alarm_name(endpoint),
        f"Requests wait at endpoint {endpoint}, which has no instance.",
        "HasBacklogWithoutCapacity",
        {"EndpointName": endpoint},
        "Average",
    )


def copies_alarm(component: str) -> dict[str, Any]:
    """Return the alarm that starts the first copy: a request that none could answer."""
    return _alarm(
        copies_alarm_name(component),
        f"Requests come to {component}, which has no copy.",
        "NoCapacityInvocationFailures",
        {"InferenceComponentName": component},
        "Sum",
    )


def _alarm(
    name: str, why: str, metric: str, dimensions: Mapping[str, str], statistic: str
) -> dict[str, Any]:
    return {
        "AlarmName": name,
        "AlarmDescription": why,
        "Namespace": "AWS/SageMaker",
        "MetricName": metric,
        "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions.items()],
        "Statistic": statistic,
        "Period": 60,
        "EvaluationPeriods": 1,
        "Threshold": 1.0,
        "ComparisonOperator": "GreaterThanOrEqualToThreshold",
        "TreatMissingData": "notBreaching",
    }


def _ensure_alarm(
    project: Project, scaling: Scaling, policy_arn: str, tags: list[dict[str, str]]
) -> bool:
    """Create the alarm unless it exists for this policy; return whether it existed."""
    alarm = _find_alarm(project, scaling.alarm_name)
    if alarm is not None and alarm.get("AlarmActions") == [policy_arn]:
        return True
    action = {"AlarmActions": [policy_arn], "Tags": tags}
    project.aws.call(Request("cloudwatch", "PutMetricAlarm", **scaling.alarm, **action))
    return False


def _find_alarm(project: Project, name: str) -> dict[str, Any] | None:
    """Return an alarm of ours. Raises UserError for one that is not the project's."""
    request = Request("cloudwatch", "DescribeAlarms", AlarmNames=[name])
    alarm = next(iter(project.aws.items(request, "MetricAlarms")), None)
    if alarm is not None:
        project.check_owner(f"alarm {name}", alarm_tags(project, alarm))
    return alarm


def alarm_tags(project: Project, alarm: dict[str, Any]) -> list[Mapping[str, str]]:
    request = Request("cloudwatch", "ListTagsForResource", ResourceARN=alarm["AlarmArn"])
    return list(project.aws.call(request)["Tags"])


def remove(project: Project, scaling: Scaling) -> None:
    """Remove the scalable target, and with it its policies; and remove the alarm."""
    project.aws.find(Request(SERVICE, "DeregisterScalableTarget", **scaling.where))
    if _find_alarm(project, scaling.alarm_name) is not None:
        names = [scaling.alarm_name]
        project.aws.call(Request("cloudwatch", "DeleteAlarms", AlarmNames=names))


def _tracking(where: dict[str, str], name: str, configuration: dict[str, Any]) -> Request:
    cooldowns = {"ScaleInCooldown": SCALE_IN_SECONDS, "ScaleOutCooldown": SCALE_OUT_SECONDS}
    return _policy(where, name, "TargetTrackingScaling", {**configuration, **cooldowns})


def _policy(where: dict[str, str], name: str, kind: str, settings: dict[str, Any]) -> Request:
    named = {"PolicyName": name, "PolicyType": kind, f"{kind}PolicyConfiguration": settings}
    return Request(SERVICE, "PutScalingPolicy", **where, **named)


def _one_more(where: dict[str, str], name: str) -> Request:
    """Return the policy by which an alarm starts the first instance or copy."""
    step = {
        "AdjustmentType": "ChangeInCapacity",
        "MetricAggregationType": "Average",
        "Cooldown": WAKE_COOLDOWN_SECONDS,
        "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
    }
    return _policy(where, name, "StepScaling", step)


def _by_queue(endpoint: str, where: dict[str, str]) -> list[Request]:
    backlog = _tracking(where, f"{endpoint}-backlog", _by_backlog(endpoint))
    return [backlog, _one_more(where, alarm_name(endpoint))]


def _by_requests_of_copies(concurrent: int) -> dict[str, Any]:
    metric = "SageMakerInferenceComponentConcurrentRequestsPerCopyHighResolution"
    return {
        "TargetValue": float(concurrent),
        "PredefinedMetricSpecification": {"PredefinedMetricType": metric},
    }


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
