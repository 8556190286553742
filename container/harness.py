"""The image from the outside, treated as SageMaker treats it: one file for tests and for people.

    python container/harness.py train --data DIR --out out/local --set size=tiny --set max_steps=20
    python container/harness.py serve --model out/local/model.tar.gz --port 8080

`train` lays out what the platform puts under /opt/ml, runs the image on it and packs model.tar.gz;
`serve` unpacks one, read-only, and serves it with limits on memory and processors. Ctrl-C stops a
container as the platform does, by SIGTERM first. Needs a Docker engine and the standard library.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DOCKER = os.environ.get("DOCKER", "docker")
IMAGE = os.environ.get("DALLE_IMAGE", "dalle-sagemaker")
PATIENCE = 300.0
STOP_TRAINING_SECONDS = 120
STOP_SERVING_SECONDS = 30
"""Between SIGTERM and SIGKILL on the platform."""

# One host's files as they were logged on SageMaker, and as the SDK's local mode writes them.
RESOURCE_CONFIG: dict[str, dict[str, Any]] = {
    "platform": {
        "current_group_name": "homogeneousCluster",
        "current_host": "algo-1",
        "current_instance_type": "ml.g5.xlarge",
        "hosts": ["algo-1"],
        "instance_groups": [
            {
                "hosts": ["algo-1"],
                "instance_group_name": "homogeneousCluster",
                "instance_type": "ml.g5.xlarge",
            }
        ],
        "network_interface_name": "eth0",
        "topology": None,
    },
    "local": {
        "current_host": "algo-1",
        "hosts": ["algo-1"],
        "network_interface_name": "ethwe",
        "current_instance_type": "local_cpu",
    },
}
CHANNEL_CONFIG = {
    "platform": {
        "ContentType": "application/x-image",
        "TrainingInputMode": "File",
        "S3DistributionType": "FullyReplicated",
        "RecordWrapperType": "None",
    },
    "local": {"TrainingInputMode": "File"},
}


class OptMl:
    """What stands under /opt/ml, in a directory of this machine.

    shape: `platform`, `local` (the SDK's local mode), or `empty` (no config files at all).
    """

    def __init__(self, root: Path, shape: str) -> None:
        self.root = root
        self.shape = shape
        self.channels: dict[str, dict[str, str]] = {}
        for name in ("input/data", "model", "output/data"):
            (root / name).mkdir(parents=True, exist_ok=True)
        if shape != "empty":
            self.write("resourceconfig", RESOURCE_CONFIG[shape])
            self.write("inputdataconfig", {})
            self.write("hyperparameters", {})

    def write(self, name: str, value: object) -> Path:
        """input/config/<name>.json; a text is written as it is, anything else as JSON."""
        path = self.root / "input" / "config" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    def set_hyperparameters(self, **values: object) -> None:
        """As the SDK does it: texts as they are, everything else as JSON in a text."""
        texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in values.items()}
        self.write("hyperparameters", texts)

    def add_channel(self, name: str) -> Path:
        """The new channel's directory, described in inputdataconfig.json where there is one."""
        directory = self.root / "input" / "data" / name
        directory.mkdir(exist_ok=True)
        if self.shape != "empty":
            self.channels[name] = CHANNEL_CONFIG[self.shape]
            self.write("inputdataconfig", self.channels)
        return directory

    @property
    def failure(self) -> str:
        """What the platform would show as FailureReason."""
        return (self.root / "output" / "failure").read_text(encoding="utf-8")[:1024]

    def mounts(self, channels: Mapping[str, Path]) -> list[str]:
        """Options of `docker run`: input is read-only, outputs are writable for every user.

        channels: directories that stand elsewhere and are mounted in place of the tree's own.
        """
        options = ["--volume", f"{(self.root / 'input').absolute()}:/opt/ml/input:ro"]
        for name, directory in channels.items():
            options += ["--volume", f"{directory.absolute()}:/opt/ml/input/data/{name}:ro"]
        for name in ("model", "output", "output/data", "output/tensorboard", "checkpoints"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            if (self.root / name).stat().st_uid == os.getuid():
                (self.root / name).chmod(0o777)
        for name in ("model", "output", "checkpoints"):
            options += ["--volume", f"{(self.root / name).absolute()}:/opt/ml/{name}"]
        return options


def docker(*arguments: str, check: bool = True, seconds: float | None = PATIENCE) -> str:
    """The output of a docker command, both streams. Raises RuntimeError with it when it fails."""
    done = subprocess.run(  # noqa: S603
        [DOCKER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stdout.strip()}")
    return done.stdout


def why_no_docker(image: str = IMAGE) -> str:
    """What is missing to run the image here; empty when nothing is."""
    if shutil.which(DOCKER) is None:
        return f"the program {DOCKER} is not installed"
    information = subprocess.run([DOCKER, "info"], capture_output=True, text=True, check=False)  # noqa: S603
    if information.returncode != 0:
        words = information.stderr.strip().splitlines() or ["docker info failed"]
        return f"no Docker engine answers (it must run, and asks for root): {words[-1]}"
    if not docker("image", "ls", "--quiet", image).strip():
        return f"the image {image} is not built: make image"
    return ""


class Container:
    """A running container; its log is read by a thread, so that waiting for a line needs no sleep.

    As a context manager it is removed at the end, whatever its state.
    """

    def __init__(self, image: str, *command: str, options: Sequence[str] = ()) -> None:
        self.id = docker("run", "--detach", *options, image, *command).split()[-1]
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._echo = False
        self._logs = subprocess.Popen(  # noqa: S603
            [DOCKER, "logs", "--follow", self.id],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this program; the rest of the log is wanted
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._logs.stdout is not None
        for line in self._logs.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
                if self._echo:
                    print(line, end="", flush=True)
        with self._news:
            self._ended = True
            self._news.notify_all()

    def echo(self) -> None:
        """Print the log, past and future."""
        with self._news:
            print("\n".join(self.lines), flush=True)
            self._echo = True

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """The first line of the log, past or future, in which the pattern is found."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, seconds)
            match = found()
        if match is None:
            raise RuntimeError(f"{pattern!r} is not in the log of {self.id[:12]}:\n{self.log}")
        return match

    def wait(self, seconds: float | None = PATIENCE) -> int:
        """The exit status, once it ends by itself and its log has been read; None waits on."""
        status = int(docker("wait", self.id, seconds=seconds))
        self._reader.join(seconds)
        return status

    def stop(self, seconds: int) -> int:
        """SIGTERM, and SIGKILL after so many seconds; the exit status (137 when it was killed)."""
        docker("stop", "--time", str(seconds), self.id, seconds=seconds + PATIENCE)
        return self.wait()

    def kill(self) -> None:
        docker("kill", self.id)
        self.wait()

    def state(self) -> dict[str, Any]:
        """Docker's words: ExitCode, OOMKilled, StartedAt, ..."""
        state: dict[str, Any] = json.loads(
            docker("inspect", "--format", "{{json .State}}", self.id)
        )
        return state

    def written(self) -> list[str]:
        """What was added, changed or deleted inside, outside its volumes: "A /tmp/x"."""
        return docker("diff", self.id).splitlines()

    def python(self, code: str) -> str:
        """What a second Python inside prints."""
        return docker("exec", self.id, "/opt/venv/bin/python", "-c", code)

    def memory(self) -> int:
        """Resident bytes of all its processes; pages that several share count once."""
        return int(
            self.python(
                "from pathlib import Path\n"
                "kilobytes = 0\n"
                "for p in Path('/proc').glob('[0-9]*/smaps_rollup'):\n"
                "    try: kilobytes += int(p.read_text().split('Pss:')[1].split()[0])\n"
                "    except (OSError, IndexError): pass\n"
                "print(kilobytes * 1024)"
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        docker("rm", "--force", "--volumes", self.id, check=False)
        self._logs.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self._logs.stdout is not None
        self._logs.stdout.close()


def start_training(
    tree: OptMl,
    *options: str,
    image: str = IMAGE,
    command: Sequence[str] = ("train",),
    channels: Mapping[str, Path] | None = None,
) -> Container:
    """The image's `train` on a tree. channels: data that stands elsewhere, by channel name."""
    job = ["--env", "TRAINING_JOB_NAME=harness"]
    return Container(image, *command, options=[*job, *tree.mounts(channels or {}), *options])


@dataclass
class Reply:
    """An HTTP reply; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Serving(Container):
    """The image's `serve` on an unpacked model, its port published on loopback.

    port: on this machine, 0 for a free one. inside: the port that it listens on.
    """

    def __init__(
        self, model: Path, *options: str, image: str = IMAGE, port: int = 0, inside: int = 8080
    ) -> None:
        publish = f"127.0.0.1:{port or ''}:{inside}"
        volume = f"{model.absolute()}:/opt/ml/model:ro"
        self.began = time.monotonic()
        super().__init__(
            image, "serve", options=["--publish", publish, "--volume", volume, *options]
        )
        try:
            published = docker("port", self.id, str(inside))
        except RuntimeError:  # without a network, or it has ended already
            published = ":0"
        self.port = int(published.split()[0].rpartition(":")[2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(
        self,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """GET, or POST when there is a body; a dictionary goes as JSON. OSError while unbound."""
        sent = dict(headers or {})
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = self.connect()
        try:
            connection.request("GET" if body is None else "POST", path, body, sent)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()

    def wait_until_ready(self, seconds: float = PATIENCE) -> list[int]:
        """Ping as the platform does, until 200. The different statuses on the way, 200 the last.

        Raises RuntimeError with the log when the container ends or the time is up.
        """
        statuses: list[int] = []
        while time.monotonic() < self.began + seconds and not self._ended:
            try:
                status = self.ask("/ping").status
            except (OSError, http.client.HTTPException):
                status = 0  # not bound yet
            if status and status not in statuses[-1:]:
                statuses.append(status)
            if status == 200:
                return statuses
            time.sleep(0.02)
        raise RuntimeError(f"/ping did not answer 200 within {seconds:g} s:\n{self.log}")


def pack_model(model: Path, archive: Path) -> Path:
    """model.tar.gz as SageMaker packs /opt/ml/model: paths relative to it, links as links."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in sorted(model.iterdir()):
            tar.add(path, path.name)
    return archive


def unpack_model(archive: Path, directory: Path) -> Path:
    """Unpack where nobody may write, as under an endpoint's /opt/ml/model.

    Raises ValueError for anything but files and directories, which hosting unpacks badly.
    """
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{archive}: {member.name} is neither a file nor a directory")
        # Python 3.11.4 brought filters, 3.14 made this one the default.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(directory)  # noqa: S202 - of our own making, and checked above
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    reason = why_no_docker(options.image)
    if reason:
        print(reason, file=sys.stderr)
        return 1
    limits = [
        f"--{name}={value}"
        for name in ("memory", "cpus", "gpus")
        if (value := getattr(options, name))
    ]
    for variable in options.env:
        limits += ["--env", variable]
    result: int = options.run(options, limits)
    return result


def _train(options: argparse.Namespace, limits: list[str]) -> int:
    tree = OptMl(options.out, "platform")
    tree.set_hyperparameters(**dict(text.split("=", 1) for text in options.set))
    folders = [path for path in sorted(options.data.iterdir()) if path.is_dir()]
    named = {
        path.name: path for path in folders if path.name in ("train", "validation", "artefact")
    }
    channels = named if "train" in named else {"train": options.data}
    for name in channels:
        tree.add_channel(name)
    if os.getuid() != 0:  # what it writes shall belong to who asked for it
        limits = [*limits, "--user", f"{os.getuid()}:{os.getgid()}"]
    with start_training(tree, *limits, image=options.image, channels=channels) as container:
        container.echo()
        try:
            status = container.wait(seconds=None)
        except KeyboardInterrupt:
            status = container.stop(STOP_TRAINING_SECONDS)
        if container.state()["OOMKilled"]:
            print("killed: it needed more memory than --memory allows", file=sys.stderr)
    if status != 0:
        print(f"failed with exit status {status}", file=sys.stderr)
        return 1
    print(f"packed {pack_model(options.out / 'model', options.out / 'model.tar.gz')}")
    return 0


def _serve(options: argparse.Namespace, limits: list[str]) -> int:
    if not options.model.exists():
        print(f"{options.model} is not there; `train` of this program makes one", file=sys.stderr)
        return 1
    with (
        _unpacked(options.model) as model,
        Serving(model, *limits, image=options.image, port=options.port) as serving,
    ):
        serving.echo()
        try:
            serving.wait_until_ready()
            seconds = time.monotonic() - serving.began
            print(f"ready after {seconds:.1f} s: http://127.0.0.1:{serving.port}/invocations")
            status = serving.wait(seconds=None)
        except KeyboardInterrupt:
            status = serving.stop(STOP_SERVING_SECONDS)
    return status


@contextmanager
def _unpacked(model: Path) -> Iterator[Path]:
    """A directory as it is; an archive unpacked for as long as it is needed."""
    if model.is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory() as directory:
        path = unpack_model(model, Path(directory) / "model")
        try:
            yield path
        finally:
            for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
                folder.chmod(0o755)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="harness.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train the image on a directory of pairs")
    train.add_argument(
        "--data",
        type=Path,
        required=True,
        help="holds pairs, or the channels train, validation, artefact",
    )
    train.add_argument("--out", type=Path, required=True, help="becomes what /opt/ml is")
    train.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter"
    )
    train.set_defaults(run=_train)
    serve = commands.add_parser("serve", help="serve a model.tar.gz or the directory of a model")
    serve.add_argument("--model", type=Path, required=True)
    serve.add_argument("--port", type=int, default=8080)
    serve.set_defaults(run=_serve)
    for command in (train, serve):
        command.add_argument("--image", default=IMAGE, help="default %(default)s")
        command.add_argument("--memory", default="", help="such as 4g; default no limit")
        command.add_argument("--cpus", default="", help="such as 2; default no limit")
        command.add_argument("--gpus", default="", help="such as all; default none")
        command.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
