"""A registry on loopback that `docker push` speaks to, and an ECR that describes its images."""

import base64
import hashlib
import io
import re
import tarfile
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from infra.docker import docker, why_no_docker

PASSWORD = "a password that nobody may see"


class Registry(ThreadingHTTPServer):
    """Enough of the distribution protocol to be pushed to, with a password."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.refused = 0
        self.thread = threading.Thread(target=self.serve_forever, args=[0.02])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Registry

    def _serve(self) -> None:
        body = self._body()
        expected = "Basic " + base64.b64encode(f"AWS:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            self.server.refused += 1
            return self._reply(401, **{"WWW-Authenticate": 'Basic realm="test"'})
        path, _, query = self.path.partition("?")
        if path == "/v2/":
            return self._reply(200)
        name, kind, rest = re.fullmatch(r"/v2/(.+)/(blobs|manifests)/(.*)", path).groups()
        answer = self._blobs if kind == "blobs" else self._manifests
        return answer(name, rest, query, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _serve  # noqa: N815

    def _blobs(self, name: str, rest: str, query: str, body: bytes) -> None:
        registry = self.server
        if not rest.startswith("uploads/"):
            known = registry.blobs.get(rest)
            return self._reply(404) if known is None else self._reply(200, known)
        upload = rest.removeprefix("uploads/") or uuid.uuid4().hex
        registry.uploads[upload] = registry.uploads.get(upload, b"") + body
        place = {"Location": f"/v2/{name}/blobs/uploads/{upload}"}
        if self.command == "PUT":
            digest = re.search(r"digest=(sha256(?::|%3A)\w+)", query)[1].replace("%3A", ":")
            registry.blobs[digest] = registry.uploads.pop(upload)
            return self._reply(201, **{"Docker-Content-Digest": digest})
        size = len(registry.uploads[upload])
        return self._reply(202, Range=f"0-{max(0, size - 1)}", **place)

    def _manifests(self, name: str, tag: str, query: str, body: bytes) -> None:
        registry = self.server
        if self.command == "PUT":
            digest = "sha256:" + hashlib.sha256(body).hexdigest()
            registry.manifests[tag] = (self.headers["Content-Type"], body)
            return self._reply(201, **{"Docker-Content-Digest": digest})
        if tag not in registry.manifests:
            return self._reply(404)
        kind, content = registry.manifests[tag]
        return self._reply(200, content, **{"Content-Type": kind})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = io.BytesIO()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content.write(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return content.getvalue()

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def registry(account, infra):
    """A registry whose images the simulated ECR describes."""
    infra("bootstrap")
    with Registry() as registry:
        arn = "arn:aws:ecr:us-east-1:123456789012:repository/dalle"
        uri = f"{registry.address}/dalle"
        tags: dict[str, str] = {}

        def images(request: dict[str, Any]) -> dict[str, Any]:
            found = []
            for wanted in request["imageIds"]:
                if wanted["imageTag"] in registry.manifests:
                    kind, body = registry.manifests[wanted["imageTag"]]
                    digest = "sha256:" + hashlib.sha256(body).hexdigest()
                    found.append(
                        {
                            "imageId": {"imageDigest": digest, **wanted},
                            "imageManifest": body.decode(),
                            "imageManifestMediaType": kind,
                        }
                    )
            return {"images": found, "failures": []}

        def tag(request: dict[str, Any]) -> dict[str, Any]:
            tags.update({entry["Key"]: entry["Value"] for entry in request["tags"]})
            return {}

        token = base64.b64encode(f"AWS:{PASSWORD}".encode()).decode()
        account.handlers |= {
            "BatchGetImage": images,
            "DescribeRepositories": lambda request: {
                "repositories": [{"repositoryUri": uri, "repositoryArn": arn}]
            },
            "ListTagsForResource": lambda request: {
                "tags": [{"Key": key, "Value": value} for key, value in tags.items()]
            },
            "TagResource": tag,
            "GetAuthorizationToken": lambda request: {
                "authorizationData": [
                    {"authorizationToken": token, "proxyEndpoint": f"http://{registry.address}"}
                ]
            },
        }
        registry.tags = tags
        yield registry


@pytest.fixture
def tiny_image(tmp_path):
    """The name of a tiny image of one file on this machine's engine."""
    reason = why_no_docker("scratch-of-push")
    if reason and "is not built" not in reason:
        pytest.skip(reason)
    name = f"dalle-push-{uuid.uuid4().hex[:10]}"
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        content = uuid.uuid4().bytes
        about = tarfile.TarInfo("file")
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))
    docker("import", str(tmp_path / "root.tar"), f"{name}:latest")
    yield name
    docker("rmi", "--force", name, check=False)
