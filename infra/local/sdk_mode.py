"""The image under the SageMaker Python SDK's local mode: the only file that imports that SDK.

    archive = train({"train": "data/train"}, out, hyperparameters={"size": "tiny"})
    with hosted(archive) as endpoint:
        reply = endpoint.invoke(b"big filled orange star", "text/plain", "image/png")
    transform(archive, requests, results)

Everything goes through the SDK's own classes (`ModelTrainer`, `LocalSession`, `Transformer`), as a
user's notebook would use them, and is cleared away afterwards. Where the SDK (3.27.0) does wrong
on the way it is put right here: "Repair" says so, with the number in aws/sagemaker-python-sdk where
there is one. No telemetry is sent, and no account is asked who it is. One call at a time in a
process: three repairs replace a name inside the SDK meanwhile.
"""

from __future__ import annotations

import shutil
import socket
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.errors import JobError, PlatformError
from infra.aws.client import session as aws_session
from infra.docker import image_name
from infra.local import compose
from infra.local.serving import Reply, unpacked

NETWORK = "sagemaker-local"
SETTINGS = {
    "SchemaVersion": "1.0",
    "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}},
}


def train(
    channels: Mapping[str, Path | str],
    out: Path,
    *,
    hyperparameters: Mapping[str, object] | None = None,
    image: str | None = None,
    instance_count: int = 1,
    gpu: bool = False,
) -> Path:
    """Train by `ModelTrainer` in the mode LOCAL_CONTAINER; the model.tar.gz, in `out` beside
    output.tar.gz.

    channels: a directory of this machine or an s3:// address for each name; only the latter asks
    for credentials, which the SDK hands on to the container.
    Raises JobError with the job's own reason when it fails, and PlatformError when the SDK
    reports success and a host failed or no model is there, or when another job is in the way.
    """
    from sagemaker.core.training.configs import Compute, InputData
    from sagemaker.train.local import local_container
    from sagemaker.train.model_trainer import Mode, ModelTrainer

    image = image or image_name()
    offline = not any(map(_is_remote, channels.values()))
    _refuse_neighbours(instance_count)
    with _job_directory(out, image) as root:
        trainer = ModelTrainer(
            training_mode=Mode.LOCAL_CONTAINER,
            training_image=image,
            sagemaker_session=_session(offline=offline),
            compute=Compute(
                instance_type="local_gpu" if gpu else "local_cpu", instance_count=instance_count
            ),
            hyperparameters=dict(hyperparameters or {}),
            local_container_root=str(root),
        )
        inputs = [
            InputData(channel_name=name, data_source=_source(source))
            for name, source in channels.items()
        ]
        # Repair (#5542, left by #5629): for users other than root the SDK clears away by
        # `docker run IMAGE chmod`, which an image with an entry point refuses.
        with _replaced(local_container, "_rmtree", _remove_tree):
            try:
                trainer.train(inputs)
            except RuntimeError as error:
                # Repair (#405): the SDK does not show what the job gave as its reason.
                raise JobError(_reason(root) or f"the job failed: {error}") from error
        # Repair: the SDK looks at the host that ended first, stops the others there and then,
        # and packs whatever there is.
        hosts = compose.containers(root)
        if len(hosts) != instance_count or not all(host.ended_well for host in hosts):
            states = "; ".join(f"{host.service}: {host.status}" for host in hosts)
            raise PlatformError(f"of {instance_count} hosts not all ended well: {states}")
        packed = root / "compressed_artifacts"
        _check_model(packed / "model.tar.gz")
        for name in ("model.tar.gz", "output.tar.gz"):
            shutil.move(packed / name, out / name)
    return out / "model.tar.gz"


@dataclass(frozen=True)
class HostedModel:
    """An endpoint of the SDK's local hosting. port: of its container, on loopback."""

    name: str
    port: int
    session: Any

    def invoke(self, body: bytes, content_type: str, accept: str | None = None) -> Reply:
        """Call it by the session's runtime client, whatever status comes."""
        client = self.session.sagemaker_runtime_client
        answer = client.invoke_endpoint(body, self.name, content_type, accept)
        about = answer["ResponseMetadata"]
        headers = {name.lower(): value for name, value in about["HTTPHeaders"].items()}
        with answer["Body"] as stream:
            return Reply(about["HTTPStatusCode"], headers, stream.read())


