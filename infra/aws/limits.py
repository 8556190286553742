"""SageMaker's limits in numbers: a plan is checked against them before any request is sent.

Every error names the limit and its number. Sources: AWS's documentation and the API's model, as of
2026-11; where they differ, the narrower one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dalle.errors import PlanError
from infra.aws.deployment import Deployment, Mode

MEGABYTE = 1_000_000
GIBIBYTE = 1 << 30

INVOCATION_SECONDS: dict[Mode, int] = {
    "realtime": 60,
    "serverless": 60,
    "async": 3600,
    "batch": 3600,
}
PAYLOAD_BYTES: dict[Mode, int] = {
    "realtime": 25 * MEGABYTE,
    "serverless": 4 * MEGABYTE,
    "async": 1_000 * MEGABYTE,
    "batch": 100 * MEGABYTE,
}
INLINE_BYTES = 128_000
"""Of a request to an asynchronous endpoint that is sent with the call, not by the bucket."""
SERVERLESS_MEMORY_MB = range(1024, 6144 + 1, 1024)
SERVERLESS_IMAGE_BYTES = 10 * GIBIBYTE
SERVERLESS_CONCURRENCY = range(1, 200 + 1)
TIMEOUT_SECONDS = range(60, 3600 + 1)
VOLUME_GB = range(1, 512 + 1)
CONCURRENT = range(1, 1000 + 1)
ENVIRONMENT_ENTRIES = 100
ENVIRONMENT_BYTES = 32 * 1024
BATCH_PAYLOAD_MB = 100
ATTRIBUTES = 16
HYPERPARAMETERS = 100
HYPERPARAMETER_NAME = 256
HYPERPARAMETER_VALUE = 256
"""By the documentation; the API's model allows 2,500."""
MAX_RUNTIME_SECONDS = 28 * 24 * 3600
KEEP_ALIVE_SECONDS = 21_600

CUDA = "12.8"
OLDEST_DRIVER = 525
AMI_DRIVERS: dict[str, int] = {
    "al2-ami-sagemaker-inference-gpu-2": 535,
    "al2-ami-sagemaker-inference-gpu-2-1": 535,
    "al2-ami-sagemaker-inference-gpu-3-1": 550,
    "al2023-ami-sagemaker-inference-gpu-4-1": 580,
}
DEFAULT_AMI = "al2-ami-sagemaker-inference-gpu-3-1"
NEWEST_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
BATCH_AMI = "al2-ami-sagemaker-batch-gpu-535"
BLACKWELL_DRIVER = 570
BLACKWELL = {"g7", "g7e", "p6-b200", "p6-b300"}
TOO_OLD = {"p2": "Kepler", "p3": "Volta", "p3dn": "Volta"}
OTHER_CHIPS = {"inf1", "inf2", "trn1", "trn1n", "trn2", "dl1"}
NO_BATCH = {"t2", "p4d", "p4de", "p5", "p5e", "p5en", "g7", "g7e"}
# Families with built-in disks; a requested volume is ignored or refused.
OWN_DISKS = {"g4dn", "g5", "g6", "g6e", "g7", "g7e", "p3dn", "p4d", "p4de", "p5", "p5e", "p5en"}
OWN_DISKS |= {"p6-b200", "p6-b300"}


def family(instance_type: str) -> str:
    """Return the family of a type: g5 for ml.g5.xlarge."""
    parts = instance_type.split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "ml" else instance_type


def has_gpu(instance_type: str) -> bool:
    """Return whether a type has NVIDIA GPUs: its family begins with p or g."""
    return re.match(r"[pg]\d", family(instance_type)) is not None


def has_own_disk(instance_type: str) -> bool:
    """Return whether a type has built-in disks: a GPU family that has them, or a d in its name."""
    kind = family(instance_type)
    return kind in OWN_DISKS or re.match(r"[a-z]+\d+[a-z]*d", kind) is not None


def is_arm(instance_type: str) -> bool:
    """Return whether a type has an ARM processor: a g follows its generation."""
    return re.match(r"[a-z]+\d+g|p6e-gb", family(instance_type)) is not None


