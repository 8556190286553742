"""Addresses in S3 that a job or an endpoint is to read, checked before it is paid for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from dalle.errors import AccessError, UserError
from infra.aws.project import Project, split_uri
from infra.aws.request import Request
from infra.aws.stack import StackOutputs

SHOWN = 5


def check_readable(project: Project, outputs: StackOutputs, uris: Iterable[str]) -> None:
    """Raise UserError for an address whose bucket the project's jobs and endpoints cannot read.

    SageMaker reads buckets of its own region, and the project's role its own bucket and the one
    that `bootstrap --read-bucket` named. What a role of others may read is not known.
    """
    for bucket in dict.fromkeys(split_uri(uri)[0] for uri in uris):
        if bucket != outputs.bucket:
            _check_bucket(project, outputs, bucket)


def _check_bucket(project: Project, outputs: StackOutputs, bucket: str) -> None:
    ours = project.aws.region
    request = Request("s3", "HeadBucket", Bucket=bucket)
    try:
        found = project.aws.find(request, answer={"BucketRegion": ours})
    except AccessError:
        found = {}  # the caller of a job need not be allowed to look into what the job reads
    if found is None:
        raise UserError(f"there is no bucket {bucket}")
    region = found.get("BucketRegion") or ours
    if region != ours:
        raise UserError(
            f"the bucket {bucket} is in {region}, and in {ours} SageMaker reads buckets of {ours} "
            f"alone; copy what is needed to s3://{outputs.bucket}/, or work in --region {region}"
        )
    is_known = outputs.owns_role and not project.aws.dry_run
    if is_known and bucket != outputs.read_bucket:
        raise UserError(
            f"the role of project {project.name} may not read the bucket {bucket}; "
            f"`python -m infra bootstrap --read-bucket {bucket}` allows it"
        )


def folder_or_file(project: Project, uri: str) -> str:
    """Return the address of a folder with a slash at its end, and that of a file as it is.

    A channel takes every key that begins with its address: without the slash val/ would bring
    val_old/. Raises UserError for a file beside which other keys begin alike.
    In a dry run a name without a suffix is presumed to be a folder's.
    """
    bucket, key = split_uri(uri)
    if not key or key.endswith("/"):
        return uri
    request = Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=key, Delimiter="/")
    presumed = [] if PurePosixPath(key).suffix else [{"Prefix": f"{key}/"}]
    folders = [
        found["Prefix"] for found in project.aws.items(request, "CommonPrefixes", answer=presumed)
    ]
    if f"{key}/" in folders:
        return f"{uri}/"
    files = [] if project.aws.dry_run else project.aws.items(request, "Contents")
    names = {*folders, *(found["Key"] for found in files)}
    others = sorted(names - {key})
    if key in names and others:
        raise UserError(
            f"{uri} would bring {', '.join(others[:SHOWN])} along: a job reads every key that "
            "begins with an address; copy the file into a folder of its own"
        )
    return uri
