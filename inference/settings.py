"""What one server is told from outside: environment variables to typed settings, checked at once.

Only `inference.__main__` reads the environment; everything else is handed `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dalle.errors import UserError
from dalle.types import PRECISIONS, Precision
from inference.api.schema import MAX_DEADLINE_SECONDS, Limits

BATCH_DEADLINE_SECONDS = 590.0  # the platform ends a batch invocation after 600 unless told
MEGABYTE = 1_000_000
MOVING_INVOCATIONS = 7  # beside those that wait or run: bodies coming in, replies going out
SPARE_THREADS = 8  # for pings, metrics and refusals, each of which is short


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a server can be told. `limits` bound requests; the rest is how it works."""

    limits: Limits = field(default_factory=Limits)
    device: str = "auto"
    threads: int | None = None  # None: as many as draw fastest, of the processors to use
    chunk_size: int | None = None  # None: what suits the device
    precision: Precision = "fp32"
    queue_size: int = 16
    body_seconds: float = 60.0
    stall_seconds: float = 300.0
    drain_seconds: float = 25.0
    is_batch: bool = False

    @property
    def max_invocations(self) -> int:
        """How many invocations may be read, wait, run or be sent together; one runs."""
        return self.queue_size + 1 + MOVING_INVOCATIONS

    @property
    def http_threads(self) -> int:
        """One for each invocation that may be under way, and the spare ones."""
        return self.max_invocations + SPARE_THREADS


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: its name, default as text, and a sentence for `--help`."""

    name: str
    default: str
    description: str


DEVICE = Variable(
    "DALLE_DEVICE", "auto", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one"
)
THREADS = Variable(
    "DALLE_THREADS",
    "",
    "torch threads, 1 to 1024; empty: as many as draw fastest when the model is loaded, at most "
    "the processors this container may use",
)
CHUNK_SIZE = Variable(
    "DALLE_CHUNK_SIZE", "", "candidates drawn together, 1 to 512; empty: what suits the device"
)
PRECISION = Variable(
    "DALLE_PRECISION",
    "fp32",
    "of drawing: fp32; on a GPU bf16; on a CPU fp16 or int8, faster; refused where it changes "
    "the model's pictures",
)
QUEUE_SIZE = Variable(
    "DALLE_QUEUE_SIZE", "16", "requests that may wait, 1 to 512; the next one is refused with 429"
)
MAX_CANDIDATES = Variable(
    "DALLE_MAX_CANDIDATES", "512", "largest num_candidates of a request, 1 to 512"
)
MAX_IMAGES = Variable("DALLE_MAX_IMAGES", "32", "largest num_images of a request, 1 to 512")
DEADLINE = Variable(
    "DALLE_DEADLINE_SECONDS",
    "",
    f"for requests that set none, 1 to {MAX_DEADLINE_SECONDS:.0f}; empty: 55, and "
    f"{BATCH_DEADLINE_SECONDS:.0f} with SAGEMAKER_BATCH=true",
)
REQUEST_MB = Variable("DALLE_MAX_REQUEST_MB", "25", "largest body of a request, 1 to 1000")
BODY_SECONDS = Variable(
    "DALLE_BODY_SECONDS", "60", "for the body of a request to arrive, 1 to 3600; then 408"
)
REPLY_MB = Variable(
    "DALLE_MAX_REPLY_MB", "5", "largest JSON reply in MB, 1 to 1000; checked before any work"
)
STALL = Variable(
    "DALLE_STALL_SECONDS", "300", "/ping answers 500 after so long without progress, 1 to 3600"
)
DRAIN = Variable(
    "DALLE_DRAIN_SECONDS", "25", "for ending requests after SIGTERM, 1 to 27; then it is killed"
)
OURS = (
    DEVICE,
    THREADS,
    CHUNK_SIZE,
    PRECISION,
    QUEUE_SIZE,
    MAX_CANDIDATES,
    MAX_IMAGES,
    DEADLINE,
    REQUEST_MB,
    BODY_SECONDS,
    REPLY_MB,
    STALL,
    DRAIN,
)
BATCH = Variable("SAGEMAKER_BATCH", "", "true in a batch transform job; set by the platform")
BATCH_MB = Variable(
    "SAGEMAKER_MAX_PAYLOAD_IN_MB", "", "raises DALLE_MAX_REQUEST_MB in a batch transform job"
)
PORT = Variable("SAGEMAKER_BIND_TO_PORT", "", "the port, where --port is not given")
PLATFORMS = (BATCH, BATCH_MB, PORT)


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from environment variables; unset and empty ones have their defaults.

    Raises `UserError` that names every variable that is wrong, its value and its range.
    """
    problems: list[str] = []

    def text(variable: Variable) -> str:
        return environment.get(variable.name, "").strip() or variable.default

    def number(
        variable: Variable, convert: Callable[[str], float], low: float, high: float
    ) -> float | None:
        value = text(variable)
        if not value:
            return None
        try:
            result = convert(value)
        except ValueError:
            result = low - 1
        if not low <= result <= high:
            kind = "a whole number" if convert is int else "a number"
            problems.append(
                f"{variable.name} must be {kind} from {low:g} to {high:g}, got {value!r}"
            )
        return result

    def whole(variable: Variable, high: int) -> int | None:
        result = number(variable, int, 1, high)
        return None if result is None else int(result)

    device = text(DEVICE)
    if device not in ("auto", "cpu", "cuda") and not (
        device.startswith("cuda:") and device[5:].isdigit()
    ):
        problems.append(f"{DEVICE.name} must be auto, cpu, cuda or cuda:N, got {device!r}")
    precision = next((each for each in PRECISIONS if each == text(PRECISION)), None)
    if precision is None:
        known = ", ".join(PRECISIONS)
        problems.append(f"{PRECISION.name} must be one of {known}, got {text(PRECISION)!r}")
    is_batch = text(BATCH).lower() in ("true", "1")
    request_mb = whole(REQUEST_MB, 1000) or 0
    if is_batch:
        request_mb = max(request_mb, whole(BATCH_MB, 100) or 0)
    deadline = number(DEADLINE, float, 1, MAX_DEADLINE_SECONDS)
    if deadline is None:
        deadline = BATCH_DEADLINE_SECONDS if is_batch else Limits().deadline_seconds
    settings = Settings(
        limits=Limits(
            max_candidates=whole(MAX_CANDIDATES, 512) or 0,
            max_images=whole(MAX_IMAGES, 512) or 0,
            max_request_bytes=request_mb * MEGABYTE,
            max_reply_bytes=(whole(REPLY_MB, 1000) or 0) * MEGABYTE,
            deadline_seconds=deadline,
        ),
        device=device,
        threads=whole(THREADS, 1024),
        chunk_size=whole(CHUNK_SIZE, 512),
        precision=precision or "fp32",
        queue_size=whole(QUEUE_SIZE, 512) or 0,
        body_seconds=number(BODY_SECONDS, float, 1, 3600) or 0.0,
        stall_seconds=number(STALL, float, 1, 3600) or 0.0,
        drain_seconds=number(DRAIN, float, 1, 27) or 0.0,
        is_batch=is_batch,
    )
    if problems:
        raise UserError("; ".join(problems))
    return settings


def read_port(environment: Mapping[str, str], given: int | None) -> int:
    """`--port` where it was given, else what the platform says, else 8080."""
    value = environment.get(PORT.name, "").strip()
    if given is None and value and not value.isdigit():
        raise UserError(f"{PORT.name} must be a port number from 0 to 65535, got {value!r}")
    port = given if given is not None else int(value or 8080)
    if not 0 <= port <= 65_535:
        raise UserError(f"the port must be from 0 to 65535, got {port}")
    return port