@contextmanager
def hosted(
    model: Path,
    *,
    image: str | None = None,
    environment: Mapping[str, str] | None = None,
    memory: str = "",
    cpus: float = 0.0,
    gpu: bool = False,
) -> Iterator[HostedModel]:
    """Create model, endpoint configuration and endpoint; delete all of them at the end.

    model: a model.tar.gz or the directory of a model. memory, such as "2g", and cpus limit the
    container. Raises PlatformError with its log when it ends before it is ready, or is not ready in
    time.
    """
    with _hosting(model, image, environment, memory, cpus) as (session, name):
        client = session.sagemaker_client
        variant = {
            "VariantName": "AllTraffic",
            "ModelName": name,
            "InstanceType": "local_gpu" if gpu else "local",
            "InitialInstanceCount": 1,
        }
        client.create_endpoint_config(name, [variant])
        try:
            client.create_endpoint(name, name)
            yield HostedModel(name, session.config["local"]["serving_port"], session)
        finally:
            client.delete_endpoint(name)
            client.delete_endpoint_config(name)


def transform(
    model: Path,
    requests: Path,
    results: Path,
    *,
    image: str | None = None,
    environment: Mapping[str, str] | None = None,
    content_type: str = "application/jsonlines",
    accept: str | None = None,
    split_lines: bool = True,
) -> list[Path]:
    """Batch transform of every file in the directory `requests`; the files in `results`, each
    named after its input with .out behind.

    split_lines: requests may be cut between lines, and put together, up to the size that
    /execution-parameters names; otherwise each file is one request.
    Raises PlatformError when the container answers a request with an error.
    """
    from sagemaker.core.local.local_session import LocalSagemakerRuntimeClient
    from sagemaker.core.transformer import Transformer

    class Checked(LocalSagemakerRuntimeClient):  # type: ignore[misc]
        """Repair: the SDK writes a container's errors into the results."""

        def invoke_endpoint(self, *words: Any, **named: Any) -> Any:
            answer = super().invoke_endpoint(*words, **named)
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            if status != 200:
                with answer["Body"] as stream:
                    said = stream.read().decode("utf-8", "replace")
                raise PlatformError(f"the container answered {status}: {said}")
            return answer

    with _hosting(model, image, environment) as (session, name):
        session.sagemaker_runtime_client = Checked(session.config)
        transformer = Transformer(
            model_name=name,
            instance_count=1,
            instance_type="local",
            strategy="MultiRecord" if split_lines else "SingleRecord",
            assemble_with=None,
            output_path=_file_address(results),
            accept=accept,
            # Repair: without a name for its job it asks the real service for the local model.
            base_transform_job_name=name,
            sagemaker_session=session,
        )
        results.mkdir(parents=True, exist_ok=True)
        try:
            transformer.transform(
                _file_address(requests),
                content_type=content_type,
                split_type="Line" if split_lines else None,
            )
        finally:
            # Repair: a transform that fails leaves its container running.
            for job in session.sagemaker_client._transform_jobs.values():
                unfinished = job.container is not None and job.state != job._COMPLETED
                if job.model_name == name and unfinished:
                    job.container.stop_serving()
    return [results / f"{path.name}.out" for path in sorted(requests.iterdir()) if path.is_file()]


def _session(*, offline: bool = True) -> Any:
    """The SDK's session for local mode. The bucket is named so that none is looked up."""
    from sagemaker.core.local.local_session import LocalSession

    boto = aws_session(offline=offline)
    return LocalSession(boto, default_bucket="local", sagemaker_config=SETTINGS)


