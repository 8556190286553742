"""Fixtures of the tests of the model runner."""

import pytest

from dalle import artefact as artefacts
from inference.engine.model_runner import ModelRunner
from tests.inference.engine.model_runner_work import CPU


@pytest.fixture(scope="module")
def artefact(tiny_artefact):
    return artefacts.load(tiny_artefact)


@pytest.fixture
def runner(artefact) -> ModelRunner:
    return ModelRunner(artefact, CPU)
