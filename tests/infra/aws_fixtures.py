"""Fixtures of the tests of `infra`: an empty AWS account, and the command line run on it."""

import os
import random
import shutil
from pathlib import Path

import pytest

from dalle.preprocess.images import encode_image
from infra.__main__ import main
from infra.local.endpoint import RuntimeFacade
from tests.inference.served import running
from tests.infra.aws_account import BUCKET, Account, Result, moto_server
from tests.infra.aws_platform import Platform
from training import rainbow


@pytest.fixture(scope="session")
def moto_address():
    """Where a moto_server listens, for the whole session."""
    with moto_server() as address:
        yield address


@pytest.fixture
def account(moto_address, monkeypatch):
    """An empty AWS account (see tests/infra/aws_account.py), which the environment points to."""
    for name in [*os.environ]:
        if name.startswith(("AWS_", "DALLE_")):
            monkeypatch.delenv(name)
    account = Account(moto_address)
    for name, value in account.environment.items():
        monkeypatch.setenv(name, value)
    account.reset()
    yield account
    account.close()


@pytest.fixture
def infra(capfd):
    """A function: words of a command line -> exit code, stdout and stderr of `python -m infra`."""

    def run(*words: object) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def serve_url(tiny_artefact, tmp_path_factory):
    """The address of a real `serve` with tiny models, for the whole session."""
    root = tmp_path_factory.mktemp("serve")
    shutil.copytree(tiny_artefact, root / "model")
    with running(root) as served:
        yield served.ready().url


@pytest.fixture
def endpoint(account, infra, serve_url, monkeypatch):
    """A function: words of `deploy` -> the account, with an endpoint behind which `serve` is."""

    def deploy(*words: object):
        infra("bootstrap")
        account.put_image()
        result = infra("deploy", *words, "--model", f"s3://{BUCKET}/models/job/output/model.tar.gz")
        assert result.code == 0, result.err
        return account

    port = int(serve_url.rpartition(":")[2])
    with RuntimeFacade({"dalle": port}) as facade:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", facade.url)
        yield deploy


@pytest.fixture
def platform(account, tmp_path_factory):
    """The account's jobs train and its endpoints serve (see tests/infra/aws_platform.py)."""
    platform = Platform(account, tmp_path_factory.mktemp("platform"))
    yield platform
    platform.close()


@pytest.fixture(scope="session")
def rainbow_pairs():
    """A function: folder and numbers of pairs -> the folder, with train/ and validation/ in it."""

    def write(folder: Path, *, train: int, validation: int) -> Path:
        chosen = random.Random(0).sample(rainbow.samples(), train + validation)
        for number, sample in enumerate(chosen):
            path = folder / ("train" if number < train else "validation") / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(sample.picture(), "png"))
            path.with_suffix(".txt").write_text(f"{sample.caption}\n", "utf-8")
        return folder

    return write
