"""The AWS client, and the only file that imports boto3: sessions, retries, dry runs, errors.

    aws = connect(options)
    aws.call(Request("sagemaker", "DescribeModel", {"ModelName": "dalle"}))

Every request is checked against botocore's model before it is sent. So a mistake costs no round
trip and gives the same message in a dry run, which sends nothing and needs neither credentials nor
network. Throttled requests are sent again by botocore's adaptive mode.
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import botocore.loaders
import botocore.parsers
import botocore.session
import botocore.validate
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config

from dalle.errors import AccessError, AwsError, DalleError, PlanError
from infra.aws.errors import LOG_IN, explain_answer, is_absence, plain
from infra.aws.output import Output
from infra.aws.request import Request, placeholder, problems

MAX_ATTEMPTS = 8
CONNECT_SECONDS = 10
MAX_CONNECTIONS = 16
READ_SECONDS = 70
"""Above the 60 s that a real-time invocation may take; every other request is quicker."""

LOCAL_REGION = "us-east-1"
PATIENCE_SECONDS = 1800.0
"""For endpoints, stacks and jobs to be deleted, which takes minutes."""

# botocore's exceptions; the last one is for a response that cannot be parsed.
ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.parsers.ResponseParserError,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that sends requests to AWS."""
    group = parser.add_argument_group("AWS")
    group.add_argument("--region", help="default: AWS_REGION, AWS_DEFAULT_REGION or the profile's")
    group.add_argument("--profile", help="a profile of the AWS configuration files")
    group.add_argument(
        "--dry-run", action="store_true", help="print every request as JSON and send nothing"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def connect(options: argparse.Namespace, output: Output | None = None) -> Aws:
    """Return the client that the options of `add_arguments` describe."""
    output = output or Output(as_json=options.json, dry_run=options.dry_run)
    return Aws(output, region=options.region, profile=options.profile)


class Aws:
    """A client of one account and region. Nothing is read or sent before the first request.

    In a dry run (`output.dry_run`) requests are printed instead of being sent.
    local_url: of an endpoint on this machine, which replaces AWS and needs no credentials.
    """

    def __init__(
        self,
        output: Output,
        *,
        region: str | None = None,
        profile: str | None = None,
        local_url: str | None = None,
    ) -> None:
        self.output = output
        self._local_url = local_url
        self._region = region
        self._profile = profile
        self._session: boto3.Session | None = None
        self._clients: dict[tuple[str, str, float], Any] = {}
        self._botocore = botocore.session.get_session()
        self._botocore.register_component("data_loader", _loader())

    @property
    def dry_run(self) -> bool:
        return self.output.dry_run

    @property
    def region(self) -> str:
        """The region of every request. Raises AccessError when none is chosen."""
        if self._local_url:
            return LOCAL_REGION
        found = self._region or os.environ.get("AWS_REGION") or self._boto().region_name
        if found:
            return str(found)
        if self.dry_run:
            return placeholder("region")
        raise AccessError("no AWS region is chosen; give --region, or set AWS_REGION")

    def check(self, request: Request) -> None:
        """Raise PlanError with every fault of a request by botocore's model of it."""
        model = self._botocore.get_service_model(request.service).operation_model(request.operation)
        shape = model.input_shape
        if shape is None:
            return
        report = botocore.validate.ParamValidator().validate(dict(request.parameters), shape)
        wrong = report.generate_report().splitlines() if report.has_errors() else []
        wrong.extend(problems(shape, request.parameters, request.operation))
        if wrong:
            raise PlanError("\n".join(wrong))

    def call(
        self,
        request: Request,
        *,
        answer: Mapping[str, Any] | None = None,
        region: str | None = None,
        read_seconds: float = READ_SECONDS,
    ) -> dict[str, Any]:
        """Send one request and return AWS's response.

        answer: the response in a dry run, with placeholders for values of AWS's.
        Raises PlanError before sending, AccessError and AwsError after it.
        """
        self.check(request)
        if self.dry_run:
            self.output.request(request)
            return dict(answer or {})
        try:
            client = self.client(request.service, region, read_seconds)
            send = getattr(client, _method(request.operation))
            return dict(send(**request.parameters))
        except ERRORS as error:
            raise explain(error, request) from error

    def find(
        self, request: Request, *, answer: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """As `call`, but return None for a resource that does not exist, or without `answer`."""
        try:
            found = self.call(request, answer=answer)
        except DalleError as error:
            if is_missing(error.__cause__):
                return None
            raise
        return None if self.dry_run and answer is None else found

    def items(
        self,
        request: Request,
        key: str,
        *,
        answer: list[Any] | None = None,
        region: str | None = None,
    ) -> Iterator[Any]:
        """Yield the entries under `key` on every page of a list; in a dry run, of `answer`.

        Raises as `call` does. The list of a resource that does not exist is empty.
        """
        self.check(request)
        if self.dry_run:
            self.output.request(request)
            yield from answer or []
            return
        try:
            client = self.client(request.service, region, READ_SECONDS)
            paginator = client.get_paginator(_method(request.operation))
            for page in paginator.paginate(**request.parameters):
                yield from page.get(key, [])
        except ERRORS as error:
            if not is_missing(error):
                raise explain(error, request) from error

    def wait(
        self, request: Request, state: Callable[[dict[str, Any]], bool], *, every_seconds: float
    ) -> dict[str, Any]:
        """Repeat a request until `state` of its response is true; once only in a dry run."""
        if self.dry_run:
            return self.call(request)
        while True:
            found = self.call(request)
            if state(found):
                return found
            self.pause(every_seconds)

    def until(self, what: str, is_done: Callable[[], bool], *, every_seconds: float) -> None:
        """Wait until `is_done` is true. Raises AwsError after half an hour."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while not is_done():
            if time.monotonic() > ends:
                raise AwsError(
                    f"{what} did not happen within {PATIENCE_SECONDS / 60:.0f} minutes; "
                    "run the same command again to continue waiting"
                )
            self.pause(every_seconds)

    def until_gone(self, what: str, request: Request, *, every_seconds: float) -> None:
        """Wait until a resource is not described any more. Raises AwsError after half an hour."""
        self.until(what, lambda: self.find(request) is None, every_seconds=every_seconds)

    def pause(self, seconds: float) -> None:
        """Wait between two requests of a polling loop."""
        time.sleep(seconds)

    def read(self, bucket: str, key: str) -> bytes | None:
        """Return the content of one S3 object; None when there is none."""
        request = Request("s3", "GetObject", Bucket=bucket, Key=key)
        found = self.find(request)
        if found is None:
            return None
        return b"".join(self.chunks(found["Body"], request))

    def presigned(self, bucket: str, key: str, seconds: int) -> str:
        """Return an address at which anybody may read one S3 object, for so many seconds.

        It is signed here and sent nowhere; it ends earlier with temporary credentials. The object
        need not exist yet. Raises AccessError without credentials.
        """
        try:
            client = self._boto().client(
                "s3",
                region_name=self.region,
                # Objects under a KMS key need this signature. The bucket's name stands before
                # its region, since an address without a region redirects, which breaks it.
                config=Config(signature_version="s3v4", s3={"addressing_style": "virtual"}),
                endpoint_url=self._local_url,
            )
            object_ = {"Bucket": bucket, "Key": key}
            return str(client.generate_presigned_url("get_object", object_, ExpiresIn=seconds))
        except ERRORS as error:
            raise explain(error) from error

    def chunks(self, body: Any, request: Request) -> Iterator[bytes]:
        """Yield the bytes of a streamed response: a body, or a stream of events."""
        try:
            if hasattr(body, "iter_chunks"):
                yield from body.iter_chunks(1 << 20)
                return
            for event in body:
                if "PayloadPart" in event:
                    yield event["PayloadPart"]["Bytes"]
        except ERRORS as error:
            raise explain(error, request) from error

    def write(self, path: Path, bucket: str, key: str) -> None:
        """Write one file to one S3 object, in a single request."""
        with path.open("rb") as file:
            self.call(Request("s3", "PutObject", Bucket=bucket, Key=key, Body=file))

    @property
    def runtime_url(self) -> str:
        """Where endpoints are invoked: https://runtime.sagemaker.REGION.amazonaws.com, or local."""
        return str(self.client("sagemaker-runtime").meta.endpoint_url)

    def bearer_token(self, seconds: int) -> str:
        """Return a token with which OpenAI's clients may invoke endpoints as the caller.

        seconds: until it expires, 1 to 43,200. It is signed here and sent nowhere; whoever has it
        has the caller's rights, so make one for each use. As `sagemaker.core.token_generator`.
        Raises AccessError without credentials.
        """
        try:
            found = self._boto().get_credentials()
            credentials = found.get_frozen_credentials() if found else None
        except ERRORS as error:
            raise explain(error) from error
        if credentials is None:
            raise AccessError(f"no AWS credentials were found; {LOG_IN}")
        url = "https://sagemaker.amazonaws.com/"
        request = AWSRequest("POST", url, params={"Action": "CallWithBearerToken"})
        request.headers["host"] = "sagemaker.amazonaws.com"
        SigV4QueryAuth(credentials, "sagemaker", self.region, expires=seconds).add_auth(request)
        signed = request.url.removeprefix("https://") + "&Version=1"
        return "sagemaker-api-key-" + base64.b64encode(signed.encode()).decode()

    def client(
        self, service: str, region: str | None = None, read_seconds: float = READ_SECONDS
    ) -> Any:
        """Return boto3's client of a service, created once."""
        key = (service, region or self.region, read_seconds)
        if key not in self._clients:
            # An invocation costs money, and so is never repeated without the caller.
            attempts = 1 if service == "sagemaker-runtime" else _attempts()
            config = Config(
                retries={"mode": "adaptive", "total_max_attempts": attempts},
                connect_timeout=CONNECT_SECONDS,
                read_timeout=read_seconds,
                max_pool_connections=MAX_CONNECTIONS,
            )
            self._clients[key] = self._boto().client(
                service, region_name=key[1], config=config, endpoint_url=self._local_url
            )
        return self._clients[key]

    def _boto(self) -> boto3.Session:
        if self._session is None and self._local_url:
            self._session = boto3.Session("local", "local")  # so that no credentials are looked for
        elif self._session is None:
            self._session = boto3.Session(
                profile_name=self._profile, botocore_session=self._botocore
            )
        return self._session


@functools.cache
def _loader() -> Any:
    # Of the services' models: SageMaker's is 2 MB of JSON, read once.
    return botocore.loaders.create_loader()


def _attempts() -> int:
    """Return how often one request is sent at most, the first time included (AWS_MAX_ATTEMPTS)."""
    text = os.environ.get("AWS_MAX_ATTEMPTS", "")
    return int(text) if text.isdigit() and int(text) > 0 else MAX_ATTEMPTS


def _method(operation: str) -> str:
    """Return boto3's name of an operation: create_model for CreateModel."""
    return str(botocore.xform_name(operation))


def is_missing(error: BaseException | None) -> bool:
    """Return whether AWS reports that the resource does not exist."""
    if not isinstance(error, botocore.exceptions.ClientError):
        return False
    details = error.response.get("Error", {})
    return is_absence(details.get("Code", ""), details.get("Message", ""))


def explain(error: Exception, request: Request | None = None) -> DalleError:
    """Return botocore's error as one of ours that says what to do."""
    action = f"{request.service}:{request.operation}" if request else "a request"
    match error:
        case botocore.exceptions.ClientError():
            details = error.response.get("Error", {})
            code, message = details.get("Code", ""), plain(details.get("Message", ""))
            if code == "ModelError":
                return _explain_container(error.response, message)
            return explain_answer(code, message, action, _attempts())
        case (
            botocore.exceptions.NoCredentialsError()
            | botocore.exceptions.CredentialRetrievalError()
        ):
            return AccessError(f"no AWS credentials were found; {LOG_IN}")
        case botocore.exceptions.ProfileNotFound():
            return AccessError(f"{error}; `aws configure list-profiles` shows them")
        case botocore.exceptions.PartialCredentialsError():
            return AccessError(f"the AWS credentials are incomplete ({error}); {LOG_IN}")
        case botocore.exceptions.NoRegionError():
            return AccessError("no AWS region is chosen; give --region, or set AWS_REGION")
        case (
            botocore.exceptions.SSOError()
            | botocore.exceptions.TokenRetrievalError()
            | botocore.exceptions.UnauthorizedSSOTokenError()
        ):
            return AccessError(f"the AWS login is not valid any more ({error}); {LOG_IN}")
        case botocore.exceptions.HTTPClientError() | botocore.exceptions.ConnectionError():
            return AwsError(
                f"AWS did not answer {action} ({error}); "
                "check the network, the proxy settings and the region's name"
            )
    return AwsError(f"{action} failed: {plain(str(error))}")


def _explain_container(response: Mapping[str, Any], message: str) -> AwsError:
    """Return the error reply of `serve`, which the platform wraps into a ModelError."""

    text = response.get("OriginalMessage") or message
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = plain(text)
    return AwsError(
        f"the endpoint answered {response.get('OriginalStatusCode', 'an error')}: {text}"
    )
