"""The only file that knows boto3: sessions, retries, dry runs, and AWS's errors as plain advice.

    aws = connect(options)
    aws.call(Call("sagemaker", "DescribeModel", {"ModelName": "dalle"}))

Every request is checked against botocore's model before it is sent, so that a mistake costs no
round trip and is told alike in a dry run, which sends nothing and needs neither credentials nor
network. Throttled requests are sent again by botocore's adaptive mode.
"""

from __future__ import annotations

import argparse
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
from botocore.config import Config

from dalle.errors import AccessError, AwsError, DalleError, PlanError
from infra.aws.errors import LOG_IN, explain_answer, is_absence, plain
from infra.aws.output import Console
from infra.aws.request import Call, placeholder, problems

MAX_ATTEMPTS = 8
CONNECT_SECONDS = 10
MAX_CONNECTIONS = 16
READ_SECONDS = 70
"""A real-time invocation may take 60 s; nothing else takes longer to answer."""

LOCAL_REGION = "us-east-1"
PATIENCE_SECONDS = 1800.0
"""For endpoints, stacks and jobs to be gone; each takes minutes at most."""

# What botocore raises; the last of them when an answer is not of the form it must have.
ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.parsers.ResponseParserError,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that speaks to AWS."""
    group = parser.add_argument_group("AWS")
    group.add_argument("--region", help="default: AWS_REGION, AWS_DEFAULT_REGION or the profile's")
    group.add_argument("--profile", help="a profile of the AWS configuration files")
    group.add_argument(
        "--dry-run", action="store_true", help="print every request as JSON and send nothing"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def connect(options: argparse.Namespace, console: Console | None = None) -> Aws:
    """AWS as the options of `add_arguments` describe it."""
    console = console or Console(as_json=options.json, dry_run=options.dry_run)
    return Aws(console, region=options.region, profile=options.profile)


def told(error: Exception) -> DalleError | None:
    """An error of botocore's as one of ours; None for every other error."""
    if isinstance(error, botocore.exceptions.ClientError):
        return explain(error, Call("AWS", error.operation_name, {}))
    if isinstance(error, ERRORS):
        return explain(error, Call("AWS", "request", {}))
    return None


