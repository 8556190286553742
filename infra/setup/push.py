"""`push`: the image from this machine into the repository, in a form that SageMaker takes.

SageMaker refuses manifests of OCI media types and indexes of attestations, and reports it only when
an endpoint is created. So the manifest in the registry is checked here after the push.

The password goes to `docker login` through stdin and into a configuration that is deleted
afterwards, so that it is neither in a process list nor left on the disk.
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
from dataclasses import dataclass
from typing import Any

from dalle.errors import AwsError, PlanError, PlatformError, UserError
from infra.aws.limits import SERVERLESS_IMAGE_BYTES
from infra.aws.output import size_words
from infra.aws.project import (
    IMAGE_TAG,
    Project,
    add_project_arguments,
    image_size_tag,
    open_project,
)
from infra.aws.request import Request, placeholder
from infra.docker import DockerError, docker, image_name, program

PLATFORM = "linux/amd64"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_TYPES = [
    DOCKER_MANIFEST,
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
]


@dataclass(frozen=True)
class LocalImage:
    """identity: `sha256:…` as the engine computes it. num_bytes: unpacked."""

    name: str
    identity: str
    platform: str
    num_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        default=image_name(),
        help="an image of this machine; default: DALLE_IMAGE or dalle-sagemaker",
    )
    parser.add_argument("--tag", default=IMAGE_TAG, help=f"its tag there; default: {IMAGE_TAG}")
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    project = open_project(options)
    output = project.output
    image = inspect(options.image)
    check_image(image)
    repository = project.stack_outputs().repository
    about = project.repository(repository)
    manifest = read_manifest(project, repository, options.tag)
    if manifest is not None and image.identity in (manifest["config"], manifest["digest"]):
        state = "already there"
    else:
        check_tag(about, options.tag, manifest)
        state = "pushed"
        push(project, image, f"{about['uri']}:{options.tag}")
        manifest = read_manifest(project, repository, options.tag)
    if not project.aws.dry_run:
        check_manifest(manifest, repository, options.tag)
    digest = manifest["digest"] if manifest else placeholder("digest of the image")
    note_size(project, about, options.tag, f"{digest} {image.num_bytes}")
    output.item(f"image {repository}:{options.tag}", state)
    output.item("", f"{size_words(image.num_bytes)} unpacked, docker media types")
    if image.num_bytes > SERVERLESS_IMAGE_BYTES:
        output.item("", "too large for a serverless endpoint, which takes 10 GiB")
    return output.finish(
        image=f"{about['uri']}@{digest}", tag=options.tag, num_bytes=image.num_bytes, state=state
    )


def inspect(name: str) -> LocalImage:
    """Return an image of this machine. Raises UserError when there is none of that name."""
    try:
        text = _docker("image", "inspect", "--format", "{{json .}}", name)
    except PlatformError as error:
        if "no such image" in str(error).lower():
            raise UserError(
                f"there is no image {name!r} on this machine; `make image` builds it"
            ) from error
        raise
    found = json.loads(text.splitlines()[-1])  # warnings of the client come before
    return LocalImage(
        name=name,
        identity=found["Id"],
        platform=f"{found['Os']}/{found['Architecture']}",
        num_bytes=found["Size"],
    )


def check_image(image: LocalImage) -> None:
    """Raise PlanError for an image that no host of SageMaker can run."""
    if image.platform != PLATFORM:
        raise PlanError(
            f"image {image.name} is for {image.platform}, and hosts need {PLATFORM}; "
            f"build it with --platform {PLATFORM}"
        )


def check_tag(repository: dict[str, Any], tag: str, there: dict[str, Any] | None) -> None:
    """Raise UserError when the repository keeps a tag on the image that has it now."""
    if there is not None and repository["fixed"](tag):
        raise UserError(
            f"the tag {tag!r} is on {there['digest'][:19]}, and this repository keeps it there: "
            f"jobs and endpoints that name the tag must not change; give another --tag, or "
            f"{IMAGE_TAG!r} where it may move"
        )


def push(project: Project, image: LocalImage, target: str) -> None:
    """Log in, tag and push."""
    token = project.aws.call(
        Request("ecr", "GetAuthorizationToken"), answer={"authorizationData": []}
    )
    if project.aws.dry_run:
        return
    about = token["authorizationData"][0]
    user, _, password = base64.b64decode(about["authorizationToken"]).decode().partition(":")
    project.output.line(f"pushing {size_words(image.num_bytes)}; layers that are there are skipped")
    _docker("tag", image.name, target)
    try:
        with tempfile.TemporaryDirectory(prefix="docker-") as directory:
            environment = {"DOCKER_CONFIG": directory}
            login = ("login", "--username", user, "--password-stdin", about["proxyEndpoint"])
            _docker(*login, stdin=password, environment=environment)
            _docker("push", "--quiet", target, environment=environment)
    finally:
        _docker("rmi", "--no-prune", target)


def _docker(
    *arguments: str, stdin: str | None = None, environment: dict[str, str] | None = None
) -> str:
    """Return a docker command's output. Raises PlatformError with its last three lines."""
    try:
        return docker(*arguments, seconds=None, stdin=stdin, environment=environment)
    except FileNotFoundError as error:
        raise PlatformError(
            f"there is no command {program()!r}; `push` needs the Docker client and an engine"
        ) from error
    except DockerError as error:
        reason = " ".join(error.output.splitlines()[-3:])
        raise PlatformError(
            f"`docker {arguments[0]}` failed with {error.returncode}: {reason}"
        ) from error


def read_manifest(project: Project, repository: str, tag: str) -> dict[str, Any] | None:
    """Return `type` (media type), `digest` and `config` of the registry's manifest, or None."""
    named = {"repositoryName": repository, "imageIds": [{"imageTag": tag}]}
    request = Request("ecr", "BatchGetImage", **named, acceptedMediaTypes=MANIFEST_TYPES)
    found = project.aws.call(request, answer={"images": []})["images"]
    if not found:
        return None
    manifest = json.loads(found[0]["imageManifest"])
    kind = found[0].get("imageManifestMediaType") or manifest.get("mediaType", "")
    return {
        "type": kind,
        "digest": found[0]["imageId"]["imageDigest"],
        "config": manifest.get("config", {}).get("digest"),
    }


def check_manifest(manifest: dict[str, Any] | None, repository: str, tag: str) -> None:
    """Raise AwsError when SageMaker does not accept the registry's manifest."""
    if manifest is None:
        raise AwsError(f"the repository {repository} has no image {tag!r} after the push")
    if manifest["type"] != DOCKER_MANIFEST:
        raise AwsError(
            f"the image's manifest is of type {manifest['type']}, which SageMaker refuses; it must "
            f"be {DOCKER_MANIFEST}. Build without attestations and with docker media types: "
            "`make image`, or docker buildx build --provenance=false --sbom=false "
            "--output type=docker,oci-mediatypes=false"
        )


def note_size(project: Project, about: dict[str, Any], tag: str, note: str) -> None:
    """Store the unpacked size as a tag: the registry itself has only the compressed size."""
    key = image_size_tag(tag)
    if about["tags"].get(key) != note:
        tags = [{"Key": key, "Value": note}]
        project.aws.call(Request("ecr", "TagResource", resourceArn=about["arn"], tags=tags))