@contextmanager
def _hosting(
    model: Path,
    image: str | None,
    environment: Mapping[str, str] | None,
    memory: str = "",
    cpus: float = 0.0,
) -> Iterator[tuple[Any, str]]:
    """A session with a port and a directory of its own, and the name of the model in it."""
    from sagemaker.core.local import entities
    from sagemaker.core.local.image import _SageMakerContainer

    class OnLoopback(_SageMakerContainer):  # type: ignore[misc]
        """Repair: the SDK publishes the port on every interface."""

        def _create_docker_host(self, *words: Any, **named: Any) -> dict[str, Any]:
            config: dict[str, Any] = super()._create_docker_host(*words, **named)
            config["ports"] = [f"127.0.0.1:{ports}" for ports in config["ports"]]
            return config

    def wait(port: int, timeout: float = 0.0) -> None:
        """Repair (#5258): the SDK waits two minutes for a container that has ended long ago, shows
        no log, and refuses in its configuration the longer time that it looks for there."""
        try:
            compose.wait_for_pings(Path(scratch), port)
        except RuntimeError as error:
            raise PlatformError(str(error)) from error

    image = image or image_name()
    name = f"dalle-{uuid.uuid4().hex[:12]}"
    session = _session()
    limits = {key: value for key, value in (("mem_limit", memory), ("cpus", cpus)) if value}
    with (
        tempfile.TemporaryDirectory(prefix="sagemaker-") as scratch,
        _cleared(Path(scratch)),
        unpacked(model) as directory,  # Repair: the SDK unpacks a model.tar.gz beside itself
        _replaced(entities, "_SageMakerContainer", OnLoopback),
        _replaced(entities, "_wait_for_serving_container", wait),
    ):
        session.config = {
            "local": {
                "serving_port": _free_port(),  # Repair (#2020): or all endpoints are on 8080
                "container_root": scratch,
                "container_config": limits,
            }
        }
        container = {
            "Image": image,
            "ModelDataUrl": _file_address(directory),
            "Environment": dict(environment or {}),
        }
        session.sagemaker_client.create_model(name, container)
        try:
            yield session, name
        finally:
            session.sagemaker_client.delete_model(name)


@contextmanager
def _job_directory(out: Path, image: str) -> Iterator[Path]:
    """A new directory in `out`, gone at the end with every container that was composed in it.

    Repair: the SDK leaves its compose file there, which names credentials, and hands what an
    earlier job left in the directory on into the next one's model.
    """
    out.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="job-", dir=out.absolute()))
    try:
        with _cleared(root):
            yield root
    finally:
        compose.remove_tree(root, image)


@contextmanager
def _cleared(root: Path) -> Iterator[None]:
    """Repair (#3488, #4659): the SDK leaves containers and its network behind."""
    try:
        yield
    finally:
        compose.remove(root, NETWORK)


def _remove_tree(path: Path | str, image: str, is_studio: bool = False) -> None:
    """In place of a function of the SDK's of this shape."""
    compose.remove_tree(path, image)


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _refuse_neighbours(instance_count: int) -> None:
    """Repair: every job's hosts are called algo-1, algo-2, ... on the one network, where those of
    two jobs would be taken for each other."""
    others = compose.running("algo-1" if instance_count > 1 else "algo-2", NETWORK)
    if others:
        raise PlatformError(
            f"{', '.join(others)}: a local job runs on the network {NETWORK}, and a job of several "
            "hosts must be alone there; wait until it has ended"
        )


def _check_model(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        if "manifest.json" not in tar.getnames():
            raise PlatformError(f"the job left no model: {archive.name} has no manifest.json")


def _reason(root: Path) -> str:
    """What the hosts of a failed job gave as its cause, as the platform would show it."""
    reasons = []
    for path in sorted(root.glob("algo-*/output/failure")):
        reasons.append(path.read_text("utf-8", "replace")[:1024])
    return "\n".join(dict.fromkeys(reasons))


def _source(source: Path | str) -> str:
    """As the SDK wants it: an s3:// address, or an absolute path."""
    return str(source) if _is_remote(source) else str(Path(source).absolute())


def _is_remote(source: Path | str) -> bool:
    return str(source).startswith("s3://")


def _file_address(path: Path) -> str:
    return f"file://{path.absolute()}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
