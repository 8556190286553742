"""`upload`: a folder into the bucket under data/NAME/, as often as you like.

A file is skipped when the object there has its size and MD5, which is what S3 calls ETag of an
object that came in one piece. Hidden files stay here.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.errors import AwsError, PlanError, UserError
from infra.aws import project
from infra.aws.client import MAX_CONNECTIONS
from infra.aws.output import count_words, size_words
from infra.aws.project import Project
from infra.aws.request import Call

MAX_BYTES = 5 * (1 << 30)
"""Of an object that is sent in one piece."""
DELETED_TOGETHER = 1000
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


@dataclass(frozen=True)
class File:
    path: Path
    key: str
    num_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="with train/ and, if you like, validation/ in it, or pictures"
    )
    parser.add_argument("--name", help="what `train --data` calls it; default: the folder's name")
    parser.add_argument(
        "--delete", action="store_true", help="delete there what is not in the folder any more"
    )
    project.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    folder = options.folder
    name = options.name or folder.resolve().name
    if not re.fullmatch(NAME_PATTERN, name):
        raise PlanError(f"--name is letters, digits, dots, dashes and underscores, got {name!r}")
    opened = project.open_project(options)
    bucket = opened.outputs().bucket
    prefix = f"data/{name}/"
    files = list(find_files(folder, prefix))
    there = listing(opened, bucket, prefix)
    with ThreadPoolExecutor(1 if opened.aws.dry_run else MAX_CONNECTIONS) as pool:
        sent = list(pool.map(lambda file: _send(opened, bucket, file, there), files))
    gone = sorted(there.keys() - {file.key for file in files})
    if options.delete and gone:
        delete(opened, bucket, [{"Key": key} for key in gone])
    num_bytes = sum(file.num_bytes for file, new in zip(files, sent, strict=True) if new)
    uri = f"s3://{bucket}/{prefix}"
    console = opened.console
    console.item(f"{count_words(sum(sent), 'file')}, {size_words(num_bytes)}", "uploaded")
    console.item(count_words(len(files) - sum(sent), "file"), "already there")
    if gone:
        console.item(
            f"{count_words(len(gone), 'file')} not in {folder}",
            "deleted there" if options.delete else "left there (--delete removes them)",
        )
    console.say(f"\ntrain on it: python -m infra train --data {name}")
    return console.finish(
        uri=uri,
        uploaded=sum(sent),
        unchanged=len(files) - sum(sent),
        uploaded_bytes=num_bytes,
        foreign=len(gone),
        deleted=len(gone) if options.delete else 0,
    )


def find_files(folder: Path, prefix: str) -> Iterator[File]:
    """Every file in a folder that is not hidden, in order. Raises UserError, PlanError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    found = False
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise PlanError(
                f"{path} has {num_bytes:,} bytes, and an object is sent in one piece of at most "
                f"{MAX_BYTES:,} (5 GiB); tar shards of 50 to 500 MB are read fastest"
            )
        found = True
        yield File(path, prefix + relative.as_posix(), num_bytes)
    if not found:
        raise UserError(f"{folder} has no files in it")


def listing(opened: Project, bucket: str, prefix: str) -> dict[str, tuple[int, str]]:
    """Key -> size and ETag of every object under a prefix."""
    call = Call("s3", "ListObjectsV2", {"Bucket": bucket, "Prefix": prefix})
    return {
        found["Key"]: (found["Size"], found["ETag"].strip('"'))
        for found in opened.aws.items(call, "Contents")
    }


def delete(opened: Project, bucket: str, objects: list[dict[str, str]]) -> None:
    """Delete objects (Key and, if need be, VersionId), a thousand a request.

    Raises AwsError for those that S3 kept.
    """
    for start in range(0, len(objects), DELETED_TOGETHER):
        some = {"Objects": objects[start : start + DELETED_TOGETHER], "Quiet": True}
        answer = opened.aws.call(Call("s3", "DeleteObjects", {"Bucket": bucket, "Delete": some}))
        kept = answer.get("Errors", [])
        if kept:
            raise AwsError(
                f"S3 kept {len(kept)} objects of {bucket}; {kept[0]['Key']}: {kept[0]['Message']}"
            )


def identity(found: Mapping[str, Any]) -> dict[str, str]:
    """What `delete` takes, of a version as S3 lists it.

    A bucket that keeps no versions calls its only one `null`; that word is passed on, because in a
    bucket that began to keep them later a deletion without it would only hide the object.
    """
    return {"Key": found["Key"], "VersionId": found["VersionId"]}


def _send(opened: Project, bucket: str, file: File, there: Mapping[str, tuple[int, str]]) -> bool:
    """True when the file was sent, False when it was there already."""
    found = there.get(file.key)
    if found is not None and found[0] == file.num_bytes and found[1] == md5(file.path):
        return False
    opened.aws.write(file.path, bucket, file.key)
    return True


def md5(path: Path) -> str:
    """As S3 counts it: to tell whether a file has changed, not to protect anything."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
