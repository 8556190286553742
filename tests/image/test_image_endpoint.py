"""boto3's runtime client on the image, through the facade. The facade's tests:
test_endpoint.py."""

import json
import signal
import subprocess
import sys
from contextlib import closing

import boto3
import pytest
from PIL import Image

from infra.docker import docker
from infra.local.endpoint import RuntimeFacade
from infra.local.serving import Serving, unpack_model
from tests import REPOSITORY

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("image")]


@pytest.fixture(scope="module")
def runtime(model):
    """The image as the endpoint `dalle`; its streams send one candidate at a time."""
    options = ("--memory", "2g", "--cpus", "1", "--env", "DALLE_CHUNK_SIZE=1")
    with Serving(model, *options) as serving:
        serving.wait_until_ready()
        with RuntimeFacade({"dalle": serving.port}) as facade:
            client = boto3.client(
                "sagemaker-runtime",
                region_name="us-east-1",
                endpoint_url=facade.url,
                aws_access_key_id="any",
                aws_secret_access_key="any",
            )
            with closing(client):
                yield client


def test_a_caption_becomes_an_image(runtime):
    reply = runtime.invoke_endpoint(
        EndpointName="dalle",
        ContentType="application/json",
        Accept="image/png",
        CustomAttributes="trace=1",
        Body=json.dumps({"caption": "red circle", "num_candidates": 2}),
    )
    assert (reply["ContentType"], reply["CustomAttributes"]) == ("image/png", "trace=1")
    assert reply["Body"].read().startswith(b"\x89PNG")


def test_an_error_reply_reaches_the_client_unchanged(runtime):
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        runtime.invoke_endpoint(EndpointName="dalle", ContentType="application/json", Body="{")
    error = caught.value.response
    assert error["OriginalStatusCode"] == 400
    assert json.loads(error["OriginalMessage"])["error"]["code"] == "malformed_body"


def test_a_stream_of_candidates_ends_with_their_ranking(runtime):
    reply = runtime.invoke_endpoint_with_response_stream(
        EndpointName="dalle",
        ContentType="application/json",
        Accept="application/jsonlines",
        Body=json.dumps({"caption": "red circle", "num_candidates": 8, "seed": 7}),
    )
    assert reply["ContentType"] == "application/jsonlines"
    with closing(reply["Body"]) as events:
        parts = [event["PayloadPart"]["Bytes"] for event in events]
    lines = [json.loads(line) for line in b"".join(parts).splitlines()]
    assert [line["event"] for line in lines][-1] == "ranking"
    assert [line["event"] for line in lines].count("candidate") == 8
    assert len(parts) > 1, "it came in one piece"


def test_the_printed_call_runs_and_ctrl_c_stops_everything(archive, tmp_path):
    model = unpack_model(archive, tmp_path / "model")
    command = [sys.executable, "-m", "infra.local", "endpoint", "--port", "0", "--memory", "2g"]
    with subprocess.Popen(
        [*command, "--model", model], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as program:
        printed = []
        for line in program.stdout:
            printed.append(line)
            if "file.write" in line:
                break
        call = "".join(printed[printed.index("import boto3\n") :])
        try:
            subprocess.run([sys.executable, "-c", call], cwd=tmp_path, check=True)
        finally:
            program.send_signal(signal.SIGINT)
            program.stdout.read()
    assert program.returncode == 0
    with Image.open(tmp_path / "star.png") as picture:
        assert picture.size == (32, 32)
    assert docker("ps", "--all", "--quiet", "--filter", f"volume={model}") == ""