def default_ami(instance_type: str) -> str | None:
    """Return the InferenceAmiVersion with a driver for the image's CUDA; None without a GPU."""
    if not has_gpu(instance_type):
        return None
    return NEWEST_AMI if family(instance_type) in BLACKWELL else DEFAULT_AMI


def check_deployment(deployment: Deployment) -> None:
    """Raise PlanError with a line for every limit that the deployment breaks."""
    raise_all(
        f"deployment {deployment.name} ({deployment.mode})",
        [
            *_hosts(deployment),
            *_serverless(deployment),
            *_numbers(deployment),
            *_model_and_environment(deployment),
        ],
    )


def raise_all(what: str, wrong: Sequence[str]) -> None:
    """Raise PlanError with every mistake; return when there is none."""
    if len(wrong) == 1:
        raise PlanError(f"{what}: {wrong[0]}")
    if wrong:
        raise PlanError("\n- ".join([f"{what} is not possible:", *wrong]))


def check_instance_type(instance_type: str) -> Iterator[str]:
    """Yield why the image cannot run on a type: not x86, or a GPU that its torch dropped."""
    kind = family(instance_type)
    if not re.fullmatch(r"ml\.[a-z0-9-]+\.[a-z0-9-]+", instance_type):
        yield f"an instance type such as ml.g5.xlarge was expected, got {instance_type!r}"
    elif kind in TOO_OLD:
        yield (
            f"{instance_type} has {TOO_OLD[kind]} GPUs, which drivers and PyTorch for CUDA {CUDA} "
            "no longer support or will soon drop; take ml.g4dn, ml.g5 or ml.g6"
        )
    elif kind in OTHER_CHIPS:
        yield f"{instance_type} is neither a host with NVIDIA GPUs nor a plain CPU host"
    elif is_arm(instance_type):
        yield f"{instance_type} has an ARM processor, and the image is for x86 (linux/amd64)"


def _hosts(deployment: Deployment) -> Iterator[str]:
    kind = deployment.instance_type
    if deployment.mode == "serverless":
        return
    if kind is None:
        yield f"mode {deployment.mode} needs --instance-type"
        return
    yield from check_instance_type(kind)
    if deployment.mode == "batch":
        if family(kind) in NO_BATCH:
            yield f"batch transform has no {kind}; take ml.g5, ml.g6, or a CPU type such as ml.c7i"
        return
    if deployment.volume_gb is not None and has_own_disk(kind):
        yield f"{kind} has a built-in disk: --volume-gb cannot be chosen for it"
    if deployment.ami is None:
        if has_gpu(kind):
            yield (
                f"{kind} needs an explicit InferenceAmiVersion: the default has driver 470 on most "
                f"families, and CUDA {CUDA} needs driver {OLDEST_DRIVER} or newer"
            )
        return
    yield from _ami(deployment.ami, kind)


def _ami(ami: str, kind: str) -> Iterator[str]:
    if not has_gpu(kind):
        yield f"InferenceAmiVersion {ami} is for GPU hosts, and {kind} has no GPU; leave it out"
    elif ami not in AMI_DRIVERS:
        known = ", ".join(f"{name} (driver {driver})" for name, driver in AMI_DRIVERS.items())
        yield f"InferenceAmiVersion {ami!r} is unknown; there are {known}"
    elif family(kind) in BLACKWELL and AMI_DRIVERS[ami] < BLACKWELL_DRIVER:
        yield (
            f"{kind} needs driver {BLACKWELL_DRIVER} or newer, and {ami} has {AMI_DRIVERS[ami]}; "
            f"take {NEWEST_AMI}"
        )


