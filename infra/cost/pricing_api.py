"""Prices from the AWS Pricing API: the response of GetProducts as rows of the table.

A product counts when its usage type is a name such as `Host:ml.g5.xlarge` after nothing but a
region's short name: reserved and savings variants have other words there. Prices of USD 0 (free
tiers, placeholders) are left out. Two different prices of one item are an error.
Knows nothing of the network: the caller passes the products in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dalle.errors import AwsError, PriceMissing
from infra.aws.request import Request
from infra.cost.prices import InstanceType, Price

API_REGION = "us-east-1"  # one of the few regions that answer; prices of all regions are there
USAGE_TYPES = {
    "Hosting": "Host",
    "AsyncInference": "AsyncInf",
    "Training": "Train",
    "BatchTransform": "Tsform",
    "Processing": "Processing",
    "Notebook": "Notebk",
}
_PREFIX = r"^(?:[A-Z]+\d*-)?"  # USE1-, EU-, APN1-; none at all for some products of us-east-1
_SERVERLESS = re.compile(_PREFIX + r"ServerlessInf:Mem-(\d+)GB$")
_UNITS = {"Hrs": "hour", "GB-Mo": "GB-month"}


@dataclass(frozen=True, slots=True)
class Product:
    """A product's on-demand price in USD per the API's unit, and its source."""

    usd: float
    unit: str
    usage_type: str
    sku: str
    effective: str
    attributes: dict[str, str]

    def source(self) -> str:
        """Return the source as the table names it."""
        return f"AWS Pricing API: SKU {self.sku}, {self.usage_type}, effective {self.effective}"


def request_for(item: str, region: str) -> Request:
    """Return the GetProducts request for an item of the table in a region."""
    service, narrowed = "AmazonSageMaker", ("instanceName", item)
    if item == "lambda":
        service, narrowed = "AWSLambda", ("productFamily", "Serverless")
    elif item == "serverless":
        narrowed = ("productFamily", "ML Serverless")
    elif item == "endpoint":
        narrowed = ("volumeType", "General Purpose-Hosting")
    filters = [narrowed, ("regionCode", region)]
    parameters = {
        "ServiceCode": service,
        "FormatVersion": "aws_v1",
        "Filters": [
            {"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in filters
        ],
    }
    return Request("pricing", "GetProducts", **parameters)


def read_prices(
    products: Iterable[str], item: str, region: str, components: Sequence[str], *, today: str
) -> tuple[list[Price], InstanceType | None]:
    """Return the prices of one item, and the description of an instance type.

    products: the PriceList of every page of the response to `request_for`, each a JSON text.
    components: of an instance type; other items are read whole. today: the date of the rows.
    Raises PriceMissing when nothing is found, AwsError when the API contradicts itself.
    """
    found = list(_charged(products))

    def row(component: str, each: Product, usd: float, unit: str, note: str | None = None) -> Price:
        return Price.model_validate(
            {
                "item": item,
                "component": component,
                "region": region,
                "usd": usd,
                "unit": unit,
                "date": today,
                "confidence": "A",
                "source": each.source(),
                "note": note,
            }
        )

    prices: list[Price] = []
    specification = None
    if item == "serverless":
        sized = [each for each in found if _SERVERLESS.search(each.usage_type)]
        if sized:
            each = _single_price(item, sized, _usd_per_gb)
            prices.append(row("compute", each, round(_usd_per_gb(each), 12), "GB-second"))
    elif item == "lambda":
        for component, usage, unit, factor in (
            ("compute", "Lambda-GB-Second", "GB-second", 1),
            ("requests", "Request", "million requests", 1_000_000),
        ):
            matching = _ending(found, usage)
            if matching:
                each = _single_price(f"{item} ({component})", matching)
                prices.append(row(component, each, round(each.usd * factor, 12), unit))
    elif item == "endpoint":
        matching = [each for each in found if each.unit == "GB-Mo"]
        if matching:
            each = _single_price(item, matching)
            prices.append(row("volume", each, each.usd, _UNITS[each.unit]))
    else:
        for component in components:
            matching = _ending(found, f"{USAGE_TYPES[component]}:{item}")
            matching = [each for each in matching if each.unit == "Hrs"]
            if matching:
                each = _single_price(f"{item} ({component})", matching)
                prices.append(row(component, each, each.usd, "hour"))
                specification = specification or _specification(each.attributes)
    if not prices:
        wanted = f" ({', '.join(components)})" if item.startswith("ml.") else ""
        raise PriceMissing(
            f"the Pricing API has no on-demand price of {item}{wanted} in {region}; it may not be "
            "offered there, or the name is misspelt",
            field=item,
        )
    return prices, specification


def _charged(products: Iterable[str]) -> Iterator[Product]:
    """Yield every product with an on-demand price above 0.

    Of a price in tiers this is the highest, which applies to the first units.
    """
    for text in products:
        product = json.loads(text)
        attributes = product["product"]["attributes"]
        dimensions = [
            (float(dimension["pricePerUnit"].get("USD", 0)), dimension["unit"], term)
            for term in product.get("terms", {}).get("OnDemand", {}).values()
            for dimension in term["priceDimensions"].values()
        ]
        charged = [each for each in dimensions if each[0] > 0]
        if charged:
            usd, unit, term = max(charged, key=lambda each: each[0])
            yield Product(
                usd=usd,
                unit=unit,
                usage_type=attributes.get("usagetype", ""),
                sku=product["product"]["sku"],
                effective=term.get("effectiveDate", "unknown")[:10],
                attributes=attributes,
            )


def _ending(found: Sequence[Product], usage: str) -> list[Product]:
    pattern = re.compile(_PREFIX + re.escape(usage) + "$")
    return [each for each in found if pattern.search(each.usage_type)]


def _usd_per_gb(serverless: Product) -> float:
    size = _SERVERLESS.search(serverless.usage_type)
    assert size is not None
    return serverless.usd / int(size[1])


def _single_price(
    what: str, found: Sequence[Product], amount: Callable[[Product], float] = lambda each: each.usd
) -> Product:
    if max(map(amount, found)) > min(map(amount, found)) * 1.000001:
        said = "; ".join(f"{amount(each):g} ({each.source()})" for each in found)
        raise AwsError(f"the Pricing API gives different prices for {what}: {said}")
    return found[0]


def _specification(attributes: dict[str, str]) -> InstanceType | None:
    """Return vCPUs, memory and GPUs where the API has all: "4", "16 GiB", "1" or "N/A"."""
    memory = re.match(r"[\d.,]+", attributes.get("memory", ""))
    vcpus = attributes.get("vCpu", "")
    if not memory or not vcpus.isdigit():
        return None
    gpus = attributes.get("gpu", attributes.get("physicalGpu", "0"))
    count = int(gpus) if gpus.isdigit() else 0
    name = attributes.get("physicalGpu") if count else None
    return InstanceType(
        vcpus=int(vcpus),
        memory_gib=float(memory[0].replace(",", "")),
        gpus=count,
        gpu=name if name and not name.isdigit() else None,
    )
