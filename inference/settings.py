"""Settings of one server, from environment variables.

Only `inference.__main__` reads the environment; everything else takes `Settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from dalle.errors import UserError
from dalle.types import PRECISIONS, WIDEST_WINDOW, Precision
from inference.api.content_credentials import CERTIFICATE, KEY, SIGNATURE_BYTES
from inference.api.parsing import bound
from inference.api.schema import DEFAULT_LIMITS, MAX_DEADLINE_SECONDS, Limits

BATCH_DEADLINE_SECONDS = 590.0  # the platform ends a batch invocation after 600 by default
MEGABYTE = 1_000_000
MOVING_INVOCATIONS = 7  # that are read or whose replies are sent, beside those queued or running
SPARE_THREADS = 8  # for pings, metrics and refusals, each of which is short
LARGEST_BODIES = 8  # that are in memory while they arrive
MARK_BYTES = 2_500  # of a file for what it says of its origin, at most


def _up_to(most: float, default: float | None, description: str) -> Any:
    """Return the field of a number from 1 to `most`; `{}` in the description is that range."""
    return Field(default, ge=1, le=most, description=description.format(f"1 to {most:g}"))


class Variables(BaseModel):
    """Environment variables of `serve`, in upper case. `--help` shows the descriptions.

    title: what a variable that is no number must be, for the message of an error.
    """

    model_config = ConfigDict(alias_generator=str.upper, allow_inf_nan=False)

    dalle_device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        title="auto, cpu, cuda or cuda:N",
        description="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one",
    )
    dalle_threads: int | None = _up_to(
        1024,
        None,
        "torch threads, {}; empty: as many as are fastest when the model is loaded, at most the "
        "processors this container may use",
    )
    dalle_chunk_size: int | None = _up_to(
        512, None, "candidates sampled together, {}; empty: what suits the device"
    )
    dalle_parallel_positions: int | None = _up_to(
        WIDEST_WINDOW,
        None,
        "positions of a candidate that a step samples on a CPU, {}; empty: as many as are fastest; "
        "the images are the same",
    )
    dalle_precision: Precision = Field(
        "fp32",
        title=f"one of {', '.join(PRECISIONS)}",
        description="of sampling: fp32; on a GPU bf16; on a CPU fp16 or int8, faster; refused "
        "where it changes the model's images",
    )
    dalle_queue_size: int = _up_to(
        512, 16, "requests that may wait, {}; the next one is refused with 429"
    )
    dalle_max_candidates: int = _up_to(
        512, DEFAULT_LIMITS.max_candidates, "largest num_candidates of a request, {}"
    )
    dalle_max_images: int = _up_to(
        512, DEFAULT_LIMITS.max_images, "largest num_images of a request, {}"
    )
    dalle_deadline_seconds: float | None = _up_to(
        MAX_DEADLINE_SECONDS,
        None,
        f"for requests that set none, {{}}; empty: {DEFAULT_LIMITS.deadline_seconds:.0f}, and "
        f"{BATCH_DEADLINE_SECONDS:.0f} with SAGEMAKER_BATCH=true",
    )
    dalle_max_request_mb: int = _up_to(1000, 25, "largest body of a request, {}")
    dalle_body_seconds: float = _up_to(
        3600, 60, "for the body of a request to arrive, {}; then 408"
    )
    dalle_max_reply_mb: int = _up_to(
        1000, 5, "largest JSON reply in MB, {}; checked before any work"
    )
    dalle_stall_seconds: float = _up_to(
        3600, 300, "/ping answers 500 after so long without progress, {}"
    )
    dalle_drain_seconds: float = _up_to(
        27, 25, "for ending requests after SIGTERM, {}; then the process is killed"
    )
    dalle_playground: bool = Field(
        False,
        title="1 or 0",
        description="1: GET / is a page to try the model; for your own machine, not an endpoint",
    )
    dalle_mark: Literal["on", "off"] = Field(
        "on",
        title="on or off",
        description="on: image files say in their metadata that a model made them, which one and "
        "by which seed; off: they say nothing",
    )
    dalle_c2pa_certificate: str = Field(
        "",
        description="path of a PEM file with your certificate and those above it: files carry a "
        "signed C2PA manifest; needs the package c2pa-python",
    )
    dalle_c2pa_key: str = Field(
        "", description="path of a PEM file with the certificate's private key, without a password"
    )
    sagemaker_batch: str = Field(
        "", description="true in a batch transform job; set by the platform"
    )
    sagemaker_batch_strategy: str = Field(
        "",
        description="MULTI_RECORD: a reply of several lines ends without a line break in a batch "
        "transform job, which adds one with AssembleWith=Line; set by the platform",
    )
    sagemaker_max_payload_in_mb: int = Field(
        0, ge=1, le=100, description="raises DALLE_MAX_REQUEST_MB in a batch transform job"
    )
    sagemaker_bind_to_port: str = Field("", description="the port, where --port is not given")


VARIABLES = {name.upper(): field for name, field in Variables.model_fields.items()}
_BATCH, _STRATEGY, _BATCH_MB, _PORT = list(VARIABLES)[-4:]


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server. `limits` bound requests; `Variables` describes the others.

    threads, chunk_size, parallel_positions: None to choose what is fastest or suits the device.
    last_line_break: whether a reply of several lines ends with one.
    """

    limits: Limits
    device: str
    threads: int | None
    chunk_size: int | None
    parallel_positions: int | None
    precision: Precision
    queue_size: int
    body_seconds: float
    stall_seconds: float
    drain_seconds: float
    playground: bool = False
    mark: bool = True
    last_line_break: bool = True
    c2pa_files: tuple[Path, Path] | None = None
    """Paths of certificate and key that files are signed with."""

    @property
    def max_invocations(self) -> int:
        """Number of invocations that are read, wait, run or are sent at the same time."""
        return self.queue_size + 1 + MOVING_INVOCATIONS

    @property
    def max_body_bytes(self) -> int:
        """Bytes in memory, together, of the bodies that are arriving."""
        return LARGEST_BODIES * self.limits.max_request_bytes

    @property
    def http_threads(self) -> int:
        """Number of threads that answer HTTP."""
        return self.max_invocations + SPARE_THREADS


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Return the settings in environment variables; unset and empty ones have their defaults.

    Raises `UserError` that names every variable that is wrong, its value and its range.
    """
    given = {name: text for name in VARIABLES if (text := environment.get(name, "").strip())}
    is_batch = given.get(_BATCH, "").lower() in ("true", "1")
    if not is_batch:
        given.pop(_BATCH_MB, None)
        given.pop(_STRATEGY, None)
    try:
        read = Variables.model_validate(given)
    except ValidationError as error:
        raise UserError("; ".join(map(_explain, error.errors()))) from error
    c2pa_files = _c2pa_files(read)
    default_deadline = BATCH_DEADLINE_SECONDS if is_batch else DEFAULT_LIMITS.deadline_seconds
    request_mb = max(read.dalle_max_request_mb, read.sagemaker_max_payload_in_mb)
    return Settings(
        limits=Limits(
            max_candidates=read.dalle_max_candidates,
            max_images=read.dalle_max_images,
            max_request_bytes=request_mb * MEGABYTE,
            max_reply_bytes=read.dalle_max_reply_mb * MEGABYTE,
            deadline_seconds=read.dalle_deadline_seconds or default_deadline,
            mark_bytes=(read.dalle_mark == "on") * MARK_BYTES + bool(c2pa_files) * SIGNATURE_BYTES,
        ),
        device=read.dalle_device,
        threads=read.dalle_threads,
        chunk_size=read.dalle_chunk_size,
        parallel_positions=read.dalle_parallel_positions,
        precision=read.dalle_precision,
        queue_size=read.dalle_queue_size,
        body_seconds=read.dalle_body_seconds,
        stall_seconds=read.dalle_stall_seconds,
        drain_seconds=read.dalle_drain_seconds,
        playground=read.dalle_playground,
        mark=read.dalle_mark == "on",
        last_line_break=read.sagemaker_batch_strategy != "MULTI_RECORD",
        c2pa_files=c2pa_files,
    )


def _c2pa_files(read: Variables) -> tuple[Path, Path] | None:
    certificate, key = read.dalle_c2pa_certificate, read.dalle_c2pa_key
    if not certificate and not key:
        return None
    if not certificate or not key:
        missing, given = (KEY, CERTIFICATE) if certificate else (CERTIFICATE, KEY)
        raise UserError(f"{missing} is missing: it goes with {given}")
    if read.dalle_mark == "off":
        raise UserError(f"DALLE_MARK must be on with {CERTIFICATE}, got 'off'")
    return Path(certificate), Path(key)


def _explain(detail: ErrorDetails) -> str:
    name = str(detail["loc"][0])
    field = VARIABLES[name]
    wanted = field.title
    if wanted is None:
        is_whole = int in (field.annotation, *get_args(field.annotation))
        kind = "a whole number" if is_whole else "a number"
        wanted = f"{kind} from 1 to {bound(field, 'le'):g}"
    return f"{name} must be {wanted}, got {detail['input']!r}"


def read_port(environment: Mapping[str, str], given: int | None) -> int:
    """Return `--port` where it was given, else the platform's port, else 8080."""
    value = environment.get(_PORT, "").strip()
    if given is None and value and not value.isdigit():
        raise UserError(f"{_PORT} must be a port number from 0 to 65535, got {value!r}")
    port = given if given is not None else int(value or 8080)
    if not 0 <= port <= 65_535:
        raise UserError(f"the port must be from 0 to 65535, got {port}")
    return port
