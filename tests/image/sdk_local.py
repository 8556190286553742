"""The image under the SageMaker SDK's local mode, by `ModelTrainer`, `LocalSession`, `Transformer`.

As a notebook would use them, and cleared away afterwards. "Repair" marks what the SDK (3.27.0)
gets wrong and these tests need, with the issue in aws/sagemaker-python-sdk where there is one.
"""

import gc
import os
import shutil
import socket
import tarfile
import tempfile
import time
import uuid
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import boto3

from dalle.errors import JobError, PlatformError
from infra.docker import docker, image_name
from infra.local.serving import Reply, unpacked

NETWORK = "sagemaker-local"
SETTINGS = {
    "SchemaVersion": "1.0",
    "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}},
}
DIRECTORY = "com.docker.compose.project.working_dir"
START_SECONDS = 480.0


def train(channels, out, *, hyperparameters, instance_count=1, source_code=None):
    """Train in the mode LOCAL_CONTAINER; return model.tar.gz, in `out` beside output.tar.gz.

    channels: name -> a directory of this machine or an s3:// address. source_code: arguments of
    SourceCode; None for none. Raises JobError with the job's reason, PlatformError where the SDK
    reports success for hosts that failed.
    """
    from sagemaker.core.training.configs import Compute, InputData, SourceCode
    from sagemaker.train.local import local_container
    from sagemaker.train.model_trainer import Mode, ModelTrainer

    offline = not any(str(source).startswith("s3://") for source in channels.values())
    root = Path(tempfile.mkdtemp(prefix="job-", dir=out))
    trainer = ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER,
        training_image=image_name(),
        sagemaker_session=_session(offline=offline),
        compute=Compute(instance_type="local_cpu", instance_count=instance_count),
        hyperparameters=hyperparameters,
        local_container_root=str(root),
        source_code=SourceCode(**source_code) if source_code else None,
    )
    inputs = [
        InputData(channel_name=name, data_source=str(source)) for name, source in channels.items()
    ]
    try:
        # Repair (#5542, left by #5629): for users other than root the SDK clears away by
        # `docker run IMAGE chmod`, which an image with an entry point refuses.
        with _replaced(local_container, "_rmtree", lambda path, *_, **__: _remove_tree(path)):
            trainer.train(inputs)
        # Repair: the SDK looks at the host that ended first and stops the others.
        states = [status for _, status in containers(root)]
        if len(states) != instance_count or not all(s.startswith("Exited (0)") for s in states):
            raise PlatformError(f"of {instance_count} hosts not all ended well: {states}")
        packed = root / "compressed_artifacts"
        with tarfile.open(packed / "model.tar.gz") as tar:
            assert "manifest.json" in tar.getnames()
        for name in ("model.tar.gz", "output.tar.gz"):
            shutil.move(packed / name, out / name)
    except RuntimeError as error:
        # Repair (#405): the SDK does not show the job's reason.
        reasons = [path.read_text("utf-8") for path in root.glob("algo-*/output/failure")]
        raise JobError("\n".join(reasons) or f"the job failed: {error}") from error
    finally:
        # Repair: the SDK leaves its folder of scripts and its pipes to the garbage collector.
        if trainer._temp_code_dir is not None:
            trainer._temp_code_dir.cleanup()
        gc.collect()
        _remove_containers(root)
        _remove_tree(root)
    return out / "model.tar.gz"


class HostedModel(NamedTuple):
    """An endpoint of the SDK's local hosting. port: of its container, on loopback."""

    name: str
    port: int
    session: Any

    def invoke(self, body: bytes, content_type: str, accept: str | None = None) -> Reply:
        """Return the container's reply, whatever its status."""
        client = self.session.sagemaker_runtime_client
        answer = client.invoke_endpoint(body, self.name, content_type, accept)
        about = answer["ResponseMetadata"]
        headers = {name.lower(): value for name, value in about["HTTPHeaders"].items()}
        with answer["Body"] as stream:
            return Reply(about["HTTPStatusCode"], headers, stream.read())


@contextmanager
def hosted(model: Path, *, memory: str = "4g", cpus: float = 2.0):
    """Create model, endpoint configuration and endpoint; delete all of them at the end.

    Raises PlatformError with the container's log when it ends before it is ready.
    """
    with _hosting(model, {"mem_limit": memory, "cpus": cpus}) as (session, name):
        client = session.sagemaker_client
        variant = {
            "VariantName": "AllTraffic",
            "ModelName": name,
            "InstanceType": "local",
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
    content_type: str = "application/jsonlines",
    split_lines: bool = True,
) -> list[Path]:
    """Batch-transform every file in `requests`; return the files in `results`, NAME.out each.

    Raises PlatformError when the container answers a request with an error.
    """
    from sagemaker.core.local.local_session import LocalSagemakerRuntimeClient
    from sagemaker.core.transformer import Transformer

    class Checked(LocalSagemakerRuntimeClient):  # type: ignore[misc]
        """Repair: the SDK writes a container's errors into the results."""

        def invoke_endpoint(self, *words, **named):
            answer = super().invoke_endpoint(*words, **named)
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            if status != 200:
                with answer["Body"] as stream:
                    message = stream.read().decode("utf-8", "replace")
                raise PlatformError(f"the container answered {status}: {message}")
            return answer

    with _hosting(model, {}) as (session, name):
        session.sagemaker_runtime_client = Checked(session.config)
        transformer = Transformer(
            model_name=name,
            instance_count=1,
            instance_type="local",
            strategy="MultiRecord" if split_lines else "SingleRecord",
            assemble_with=None,
            output_path=f"file://{results}",
            # Repair: without a name for its job it asks the real service for the local model.
            base_transform_job_name=name,
            sagemaker_session=session,
        )
        results.mkdir(parents=True, exist_ok=True)
        split_type = "Line" if split_lines else None
        try:
            transformer.transform(
                f"file://{requests}", content_type=content_type, split_type=split_type
            )
        finally:
            # Repair: a transform that fails leaves its container running.
            for job in session.sagemaker_client._transform_jobs.values():
                unfinished = job.container is not None and job.state != job._COMPLETED
                if job.model_name == name and unfinished:
                    job.container.stop_serving()
    return [results / f"{path.name}.out" for path in sorted(requests.iterdir())]


