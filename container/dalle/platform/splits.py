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
_OF_MANY = (".tar", ".parquet", ".jsonl", ".csv", ".tsv", ".recordio", ".manifest")


def split_of(name: str, *, is_folder: bool) -> Split | None:
    """Return the split that a folder, or a file of many pairs, belongs to by its name."""
    name = name.lower()
    if is_folder:
        return _OF_NAME.get(name)
    stem = name.partition(".")[0]
    if not name.endswith(_OF_MANY):
        return None
    return _OF_NAME.get(stem) or _OF_NAME.get(re.split(r"[-_]?\d|-of-|-", stem)[0])
