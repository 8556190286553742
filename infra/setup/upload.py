"""`upload`: a folder to the bucket under data/NAME/.

A file is skipped when its object has the same size and MD5, which is the ETag of an object that was
uploaded in one piece. Hidden files are left out; links to files and folders are followed.
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
from infra.aws.client import MAX_CONNECTIONS
from infra.aws.output import count_words, size_words
from infra.aws.project import Project, add_project_arguments, open_project
from infra.aws.request import Request

MAX_BYTES = 5 * (1 << 30)
"""Limit of an upload in one piece."""
DELETED_TOGETHER = 1000
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


@dataclass(frozen=True)
class File:
    path: Path
    key: str
    num_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="holds train/ and optionally validation/, or images and captions"
    )
    parser.add_argument("--name", help="what `train --data` calls it; default: the folder's name")
    parser.add_argument(
        "--delete", action="store_true", help="delete objects that are no longer in the folder"
    )
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    folder = options.folder
    name = options.name or folder.resolve().name
    if not re.fullmatch(NAME_PATTERN, name):
        raise PlanError(f"--name is letters, digits, dots, dashes and underscores, got {name!r}")
    prefix = f"data/{name}/"
    files = list(find_files(folder, prefix))
    project = open_project(options)
    bucket = project.stack_outputs().bucket
    there = listing(project, bucket, prefix)
    with ThreadPoolExecutor(1 if project.aws.dry_run else MAX_CONNECTIONS) as pool:
        sent = list(pool.map(lambda file: _send(project, bucket, file, there), files))
    gone = sorted(there.keys() - {file.key for file in files})
    if options.delete and gone:
        delete(project, bucket, [{"Key": key} for key in gone])
    num_bytes = sum(file.num_bytes for file, new in zip(files, sent, strict=True) if new)
    uri = f"s3://{bucket}/{prefix}"
    output = project.output
    output.item(f"{count_words(sum(sent), 'file')}, {size_words(num_bytes)}", "uploaded")
    output.item(count_words(len(files) - sum(sent), "file"), "already there")
    if gone:
        output.item(
            f"{count_words(len(gone), 'file')} not in {folder}",
            "deleted there" if options.delete else "left there (--delete removes them)",
        )
    output.line(f"\ntrain on it: python -m infra train --data {name}")
    return output.finish(
        uri=uri,
        uploaded=sum(sent),
        unchanged=len(files) - sum(sent),
        uploaded_bytes=num_bytes,
        foreign=len(gone),
        deleted=len(gone) if options.delete else 0,
    )


def find_files(folder: Path, prefix: str) -> Iterator[File]:
    """Yield every file of a folder that is not hidden, in order; links are followed.

    Raises UserError for what cannot be read, PlanError for a file that is too large.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    found = False
    for path in _walk(folder, (folder.resolve(),)):
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise PlanError(
                f"{path} has {num_bytes:,} bytes, and an object is sent in one piece of at most "
                f"{MAX_BYTES:,} (5 GiB); tar shards of 50 to 500 MB are read fastest"
            )
        found = True
        yield File(path, prefix + path.relative_to(folder).as_posix(), num_bytes)
    if not found:
        raise UserError(f"{folder} has no files in it")


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files below a folder. above: the real paths of the folder and of those above it.

    Raises UserError: a file that is left out without a word is missing from the training data.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        for path in paths:
            if not path.exists():
                raise UserError(f"{path} is a link to {path.readlink()}, which is not there")
            real = path.resolve()
            if path.is_dir():
                if real in above:
                    raise UserError(f"{path} is a link to {real}, a folder that it lies in")
                yield from _walk(path, (*above, real))
            elif path.is_file():
                yield path
            else:
                raise UserError(f"{path} is neither a file nor a folder; move it away")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a ring
        raise UserError(f"{folder} cannot be read: {error}") from error


def listing(project: Project, bucket: str, prefix: str) -> dict[str, tuple[int, str]]:
    """Return key -> size and ETag of every object under a prefix."""
    request = Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=prefix)
    return {
        found["Key"]: (found["Size"], found["ETag"].strip('"'))
        for found in project.aws.items(request, "Contents")
    }


def delete(project: Project, bucket: str, objects: list[dict[str, str]]) -> None:
    """Delete objects (Key, optionally VersionId), a thousand a request.

    Raises AwsError for objects that S3 did not delete.
    """
    for start in range(0, len(objects), DELETED_TOGETHER):
        some = {"Objects": objects[start : start + DELETED_TOGETHER], "Quiet": True}
        answer = project.aws.call(Request("s3", "DeleteObjects", Bucket=bucket, Delete=some))
        kept = answer.get("Errors", [])
        if kept:
            raise AwsError(
                f"S3 kept {len(kept)} objects of {bucket}; {kept[0]['Key']}: {kept[0]['Message']}"
            )


def identity(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the argument of `delete` for a version as S3 lists it.

    A bucket without versioning calls its only version `null`. That id is passed on, because after
    versioning was switched on, a deletion without it would only hide the object.
    """
    return {"Key": found["Key"], "VersionId": found["VersionId"]}


def _send(project: Project, bucket: str, file: File, there: Mapping[str, tuple[int, str]]) -> bool:
    """Upload a file unless its object is the same; return whether it was uploaded."""
    found = there.get(file.key)
    if found is not None and found[0] == file.num_bytes and found[1] == md5(file.path):
        return False
    project.aws.write(file.path, bucket, file.key)
    return True


def md5(path: Path) -> str:
    """Return the MD5 of a file, which S3 gives as ETag. It shows changes and protects nothing."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
