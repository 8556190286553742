"""inference.engine.model_runner: what it loads, missing components, devices, precisions."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle import artefact as artefacts
from dalle.decoding.engine import DecodeEngine
from dalle.errors import ArtefactError, DeviceError, UserError
from inference.api.schema import ClassifyRequest, CompleteRequest
from inference.engine.model_runner import ModelRunner
from tests.inference.engine.model_runner_work import CPU, answer, ask, picture


@pytest.mark.parametrize(
    ("missing", "request_", "says"),
    [
        ("dvae", ask(), "no dvae, .* train the stage dvae"),
        ("transformer", ask(), "no transformer, .* train the stage transformer"),
        ("tokenizer", ask(), "no tokenizer, .* train the stage transformer"),
        (
            "clip",
            ClassifyRequest(images=[picture()], classes=["a"]),
            "no clip, .* train the stage clip",
        ),
        ("transformer", CompleteRequest(complete="a"), "train the stage transformer"),
    ],
)
def test_a_missing_component_says_which_stage_to_train(artefact, missing, request_, says):
    runner = ModelRunner(replace(artefact, **{missing: None}), CPU)
    with pytest.raises(UserError, match=says) as caught:
        runner.prepare(request_)
    assert (caught.value.status, caught.value.code) == (422, "component_missing")


@pytest.mark.parametrize("missing", ["dvae", "transformer", "clip", None])
def test_an_artefact_without_a_component_passes_the_self_test(artefact, missing):
    partial = replace(artefact, **{missing: None}) if missing else artefact
    ModelRunner(partial, CPU).self_test()


@pytest.mark.parametrize("left", [[], ["dvae"], ["tokenizer", "dvae"], ["transformer", "dvae"]])
def test_an_artefact_that_can_answer_nothing_fails_its_self_test(left, artefact):
    components = {name: getattr(artefact, name) for name in left}
    partial = artefacts.Artefact(**components)
    with pytest.raises(ArtefactError, match="nothing can be answered; train the stages"):
        ModelRunner(partial, CPU).self_test()


def test_it_loads_a_directory_and_an_archive_of_it(tiny_artefact, tmp_path):
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(tiny_artefact, arcname=".")
    first, second = (ModelRunner.load(path, "cpu") for path in (tiny_artefact, tmp_path))
    assert first.components == second.components == ["dvae", "transformer", "clip", "tokenizer"]
    one, other = (answer(each, ask(num_candidates=1)) for each in (first, second))
    assert (one.ranked[0].pixels == other.ranked[0].pixels).all()


def test_a_device_that_is_absent_is_named():
    with pytest.raises(DeviceError, match="cuda:63 is not usable"):
        ModelRunner.load(Path("unused"), "cuda:63")


@pytest.mark.gpu
def test_it_samples_and_scores_on_a_gpu(tiny_artefact):
    runner = ModelRunner.load(tiny_artefact, "cuda")
    runner.self_test()
    assert len(answer(runner, ask(num_candidates=3)).ranked) == 3


def test_precisions_are_compared_on_the_artefacts_example_captions(tiny_artefact, monkeypatch):
    given = []

    def build_engine(model, num_slots, *_, captions, **__):
        given.append(captions)
        return DecodeEngine(model, num_slots)

    monkeypatch.setattr("inference.engine.model_runner.build_engine", build_engine)
    loaded = artefacts.load(tiny_artefact)
    ModelRunner(loaded, torch.device("cpu"))
    loaded.manifest.captions = ["a", "a a"]
    ModelRunner(loaded, torch.device("cpu"))
    nothing, examples = given
    assert nothing is None
    assert torch.equal(examples, loaded.tokenizer.encode(["a", "a a"]))