class Aws:
    """One account and region. Nothing is read or sent before the first call.

    A dry run is the console's: requests are printed there instead of being sent.
    local_url: of an endpoint on this machine, which takes the place of AWS and trusts everybody.
    """

    def __init__(
        self,
        console: Console,
        *,
        region: str | None = None,
        profile: str | None = None,
        local_url: str | None = None,
    ) -> None:
        self.console = console
        self._local_url = local_url
        self._region = region
        self._profile = profile
        self._session: boto3.Session | None = None
        self._clients: dict[tuple[str, str, float], Any] = {}
        self._botocore = botocore.session.get_session()
        self._botocore.register_component("data_loader", _loader())

    @property
    def dry_run(self) -> bool:
        return self.console.dry_run

    @property
    def region(self) -> str:
        """The region that requests go to. Raises AccessError when none is chosen."""
        if self._local_url:
            return LOCAL_REGION
        found = self._region or os.environ.get("AWS_REGION") or self._boto().region_name
        if found:
            return str(found)
        if self.dry_run:
            return placeholder("region")
        raise AccessError("no AWS region is chosen; give --region, or set AWS_REGION")

    def check(self, call: Call) -> None:
        """Raises PlanError with everything that botocore's model of the request finds wrong."""
        model = self._botocore.get_service_model(call.service).operation_model(call.operation)
        shape = model.input_shape
        if shape is None:
            return
        report = botocore.validate.ParamValidator().validate(dict(call.parameters), shape)
        wrong = report.generate_report().splitlines() if report.has_errors() else []
        wrong.extend(problems(shape, call.parameters, call.operation))
        if wrong:
            raise PlanError("\n".join(wrong))

    def call(
        self,
        call: Call,
        *,
        answer: Mapping[str, Any] | None = None,
        region: str | None = None,
        read_seconds: float = READ_SECONDS,
    ) -> dict[str, Any]:
        """Send one request and return AWS's answer.

        answer: what a dry run goes on with, placeholders for what only AWS knows.
        Raises PlanError before sending, AccessError and AwsError after it.
        """
        self.check(call)
        if self.dry_run:
            self.console.request(call)
            return dict(answer or {})
        try:
            return self._send(call, region, read_seconds)
        except ERRORS as error:
            raise explain(error, call) from error

    def find(self, call: Call, *, answer: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """As `call`, but None for a thing that is not there; so is a dry run without an answer."""
        if self.dry_run:
            self.call(call)
            return None if answer is None else dict(answer)
        self.check(call)
        try:
            return self._send(call, None, READ_SECONDS)
        except ERRORS as error:
            if is_missing(error):
                return None
            raise explain(error, call) from error

    def items(
        self, call: Call, key: str, *, answer: list[Any] | None = None, region: str | None = None
    ) -> Iterator[Any]:
        """What stands under `key` on every page of a list; a dry run goes on with `answer`.

        Raises as `call` does. A list of a thing that does not exist is empty.
        """
        self.check(call)
        if self.dry_run:
            self.console.request(call)
            yield from answer or []
            return
        try:
            client = self.client(call.service, region, READ_SECONDS)
            paginator = client.get_paginator(_method(call.operation))
            for page in paginator.paginate(**call.parameters):
                yield from page.get(key, [])
        except ERRORS as error:
            if not is_missing(error):
                raise explain(error, call) from error

    def wait(
        self, call: Call, state: Callable[[dict[str, Any]], bool], *, every_seconds: float
    ) -> dict[str, Any]:
        """Ask until `state` of the answer is true; a dry run asks once and gets no answer."""
        if self.dry_run:
            return self.call(call)
        while True:
            found = self.call(call)
            if state(found):
                return found
            self.pause(every_seconds)

    def until(self, what: str, is_done: Callable[[], bool], *, every_seconds: float) -> None:
        """Ask until something has come about. Raises AwsError when that takes half an hour."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while not is_done():
            if time.monotonic() > ends:
                raise AwsError(
                    f"{what} has not come about within {PATIENCE_SECONDS / 60:.0f} minutes; "
                    "run the same command again to wait on"
                )
            self.pause(every_seconds)

    def pause(self, seconds: float) -> None:
        """Between two looks at something that takes its time."""
        time.sleep(seconds)

    def read(self, bucket: str, key: str) -> bytes | None:
        """The content of one S3 object; None when there is none."""
        call = Call("s3", "GetObject", {"Bucket": bucket, "Key": key})
        found = self.find(call)
        if found is None:
            return None
        return b"".join(self.chunks(found["Body"], call))

    def chunks(self, body: Any, call: Call) -> Iterator[bytes]:
        """The bytes of an answer that arrives bit by bit: a body, or a stream of events."""
        try:
            if hasattr(body, "iter_chunks"):
                yield from body.iter_chunks(1 << 20)
                return
            for event in body:
                if "PayloadPart" in event:
                    yield event["PayloadPart"]["Bytes"]
        except ERRORS as error:
            raise explain(error, call) from error

    def write(self, path: Path, bucket: str, key: str) -> None:
        """One file to one S3 object, in a single request."""
        with path.open("rb") as file:
            self.call(Call("s3", "PutObject", {"Bucket": bucket, "Key": key, "Body": file}))

    def _send(self, call: Call, region: str | None, read_seconds: float) -> dict[str, Any]:
        client = self.client(call.service, region, read_seconds)
        answer: dict[str, Any] = getattr(client, _method(call.operation))(**call.parameters)
        return answer

    def client(
        self, service: str, region: str | None = None, read_seconds: float = READ_SECONDS
    ) -> Any:
        """boto3's client, made once."""
        key = (service, region or self.region, read_seconds)
        if key not in self._clients:
            # A drawing that was paid for once is not asked for again behind the caller's back.
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
    """Of the services' models: that of SageMaker is 2 MB of JSON, and is read once."""
    return botocore.loaders.create_loader()


def _attempts() -> int:
    """How often one request is tried, the first time included (AWS_MAX_ATTEMPTS)."""
    text = os.environ.get("AWS_MAX_ATTEMPTS", "")
    return int(text) if text.isdigit() and int(text) > 0 else MAX_ATTEMPTS


def _method(operation: str) -> str:
    """boto3's name of an operation: CreateModel is create_model."""
    return str(botocore.xform_name(operation))


def is_missing(error: Exception) -> bool:
    """Whether AWS says that what was asked about is not there."""
    if not isinstance(error, botocore.exceptions.ClientError):
        return False
    details = error.response.get("Error", {})
    return is_absence(details.get("Code", ""), details.get("Message", ""))


def explain(error: Exception, call: Call) -> DalleError:
    """An error of botocore's as one of ours that says what to do."""
    action = f"{call.service}:{call.operation}"
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
    """What `serve` itself answered, which the platform wraps into an error of its own."""
    text = response.get("OriginalMessage") or message
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = plain(text)
    return AwsError(
        f"the endpoint answered {response.get('OriginalStatusCode', 'an error')}: {text}"
    )