def containers(root: Path) -> list[tuple[str, str]]:
    """Id and status ("Exited (0) 3 seconds ago") of every container composed under a directory."""
    columns = ("{{.ID}}", f'{{{{.Label "{DIRECTORY}"}}}}', "{{.Status}}")
    found = []
    for line in docker("ps", "--all", "--format", "\t".join(columns)).splitlines():
        container, directory, status = line.split("\t")
        if directory and Path(directory).is_relative_to(root):
            found.append((container, status))
    return found


def _session(*, offline: bool = True) -> Any:
    """The SDK's session for local mode. The bucket is named so that none is looked up."""
    from sagemaker.core.local.local_session import LocalSession

    boto = boto3.Session(*(("local", "local", None, "us-east-1") if offline else ()))
    return LocalSession(boto, default_bucket="local", sagemaker_config=SETTINGS)


@contextmanager
def _hosting(model: Path, limits: dict[str, Any]):
    """A session with a free port and a directory, and the name of the model in it."""
    from sagemaker.core.local import entities
    from sagemaker.core.local.image import _SageMakerContainer

    class OnLoopback(_SageMakerContainer):  # type: ignore[misc]
        """Repair: the SDK publishes the port on every interface."""

        def _create_docker_host(self, *words, **named):
            config = super()._create_docker_host(*words, **named)
            config["ports"] = [f"127.0.0.1:{ports}" for ports in config["ports"]]
            return config

    name = f"dalle-{uuid.uuid4().hex[:12]}"
    session = _session()
    with (
        tempfile.TemporaryDirectory(prefix="sagemaker-") as scratch,
        unpacked(model) as directory,  # Repair: the SDK unpacks a model.tar.gz beside itself
        _replaced(entities, "_SageMakerContainer", OnLoopback),
        # Repair (#5258): the SDK waits two minutes for a container that has ended, and shows no log
        _replaced(
            entities,
            "_wait_for_serving_container",
            lambda port, *_, **__: _wait(Path(scratch), port),
        ),
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        session.config = {
            "local": {
                "serving_port": free.getsockname()[1],  # Repair (#2020): all are on 8080
                "container_root": scratch,
                "container_config": limits,
            }
        }
        free.close()
        model_data = {"Image": image_name(), "ModelDataUrl": f"file://{directory}"}
        session.sagemaker_client.create_model(name, model_data | {"Environment": {}})
        try:
            yield session, name
        finally:
            session.sagemaker_client.delete_model(name)
            _remove_containers(Path(scratch))


def _wait(root: Path, port: int) -> None:
    """Return once /ping answers 200. Raises PlatformError with the log when no container lives."""
    deadline = time.monotonic() + START_SECONDS
    seen = False
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (OSError, HTTPException):  # not bound yet, or 503
            pass
        found = containers(root)
        seen = seen or bool(found)
        alive = any(status.startswith(("Up", "Created")) for _, status in found)
        if time.monotonic() > deadline or (seen and not alive):
            states = ", ".join(status for _, status in found) or "none was started"
            log = "\n".join(docker("logs", "--tail", "20", container) for container, _ in found)
            raise PlatformError(f"the container does not answer pings ({states}):\n{log}")
        time.sleep(0.1)


def _remove_containers(root: Path) -> None:
    """Repair (#3488, #4659): the SDK leaves containers and its network behind."""
    for container, _ in containers(root):
        docker("rm", "--force", "--volumes", container)
    docker("network", "rm", NETWORK, check=False)  # refused while a container is on it


def _remove_tree(path: Path | str) -> None:
    """Remove what containers wrote as root; a user who is not root borrows the image's `chown`."""
    if os.getuid() != 0:
        owner = f"{os.getuid()}:{os.getgid()}"
        volume = ("--volume", f"{Path(path).absolute()}:/reclaimed")
        chown = ("--entrypoint", "chown", image_name(), "--recursive", owner, "/reclaimed")
        docker("run", "--rm", "--network", "none", "--user", "0:0", *volume, *chown)
    shutil.rmtree(path)


@contextmanager
def _replaced(module: Any, name: str, value: object):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
