"""What an endpoint costs while nobody uses it, from the dated price table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle.errors import PriceMissing
from infra.aws.limits import Deployment, Mode
from infra.aws.project import Project
from infra.aws.request import Call
from infra.cost.prices import HOURS_PER_MONTH, hourly
from infra.endpoint.invoke import mode_of


@dataclass(frozen=True)
class Standing:
    """How an endpoint stands there. usd_per_month: of what it holds now; None without a price.

    words: the price with its date, or why there is none.
    """

    mode: Mode
    instance_type: str
    instances: int
    usd_per_month: float | None
    words: str

    @property
    def hosts(self) -> str:
        return f"{self.instances} x {self.instance_type}" if self.instance_type else "no instances"

    @property
    def cost(self) -> str:
        if self.usd_per_month is None:
            return self.words
        return f"{self.usd_per_month:,.2f} USD a month{self.words and f' ({self.words})'}"


def standing(opened: Project, endpoint: str) -> Standing | None:
    """What an endpoint has and costs now; None when it is gone."""
    found = opened.aws.find(Call("sagemaker", "DescribeEndpoint", {"EndpointName": endpoint}))
    if found is None:
        return None
    name = found["EndpointConfigName"]
    config = opened.aws.find(
        Call("sagemaker", "DescribeEndpointConfig", {"EndpointConfigName": name})
    )
    if config is None:
        return Standing("realtime", "", 0, None, f"its configuration {name} is gone")
    return of_config(config, found, opened.aws.region)


def of_config(config: dict[str, Any], endpoint: dict[str, Any], region: str) -> Standing:
    """The cost of the endpoint's instances as many as there are now, scaled or not."""
    mode = mode_of(config)
    if mode == "serverless":
        share = config["ProductionVariants"][0]["ServerlessConfig"]
        warm = share.get("ProvisionedConcurrency")
        if warm:
            return Standing(mode, "", 0, None, f"{warm} provisioned, of which no price is known")
        return Standing(mode, "", 0, 0.0, "paid by the second of work")
    kind = config["ProductionVariants"][0]["InstanceType"]
    count = endpoint.get("ProductionVariants", [{}])[0].get("CurrentInstanceCount", 0)
    try:
        price = hourly(kind, region=region)
    except PriceMissing:
        words = f"no price is known for {kind} in {region}"
        return Standing(mode, kind, count, None, words)
    usd = price.usd * HOURS_PER_MONTH * count
    return Standing(mode, kind, count, usd, f"{count} x {price.describe()}")


def expected(wanted: Deployment, region: str) -> str:
    """What a deployment will cost while nobody uses it, and while somebody does."""
    if wanted.mode == "serverless":
        if wanted.provisioned_concurrency:
            return f"{wanted.provisioned_concurrency} provisioned, of which no price is known"
        return "nothing while nobody asks; paid by the second of work"
    try:
        price = hourly(str(wanted.instance_type), region=region)
    except PriceMissing:
        return f"no price is known for {wanted.instance_type} in {region}"
    if wanted.min_instances == 0:
        return f"nothing while nobody asks; an instance {price.describe()} while it works"
    usd = price.usd * HOURS_PER_MONTH * wanted.min_instances
    return f"{usd:,.2f} USD a month always on ({wanted.min_instances} x {price.describe()})"