def _serverless(deployment: Deployment) -> Iterator[str]:
    given = {
        "--memory-mb": deployment.memory_mb,
        "--max-concurrency": deployment.max_concurrency,
        "--provisioned-concurrency": deployment.provisioned_concurrency,
    }
    if deployment.mode != "serverless":
        for option, value in given.items():
            if value is not None:
                yield f"{option} is for --mode serverless alone"
        return
    if deployment.instance_type is not None:
        yield (
            "a serverless endpoint has no instances and no GPU: leave --instance-type out, or take "
            "--mode async, which costs nothing when idle either"
        )
    if deployment.memory_mb not in SERVERLESS_MEMORY_MB:
        yield (
            f"a serverless endpoint has 1024 to 6144 MB of memory (6 GB) in steps of 1024, "
            f"got {deployment.memory_mb}"
        )
    size = deployment.image_bytes or deployment.compressed_bytes
    if size > SERVERLESS_IMAGE_BYTES:
        yield (
            f"a serverless endpoint takes images of at most {SERVERLESS_IMAGE_BYTES:,} bytes "
            f"(10 GiB), and this one has {'' if deployment.image_bytes else 'packed '}{size:,}"
        )
    most = deployment.max_concurrency or 0
    yield from _outside("--max-concurrency", most, SERVERLESS_CONCURRENCY)
    warm = deployment.provisioned_concurrency
    if warm is not None and not 1 <= warm <= most:
        yield (
            f"--provisioned-concurrency must be 1 to --max-concurrency, which is {most}, got {warm}"
        )
    absent = {
        "--ami": deployment.ami,
        "--volume-gb": deployment.volume_gb,
        "--isolate": deployment.isolate or None,
    }
    for option, chosen in absent.items():
        if chosen is not None:
            yield f"{option} does not exist for a serverless endpoint"


def _numbers(deployment: Deployment) -> Iterator[str]:
    most = INVOCATION_SECONDS[deployment.mode]
    seconds = deployment.invocation_seconds
    if seconds is not None and not 1 <= seconds <= most:
        hint = "; --mode async has up to 3600" if most == INVOCATION_SECONDS["realtime"] else ""
        yield f"an invocation has 1 to {most} s in mode {deployment.mode}, got {seconds}{hint}"
    if deployment.mode == "serverless":
        return
    if deployment.mode != "batch":
        yield from _outside("--startup-seconds", deployment.startup_seconds, TIMEOUT_SECONDS)
        yield from _outside("--download-seconds", deployment.download_seconds, TIMEOUT_SECONDS)
    yield from _outside("--volume-gb", deployment.volume_gb, VOLUME_GB)
    if deployment.max_instances < max(1, deployment.min_instances):
        yield (
            f"--max-instances must be at least 1 and --min-instances, which is "
            f"{deployment.min_instances}, got {deployment.max_instances}"
        )
    is_shared = deployment.copies is not None
    if deployment.mode == "realtime" and deployment.min_instances < (0 if is_shared else 1):
        yield (
            "a real-time endpoint keeps at least 1 instance; one of models named by --component, "
            "--mode async and --mode serverless cost nothing when idle"
        )
    if deployment.mode == "async":
        yield from _outside("--concurrent", deployment.concurrent_per_instance, CONCURRENT)


def _outside(option: str, value: int | None, allowed: range) -> Iterator[str]:
    if value is not None and value not in allowed:
        yield f"{option} must be {allowed[0]} to {allowed[-1]}, got {value}"


def _model_and_environment(deployment: Deployment) -> Iterator[str]:
    if not deployment.model_data.startswith("s3://"):
        yield f"the model is given by its s3:// address, got {deployment.model_data!r}"
    elif not deployment.model_data.endswith(".tar.gz"):
        is_batch = deployment.mode == "batch"
        hint = " (batch transform cannot read uncompressed models)" if is_batch else ""
        yield f"the model must be a model.tar.gz{hint}, got {deployment.model_data}"
    environment = deployment.environment or {}
    if len(environment) > ENVIRONMENT_ENTRIES:
        yield f"at most {ENVIRONMENT_ENTRIES} environment variables, got {len(environment)}"
    for name, value in environment.items():
        if max(len(name), len(value)) > 1024:
            yield f"environment variable {name[:40]} is longer than 1024 characters"
    size = sum(len(name) + len(value) for name, value in environment.items())
    if size > ENVIRONMENT_BYTES:
        yield f"the environment has at most {ENVIRONMENT_BYTES:,} bytes in all, got {size:,}"


def check_payload(mode: Mode, num_bytes: int) -> None:
    """Raise PlanError when a request's body is larger than the mode allows."""
    most = PAYLOAD_BYTES[mode]
    if num_bytes > most:
        hint = "" if mode in ("async", "batch") else "; --mode async takes up to 1 GB"
        raise PlanError(
            f"a request to a {mode} endpoint has at most {most:,} bytes, got {num_bytes:,}{hint}"
        )
