"""What SageMaker puts under /opt/ml for a training job, read into one frozen `Job`.

Every file and every key may be missing: local mode writes few of them and a hand-run container
none. Knows files, hosts and channels; knows nothing of models, and imports the standard library
only, so that infra can read it on a laptop. The environment is read here and nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.errors import JobError, PlatformError

logger = logging.getLogger(__name__)

DEFAULT_ROOT = Path("/opt/ml")
FAILURE_CHARACTERS = 1024
"""So much of the failure file reaches `FailureReason`; the rest would never be seen."""

FAILURE_BYTES = 6 * FAILURE_CHARACTERS
"""What so many characters take at most: an escaped surrogate is six bytes, others are fewer."""

SDK_CHANNELS = frozenset({"code", "recipe", "sm_drivers"})
"""Channels that the SageMaker SDK adds for itself; they carry no data of ours."""

DEFAULT_HOST = "algo-1"
DEFAULT_JOB_NAME = "local"
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Paths:
    """The places of the contract under one root (`/opt/ml` on the platform).

    checkpoints_at: where checkpointconfig.json puts checkpoints, when it says so.
    """

    root: Path = DEFAULT_ROOT
    checkpoints_at: Path | None = None

    @property
    def config(self) -> Path:
        return self.root / "input" / "config"

    @property
    def hyperparameters(self) -> Path:
        return self.config / "hyperparameters.json"

    @property
    def input_data_config(self) -> Path:
        return self.config / "inputdataconfig.json"

    @property
    def resource_config(self) -> Path:
        return self.config / "resourceconfig.json"

    @property
    def checkpoint_config(self) -> Path:
        return self.config / "checkpointconfig.json"

    @property
    def input_data(self) -> Path:
        """One directory per channel; read-only."""
        return self.root / "input" / "data"

    @property
    def artefact(self) -> Path:
        """The channel `artefact`, where an earlier job's model arrives; read-only, often absent."""
        return self.input_data / "artefact"

    @property
    def model(self) -> Path:
        """Packed as model.tar.gz when the job ends."""
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        """Copied to and from S3 all the time, when the job has a CheckpointConfig."""
        return self.checkpoints_at or self.root / "checkpoints"

    @property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def output_data(self) -> Path:
        """Packed as output.tar.gz when the job ends."""
        return self.output / "data"

    @property
    def tensorboard(self) -> Path:
        """Copied to S3 while the job runs."""
        return self.output / "tensorboard"

    @property
    def failure(self) -> Path:
        return self.output / "failure"

    @property
    def allowed(self) -> tuple[Path, ...]:
        """The directories a job may write; besides them only the system's temporary one."""
        return (self.model, self.checkpoints, self.output)


@dataclass(frozen=True)
class Channel:
    """One named input of the job. directory need not exist: the reader decides whether it must.

    input_mode: `File`, `FastFile` or `Pipe`; a pipe of the channel is beside its directory.
    distribution: `FullyReplicated`, or `ShardedByS3Key` when each host is given other objects.
    record_wrapper: `RecordIO` when the stream of a Pipe is parted into records, else None.
    """

    name: str
    directory: Path
    input_mode: str = "File"
    content_type: str | None = None
    distribution: str = "FullyReplicated"
    record_wrapper: str | None = None

    def pipe(self, epoch: int) -> Path:
        """The FIFO that brings the channel for the epoch-th time, from 0."""
        return self.directory.with_name(f"{self.directory.name}_{epoch}")


@dataclass(frozen=True)
class Job:
    """One training run as the platform described it.

    hyperparameters: name -> text, as given; `parse_value` makes values of them.
    hosts: sorted as text, so that every host counts alike (algo-10 before algo-2).
    network_interface_name: None where the platform did not say; never guess one.
    device: `auto`, `cpu` or `cuda` (from DALLE_DEVICE).
    git_revision: of this code, as the image was built (from DALLE_GIT_REVISION), or "".
    """

    paths: Paths
    hyperparameters: dict[str, str]
    channels: dict[str, Channel]
    hosts: tuple[str, ...]
    current_host: str
    network_interface_name: str | None
    job_name: str
    device: str
    git_revision: str

    @property
    def rank(self) -> int:
        return self.hosts.index(self.current_host)


def read_job(root: Path = DEFAULT_ROOT, environment: Mapping[str, str] | None = None) -> Job:
    """Read every file of the contract under `root`.

    environment: os.environ when None. TRAINING_JOB_NAME names the job, SM_CHANNEL_<NAME>
    puts a channel elsewhere (for laptops), DALLE_DEVICE chooses the device.
    Raises JobError naming the file, key or variable that is wrong.
    """
    environment = os.environ if environment is None else environment
    root = root.absolute()
    plain = Paths(root)
    current_host, hosts, interface = _read_hosts(plain.resource_config)
    device = environment.get("DALLE_DEVICE", "auto")
    if device not in DEVICES:
        raise JobError(f"DALLE_DEVICE must be one of {', '.join(DEVICES)}, got {device!r}")
    return Job(
        paths=Paths(root, checkpoints_at=_read_checkpoint_directory(plain)),
        hyperparameters=_read_hyperparameters(plain.hyperparameters),
        channels=_read_channels(plain, environment),
        hosts=hosts,
        current_host=current_host,
        network_interface_name=interface,
        job_name=environment.get("TRAINING_JOB_NAME") or DEFAULT_JOB_NAME,
        device=device,
        git_revision=environment.get("DALLE_GIT_REVISION", ""),
    )


