"""Names of the parts that people divide a data set into: to train on, and to hold out.

Knows names alone; who reads folders or buckets passes theirs. Standard library only.
"""

from __future__ import annotations

import re
from typing import Literal

Split = Literal["train", "validation", "test"]

NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing", "heldout", "held_out", "held-out", "holdout"),
}
"""A split -> names of its folder, in any case; shards and tables begin with them (train-0001.tar).

Pictures of `test` are for neither training nor validation.
"""
_OF_NAME: dict[str, Split] = {name: split for split, names in NAMES.items() for name in names}
_OF_YEAR = re.compile(r"([a-z]+)[-_]?\d{4}")
_OF_MANY = (".tar", ".parquet", ".jsonl", ".csv", ".tsv", ".recordio", ".manifest")


def split_of(name: str, *, is_folder: bool) -> Split | None:
    """Return the split that a folder, or a file of many pairs, belongs to by its name."""
    name = name.lower()
    if is_folder:
        return _OF_NAME.get(name)
    stem = name.partition(".")[0]
    if not holds_many(name):
        return None
    return _OF_NAME.get(stem) or _OF_NAME.get(re.split(r"[-_]?\d|-of-|-", stem)[0])


def split_of_year(name: str) -> Split | None:
    """Return the split of a folder whose name ends with a year, such as COCO's `val2017`."""
    found = _OF_YEAR.fullmatch(name.lower())
    return _OF_NAME.get(found[1]) if found else None


def holds_many(name: str) -> bool:
    """Whether a file of this name is a shard or a table: a file of many pairs."""
    return name.lower().endswith(_OF_MANY)
