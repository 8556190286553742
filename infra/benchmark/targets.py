"""The servers of a benchmark: a URL, the local image under several limits, an endpoint."""

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
from inference.bench.http_target import HttpTarget, Response, Target
from infra.aws.client import Aws
from infra.aws.request import describe
from infra.benchmark.machine import (
    container_hardware,
    container_usage,
    container_versions,
    this_machine,
)
from infra.benchmark.revision import checkout_revision
from infra.benchmark.run_file import Device, Hardware
from infra.cost.prices import PriceTable
from infra.docker import why_no_docker
from infra.endpoint.calls.direct import invoke_sync
from infra.local.serving import Serving, unpacked

LOOPBACK = ("127.0.0.1", "::1", "localhost")
READY_SECONDS = 600.0


@dataclass
class Server:
    """One server to be measured, ready for requests.

    name: short, for tables and file names; empty for a single server. address: its URL, image or
    endpoint name. cpu_seconds: returns the processor time that the server has used, or None where
    it cannot be read; peak_memory_bytes likewise.
    """

    name: str
    kind: Literal["url", "image", "endpoint"]
    address: str
    target: Target
    device: Device
    hardware: Hardware
    versions: dict[str, str]
    stands_for: list[str] = field(default_factory=list)
    ready_seconds: float | None = None
    cpu_seconds: Callable[[], float | None] = lambda: None
    peak_memory_bytes: Callable[[], int | None] = lambda: None


def url_server(
    url: str, *, device: Device | None, processor: str | None, timeout_seconds: float
) -> Server:
    """Return a server that is already running.

    device, processor: given by the caller; with cuda `processor` names the GPU. They are optional
    for a server on this machine: the names come from /proc, and the device is the CPU without an
    NVIDIA driver.
    Raises UserError when the server does not answer, or when the device is not known.
    """
    target = HttpTarget(url, timeout_seconds=timeout_seconds)
    is_here = target.host in LOOPBACK
    if device is None:
        if not is_here or Path("/proc/driver/nvidia").exists():
            raise UserError(
                f"the device of {target.host} is not known here: give --device cpu or "
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
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    versions = _versions(target)
    if is_here and (revision := checkout_revision()):
        versions["revision"] = revision  # a server on this machine is taken to be of this checkout
    return Server("", "url", address, target, device, hardware, versions)


@contextlib.contextmanager
def image_servers(
    image: str,
    model: Path,
    *,
    cpus: Sequence[float],
    memory: str | None,
    options: Sequence[str] = (),
    timeout_seconds: float,
    line: Callable[[str], None],
) -> Iterator[list[Server]]:
    """Run the image's `serve` once for each number of processors, all until the end of `with`.

    cpus: limits for `docker run --cpus`; empty for one container without a limit. memory: a limit
    such as `6g`. options: further options of `docker run`, such as `--gpus all`.
    Raises UserError where Docker, the image or the model is missing.
    """
    reason = why_no_docker(image)
    if reason:
        raise UserError(reason, field="--image")
    if not model.exists():
        raise UserError(f"{model} does not exist; give a model.tar.gz or its directory")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(unpacked(model))
        servers = []
        for limit in cpus or (None,):
            words = [*options, *(("--cpus", f"{limit:g}") if limit else ())]
            if memory:
                # Without a limit on swap, a container may use as much swap in addition.
                words += ["--memory", memory, "--memory-swap", memory]
            try:
                container = stack.enter_context(Serving(directory, *words, image=image))
            except RuntimeError as error:
                raise UserError(f"{image} did not start: {error}", field="--image") from error
            server = _container_server(container, image, limit, memory, timeout_seconds)
            line(
                f"{server.name or image}: ready after {server.ready_seconds:.1f} s, "
                f"{server.hardware.describe()}"
            )
            servers.append(server)
        yield servers


def _container_server(
    container: Serving, image: str, limit: float | None, memory: str | None, timeout: float
) -> Server:

    try:
        container.wait_until_ready(READY_SECONDS)
    except RuntimeError as error:
        raise UserError(f"{image} did not start: {error}", field="--image") from error
    ready_seconds = time.monotonic() - container.began
    device, hardware = container_hardware(container, cpu_limit=limit, memory_limit=memory)
    return Server(
        name=f"{limit:g} cpus" if limit else "",
        kind="image",
        address=image,
        target=HttpTarget(f"http://127.0.0.1:{container.port}", timeout_seconds=timeout),
        device=device,
        hardware=hardware,
        versions=container_versions(container),
        ready_seconds=ready_seconds,
        cpu_seconds=lambda: container_usage(container).cpu_seconds,
        peak_memory_bytes=lambda: container_usage(container).peak_bytes,
    )


class EndpointTarget:
    """A SageMaker endpoint, invoked through boto3. Used by many threads at once."""

    def __init__(self, aws: Aws, endpoint: str) -> None:
        self._aws = aws
        self._endpoint = endpoint

    def connect(self) -> EndpointTarget:
        return self

    def close(self) -> None:
        """boto3 closes its connections itself."""

    def send(self, body: bytes) -> Response:
        try:
            return Response("200", invoke_sync(self._aws, self._endpoint, body))
        except DalleError as error:
            return Response(_outcome(error.__cause__))


def _outcome(cause: BaseException | None) -> str:
    """Return the outcome of a failed invocation: the container's status before the platform's."""
    response: dict[str, Any] = getattr(cause, "response", None) or {}
    status = response.get("OriginalStatusCode") or response.get("ResponseMetadata", {}).get(
        "HTTPStatusCode"
    )
    if status:
        return str(status)
    return "timeout" if "Timeout" in type(cause).__name__ else "connection"


def endpoint_server(aws: Aws, endpoint: str, table: PriceTable, *, device: Device | None) -> Server:
    """Return a real-time or serverless endpoint with one instance.

    Raises UserError for an asynchronous one, for one with several instances, and for an instance
    type that the price table does not describe when no device is given.
    """
    described = aws.call(describe("Endpoint", endpoint))
    name = described["EndpointConfigName"]
    config = aws.call(describe("EndpointConfig", name))
    if config.get("AsyncInferenceConfig"):
        raise UserError(
            f"{endpoint} is asynchronous and replies through S3; measure the same image and type "
            "as a real-time endpoint",
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
                f"{endpoint} has {count} instances: scale it to 1, because the cost is that of one "
                "instance",
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
    return Server(
        name="",
        kind="endpoint",
        address=endpoint,
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
