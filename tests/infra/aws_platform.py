"""The work of SageMaker done for real: a job trains, an endpoint serves.

moto answers that a job has completed and that an endpoint is in service, and runs neither. Here
CreateTrainingJob runs `train` on the channels of the request, and leaves its log and its model
where the platform would; CreateEndpoint serves that model by `serve`.
"""

import json
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from infra.local.opt_ml import pack_model
from infra.local.serving import unpack_model
from tests.forked import Forked
from tests.inference.served import running
from tests.infra.aws_account import Account
from tests.training.two_hosts import LONG_TIMEOUTS, train

TRAIN_SECONDS = 300


class Platform:
    """The jobs and the endpoints of one account; `close` ends what still runs."""

    def __init__(self, account: Account, scratch: Path) -> None:
        self.account = account
        self.scratch = scratch
        self._running = ExitStack()
        account.handlers |= {
            "CreateTrainingJob": partial(self._once, self._train, "TrainingJobName"),
            "CreateEndpoint": partial(self._once, self._serve, "EndpointName"),
        }
        self._lock = threading.Lock()
        self._answers: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self._running.close()

    def _once(
        self, work: Callable[[dict[str, Any]], dict[str, Any]], key: str, request: dict[str, Any]
    ) -> dict[str, Any]:
        """Do the work of a name once: a client that has waited for a minute asks again."""
        name = f"{key} {request[key]}"
        with self._lock:
            if name not in self._answers:
                self._answers[name] = work(request)
            return self._answers[name]

    def _train(self, request: dict[str, Any]) -> dict[str, Any]:
        job = request["TrainingJobName"]
        root = self.scratch / job
        config = root / "input/config"
        config.mkdir(parents=True)
        (config / "hyperparameters.json").write_text(json.dumps(request["HyperParameters"]))
        for channel in request["InputDataConfig"]:
            source = channel["DataSource"]["S3DataSource"]["S3Uri"]
            self._download(source, root / "input/data" / channel["ChannelName"])
        log = self.scratch / f"{job}.log"
        environment = {name: text for name, text in os.environ.items() if name[:3] != "AWS"}
        words = ["--root", str(root)]
        process = Forked(
            train, words, LONG_TIMEOUTS, None, log=log, environment=environment, folder=self.scratch
        )
        assert process.wait(TRAIN_SECONDS) == 0, log.read_text()
        printed = log.read_text().splitlines()
        lines = [line.replace(str(root), "/opt/ml") for line in printed if line]
        self.account.write_log("/aws/sagemaker/TrainingJobs", f"{job}/algo-1-1", lines)
        archive = pack_model(root / "model", root / "model.tar.gz")
        bucket, folder = request["OutputDataConfig"]["S3OutputPath"][5:].split("/", 1)
        self.account.put_object(f"{folder}{job}/output/model.tar.gz", archive.read_bytes(), bucket)
        answer = self.account.client("sagemaker").create_training_job(**request)
        return {"TrainingJobArn": answer["TrainingJobArn"]}

    def _serve(self, request: dict[str, Any]) -> dict[str, Any]:
        sagemaker = self.account.client("sagemaker")
        config = sagemaker.describe_endpoint_config(
            EndpointConfigName=request["EndpointConfigName"]
        )
        name = config["ProductionVariants"][0]["ModelName"]
        container = sagemaker.describe_model(ModelName=name)["PrimaryContainer"]
        root = self.scratch / f"endpoint-{request['EndpointName']}"
        root.mkdir()
        self._download(container["ModelDataUrl"], root / "packed")
        unpack_model(root / "packed/model.tar.gz", root / "model")
        wanted = {**container["Environment"], "DALLE_DEVICE": "cpu", "DALLE_THREADS": "1"}
        served = self._running.enter_context(running(root, **wanted)).ready()
        self.account.serve_async(f"{served.url}/invocations")
        answer = sagemaker.create_endpoint(**request)
        return {"EndpointArn": answer["EndpointArn"]}

    def _download(self, source: str, directory: Path) -> None:
        bucket, prefix = source[5:].split("/", 1)
        s3 = self.account.client("s3")
        base = prefix if prefix.endswith("/") else prefix.rpartition("/")[0] + "/"
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for found in page["Contents"]:
                path = directory / found["Key"].removeprefix(base)
                path.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, found["Key"], str(path))
