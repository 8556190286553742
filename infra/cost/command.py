"""`prices`: print the dated price table, or refresh it from the AWS Pricing API."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable
from pathlib import Path

from dalle.errors import PriceMissing
from infra.aws import client as aws
from infra.aws.output import aligned, write_file
from infra.cost.prices import DEFAULT_REGION, HOURS_PER_MONTH, InstanceType, Price, load_prices
from infra.cost.pricing_api import API_REGION, USAGE_TYPES, read_prices, request_for

DEFAULT_COMPONENTS = ("Hosting", "AsyncInference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `prices`, `prices show` and `prices refresh`."""
    parser.set_defaults(type=None, region=None, json=False, prices=None)  # `prices` is `show`
    actions = parser.add_subparsers(dest="action", metavar="show | refresh")
    show = actions.add_parser(
        "show",
        help="print prices with date, source and confidence",
        description="Print prices with their dates, sources and confidence.",
        epilog="example:\n  python -m infra prices show --type ml.m5.xlarge --type ml.g5.xlarge",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("--type", action="append", metavar="ITEM", help="only this one; repeatable")
    show.add_argument("--region", help="only this region")
    show.add_argument("--json", action="store_true", help="print JSON")
    add_table_argument(show)
    refresh = actions.add_parser(
        "refresh",
        help="read prices from the AWS Pricing API into a file",
        description="Read prices from the AWS Pricing API (needs the permission "
        "pricing:GetProducts) and write the whole table to a file, with new rows in place of old.",
        epilog="example:\n  python -m infra prices refresh --type ml.g5.xlarge "
        "--region eu-west-1 --out prices.json\n  python -m infra compare --prices prices.json ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    refresh.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to write the table"
    )
    refresh.add_argument(
        "--type",
        action="append",
        metavar="ITEM",
        help="an instance type, or serverless, lambda, endpoint (its volume); repeatable; "
        "default: every item of the table with a price in the region",
    )
    refresh.add_argument(
        "--component",
        action="append",
        choices=sorted(USAGE_TYPES),
        help="of instance types; repeatable; default: Hosting, and AsyncInference where it is sold",
    )
    aws.add_arguments(refresh)
    add_table_argument(refresh)


def add_table_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--prices FILE`."""
    parser.add_argument(
        "--prices", type=Path, metavar="FILE", help="another price table, written by `refresh`"
    )


def run(options: argparse.Namespace) -> int:
    """Print or refresh the table. Raises UserError, PriceMissing, AccessError, AwsError."""
    return run_refresh(options) if options.action == "refresh" else run_show(options)


def run_show(options: argparse.Namespace) -> int:
    """Print the rows that the options select. Raises PriceMissing for a type without a price."""
    table = load_prices(options.prices)
    shown = [
        each
        for each in table.prices
        if (not options.region or each.region == options.region)
        and (not options.type or each.item in options.type)
    ]
    for item in options.type or ():
        if item not in {each.item for each in shown}:
            table.price(item, "Hosting", options.region or DEFAULT_REGION)
    if options.json:
        print(json.dumps([each.model_dump() for each in shown], indent=1))
    else:
        print(render_prices(shown))
    return 0


def run_refresh(options: argparse.Namespace) -> int:
    """Read prices from the Pricing API and write the whole table."""
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
        raise PriceMissing(f"the table has no prices of {region}: name the types with --type")
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
            prices, instance_type = read_prices(products, item, region, components, today=today)
        except PriceMissing as error:
            missing.append(str(error))
            continue
        read += prices
        if instance_type is not None:
            types[item] = instance_type
    if read:
        write_file(options.out, table.with_rows(read, types).model_dump_json(indent=1) + "\n")
        account.output.line(render_prices(read))
        account.output.line(f"{len(read)} prices read; {options.out} is the whole table")
    if missing and (options.type or not read) and not account.dry_run:
        raise PriceMissing("\n".join(missing))
    for line in missing:
        account.output.line(line)
    return account.output.finish(
        read=[each.model_dump() for each in read], missing=missing, written=str(options.out)
    )


def render_prices(prices: Iterable[Price]) -> str:
    """Return a table for the terminal, with the price of a month of 730 hours."""
    lines = [
        ("item", "component", "region", "USD", "per", "USD/month", "date", "confidence", "source")
    ]
    for each in prices:
        month = f"{each.usd * HOURS_PER_MONTH:,.2f}" if each.unit == "hour" else ""
        figures = (each.amount, each.unit, month, each.dated, each.confidence)
        lines.append((each.item, each.component, each.region, *figures, each.described_source))
    return "\n".join(aligned(lines))
