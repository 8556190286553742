"""A file of the old DALLE-pytorch, imported and served by the image alone."""

import os
import shutil

import numpy as np
import pytest

from dalle import artefact as artefacts
from infra.docker import docker, image_name
from infra.local.serving import Serving
from tests.training.job.legacy.imported import greedy_pictures, pixels_of, write_tokenizer
from tests.training.job.legacy.published.files import HERE, old

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("image")]

NAME = "1.6.6-plain"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The artefact that the `import` of the image wrote, without a network."""
    folder = tmp_path_factory.mktemp("legacy")
    shutil.copy(HERE / f"{NAME}.pt", folder / "dalle.pt")
    write_tokenizer(folder / "tokenizer.json")
    options = ("--rm", "--network", "none", "--user", f"{os.getuid()}:{os.getgid()}")
    program = ("--entrypoint", "/opt/venv/bin/python", image_name(), "-m", "training.legacy")
    words = ("import", "/files/dalle.pt", "--tokenizer", "/files/tokenizer.json")
    volume = ("--volume", f"{folder}:/files")
    docker("run", *options, *volume, *program, *words, "--out", "/files/model")
    return folder / "model"


def test_an_imported_model_is_served_by_the_image_with_the_greedy_pictures_of_the_package(imported):
    expected = greedy_pictures(old(NAME), artefacts.load(imported))
    with Serving(imported, "--memory", "2g") as serving:
        serving.wait_until_ready()
        for caption, picture in expected:
            asked = {"caption": caption, "num_candidates": 1, "temperature": 0}
            reply = serving.ask("/invocations", asked)
            assert reply.status == 200, reply.body
            assert np.abs(pixels_of(reply.json()) - picture).max() <= 1
    assert not np.array_equal(expected[0][1], expected[1][1])