def parse_value(text: str) -> Any:
    """One hyperparameter's text as the value it stands for.

    JSON first ("10", "true", "[1, 2]", and one level of quotes off "\\"abc\\""), then Python's
    spelling of true, false and none, and otherwise the text itself.
    """
    stripped = text.strip()
    python_words = {"True": True, "False": False, "None": None}
    if stripped in python_words:
        return python_words[stripped]
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return text


def prepare_outputs(paths: Paths) -> None:
    """Make the output directories. Raises PlatformError when one is not writable.

    Keeps room for the failure file, since the disk may be full when there is a failure to tell;
    `release_outputs` gives it back.
    """
    for directory in (paths.model, paths.checkpoints, paths.output_data, paths.tensorboard):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlatformError(
                f"cannot make the directory {directory} ({error.strerror}); "
                "it must be writable for the user that runs `train`"
            ) from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PlatformError(f"the directory {directory} is read-only; it must be writable")
    try:
        _failure_room(paths).write_bytes(b" " * FAILURE_BYTES)
    except OSError as error:  # no reason not to train
        logger.warning("no room is kept for %s: %s", paths.failure, error)


def release_outputs(paths: Paths) -> None:
    """Remove what `prepare_outputs` kept free, if no failure file took its place."""
    _failure_room(paths).unlink(missing_ok=True)


def write_failure(paths: Paths, cause: str, traceback: str = "") -> None:
    """Write the failure file: the cause first, then the traceback's end as far as there is room.

    At most 1,024 characters in all, where `prepare_outputs` has kept room for them. A file that
    cannot be written is logged, not raised: the failure itself is what the caller must go on with.
    """
    text = _shortened(cause.strip(), FAILURE_CHARACTERS)
    room = FAILURE_CHARACTERS - len(text) - len("\n\n…")
    traceback = traceback.strip()
    if traceback and room >= min(len(traceback), 80):
        # The end of a traceback names the line at fault; its beginning is always our main().
        tail = traceback if len(traceback) <= room else "…" + traceback[-room:]
        text = f"{text}\n\n{tail}"
    temporary = _failure_room(paths)
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        # Over what is there, which takes no more room of a disk that may have none.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))
            file.truncate()
        os.replace(temporary, paths.failure)
    except OSError as error:
        logger.error("cannot write %s: %s", paths.failure, error)


def _failure_room(paths: Paths) -> Path:
    return paths.failure.with_name("failure.tmp")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no file. Raises JobError with the position."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise JobError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from error
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror}") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise JobError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise JobError(f"{path} is nested too deeply; one JSON object was expected") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise JobError(f"{path} must hold a JSON object, got {_json_kind(value)}")
    return value


def _read_hyperparameters(path: Path) -> dict[str, str]:
    """Values are text on the platform; a hand-written file may hold plain JSON values."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in _read_object(path).items()
    }


def _read_channels(paths: Paths, environment: Mapping[str, str]) -> dict[str, Channel]:
    described = _read_object(paths.input_data_config)
    if not described and paths.input_data.is_dir():
        described = {
            path.name: {}
            for path in sorted(paths.input_data.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        }
    channels = {}
    for name, settings in described.items():
        if name in SDK_CHANNELS:
            continue
        if not isinstance(settings, dict | None):
            raise JobError(
                f"{paths.input_data_config}: channel {name!r} must be a JSON object, "
                f"got {_json_kind(settings)}"
            )
        settings = settings or {}
        channels[name] = Channel(
            name=name,
            directory=paths.input_data / name,
            input_mode=_text(paths.input_data_config, settings, "TrainingInputMode") or "File",
            content_type=_text(paths.input_data_config, settings, "ContentType"),
            distribution=_text(paths.input_data_config, settings, "S3DistributionType")
            or "FullyReplicated",
            record_wrapper=_record_wrapper(paths.input_data_config, settings),
        )
    for variable, value in sorted(environment.items()):
        if variable.startswith("SM_CHANNEL_") and value:
            name = variable.removeprefix("SM_CHANNEL_").lower()
            if name not in SDK_CHANNELS:
                channels[name] = Channel(name=name, directory=Path(value).absolute())
    return channels


def _record_wrapper(path: Path, settings: Mapping[str, Any]) -> str | None:
    wrapper = _text(path, settings, "RecordWrapperType")
    return None if wrapper == "None" else wrapper


def _read_hosts(path: Path) -> tuple[str, tuple[str, ...], str | None]:
    """The current host, all hosts sorted as text, and the network interface's name."""
    settings = _read_object(path)
    current_host = _text(path, settings, "current_host")
    hosts = settings.get("hosts") or [current_host or DEFAULT_HOST]
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise JobError(f"{path}: hosts must be a list of names, got {json.dumps(hosts)}")
    hosts = sorted(set(hosts))
    current_host = current_host or hosts[0]
    if current_host not in hosts:
        raise JobError(f"{path}: current_host {current_host!r} is not among hosts {hosts}")
    return current_host, tuple(hosts), _text(path, settings, "network_interface_name")


def _read_checkpoint_directory(paths: Paths) -> Path | None:
    """CheckpointConfig's LocalPath, moved along when the root is not the platform's."""
    text = _text(paths.checkpoint_config, _read_object(paths.checkpoint_config), "LocalPath")
    if not text:
        return None
    directory = Path(text)
    if not directory.is_absolute():
        raise JobError(f"{paths.checkpoint_config}: LocalPath must be absolute, got {text!r}")
    if directory.is_relative_to(DEFAULT_ROOT):
        return paths.root / directory.relative_to(DEFAULT_ROOT)
    return directory


def _text(path: Path, settings: Mapping[str, Any], key: str) -> str | None:
    value = settings.get(key)
    if value is not None and not isinstance(value, str):
        raise JobError(f"{path}: {key} must be a text, got {json.dumps(value)}")
    return value or None


def _json_kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
