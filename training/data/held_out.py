"""Whether the pairs of a channel to train on include some that should be held out.

Told by the names of the pairs' folders and of the files that hold many. One rule for `train`,
`doctor` and `shard`. Images that no table names are no pairs, and may lie beside them.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from dalle.errors import DataError
from dalle.platform.splits import Split, holds_many, split_of, split_of_year
from training.data.pairs import Dataset
from training.data.skips import printable

TRAIN = "train"
"""The channel to train on."""
SHOWN = 5

Place = tuple[str, ...]
"""The parts of the path of a folder, or of a file that holds many pairs."""


@dataclass(frozen=True)
class HeldOut:
    """What should be held out: `data/val, data/test beside data/train`.

    is_all: whether there are no other pairs.
    """

    description: str
    is_all: bool


def find_held_out(names: Iterable[str]) -> HeldOut | None:
    """Tell which pairs should be held out by their names, such as `data/val-0001.tar/7.jpg`.

    Where the channel's folders first branch, and above, `val` or `test` is enough. Further in it
    counts only beside `train`, since a folder may be called `test` for other reasons; and so does a
    name with a year everywhere (COCO's `val2017` beside `train2017`).
    """
    directories = {tuple(_places(posixpath.dirname(name))) for name in names}
    children: dict[Place, set[str]] = defaultdict(set)
    for place in {place for places in directories for place in places}:
        children[place[:-1]].add(place[-1])
    first_branch = _first_branch(children, {_folder(places) for places in directories})
    found: dict[Split, list[Place]] = {"validation": [], "test": []}
    beside: Place | None = None
    for folder in sorted(children):
        splits = _splits(children[folder])
        is_outside = folder == first_branch[: len(folder)]
        if "train" not in splits and not is_outside:
            continue
        for split, places in found.items():
            places += [(*folder, name) for name in splits.get(split, [])]
        if "train" in splits and beside is None and any(found.values()):
            beside = (*folder, splits["train"][0])
    held_out = found["validation"] + found["test"]
    if not held_out:
        return None
    shown = ", ".join(printable("/".join(place)) for place in held_out[:SHOWN])
    if beside:
        shown += f" beside {printable('/'.join(beside))}"
    return HeldOut(shown, is_all=all(not {*held_out}.isdisjoint(each) for each in directories))


def refuse_held_out(dataset: Dataset, where: object) -> None:
    """Raise DataError for a data set to train on with pairs that should be held out.

    where: the channel's place, for the message.
    """
    if found := find_held_out(dataset.name(index) for index in range(len(dataset))):
        raise DataError(
            f"the channel {dataset.channel}, {where}, holds {found.description}: pictures that are "
            "held out would be trained on. Make the channel train of the pictures to train on "
            "alone, and the channel validation of those to validate on"
        )


def refuse_mixture(dataset: Dataset, where: object) -> None:
    """Raise DataError for a data set that is to be packed, if only a part should be held out."""
    found = find_held_out(dataset.name(index) for index in range(len(dataset)))
    if found and not found.is_all:
        raise DataError(
            f"{where} holds {found.description}: in shards, pictures that are held out could no "
            "longer be told from those to train on. Give each of the two folders by itself"
        )


def _places(directory: str) -> Iterable[Place]:
    """Yield the places on the way to a directory; those within a shard are beside it.

    >>> list(_places("a/b.tar/c"))
    [('a',), ('a', 'b.tar'), ('a', 'c')]
    """
    folder: Place = ()
    for part in filter(None, directory.split("/")):
        yield (*folder, part)
        if not holds_many(part):
            folder = (*folder, part)


def _folder(places: tuple[Place, ...]) -> Place:
    """Return the folder that the last of the places is, or is in."""
    if not places:
        return ()
    return places[-1][:-1] if holds_many(places[-1][-1]) else places[-1]


def _first_branch(children: Mapping[Place, Set[str]], folders_of_pairs: Set[Place]) -> Place:
    """Return the outermost folder that has more in it than one other folder."""
    folder: Place = ()
    while folder not in folders_of_pairs and len(children.get(folder, ())) == 1:
        folder = (*folder, *children[folder])
    return folder


def _splits(names: Iterable[str]) -> dict[Split, list[str]]:
    """Return split -> its names, of those in one folder."""
    splits: dict[Split, list[str]] = {}
    of_years: dict[Split, list[str]] = {}
    for name in sorted(names):
        is_folder = not holds_many(name)
        if split := split_of(name, is_folder=is_folder):
            splits.setdefault(split, []).append(name)
        elif is_folder and (split := split_of_year(name)):
            of_years.setdefault(split, []).append(name)
    if "train" in splits or "train" in of_years:
        for split, folders in of_years.items():
            splits.setdefault(split, []).extend(folders)
    return splits
