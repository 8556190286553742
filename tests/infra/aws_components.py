"""Inference components of a simulated account, which moto has none of."""

from collections.abc import Callable
from functools import partial
from typing import Any

from botocore.exceptions import ClientError

KIND = "InferenceComponent"
INSTANCES = "sagemaker:variant:DesiredInstanceCount"
COPIES = "sagemaker:inference-component:DesiredCopyCount"
PLACE, VARIANT = "inference-component/", "/variant/copies"
SCALING = {
    "DeregisterScalableTarget": "deregister_scalable_target",
    "DescribeScalableTargets": "describe_scalable_targets",
    "DescribeScalingPolicies": "describe_scaling_policies",
    "PutScalingPolicy": "put_scaling_policy",
    "RegisterScalableTarget": "register_scalable_target",
}
Handler = Callable[[dict[str, Any]], dict[str, Any]]


class RefusedError(Exception):
    """What a handler answers with an error: its code, and its message."""


class InferenceComponents:
    """The components of one account, by their names. client: of one of moto's services.

    Each is in service as soon as it is made. Those that the account has forgotten are gone.
    """

    def __init__(self, client: Callable[[str], Any]) -> None:
        self._client = client
        self.found: dict[str, dict[str, Any]] = {}
        self._shared: set[str] = set()
        self._tags: dict[str, list[dict[str, str]]] = {}

    @property
    def handlers(self) -> dict[str, Handler]:
        return {
            f"Create{KIND}": self._create,
            f"Describe{KIND}": self._describe,
            f"List{KIND}s": self._list,
            f"Update{KIND}": self._update,
            f"Delete{KIND}": self._delete,
            "ListTags": self._list_tags,
            "AddTags": self._add_tags,
            "CreateEndpointConfig": self._create_config,
            "DescribeEndpointConfig": self._describe_config,
            "DeleteEndpoint": self._delete_endpoint,
            **{name: partial(self._scale, method) for name, method in SCALING.items()},
        }

    def _create_config(self, request: dict[str, Any]) -> dict[str, Any]:
        """moto wants a model in every variant: it is given any."""
        variants = request["ProductionVariants"]
        if "ModelName" not in variants[0]:
            self._shared.add(request["EndpointConfigName"])
            any_model = self._client("sagemaker").list_models()["Models"][0]["ModelName"]
            variants = [{**each, "ModelName": any_model} for each in variants]
        given = {**request, "ProductionVariants": variants}
        return self._passed_on("create_endpoint_config", given)

    def _describe_config(self, request: dict[str, Any]) -> dict[str, Any]:
        found = self._passed_on("describe_endpoint_config", request)
        if request["EndpointConfigName"] in self._shared:
            for variant in found["ProductionVariants"]:
                del variant["ModelName"]
        return found

    def _create(self, request: dict[str, Any]) -> dict[str, Any]:
        name, endpoint = request[f"{KIND}Name"], request["EndpointName"]
        arn = f"arn:aws:sagemaker:us-east-1:123456789012:inference-component/{name}"
        described = self._client("sagemaker").describe_endpoint(EndpointName=endpoint)
        copies = request["RuntimeConfig"]["CopyCount"]
        self.found[name] = {
            **{key: request[key] for key in set(request) - {"Tags", "RuntimeConfig"}},
            f"{KIND}Arn": arn,
            f"{KIND}Status": "InService",
            "EndpointArn": described["EndpointArn"],
            "RuntimeConfig": {"DesiredCopyCount": copies, "CurrentCopyCount": copies},
            "CreationTime": 0,
            "LastModifiedTime": 0,
        }
        self._tags[arn] = request["Tags"]
        return {f"{KIND}Arn": arn}

    def _describe(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.found[request[f"{KIND}Name"]]
        except KeyError:
            raise RefusedError("ValidationException", "Could not find the component") from None

    def _list(self, request: dict[str, Any]) -> dict[str, Any]:
        part, endpoint = request.get("NameContains", ""), request.get("EndpointNameEquals")
        entries = [
            {key: value for key, value in found.items() if key != "Specification"}
            for name, found in self.found.items()
            if part in name and endpoint in (None, found["EndpointName"])
        ]
        return {f"{KIND}s": entries}

    def _update(self, request: dict[str, Any]) -> dict[str, Any]:
        found = self._describe(request)
        found["Specification"] = request["Specification"]
        return {f"{KIND}Arn": found[f"{KIND}Arn"]}

    def _delete(self, request: dict[str, Any]) -> dict[str, Any]:
        self._describe(request)
        del self.found[request[f"{KIND}Name"]]
        return {}

    def _delete_endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        names = [
            name
            for name, each in self.found.items()
            if each["EndpointName"] == request["EndpointName"]
        ]
        if names:
            raise RefusedError("ValidationException", f"the endpoint hosts components: {names}")
        return self._passed_on("delete_endpoint", request)

    def _list_tags(self, request: dict[str, Any]) -> dict[str, Any]:
        tags = self._tags.get(request["ResourceArn"])
        return {"Tags": tags} if tags is not None else self._passed_on("list_tags", request)

    def _add_tags(self, request: dict[str, Any]) -> dict[str, Any]:
        tags = self._tags.get(request["ResourceArn"])
        if tags is None:
            return self._passed_on("add_tags", request)
        new = {tag["Key"] for tag in request["Tags"]}
        kept = [tag for tag in tags if tag["Key"] not in new]
        self._tags[request["ResourceArn"]] = [*kept, *request["Tags"]]
        return {"Tags": self._tags[request["ResourceArn"]]}

    def _scale(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        """moto scales instances alone: copies are those of a variant that no endpoint has."""
        given = dict(request)
        if given.get("ResourceId", "").startswith(PLACE):
            given["ResourceId"] = _of_variant(given["ResourceId"])
            given |= {"ScalableDimension": INSTANCES} if "ScalableDimension" in given else {}
        if "ResourceIds" in given:
            given["ResourceIds"] = [_of_variant(each) for each in given["ResourceIds"]]
        answer = self._passed_on(method, given, "application-autoscaling")
        for entries in answer.values():
            for each in entries if isinstance(entries, list) else ():
                place, copies, _ = each.get("ResourceId", "").partition(VARIANT)
                if copies:
                    name = place.removeprefix("endpoint/")
                    each |= {"ResourceId": PLACE + name, "ScalableDimension": COPIES}
        return answer

    def _passed_on(
        self, method: str, request: dict[str, Any], service: str = "sagemaker"
    ) -> dict[str, Any]:
        try:
            answer = getattr(self._client(service), method)(**request)
        except ClientError as error:
            details = error.response["Error"]
            raise RefusedError(details["Code"], details["Message"]) from error
        return {key: value for key, value in answer.items() if key != "ResponseMetadata"}


def _of_variant(place: str) -> str:
    return f"endpoint/{place.removeprefix(PLACE)}{VARIANT}" if place.startswith(PLACE) else place
