"""What AWS charges: a dated table with a source for every row, looked up and shown.

    python -m infra prices show --type ml.g5.xlarge
    python -m infra prices refresh --type ml.g5.xlarge --region eu-west-1 --out prices-2026-11.json

A price that is not in the table is an error that says how to read it; none is ever guessed. The
table is `prices.json` beside this file, or any file of its form. Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle.errors import PriceMissing, UserError
from dalle.platform.disk import write_atomically
from infra.aws.output import aligned

DEFAULT_REGION = "us-east-1"
HOURS_PER_MONTH = 730.0  # what AWS's own calculator takes

Confidence = Literal["A", "B", "C", "low"]
CONFIDENCE: dict[Confidence, str] = {
    "A": "read from the Pricing API by `prices refresh`",
    "B": "a dated read by others, or a file of AWS's own",
    "C": "third-party tables, or inferred",
    "low": "doubtful",
}


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(_Row):
    """One price and where it comes from.

    item: an instance type, or `serverless`, `lambda`, `endpoint`. component: what is paid for of
    it (Hosting, Training, compute, volume, ...). usd: per unit, above 0. date: as exactly as it is
    known ("2026-09-28", "2026-09", "2026"); None where the source has none.
    """

    item: str
    component: str
    region: str
    usd: float = Field(gt=0, allow_inf_nan=False)
    unit: Literal["hour", "GB-second", "GB", "GB-month", "million requests"]
    date: str | None = Field(pattern=r"^20\d\d(-\d\d){0,2}$")
    confidence: Confidence
    source: str = Field(min_length=1)
    note: str | None = None

    @property
    def dated(self) -> str:
        """The date to print beside the figure."""
        return self.date or "undated"

    @property
    def key(self) -> tuple[str, str, str]:
        """What a table holds only once."""
        return self.item, self.component, self.region

    def describe(self) -> str:
        """The figure with its date and confidence: `0.23 USD per hour (2026-09-28, B)`."""
        return f"{self.amount} USD per {self.unit} ({self.dated}, {self.confidence})"

    def describe_item(self) -> str:
        """What it is, with the figure: `ml.m5.xlarge at 0.23 USD per hour (2026-09-28, B)`."""
        return f"{self.item} at {self.describe()}"

    @property
    def amount(self) -> str:
        """The dollars in plain digits, none of them lost: `0.0000166667`."""
        return f"{self.usd:.10f}".rstrip("0").rstrip(".")


class InstanceType(_Row):
    """What a type of instance has. memory_gib: GiB of main memory; gpu: the model of its GPUs."""

    vcpus: int = Field(ge=1)
    memory_gib: float = Field(gt=0)
    gpus: int = Field(ge=0)
    gpu: str | None = None


class NotOffered(_Row):
    """Something that AWS does not sell, so that no refresh will find a price of it."""

    item: str
    component: str
    source: str


class PriceTable(_Row):
    """All prices that are known. gathered: the day on which the table was put together."""

    about: str
    gathered: str = Field(pattern=r"^20\d\d-\d\d-\d\d$")
    not_offered: list[NotOffered] = []
    instance_types: dict[str, InstanceType] = {}
    prices: list[Price]

    def price(self, item: str, component: str, region: str = DEFAULT_REGION) -> Price:
        """The one price of something. Raises PriceMissing that names it and how to read it."""
        for each in self.prices:
            if each.key == (item, component, region):
                return each
        what = f"{item} ({component}) in {region}"
        for lacking in self.not_offered:
            if (lacking.item, lacking.component) == (item, component):
                raise PriceMissing(f"{what} is not offered: {lacking.source}", field=item)
        known = [
            f"{other.component} in {other.region}" for other in self.prices if other.item == item
        ]
        elsewhere = f"; known of it: {', '.join(known)}" if known else ""
        raise PriceMissing(
            f"no price is known for {what}{elsewhere}. Read it from AWS and use what was read: "
            f"python -m infra prices refresh --type {item} --component {component} "
            f"--region {region} --out prices.json, then --prices prices.json",
            field=item,
        )

    def hourly(
        self, instance_type: str, region: str = DEFAULT_REGION, component: str = "Hosting"
    ) -> Price:
        """USD per hour of one instance. Raises PriceMissing."""
        return self.price(instance_type, component, region)

    def instance_type(self, name: str) -> InstanceType:
        """What a type has. Raises PriceMissing where the table does not say."""
        try:
            return self.instance_types[name]
        except KeyError:
            raise PriceMissing(
                f"nothing is known of the instance type {name}; known are "
                f"{', '.join(self.instance_types)}. To add it: python -m infra prices refresh "
                f"--type {name} --out prices.json, then --prices prices.json",
                field=name,
            ) from None

    def with_rows(
        self, prices: Iterable[Price], instance_types: dict[str, InstanceType] | None = None
    ) -> PriceTable:
        """A table in which newer rows stand in the places of older ones; the others stay."""
        rows = {each.key: each for each in (*self.prices, *prices)}
        types = self.instance_types | (instance_types or {})
        return self.model_copy(update={"prices": list(rows.values()), "instance_types": types})


def load_prices(path: Path | None = None) -> PriceTable:
    """The table in a file, or the one that comes with this package.

    Raises UserError that names the file and what is wrong in it.
    """
    place = path or resources.files("infra.cost") / "prices.json"
    try:
        table = PriceTable.model_validate_json(place.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"the price table {path} cannot be read: {error}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no price table: {error}") from error
    keys = [each.key for each in table.prices]
    twice = sorted({" ".join(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"{path} has two prices each of {', '.join(twice)}; leave one of each")
    return table


def save_prices(table: PriceTable, path: Path) -> None:
    """Write a table to a file that `load_prices` reads, at once or not at all."""
    write_atomically(path, table.model_dump_json(indent=1, exclude_none=False) + "\n")


def hourly(
    instance_type: str,
    *,
    region: str = DEFAULT_REGION,
    component: str = "Hosting",
    table: PriceTable | None = None,
) -> Price:
    """USD per hour of one instance, from the table that comes with this package or another.

    component: Hosting, Training, BatchTransform or AsyncInference. Raises PriceMissing.
    """
    return (table or load_prices()).hourly(instance_type, region, component)


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`prices`, `prices show` and `prices refresh`."""
    from infra.cost import refresh as prices_refresh

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
        "pricing:GetProducts) and write the whole table, with what was read in the place of older "
        "rows, to a file of your own.",
        epilog="example:\n  python -m infra prices refresh --type ml.g5.xlarge "
        "--region eu-west-1 --out prices.json\n  python -m infra compare --prices prices.json ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prices_refresh.add_arguments(refresh)
    add_table_argument(refresh)


def add_table_argument(parser: argparse.ArgumentParser) -> None:
    """`--prices FILE`."""
    parser.add_argument(
        "--prices", type=Path, metavar="FILE", help="a table of your own, as `refresh` wrote it"
    )


def run(options: argparse.Namespace) -> int:
    """Do what `add_arguments` read. Raises UserError."""
    if options.action == "refresh":
        from infra.cost import refresh as prices_refresh

        return prices_refresh.run(options)
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


def render_prices(prices: Iterable[Price]) -> str:
    """A table for the terminal; what an instance costs in a month of 730 hours stands beside it."""
    head = (
        "item",
        "component",
        "region",
        "USD",
        "per",
        "USD/month",
        "date",
        "confidence",
        "source",
    )
    lines = [head]
    for each in prices:
        month = f"{each.usd * HOURS_PER_MONTH:,.2f}" if each.unit == "hour" else ""
        source = f"{each.source}; {each.note}" if each.note else each.source
        figures = (each.amount, each.unit, month, each.dated, each.confidence, source)
        lines.append((each.item, each.component, each.region, *figures))
    return "\n".join(aligned(lines))
