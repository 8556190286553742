"""What a benchmark can be aimed at: a URL, the local image under several limits, an endpoint."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from dalle.errors import DalleError, UserError
from infra.aws.client import Aws
from infra.aws.request import Call
from infra.benchmark.http import Answer, HttpTarget, Target
from infra.benchmark.machine import (
    container_hardware,
    container_versions,
    look_inside,
    this_machine,
)
from infra.benchmark.run_file import Device, Hardware
from infra.cost.prices import PriceTable
from infra.docker import why_no_docker
from infra.local.serving import Serving, unpacked

LOOPBACK = ("127.0.0.1", "::1", "localhost")
READY_SECONDS = 600.0


@dataclass
class Subject:
    """One server to be measured, ready for requests.

    name: short, for tables and file names; empty where there is only one. cpu_seconds: asks for
    the processor time that the server has used; gives None where nobody knows. peak_memory_bytes:
    likewise.
    """

    name: str
    kind: Literal["url", "image", "endpoint"]
    place: str
    target: Target
    device: Device
    hardware: Hardware
    versions: dict[str, str]
    stands_for: list[str] = field(default_factory=list)
    ready_seconds: float | None = None
    cpu_seconds: Callable[[], float | None] = lambda: None
    peak_memory_bytes: Callable[[], int | None] = lambda: None


def url_subject(
    url: str, *, device: Device | None, processor: str | None, timeout_seconds: float
) -> Subject:
    """A server that is already running somewhere.

    device and processor: what it computes on, as the caller knows; with cuda `processor` names the
    GPU. Of a server on this machine they need not be given: the names are those that /proc has, and
    the device is the CPU where there is no NVIDIA driver.
    Raises UserError when it does not answer, or when the device is not known.
    """
    target = HttpTarget(url, timeout_seconds=timeout_seconds)
    is_here = target.host in LOOPBACK
    if device is None:
        if not is_here or Path("/proc/driver/nvidia").exists():
            raise UserError(
                f"what {target.host} computes on cannot be seen from here: give --device cpu or "
                "--device cuda",
                field="--device",
            )
        device = "cpu"
    try:
        target.get("/ping")
    except OSError as error:
        raise UserError(
            f"{url} is not ready: {error}; start it, and wait until /ping answers 200",
            field="--url",
        ) from error
    hardware = this_machine(device) if is_here else Hardware()
    if processor:
        named = "gpu" if device == "cuda" else "processor"
        hardware = hardware.model_copy(update={named: processor})
    parts = urlsplit(url)
    place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return Subject("", "url", place, target, device, hardware, _versions(target))


@contextlib.contextmanager
def image_subjects(
    image: str,
    model: Path,
    *,
    cpus: Sequence[float],
    memory: str | None,
    options: Sequence[str] = (),
    timeout_seconds: float,
    say: Callable[[str], None],
) -> Iterator[list[Subject]]:
    """The image's `serve`, once for each number of processors, all running until the end.

    cpus: limits as of `docker run --cpus`; empty for one container without a limit. memory: a
    limit such as `6g`. options: more words for `docker run`, such as `--gpus all`.
    Raises UserError where Docker, the image or the model is missing.
    """
    reason = why_no_docker(image)
    if reason:
        raise UserError(reason, field="--image")
    if not model.exists():
        raise UserError(f"{model} does not exist; give a model.tar.gz or its directory")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(unpacked(model))
        subjects = []
        for limit in cpus or (None,):
            words = [*options, *(("--cpus", f"{limit:g}") if limit else ())]
            if memory:
                # Without a limit on swap as well, a container may use as much of that again.
                words += ["--memory", memory, "--memory-swap", memory]
            try:
                container = stack.enter_context(Serving(directory, *words, image=image))
            except RuntimeError as error:
                raise UserError(f"{image} did not start: {error}", field="--image") from error
            subject = _container_subject(container, image, limit, memory, timeout_seconds)
            say(
                f"{subject.name or image}: ready after {subject.ready_seconds:.1f} s, "
                f"{subject.hardware.describe()}"
            )
            subjects.append(subject)
        yield subjects


def _container_subject(
    container: Serving, image: str, limit: float | None, memory: str | None, timeout: float
) -> Subject:

    try:
        container.wait_until_ready(READY_SECONDS)
    except RuntimeError as error:
        raise UserError(f"{image} did not start: {error}", field="--image") from error
    ready_seconds = time.monotonic() - container.began
    device, hardware = container_hardware(container, cpu_limit=limit, memory_limit=memory)
    return Subject(
        name=f"{limit:g} cpus" if limit else "",
        kind="image",
        place=image,
        target=HttpTarget(f"http://127.0.0.1:{container.port}", timeout_seconds=timeout),
        device=device,
        hardware=hardware,
        versions=container_versions(container),
        ready_seconds=ready_seconds,
        cpu_seconds=lambda: look_inside(container).cpu_seconds,
        peak_memory_bytes=lambda: look_inside(container).peak_bytes,
    )


class EndpointTarget:
    """A SageMaker endpoint, invoked as boto3 does it. Used by many threads at once."""

    def __init__(self, aws: Aws, endpoint: str) -> None:
        self._aws = aws
        self._endpoint = endpoint

    def connect(self) -> EndpointTarget:
        return self

    def close(self) -> None:
        """Its connections are boto3's own."""

    def send(self, body: bytes) -> Answer:
        call = Call(
            "sagemaker-runtime",
            "InvokeEndpoint",
            {
                "EndpointName": self._endpoint,
                "ContentType": "application/json",
                "Accept": "application/json",
                "Body": body,
            },
        )
        try:
            answer = self._aws.call(call)
            return Answer("200", b"".join(self._aws.chunks(answer["Body"], call)))
        except DalleError as error:
            return Answer(_outcome(error.__cause__))


