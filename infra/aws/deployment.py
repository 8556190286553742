"""What `deploy` is to make, as plain data: how one model is served, and on which hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["realtime", "async", "serverless", "batch"]
MODES: tuple[Mode, ...] = ("realtime", "async", "serverless", "batch")


@dataclass(frozen=True)
class Copies:
    """Copies of one model on the hosts of an endpoint that several models share.

    name: of the inference component at AWS. memory_mb: MiB of a host's memory for each copy.
    cpus: processor cores for each; None for no share of its own. gpus: for each; None without.
    least, most: bounds of the scaling.
    """

    name: str
    memory_mb: int
    cpus: float | None = None
    gpus: int | None = None
    least: int = 0
    most: int = 1


@dataclass(frozen=True)
class Deployment:
    """How one model is to be served. A field that the mode does not use is None.

    model_data: the s3 address of a model.tar.gz. image_bytes: unpacked, or None where unknown.
    min_instances, max_instances: bounds of the scaling.
    concurrent_per_instance: requests in progress that the scaling aims at.
    pool: types in the order in which they are tried, beginning with instance_type; empty for one.
    reservation: the ARN of reserved capacity.
    success_topic, error_topic: ARNs of topics that are told of asynchronous replies and failures.
    copies: of a model that shares the endpoint's hosts; None for an endpoint of one model.
    """

    name: str
    mode: Mode
    image_uri: str
    model_data: str
    image_bytes: int | None = None
    compressed_bytes: int = 0
    instance_type: str | None = None
    min_instances: int = 1
    max_instances: int = 1
    concurrent_per_instance: int = 4
    memory_mb: int | None = None
    max_concurrency: int | None = None
    provisioned_concurrency: int | None = None
    ami: str | None = None
    startup_seconds: int = 600
    download_seconds: int = 600
    invocation_seconds: int | None = None
    volume_gb: int | None = None
    environment: Mapping[str, str] | None = None
    isolate: bool = False
    pool: tuple[str, ...] = ()
    provision_seconds: int | None = None
    reservation: str = ""
    success_topic: str = ""
    error_topic: str = ""
    copies: Copies | None = None
