"""AWS's prices: a dated table with a source for every row.

A price that is not in the table is an error that says how to read it; none is guessed. The table
is `prices.json` beside this file, or any file of its form. Knows nothing of measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle.errors import PriceMissing, UserError

DEFAULT_REGION = "us-east-1"
HOURS_PER_MONTH = 730.0  # as in AWS's calculator

Confidence = Literal["A", "B", "C", "low"]
CONFIDENCE: dict[Confidence, str] = {
    "A": "read from the Pricing API by `prices refresh`",
    "B": "dated, read by others, or from a file of AWS's",
    "C": "third-party tables, or inferred",
    "low": "doubtful",
}
CONFIDENCE_NOTE = (
    "Behind a price stand its date and a letter that says how far to trust it: "
    + "; ".join(f"{letter}, {meaning}" for letter, meaning in CONFIDENCE.items())
    + "."
)


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(_Row):
    """One price and its source.

    item: an instance type, or `serverless`, `lambda`, `endpoint`. component: the part of it that is
    paid for (Hosting, Training, compute, volume, ...). usd: per unit, above 0. date: as precise as
    the source ("2026-09-28", "2026-09", "2026"); None where the source has none.
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
        """The key of the row, unique in a table."""
        return self.item, self.component, self.region

    def describe(self) -> str:
        """The figure with its date and confidence: `0.23 USD per hour (2026-09-28, B)`."""
        return f"{self.amount} USD per {self.unit} ({self.dated}, {self.confidence})"

    def describe_item(self) -> str:
        """The item with the figure: `ml.m5.xlarge at 0.23 USD per hour (2026-09-28, B)`."""
        return f"{self.item} at {self.describe()}"

    @property
    def described_source(self) -> str:
        """The source, with the note where there is one."""
        return f"{self.source}; {self.note}" if self.note else self.source

    @property
    def amount(self) -> str:
        """The dollars in plain digits, all of them: `0.0000166667`."""
        return f"{self.usd:.10f}".rstrip("0").rstrip(".")


class InstanceType(_Row):
    """An instance type. memory_gib: GiB of main memory. gpu: the model of its GPUs."""

    vcpus: int = Field(ge=1)
    memory_gib: float = Field(gt=0)
    gpus: int = Field(ge=0)
    gpu: str | None = None


class NotOffered(_Row):
    """An item that AWS does not sell, so that no refresh finds a price of it."""

    item: str
    component: str
    source: str


class PriceTable(_Row):
    """A price table. gathered: the day on which it was compiled."""

    about: str
    gathered: str = Field(pattern=r"^20\d\d-\d\d-\d\d$")
    not_offered: list[NotOffered] = []
    instance_types: dict[str, InstanceType] = {}
    prices: list[Price]

    def price(self, item: str, component: str, region: str = DEFAULT_REGION) -> Price:
        """Return one price. Raises PriceMissing, whose message says how to read it."""
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
            f"no price is known for {what}{elsewhere}. Read it from AWS and use the new table: "
            f"python -m infra prices refresh --type {item} --component {component} "
            f"--region {region} --out prices.json, then --prices prices.json",
            field=item,
        )

    def hourly(
        self, instance_type: str, region: str = DEFAULT_REGION, component: str = "Hosting"
    ) -> Price:
        """Return USD per hour of one instance. Raises PriceMissing."""
        return self.price(instance_type, component, region)

    def instance_type(self, name: str) -> InstanceType:
        """Return the description of a type. Raises PriceMissing where the table has none."""
        try:
            return self.instance_types[name]
        except KeyError:
            raise PriceMissing(
                f"nothing is known of the instance type {name}; known are "
                f"{', '.join(self.instance_types)}. To add it: python -m infra prices refresh "
                f"--type {name} --out prices.json, then --prices prices.json",
                field=name,
            ) from None

    def single_gpu(self, name: str, region: str = DEFAULT_REGION) -> str:
        """Return the cheapest type with one GPU of the model that a type has several of.

        Returns `name` where it has not several, or where no smaller one has a price of hosting.
        """
        kind = self.instance_types.get(name)
        if kind is None or kind.gpus < 2:
            return name
        smaller = [
            each
            for each in self.prices
            if (each.component, each.region) == ("Hosting", region)
            and (other := self.instance_types.get(each.item)) is not None
            and (other.gpus, other.gpu) == (1, kind.gpu)
        ]
        return min(smaller, key=lambda each: each.usd).item if smaller else name

    def with_rows(
        self, prices: Iterable[Price], instance_types: dict[str, InstanceType] | None = None
    ) -> PriceTable:
        """Return a table in which these rows replace older ones of the same key."""
        rows = {each.key: each for each in (*self.prices, *prices)}
        types = self.instance_types | (instance_types or {})
        return self.model_copy(update={"prices": list(rows.values()), "instance_types": types})


def load_prices(path: Path | None = None) -> PriceTable:
    """Return the table in a file, or the one of this package.

    Raises UserError that names the file and its fault.
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
        raise UserError(f"{path} has two prices each of {', '.join(twice)}; keep one of each")
    return table
