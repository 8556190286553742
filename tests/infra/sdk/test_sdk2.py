"""The SageMaker SDK v2 (2.257) trains, serves and transforms, in a simulated account that does it.

With the tests of the image (`make test-image`), or alone by `make check-sdk2`: uv fetches the SDK
v2, which the other tests cannot have beside the v3.
"""

import json
import os
import subprocess
import sys

import pytest
import requests

from tests import REPOSITORY
from tests.infra.aws_account import BUCKET, NUMBER, REGION

pytestmark = pytest.mark.docker

IMAGE = f"{NUMBER}.dkr.ecr.{REGION}.amazonaws.com/dalle@sha256:{'0' * 64}"
ROLE = f"arn:aws:iam::{NUMBER}:role/sagemaker"
ALONE = [
    *[str(REPOSITORY / ".venv/bin/uv"), "run", "--no-project", "--isolated"],
    *["--python", sys.executable, "--with-requirements", "requirements/sdk2.txt", "python"],
]
LINES = [{"caption": "red circle", "num_candidates": 1, "seed": number} for number in range(2)]


@pytest.fixture
def realtime(account, platform):
    """The account, whose endpoints answer at once and whose transform jobs ask them."""

    def serve(url: str) -> None:
        def invoke(path, headers, body):
            names = ("content-type", "accept")
            given = {name: value for name, value in headers.items() if name.lower() in names}
            reply = requests.post(url, body, headers=given)
            return (
                reply.status_code,
                [("Content-Type", reply.headers["Content-Type"])],
                reply.content,
            )

        account.runtime = invoke
        account.serve_batches(url)

    account.serve_async = serve
    return account


def test_the_sdk_v2_trains_serves_and_transforms(realtime, infra, rainbow_pairs, tmp_path):
    pictures = rainbow_pairs(tmp_path / "pictures", train=16, validation=8)
    assert infra("bootstrap").code == 0
    assert infra("upload", pictures).code == 0
    lines = "".join(f"{json.dumps(line)}\n" for line in LINES)
    realtime.put_object("captions/requests.jsonl", lines.encode())
    out = tmp_path / "said.json"
    environment = {**os.environ, **realtime.environment, "PYTHONPATH": ""}
    done = subprocess.run(
        [*ALONE, "tests/infra/sdk/v2.py", IMAGE, ROLE, BUCKET, str(out)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(out.read_text())
    assert f"models/{said['job']}/output/model.tar.gz" in realtime.keys_in()
    assert (said["reply"]["seed"], len(said["reply"]["images"])) == (7, 1)
    (key,) = (key for key in realtime.keys_in() if key.endswith("requests.jsonl.out"))
    replies = realtime.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()
    # The platform ends a reply that has ended already.
    assert [json.loads(line)["seed"] for line in filter(None, replies.splitlines())] == [0, 1]
    assert realtime.names("endpoints") == []
