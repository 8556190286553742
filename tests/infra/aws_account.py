"""A simulated AWS account for tests: moto_server over HTTP, behind a server that can reject.

That server counts every request, answers those that a test tells it to (throttling, expired
credentials, a crash in the middle), does what moto lacks (see `LACKING`), and passes everything
else on. What the platform would do on its own, such as leaving a model or a log, is a method.
"""

import functools
import hashlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import requests
from botocore.exceptions import ClientError

from tests.infra.aws_components import InferenceComponents, RefusedError

START_SECONDS = 60
NUMBER = "123456789012"
REGION = "us-east-1"
BUCKET = f"dalle-{NUMBER}-{REGION}"
MANIFEST = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    "config": {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "size": 7023,
        "digest": "sha256:" + "b" * 64,
    },
    "layers": [],
}

# What moto 5.2.5 does not do, with a request of ours that needs it. Some have a handler in
# `Account` or in a test; all are held against botocore's model.
LACKING: dict[tuple[str, str], dict[str, Any]] = {
    ("sagemaker", "DeleteTrainingJob"): {"TrainingJobName": "dalle-x"},
    ("sagemaker", "CreateInferenceComponent"): {
        "InferenceComponentName": "dalle--a",
        "EndpointName": "dalle",
    },
    ("sagemaker", "DeleteInferenceComponent"): {"InferenceComponentName": "dalle--a"},
    ("sagemaker", "DescribeInferenceComponent"): {"InferenceComponentName": "dalle--a"},
    ("sagemaker", "ListInferenceComponents"): {},
    ("sagemaker", "UpdateInferenceComponent"): {"InferenceComponentName": "dalle--a"},
    ("sagemaker", "DeleteModelPackage"): {"ModelPackageName": "dalle"},
    ("sagemaker", "DeleteModelPackageGroup"): {"ModelPackageGroupName": "dalle"},
    ("sagemaker", "StopHyperParameterTuningJob"): {"HyperParameterTuningJobName": "dalle-x"},
    ("sagemaker", "StopTrainingJob"): {"TrainingJobName": "dalle-x"},
    ("sagemaker", "StopTransformJob"): {"TransformJobName": "dalle-x"},
    ("sagemaker", "UpdateEndpoint"): {"EndpointName": "dalle", "EndpointConfigName": "dalle-x"},
    ("sagemaker", "UpdateTrainingJob"): {
        "TrainingJobName": "dalle-x",
        "ResourceConfig": {"KeepAlivePeriodInSeconds": 0},
    },
    ("sagemaker-runtime", "InvokeEndpointWithResponseStream"): {
        "EndpointName": "dalle",
        "ContentType": "application/json",
        "Accept": "application/jsonlines",
        "Body": b"{}",
    },
}
"""Besides: endpoint configurations of newer instance types (ml.g5, ml.c7i, …), `EmptyOnDelete` of a
repository, filters of lists by warm pool, and jobs that take time."""


@dataclass(frozen=True)
class Result:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Answer = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers, body."""


@contextmanager
def moto_server():
    """The address of a moto_server on a free port of loopback."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    found: list[str] = []
    known = threading.Event()

    def read() -> None:
        for line in server.stderr:
            address = re.search(r"Running on http://([\d.]+:\d+)", line)
            if address and not found:
                found.append(address[1])
                known.set()
        known.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert known.wait(START_SECONDS), "moto_server did not start"
        assert found, "moto_server ended without an address"
        yield found[0]
    finally:
        server.terminate()
        server.wait()
        reader.join()
        server.stderr.close()


