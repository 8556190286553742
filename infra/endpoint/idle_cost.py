"""The cost of an endpoint without requests, from the dated price table."""

from __future__ import annotations

from dataclasses import dataclass

from dalle.errors import PriceMissing
from infra.aws.deployment import Deployment, Mode
from infra.aws.project import Project
from infra.aws.request import describe
from infra.cost.prices import HOURS_PER_MONTH, load_prices
from infra.endpoint.described import mode_of
from infra.endpoint.fleet.pool import types_of


@dataclass(frozen=True)
class IdleCost:
    """The cost of an endpoint with its present instances.

    usd_per_month: None without a price. note: the price with its date, or why there is none.
    """

    mode: Mode
    instance_type: str
    instances: int
    usd_per_month: float | None
    note: str

    @property
    def hosts(self) -> str:
        return f"{self.instances} x {self.instance_type}" if self.instance_type else "no instances"

    @property
    def description(self) -> str:
        if self.usd_per_month is None:
            return self.note
        return f"{self.usd_per_month:,.2f} USD a month{self.note and f' ({self.note})'}"


def idle_cost(project: Project, endpoint: str) -> IdleCost | None:
    """Return an endpoint's cost with its present instances; None when it does not exist."""
    found = project.aws.find(describe("Endpoint", endpoint))
    if found is None:
        return None
    name = found["EndpointConfigName"]
    config = project.aws.find(describe("EndpointConfig", name))
    if config is None:
        return IdleCost("realtime", "", 0, None, f"its configuration {name} is gone")
    region, mode = project.aws.region, mode_of(config)
    if mode == "serverless":
        share = config["ProductionVariants"][0]["ServerlessConfig"]
        warm = share.get("ProvisionedConcurrency")
        if warm:
            return IdleCost(mode, "", 0, None, f"{warm} provisioned, without a known price")
        return IdleCost(mode, "", 0, 0.0, "paid by the second of work")
    kind = types_of(config["ProductionVariants"][0])[0]
    count = found.get("ProductionVariants", [{}])[0].get("CurrentInstanceCount", 0)
    try:
        price = load_prices().hourly(kind, region)
    except PriceMissing:
        note = f"price unknown: no price is known for {kind} in {region}"
        return IdleCost(mode, kind, count, None, note)
    usd = price.usd * HOURS_PER_MONTH * count
    return IdleCost(mode, kind, count, usd, f"{count} x {price.describe()}")


def expected_idle_cost(deployment: Deployment, region: str) -> str:
    """Return in words what a deployment will cost without requests, and with them."""
    if deployment.mode == "serverless":
        if deployment.provisioned_concurrency:
            return f"{deployment.provisioned_concurrency} provisioned, without a known price"
        return "nothing without requests; paid by the second of work"
    try:
        price = load_prices().hourly(str(deployment.instance_type), region)
    except PriceMissing:
        kind = deployment.instance_type
        return f"price unknown: no price is known for {kind} in {region}"
    if deployment.min_instances == 0:
        return f"nothing without requests; an instance {price.describe()} while it works"
    usd = price.usd * HOURS_PER_MONTH * deployment.min_instances
    return f"{usd:,.2f} USD a month always on ({deployment.min_instances} x {price.describe()})"