def _outcome(cause: BaseException | None) -> str:
    """What went wrong with an invocation: the container's own status before the platform's."""
    response: dict[str, Any] = getattr(cause, "response", None) or {}
    status = response.get("OriginalStatusCode") or response.get("ResponseMetadata", {}).get(
        "HTTPStatusCode"
    )
    if status:
        return str(status)
    return "timeout" if "Timeout" in type(cause).__name__ else "connection"


def endpoint_subject(
    aws: Aws, endpoint: str, table: PriceTable, *, device: Device | None
) -> Subject:
    """A real-time or serverless endpoint with one instance.

    Raises UserError for an asynchronous one, for one with several instances, and for an instance
    type that the price table does not describe where no device is given.
    """
    described = aws.call(Call("sagemaker", "DescribeEndpoint", {"EndpointName": endpoint}))
    name = described["EndpointConfigName"]
    config = aws.call(Call("sagemaker", "DescribeEndpointConfig", {"EndpointConfigName": name}))
    if config.get("AsyncInferenceConfig"):
        raise UserError(
            f"{endpoint} is asynchronous and answers into S3; measure the same image and type as a "
            "real-time endpoint",
            field="--endpoint",
        )
    variant = config["ProductionVariants"][0]
    serverless = variant.get("ServerlessConfig")
    if serverless:
        kind, hardware = "serverless", Hardware(memory_limit=f"{serverless['MemorySizeInMB']} MB")
        device = device or "cpu"
    else:
        kind = variant["InstanceType"]
        current = described.get("ProductionVariants", [{}])[0].get("CurrentInstanceCount")
        count = current or variant.get("InitialInstanceCount", 1)
        if count != 1:
            raise UserError(
                f"{endpoint} has {count} instances: scale it to 1, so that what is measured is "
                "what one instance costs",
                field="--endpoint",
            )
        known = table.instance_type(kind)
        device = device or ("cuda" if known.gpus else "cpu")
        hardware = Hardware(
            instance_type=kind,
            num_cpus=known.vcpus,
            memory_bytes=int(known.memory_gib * 2**30),
            gpu=f"{known.gpus} x {known.gpu or 'GPU'}" if known.gpus else None,
        )
    return Subject(
        name="",
        kind="endpoint",
        place=endpoint,
        target=EndpointTarget(aws, endpoint),
        device=device,
        hardware=hardware,
        versions={},
        stands_for=[kind],
    )


def _versions(target: HttpTarget) -> dict[str, str]:

    try:
        document = json.loads(target.get("/openapi.json"))
        return {"dalle-sagemaker": str(document["info"]["version"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
