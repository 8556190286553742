"""The request for one training job: pure functions from a run to CreateTrainingJob's parameters.

`train` sends it, and `tune` uses the same parts in its job definition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dalle.platform.environment import Paths
from dalle.platform.metric_lines import METRIC_DEFINITIONS
from dalle.types import StageName
from infra.aws import limits
from infra.aws.request import Request, digest
from infra.aws.team.encryption import Encryption
from infra.aws.team.network import Network
from training.config.hyperparameters import LEGACY, TOKENIZER_MODEL

InputMode = Literal["File", "FastFile", "Pipe"]
Distribution = Literal["FullyReplicated", "ShardedByS3Key"]
DATA = ("train", "validation")
Stage = Literal[StageName, "all"]
MODEL_FILE = "model.tar.gz"
MAX_NOTE = 15
NOTE_PATTERN = rf"(?=.{{1,{MAX_NOTE}}}$)[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*"
"""A job's name has 63 characters: the project's, the note, a digest, a stage and an attempt."""


@dataclass(frozen=True)
class TrainingRun:
    """The settings of one `train` command; equal runs have equal digests, and so equal job names.

    channels: name -> s3 address of a folder (or, for `artefact` and `clip`, of a file).
    content: a digest of the objects in the channels; other data make another run.
    spot: spare capacity, cheaper and interruptible. keep_alive_seconds: of a warm pool.
    distribution: of the channel train over the hosts. attributes: of an augmented manifest, empty
    for other data.
    note: the word that --run puts into the names.
    network, encryption, tags: of the hosts and of what they write; they do not affect the model.
    encrypt_traffic: between the hosts of a job. training_plan: the ARN of reserved capacity.
    """

    project: str
    image_uri: str
    role_arn: str
    bucket: str
    channels: Mapping[str, str]
    content: str = ""
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    instance_type: str = "ml.g5.xlarge"
    instance_count: int = 1
    volume_gb: int = 50
    max_runtime_seconds: int = 24 * 3600
    max_wait_seconds: int | None = None
    spot: bool = False
    keep_alive_seconds: int = 0
    input_mode: InputMode = "File"
    distribution: Distribution = "FullyReplicated"
    attributes: tuple[str, ...] = ()
    isolate: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    network: Network = Network()
    encryption: Encryption = Encryption()
    tags: list[dict[str, str]] = field(default_factory=list)
    encrypt_traffic: bool = False
    training_plan: str = ""

    @property
    def digest(self) -> str:
        """The digest of every setting that affects the model; time limits do not."""
        return digest(
            [
                self.image_uri,
                self.bucket,
                dict(self.channels),
                self.content,
                dict(self.hyperparameters),
                dict(self.environment),
                self.instance_type,
                self.instance_count,
                self.note,
                *([self.distribution] if self.distribution != "FullyReplicated" else []),
                *self.attributes,
            ]
        )

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.project, self.note, self.digest) if part)


def check_run(run: TrainingRun) -> None:
    """Raise PlanError with a line for every limit that the run breaks."""
    wrong = list(limits.check_instance_type(run.instance_type))
    if run.note and not re.fullmatch(NOTE_PATTERN, run.note):
        wrong.append(
            f"--run is 1 to {MAX_NOTE} letters, digits and single dashes, got {run.note!r}"
        )
    if not 1 <= run.max_runtime_seconds <= limits.MAX_RUNTIME_SECONDS:
        wrong.append(
            f"a job may run for 1 s to {limits.MAX_RUNTIME_SECONDS:,} s (28 days), "
            f"got {run.max_runtime_seconds:,}"
        )
    if run.max_wait_seconds is not None and not run.spot:
        wrong.append("--max-wait-hours is for --spot alone")
    if run.max_wait_seconds is not None and run.max_wait_seconds < run.max_runtime_seconds:
        wrong.append(
            f"--max-wait-hours includes waiting and running, and must be at least --max-hours, "
            f"which is {run.max_runtime_seconds / 3600:g}, got {run.max_wait_seconds / 3600:g}"
        )
    if not 0 <= run.keep_alive_seconds <= limits.KEEP_ALIVE_SECONDS:
        wrong.append(
            f"a warm pool is kept for at most {limits.KEEP_ALIVE_SECONDS // 60} minutes, "
            f"got {run.keep_alive_seconds / 60:g}"
        )
    if run.keep_alive_seconds and run.spot:
        wrong.append("a warm pool (--keep-alive-minutes) cannot be of spot instances (--spot)")
    if run.training_plan and (run.spot or run.keep_alive_seconds):
        option = "--spot" if run.spot else "--keep-alive-minutes"
        wrong.append(f"--training-plan is capacity of its own: leave {option} out")
    if run.encrypt_traffic and run.instance_count == 1:
        wrong.append("--encrypt-traffic is between the hosts of one job, and this job has 1")
    wrong += run.encryption.problems(run.instance_type, is_job=True)
    if run.instance_count < 1:
        wrong.append(f"a job trains on 1 instance or more, got {run.instance_count}")
    if run.attributes and run.input_mode != "Pipe":
        wrong.append(
            f"an augmented manifest (--attributes) needs --input-mode Pipe, got {run.input_mode}"
        )
    if len(run.attributes) > limits.ATTRIBUTES:
        wrong.append(
            f"--attributes are at most {limits.ATTRIBUTES} names, got {len(run.attributes)}"
        )
    wrong += check_hyperparameters(run.hyperparameters)
    limits.raise_all(f"training run {run.name}", wrong)


def check_hyperparameters(hyperparameters: Mapping[str, str]) -> list[str]:
    """Return a line for every limit of the platform that hyperparameters break."""
    wrong = []
    if len(hyperparameters) > limits.HYPERPARAMETERS:
        wrong.append(
            f"at most {limits.HYPERPARAMETERS} hyperparameters, got {len(hyperparameters)}"
        )
    for name, value in hyperparameters.items():
        if len(name) > limits.HYPERPARAMETER_NAME:
            wrong.append(f"hyperparameter {name[:40]}… has a name of {len(name)} characters")
        if len(value) > limits.HYPERPARAMETER_VALUE:
            wrong.append(
                f"hyperparameter {name} has at most {limits.HYPERPARAMETER_VALUE} characters, "
                f"got {len(value)}"
            )
    return wrong


def job_name(run: TrainingRun, stage: Stage, attempt: int = 1) -> str:
    """Return the name of one job of the run; a repeated attempt has its number in the name."""
    return f"{run.name}-{stage}" + (f"-{attempt}" if attempt > 1 else "")


def model_uri(run: TrainingRun, job: str) -> str:
    """Return the address to which the platform writes the model of a job."""
    return f"s3://{run.bucket}/models/{job}/output/{MODEL_FILE}"


def training_request(
    run: TrainingRun,
    stage: Stage,
    job: str,
    artefact: str | None = None,
    *,
    is_next: bool = False,
) -> Request:
    """Return the request that starts one job. artefact: an earlier job's model.tar.gz, or None.

    is_next: whether that job is of the same chain, and had the same channels.
    """
    request: dict[str, Any] = {
        "TrainingJobName": job,
        "HyperParameters": {**run.hyperparameters, "stage": stage},
        **definition(run, artefact, is_next=is_next),
        # One folder for all attempts: a new one resumes from the last checkpoint.
        "CheckpointConfig": {
            "S3Uri": f"s3://{run.bucket}/checkpoints/{job_name(run, stage)}/",
            "LocalPath": str(Paths().checkpoints),
        },
        "TensorBoardOutputConfig": {
            "S3OutputPath": f"s3://{run.bucket}/tensorboard/{job_name(run, stage)}/",
            "LocalPath": str(Paths().tensorboard),
        },
        "ProfilerConfig": {"DisableProfiler": True},
        "Tags": run.tags,
    }
    return Request("sagemaker", "CreateTrainingJob", **request)


def definition(run: TrainingRun, artefact: str | None, *, is_next: bool = False) -> dict[str, Any]:
    """Return the part that a training job and the definition in a tuning job share."""
    channels = {**run.channels, **({"artefact": artefact} if artefact else {})}
    # The first job of a chain has put them into the artefact.
    if artefact:
        for name in (TOKENIZER_MODEL, LEGACY):
            channels.pop(name, None)
    if is_next:
        channels.pop("clip", None)
    stopping = {"MaxRuntimeInSeconds": run.max_runtime_seconds}
    if run.spot:
        stopping["MaxWaitTimeInSeconds"] = run.max_wait_seconds or 2 * run.max_runtime_seconds
    common: dict[str, Any] = {
        "AlgorithmSpecification": {
            "TrainingImage": run.image_uri,
            "TrainingInputMode": "File",
            "MetricDefinitions": [dict(metric) for metric in METRIC_DEFINITIONS],
        },
        "RoleArn": run.role_arn,
        "InputDataConfig": [channel(run, name, uri) for name, uri in sorted(channels.items())],
        "OutputDataConfig": {
            "S3OutputPath": f"s3://{run.bucket}/models/",
            **run.encryption.output_fields,
        },
        "StoppingCondition": stopping,
        "ResourceConfig": resource_config(run),
    }
    if run.environment:
        common["Environment"] = dict(run.environment)
    if run.spot:
        common["EnableManagedSpotTraining"] = True
    if run.isolate:
        common["EnableNetworkIsolation"] = True
    if run.network.vpc_config:
        common["VpcConfig"] = run.network.vpc_config
    if run.encrypt_traffic:
        common["EnableInterContainerTrafficEncryption"] = True
    return common


def resource_config(run: TrainingRun) -> dict[str, Any]:
    """Return the ResourceConfig. A family with built-in disks ignores the volume."""
    found: dict[str, Any] = {
        "InstanceType": run.instance_type,
        "InstanceCount": run.instance_count,
        "VolumeSizeInGB": run.volume_gb,
        **run.encryption.volume_fields("VolumeKmsKeyId", run.instance_type),
    }
    if run.keep_alive_seconds:
        found["KeepAlivePeriodInSeconds"] = run.keep_alive_seconds
    if run.training_plan:
        found["TrainingPlanArn"] = run.training_plan
    return found


def channel(run: TrainingRun, name: str, uri: str) -> dict[str, Any]:
    """Return one input. Models are copied, because they are unpacked; data may be streamed.

    Held-out data go to every host: they are few, and each host reads only a sample.
    """
    source: dict[str, Any] = {
        "S3DataType": "S3Prefix",
        "S3Uri": uri,
        "S3DataDistributionType": run.distribution if name == "train" else "FullyReplicated",
    }
    found: dict[str, Any] = {
        "ChannelName": name,
        "DataSource": {"S3DataSource": source},
        "InputMode": run.input_mode if name in DATA else "File",
    }
    if run.attributes and name in DATA:
        source["S3DataType"] = "AugmentedManifestFile"
        source["AttributeNames"] = list(run.attributes)
        found["RecordWrapperType"] = "RecordIO"  # marks where each value ends
    return found