class Account:
    """One account behind a counting, refusing server. url: what AWS_ENDPOINT_URL must be."""

    def __init__(self, moto: str) -> None:
        self.moto = moto
        self.requests: Counter[str] = Counter()
        self.refusals: dict[str, list[tuple[int, str, str]]] = {}
        self.handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "DeleteTrainingJob": self._delete_training_job,
            "DeleteModelPackage": lambda request: {},
            "DeleteModelPackageGroup": self._delete_group,
            "UpdateEndpoint": self._update_endpoint,
        }
        self.components = InferenceComponents(self.client)
        self.handlers |= self.components.handlers
        self.sent: list[tuple[str, Any]] = []
        self.runtime: Callable[[str, dict[str, str], bytes], Answer] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.account = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02])
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reset(self) -> None:
        """Forget everything that was made."""
        self._to_moto("POST", "/moto-api/reset", b"", {})

    def refuse(
        self, operation: str, code: str, message: str = "no", *, status: int = 400, times: int = 1
    ) -> None:
        """Answer the next requests for an operation with an error."""
        self.refusals.setdefault(operation, []).extend([(status, code, message)] * times)

    def client(self, service: str) -> Any:
        """A client of moto without the server between: it is neither counted nor refused."""
        return _client(self.moto, service)

    def bodies(self, operation: str) -> list[Any]:
        """The bodies of the requests for an operation, in the order in which they were sent."""
        return [body for name, body in self.sent if name == operation]

    # --- what the platform or another tool would have done

    def put_image(self, tag: str = "latest", **changes: Any) -> str:
        """An image in the repository, as `docker push` leaves it; returns its digest."""
        manifest = {**MANIFEST, **changes}
        text = json.dumps(manifest)
        digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        self.client("ecr").put_image(
            repositoryName="dalle",
            imageManifest=text,
            imageManifestMediaType=manifest["mediaType"],
            imageTag=tag,
            imageDigest=digest,  # moto would take that of an empty text
        )
        return digest

    def put_object(self, key: str, body: bytes = b"x", bucket: str = BUCKET) -> None:
        self.client("s3").put_object(Bucket=bucket, Key=key, Body=body)

    def keys_in(self, bucket: str = BUCKET) -> list[str]:
        listed = self.client("s3").list_objects_v2(Bucket=bucket)
        return [found["Key"] for found in listed.get("Contents", [])]

    def leave_model(self, job: str) -> None:
        """What a training job that has completed leaves in the bucket."""
        self.put_object(f"models/{job}/output/model.tar.gz")

    def write_log(self, group: str, stream: str, lines: list[str]) -> None:
        logs = self.client("logs")
        groups = logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]
        if group not in [found["logGroupName"] for found in groups]:
            logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName=stream)
        now = int(time.time() * 1000)
        logs.put_log_events(
            logGroupName=group,
            logStreamName=stream,
            logEvents=[
                {"timestamp": now + number, "message": line} for number, line in enumerate(lines)
            ],
        )

    def names(self, kind: str) -> list[str]:
        """Names of all models, endpoints, endpoint_configs or training_jobs there are."""
        answer = getattr(self.client("sagemaker"), f"list_{kind}")()
        return sorted(
            found[key]
            for entries in answer.values()
            if isinstance(entries, list)
            for found in entries
            for key in found
            if key.endswith("Name")
        )

    def serve_async(self, serve: str) -> None:
        """Asynchronous invocations, answered by a server of ours: it is sent the body, or what the
        bucket has in its place, and its reply is left in the bucket.

        serve: the address of `/invocations`.
        """

        def invoke(path: str, headers: dict[str, str], body: bytes) -> Answer:
            given = {name.lower(): value for name, value in headers.items()}
            if "x-amzn-sagemaker-inputlocation" in given:
                assert not body, "body and location exclude each other"
                source, key = given["x-amzn-sagemaker-inputlocation"][5:].split("/", 1)
                body = self.client("s3").get_object(Bucket=source, Key=key)["Body"].read()
            reply = requests.post(
                serve, body, headers={"Content-Type": given["x-amzn-sagemaker-content-type"]}
            )
            folder = f"async/{path.split('/')[2]}"
            name = given["x-amzn-sagemaker-filename"]
            kind = "replies" if reply.ok else "failures"
            self.put_object(f"{folder}/{kind}/{name}", reply.content)
            address = f"s3://{BUCKET}/{folder}"
            found = [
                ("Content-Type", "application/json"),
                ("X-Amzn-SageMaker-OutputLocation", f"{address}/replies/{name}"),
                ("X-Amzn-SageMaker-FailureLocation", f"{address}/failures/{name}"),
            ]
            return 202, found, b'{"InferenceId": "1"}'

        self.runtime = invoke

    def serve_batches(self, serve: str) -> None:
        """Transform jobs that do their work before they are described: a request for each line."""

        def transform(request: dict[str, Any]) -> dict[str, Any]:
            source = request["TransformInput"]["DataSource"]["S3DataSource"]["S3Uri"]
            bucket, key = source[5:].split("/", 1)
            lines = self.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
            kind = {"Content-Type": request["TransformInput"]["ContentType"]}
            replies = [requests.post(serve, line, headers=kind) for line in lines.splitlines()]
            assert all(reply.ok for reply in replies), [reply.text for reply in replies]
            out = request["TransformOutput"]["S3OutputPath"][5:].split("/", 1)[1]
            name = key.rpartition("/")[2]
            # As the platform does for AssembleWith: Line, whatever a reply ends with.
            body = b"".join(reply.content + b"\n" for reply in replies)
            self.put_object(f"{out}{name}.out", body, bucket)
            answer = self.client("sagemaker").create_transform_job(**request)
            return {"TransformJobArn": answer["TransformJobArn"]}

        self.handlers["CreateTransformJob"] = transform

    # --- what moto lacks

    def _update_endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        sagemaker = self.client("sagemaker")
        name = request["EndpointName"]
        arn = sagemaker.describe_endpoint(EndpointName=name)["EndpointArn"]
        tags = sagemaker.list_tags(ResourceArn=arn)["Tags"]
        sagemaker.delete_endpoint(EndpointName=name)
        sagemaker.create_endpoint(**request, Tags=tags)
        return {"EndpointArn": arn}

    def _delete_training_job(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the job's tags away: then it is nobody's. A handler's job is unknown."""
        sagemaker = self.client("sagemaker")
        try:
            arn = sagemaker.describe_training_job(**request)["TrainingJobArn"]
        except ClientError:
            return {}
        keys = [tag["Key"] for tag in sagemaker.list_tags(ResourceArn=arn)["Tags"]]
        sagemaker.delete_tags(ResourceArn=arn, TagKeys=keys)
        return {}

    def _delete_group(self, request: dict[str, Any]) -> dict[str, Any]:
        gone = "Could not find the group"
        self.refuse("DescribeModelPackageGroup", "ValidationException", gone, times=100)
        return {}

    # --- HTTP

    def _to_moto(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(self.moto, timeout=60)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        """The answer to one request: a refusal, a handler's, or moto's."""
        operation, is_json = operation_of(method, path, body, headers)
        self.requests[operation] += 1
        self.sent.append((operation, json.loads(body) if is_json and body else path))
        waiting = self.refusals.get(operation)
        if waiting:
            status, code, message = waiting.pop(0)
            return status, *error(code, message, is_json)
        if self.runtime is not None and path.startswith("/endpoints/"):
            return self.runtime(path, headers, body)
        if operation in self.handlers:
            try:
                answer = self.handlers[operation](json.loads(body))
            except RefusedError as refusal:
                code, message = refusal.args
                return 400, *error(code, message, is_json)
            kind = [("Content-Type", "application/x-amz-json-1.1")]
            return 200, kind, json.dumps(answer, default=_seconds).encode()
        return self._to_moto(method, path, body, headers)


@functools.cache
def _client(moto: str, service: str) -> Any:
    return boto3.client(
        service,
        endpoint_url=f"http://{moto}",
        region_name=REGION,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )


def operation_of(method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[str, bool]:
    """The API's name of a request, as far as it says one, and whether errors are JSON."""
    for name, value in headers.items():
        if name.lower() == "x-amz-target":
            return value.rpartition(".")[2], True
    smithy = re.search(r"/operation/(\w+)$", path)
    if smithy:
        return smithy[1], False
    form = parse_qs(body.decode("latin-1")) if b"Action=" in body else {}
    if "Action" in form:
        return form["Action"][0], False
    return f"{method} {urlsplit(path).path}", path.startswith("/endpoints/")


def error(code: str, message: str, is_json: bool) -> tuple[list[tuple[str, str]], bytes]:
    """Headers and body of an error in the form of the service's protocol."""
    if is_json:
        headers = [("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-errortype", code)]
        return headers, json.dumps({"__type": code, "message": message}).encode()
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    wrapped = f"<ErrorResponse>{body}<RequestId>1</RequestId></ErrorResponse>"
    return [("Content-Type", "text/xml")], wrapped.encode()


def _seconds(value: datetime) -> float:
    return value.timestamp()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together, or the client waits for the second packet

    def _answer(self) -> None:
        account: Account = self.server.account  # type: ignore[attr-defined]
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        status, headers, body = account.answer(
            self.command, self.path, self._body(), dict(self.headers.items())
        )
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _answer  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = io.BytesIO()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content.write(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return content.getvalue()

    def log_message(self, *words: Any) -> None:
        """Quiet."""
