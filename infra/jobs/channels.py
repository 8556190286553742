"""The channels of a job in S3: which folders they are, what is in them, and what they refuse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from dalle.errors import UserError
from dalle.platform.splits import Split, split_of, split_of_year
from infra.aws.project import Project, split_uri
from infra.aws.request import Request
from infra.aws.stack import StackOutputs


def data_channels(project: Project, outputs: StackOutputs, data: str) -> dict[str, str]:
    """Return the channels `train` and, where there is one, `validation`.

    They are the folders of these names (see `dalle.platform.splits`). A folder in which there are
    none is the channel `train` itself. Raises UserError without data, and where pictures that are
    held out would be trained on.
    """
    base = data if data.startswith("s3://") else f"s3://{outputs.bucket}/data/{data}"
    # Without the slash a channel would also include prefixes that begin alike: train, train_old.
    base = base.rstrip("/") + "/"
    names = top_names(project, base)
    if not names:
        hint = (
            "it is the folder that holds the pictures, or train/ and validation/"
            if data.startswith("s3://")
            else f"`python -m infra upload FOLDER --name {data}` uploads it"
        )
        raise UserError(f"there is nothing at {base}; {hint}")
    found = splits_in(names)
    for split, folders in found.items():
        if split != "test" and len(folders) > 1 and all(name.endswith("/") for name in folders):
            raise UserError(
                f"{base} has {' and '.join(folders)}, and the channel {split} can be only one of "
                f"them; move the other away, or name one: --data {base}{folders[0]}"
            )
    train = [name for name in found.get("train", []) if name.endswith("/")]
    if not train:
        _refuse_held_out(base, found)
        return {"train": base}
    of_a_split = {name for folders in found.values() for name in folders}
    if split_of_year(train[0].rstrip("/")) and (others := sorted(names - of_a_split)):
        raise UserError(
            f"{base} has {', '.join(others[:5])} beside {train[0]}, and a job that trains on "
            f"{train[0]} would not have them; put captions and pictures of each split together, "
            "into train/ and validation/ (`python -m training.data shard` packs them)"
        )
    channels = {"train": base + train[0]}
    inside = top_names(project, channels["train"], if_dry_run=())
    _refuse_held_out(channels["train"], splits_in(inside))
    for name in found.get("validation", []):
        channels["validation"] = base + name
    for name in found.get("test", []):
        project.output.line(f"{base}{name} is left out: it is neither to train nor to validate on")
    return channels


def _refuse_held_out(uri: str, found: Mapping[Split, list[str]]) -> None:
    """Raise UserError when a channel to train on holds what is held out."""
    held_out = found.get("validation", []) + found.get("test", [])
    if held_out:
        raise UserError(
            f"{uri} would be the channel train, and it holds {', '.join(held_out[:5])}: pictures "
            "that are held out would be trained on. Put those to train on into a folder train/ "
            "and those to validate on into validation/ beside it"
        )


def splits_in(names: Iterable[str]) -> dict[Split, list[str]]:
    """Return split -> the names that belong to it. A folder's name ends with a slash.

    As in a job, folders with a year (val2017/) count beside one to train on.
    """
    found: dict[Split, list[str]] = {}
    of_years: dict[Split, list[str]] = {}
    for name in sorted(names):
        is_folder = name.endswith("/")
        if split := split_of(name.rstrip("/"), is_folder=is_folder):
            found.setdefault(split, []).append(name)
        elif is_folder and (split := split_of_year(name.rstrip("/"))):
            of_years.setdefault(split, []).append(name)
    if "train" in found or "train" in of_years:
        for split, folders in of_years.items():
            found.setdefault(split, []).extend(folders)
    return found


def top_names(
    project: Project, uri: str, *, if_dry_run: Iterable[str] = ("train", "validation")
) -> set[str]:
    """Return the first parts of the keys below an address; a folder's ends with a slash.

    if_dry_run: the folders that a dry run presumes.
    """
    bucket, prefix = split_uri(uri)
    request = Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=prefix, Delimiter="/")
    answer = [{"Prefix": f"{prefix}{name}/"} for name in if_dry_run]
    folders = project.aws.items(request, "CommonPrefixes", answer=answer)
    names = {found["Prefix"].removeprefix(prefix) for found in folders}
    files = [] if project.aws.dry_run else project.aws.items(request, "Contents")
    return names | {found["Key"].removeprefix(prefix) for found in files} - {""}


def content_digest(project: Project, uris: Iterable[str]) -> str:
    """Return a digest of the objects at some addresses: their names, sizes and ETags."""
    content = hashlib.sha256()
    for uri in sorted(uris):
        bucket, prefix = split_uri(uri)
        request = Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=prefix)
        for found in project.aws.items(request, "Contents"):
            line = f"{uri} {found['Key']} {found['Size']} {found['ETag']}\n"
            content.update(line.encode())
    return content.hexdigest()
