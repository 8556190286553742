"""The training job that SageMaker describes under /opt/ml, read into one frozen `Job`.

Every file and key may be missing: local mode writes few of them, and a container run by hand has
none. Knows files, hosts and channels; knows nothing of models. Standard library only, so that infra
can import it on a laptop. Environment variables of the job are read here and nowhere else.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dalle.errors import JobError

DEFAULT_ROOT = Path("/opt/ml")
DEFAULT_HOST = "algo-1"
DEFAULT_JOB_NAME = "local"
DEVICES = ("auto", "cpu", "cuda")

PREFIX = "DALLE_"
"""Of the names of our environment variables."""

TRAIN_VARIABLES = ("DALLE_DEVICE",)
"""Variables with the prefix that `train` reads."""

LONGEST_LIST = 2_500
"""Characters of a hyperparameter's value, by the API's model."""

SDK_CHANNELS = frozenset({"code", "recipe", "sm_drivers"})
"""Channels that the SageMaker SDK adds for its own use; they hold no training data."""


class Paths:
    """Files and directories of the contract under one root (`/opt/ml` on the platform)."""

    def __init__(self, root: Path = DEFAULT_ROOT, checkpoints: Path | None = None) -> None:
        """checkpoints: the checkpoint directory where it is not `root/checkpoints`."""
        self.root = root
        self.config = root / "input" / "config"
        self.hyperparameters = self.config / "hyperparameters.json"
        self.input_data_config = self.config / "inputdataconfig.json"
        self.resource_config = self.config / "resourceconfig.json"
        self.checkpoint_config = self.config / "checkpointconfig.json"
        self.input_data = root / "input" / "data"
        """One directory per channel, read-only."""
        self.model = root / "model"
        """Packed as model.tar.gz when the job ends."""
        self.checkpoints = checkpoints or root / "checkpoints"
        """Kept in sync with S3 when the job has a CheckpointConfig."""
        self.output = root / "output"
        self.output_data = self.output / "data"
        """Packed as output.tar.gz when the job ends."""
        self.tensorboard = self.output / "tensorboard"
        """Copied to S3 while the job runs."""
        self.failure = self.output / "failure"
        self.allowed = (self.model, self.checkpoints, self.output)
        """Directories that a job may write, besides the system's temporary one."""


OTHER_VARIABLES = (
    "DALLE_GIT_REVISION",
    "DALLE_IMAGE",
    "DALLE_PROJECT",
    "DALLE_REQUIRE_BROWSER",
    "DALLE_REQUIRE_DOCKER",
    "DALLE_REQUIRE_EMOJI",
    "DALLE_REQUIRE_NPM",
    "DALLE_REQUIRE_ROOT",
)
"""Variables of the image, of `python -m infra` and of the tests."""


def unknown_variables(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """Return a sentence for each variable that seems to be meant for this command and is not read.

    known: the variables that the command reads. A variable seems meant by the prefix DALLE_, in any
    case, or by a name that is nearly a known one.
    """
    ours = sorted(name for name in known if name.startswith(PREFIX))
    rests = [name.removeprefix(PREFIX) for name in ours]
    sentences = []
    for name in sorted(environment.keys() - {*known} - {*OTHER_VARIABLES}):
        prefix, rest = name.upper()[: len(PREFIX)], name.upper()[len(PREFIX) :]
        if prefix == PREFIX:
            nearest = [PREFIX + each for each in difflib.get_close_matches(rest, rests, n=1)]
        else:
            nearest = difflib.get_close_matches(name.upper(), ours, n=1, cutoff=0.9)
        if prefix == PREFIX or nearest:
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(ours)}"
            sentences.append(
                f"the environment variable {name}={environment[name]} is unknown and has no "
                f"effect; {hint}"
            )
    return sentences


@dataclass(frozen=True)
class Channel:
    """One named input of the job. The directory may be missing: its reader decides.

    input_mode: `File`, `FastFile` or `Pipe`; the FIFOs of a pipe are beside the directory.
    distribution: `FullyReplicated`, or `ShardedByS3Key` when each host has other objects.
    record_wrapper: `RecordIO` when a Pipe's stream is split into records, else None.
    """

    name: str
    directory: Path
    input_mode: str = "File"
    content_type: str | None = None
    distribution: str = "FullyReplicated"
    record_wrapper: str | None = None

    def pipe(self, epoch: int) -> Path:
        """Return the FIFO that streams the channel in an epoch, counted from 0."""
        return self.directory.with_name(f"{self.directory.name}_{epoch}")


@dataclass(frozen=True)
class Job:
    """One training run as the platform described it.

    hyperparameters: name -> text as given; `parse_value` turns a text into a value.
    hosts: sorted as text (algo-10 before algo-2), so that ranks are equal on all hosts.
    network_interface_name: None where the platform gave none; never guess one.
    device: `auto`, `cpu` or `cuda` (from DALLE_DEVICE).
    git_revision: of the code in the image (from DALLE_GIT_REVISION), or "".
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

    environment: os.environ when None. TRAINING_JOB_NAME names the job, SM_CHANNEL_<NAME> sets a
    channel's directory (for laptops), DALLE_DEVICE chooses the device.
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
        paths=Paths(root, checkpoints=_read_checkpoint_directory(plain)),
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
    """Return the value that a hyperparameter's text stands for.

    That is JSON ("10", "true", "[1, 2]", "\\"abc\\""), Python's True, False, None or list (as the
    SageMaker SDK v2 writes them: "['a', 'b']"), or else the text unchanged.
    """
    stripped = text.strip()
    python_words = {"True": True, "False": False, "None": None}
    if stripped in python_words:
        return python_words[stripped]
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return _python_list(stripped) or text


def _python_list(text: str) -> list[Any] | None:
    """Return the list or tuple that Python writes so; None for any other text."""
    if text[:1] not in ("[", "(") or len(text) > LONGEST_LIST:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return list(value) if isinstance(value, list | tuple) else None


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} without a file. Raises JobError with the position."""
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
    """Values are text on the platform; a hand-written file may hold other JSON values."""
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
        text = partial(_text, paths.input_data_config, settings or {})
        wrapper = text("RecordWrapperType")
        channels[name] = Channel(
            name=name,
            directory=paths.input_data / name,
            input_mode=text("TrainingInputMode") or "File",
            content_type=text("ContentType"),
            distribution=text("S3DistributionType") or "FullyReplicated",
            record_wrapper=None if wrapper == "None" else wrapper,
        )
    for variable, value in sorted(environment.items()):
        if variable.startswith("SM_CHANNEL_") and value:
            name = variable.removeprefix("SM_CHANNEL_").lower()
            if name not in SDK_CHANNELS:
                channels[name] = Channel(name=name, directory=Path(value).absolute())
    return channels


def _read_hosts(path: Path) -> tuple[str, tuple[str, ...], str | None]:
    """Return the current host, all hosts sorted as text, and the network interface's name."""
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
    """Return CheckpointConfig's LocalPath, moved below the root when it is in /opt/ml."""
    text = _text(paths.checkpoint_config, _read_object(paths.checkpoint_config), "LocalPath")
    if not text:
        return None
    directory = Path(text)
    if not directory.is_absolute():
        raise JobError(f"{paths.checkpoint_config}: LocalPath must be absolute, got {text!r}")
    if ".." in directory.parts:
        raise JobError(f"{paths.checkpoint_config}: LocalPath must be without '..', got {text!r}")
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
