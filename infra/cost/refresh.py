"""Prices from the AWS Pricing API: GetProducts into rows of the table.

A product is taken when its usage type ends with what it is (`Host:ml.g5.xlarge`), with nothing but
a region's short name before it: reserved and savings variants have other words there. Prices of
USD 0 (free tiers, placeholders) are left out. Two different prices for one thing are an error.
Knows no network: whoever asks hands in what fetches the products of a request.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle.errors import AwsError, PriceMissing
from infra.aws.request import Call
from infra.cost.prices import (
    DEFAULT_REGION,
    InstanceType,
    Price,
    load_prices,
    render_prices,
    save_prices,
)

API_REGION = "us-east-1"  # one of the few regions that answer; prices of all regions are there
USAGE_TYPES = {
    "Hosting": "Host",
    "AsyncInference": "AsyncInf",
    "Training": "Train",
    "BatchTransform": "Tsform",
    "Processing": "Processing",
    "Notebook": "Notebk",
}
DEFAULT_COMPONENTS = ("Hosting", "AsyncInference")
_PREFIX = r"^(?:[A-Z]+\d*-)?"  # USE1-, EU-, APN1-; none at all for some products of us-east-1
_SERVERLESS = re.compile(_PREFIX + r"ServerlessInf:Mem-(\d+)GB$")
_UNITS = {"Hrs": "hour", "GB-Mo": "GB-month"}


@dataclass(frozen=True, slots=True)
class Found:
    """A product's on-demand price: USD per the API's unit, and where it stood."""

    usd: float
    unit: str
    usage_type: str
    sku: str
    effective: str
    attributes: dict[str, str]

    def source(self) -> str:
        """What the table says of where a figure comes from."""
        return f"AWS Pricing API: SKU {self.sku}, {self.usage_type}, effective {self.effective}"


def request_for(item: str, region: str) -> Call:
    """The GetProducts request that prices an item of the table in a region."""
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
    return Call("pricing", "GetProducts", parameters)


def read_prices(
    products: Iterable[str], item: str, region: str, components: Sequence[str], *, today: str
) -> tuple[list[Price], InstanceType | None]:
    """What the Pricing API says of one item, and of an instance type what it has.

    products: PriceList of every page that answers `request_for`, each a text of JSON. components:
    of an instance type, those wanted; other items are given whole. today: the date that the rows
    carry. Raises PriceMissing when nothing is found, AwsError when the API contradicts itself.
    """
    found = list(_charged(products))

    def row(component: str, each: Found, usd: float, unit: str, note: str | None = None) -> Price:
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
            each = _only(item, sized, _usd_per_gb)
            prices.append(row("compute", each, round(_usd_per_gb(each), 12), "GB-second"))
    elif item == "lambda":
        for component, usage, unit, factor in (
            ("compute", "Lambda-GB-Second", "GB-second", 1),
            ("requests", "Request", "million requests", 1_000_000),
        ):
            matching = _ending(found, usage)
            if matching:
                each = _only(f"{item} ({component})", matching)
                prices.append(row(component, each, round(each.usd * factor, 12), unit))
    elif item == "endpoint":
        matching = [each for each in found if each.unit == "GB-Mo"]
        if matching:
            each = _only(item, matching)
            prices.append(row("volume", each, each.usd, _UNITS[each.unit]))
    else:
        for component in components:
            matching = _ending(found, f"{USAGE_TYPES[component]}:{item}")
            matching = [each for each in matching if each.unit == "Hrs"]
            if matching:
                each = _only(f"{item} ({component})", matching)
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


def _charged(products: Iterable[str]) -> Iterator[Found]:
    """Every product with an on-demand price above 0.

    Of a price in tiers the dearest is given, which is the one that the first units cost.
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
            yield Found(
                usd=usd,
                unit=unit,
                usage_type=attributes.get("usagetype", ""),
                sku=product["product"]["sku"],
                effective=term.get("effectiveDate", "unknown")[:10],
                attributes=attributes,
            )


def _ending(found: Sequence[Found], usage: str) -> list[Found]:
    pattern = re.compile(_PREFIX + re.escape(usage) + "$")
    return [each for each in found if pattern.search(each.usage_type)]


def _usd_per_gb(serverless: Found) -> float:
    size = _SERVERLESS.search(serverless.usage_type)
    assert size is not None
    return serverless.usd / int(size[1])


def _only(
    what: str, found: Sequence[Found], amount: Callable[[Found], float] = lambda each: each.usd
) -> Found:
    if max(map(amount, found)) > min(map(amount, found)) * 1.000001:
        said = "; ".join(f"{amount(each):g} ({each.source()})" for each in found)
        raise AwsError(f"the Pricing API gives different prices for {what}: {said}")
    return found[0]


def _specification(attributes: dict[str, str]) -> InstanceType | None:
    """vCPUs, memory and GPUs where the API names them all: "4", "16 GiB", "1" or "N/A"."""
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


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `prices refresh`."""
    from infra.aws import client as aws

    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where the table is written"
    )
    parser.add_argument(
        "--type",
        action="append",
        metavar="ITEM",
        help="an instance type, or serverless, lambda, endpoint (its volume); repeatable; without "
        "it every item of the table that has a price in the region",
    )
    parser.add_argument(
        "--component",
        action="append",
        choices=sorted(USAGE_TYPES),
        help="of instance types; repeatable; default Hosting, and AsyncInference where it is sold",
    )
    aws.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Do what `add_arguments` read. Raises PriceMissing, AccessError, AwsError, UserError."""
    from infra.aws import client as aws

    table = load_prices(options.prices)
    region = options.region or DEFAULT_REGION
    items = options.type or list(
        dict.fromkeys(
            each.item
            for each in table.prices
            if each.region == region and each.component not in ("data", "Notebook")
        )
    )
    if not items:
        raise PriceMissing(f"the table has no prices of {region}: name what to read with --type")
    account = aws.connect(options)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    components = options.component or DEFAULT_COMPONENTS
    read: list[Price] = []
    types: dict[str, InstanceType] = {}
    missing: list[str] = []
    for item in items:
        products = account.items(request_for(item, region), "PriceList", region=API_REGION)
        if account.dry_run:
            list(products)  # prints the request
            continue
        try:
            prices, specification = read_prices(products, item, region, components, today=today)
        except PriceMissing as error:
            missing.append(str(error))
            continue
        read += prices
        if specification is not None:
            types[item] = specification
    if read:
        save_prices(table.with_rows(read, types), options.out)
        account.console.say(render_prices(read))
        account.console.say(f"{len(read)} prices read; {options.out} is the whole table")
    if missing and (options.type or not read) and not account.dry_run:
        raise PriceMissing("\n".join(missing))
    for line in missing:
        account.console.say(line)
    return account.console.finish(
        read=[each.model_dump() for each in read], missing=missing, written=str(options.out)
    )
