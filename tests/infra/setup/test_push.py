"""`push`: what reaches the registry, in which form. Engine and registry are real ones."""

import base64
import hashlib
import json

import pytest

from dalle.errors import AwsError, PlanError
from infra.aws.client import Aws
from infra.aws.output import Output
from infra.aws.project import Project
from infra.docker import docker
from infra.setup import push
from tests.infra.aws_account import MANIFEST
from tests.infra.registry_fixtures import PASSWORD


@pytest.mark.docker
def test_an_image_arrives_in_the_form_that_hosts_take(registry, infra, tiny_image):
    result = infra("push", "--image", tiny_image, "--json")
    assert result.code == 0, result.err
    kind, body = registry.manifests["latest"]
    assert kind == push.DOCKER_MANIFEST
    identity = docker("image", "inspect", "--format", "{{.Id}}", tiny_image).strip()
    assert json.loads(body)["config"]["digest"] == identity
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    assert result.json["image"] == f"{registry.address}/dalle@{digest}"
    assert registry.tags == {"dalle:image-bytes:latest": f"{digest} {result.json['num_bytes']}"}


@pytest.mark.docker
def test_a_second_push_sends_nothing(registry, infra, account, tiny_image):
    infra("push", "--image", tiny_image)
    result = infra("push", "--image", tiny_image)
    assert result.code == 0
    assert "already there" in result.out
    assert account.requests["GetAuthorizationToken"] == 1
    assert account.requests["TagResource"] == 1


@pytest.mark.docker
def test_the_password_is_shown_nowhere_and_the_login_not_kept(registry, infra, tiny_image):
    result = infra("push", "--image", tiny_image)
    assert PASSWORD not in result.out + result.err
    names = docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}")
    assert registry.address not in names
    refused = registry.refused
    docker("tag", tiny_image, f"{registry.address}/dalle:by-hand")
    try:
        assert "basic auth" in docker("push", f"{registry.address}/dalle:by-hand", check=False)
    finally:
        docker("rmi", f"{registry.address}/dalle:by-hand")
    assert registry.refused > refused


@pytest.mark.docker
def test_a_registry_that_refuses_is_reported_with_dockers_words(
    registry, infra, account, tiny_image
):
    wrong = base64.b64encode(b"AWS:wrong").decode()
    account.handlers["GetAuthorizationToken"] = lambda request: {
        "authorizationData": [
            {"authorizationToken": wrong, "proxyEndpoint": f"http://{registry.address}"}
        ]
    }
    result = infra("push", "--image", tiny_image)
    assert result.code == 1
    assert "`docker login` failed with 1" in result.err
    assert registry.manifests == {}


@pytest.mark.docker
def test_an_image_that_is_not_there_is_reported(account, infra, tiny_image):
    result = infra("push", "--image", f"{tiny_image}-none")
    assert result.code == 1
    assert f"there is no image '{tiny_image}-none' on this machine; `make image`" in result.err
    assert account.requests.total() == 0


def test_without_docker_it_says_what_is_missing(account, infra, monkeypatch):
    monkeypatch.setenv("DOCKER", "no-such-docker")
    result = infra("push")
    assert result.code == 1
    assert "there is no command 'no-such-docker'; `push` needs the Docker client" in result.err


def test_an_image_for_other_processors_is_refused():
    with pytest.raises(PlanError, match="is for linux/arm64, and hosts need linux/amd64"):
        push.check_image(push.LocalImage("x", "sha256:1", "linux/arm64", 1))


@pytest.mark.parametrize(
    "kind",
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"],
)
def test_a_manifest_that_hosts_refuse_is_reported_with_the_way_out(kind):
    manifest = {"type": kind, "digest": "sha256:1", "config": None}
    with pytest.raises(AwsError, match="--provenance=false") as result:
        push.check_manifest(manifest, "dalle", "latest")
    assert kind in str(result.value)


def test_the_manifest_is_read_from_the_registry(account, infra):
    infra("bootstrap")
    digest = account.put_image()
    project = Project("dalle", Aws(Output()))
    found = push.read_manifest(project, "dalle", "latest")
    assert found == {
        "type": push.DOCKER_MANIFEST,
        "digest": digest,
        "config": MANIFEST["config"]["digest"],
    }
    assert push.read_manifest(project, "dalle", "none") is None


def test_the_unpacked_size_is_known_as_long_as_the_image_is_the_same(account, infra):
    infra("bootstrap")
    digest = account.put_image()
    project = Project("dalle", Aws(Output()))
    assert project.image("dalle").num_bytes is None
    push.note_size(project, project.repository("dalle"), "latest", f"{digest} 7243000000")
    assert project.image("dalle").num_bytes == 7_243_000_000
    account.put_image(layers=[{"digest": "sha256:" + "d" * 64, "size": 1, "mediaType": "x"}])
    assert project.image("dalle").num_bytes is None
