"""training.job: a finished job started again keeps its model until a better one is whole."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch

from dalle import artefact as artefacts
from dalle.errors import ArtefactError, CheckpointError
from dalle.manifest import read_manifest
from dalle.platform.environment import read_job
from dalle.platform.outputs import prepare_outputs
from dalle.preprocess.images import encode_image
from training.config.hyperparameters import parse
from training.job import output
from training.job.trainer import Trainer

TINY = {
    "size": "tiny",
    "image_size": "16",
    "batch_size": "4",
    "tokenizer_kind": "word",
    "max_steps": "2",
    "num_validations": "0",
}


@pytest.fixture
def run(opt_ml, monkeypatch):
    """A function that runs the job in `opt_ml` with some hyperparameters, without a report."""
    folder = opt_ml.add_channel("train")
    for number in range(4):
        pixels = np.full((16, 16, 3), number, dtype=np.uint8)
        (folder / f"{number}.png").write_bytes(encode_image(pixels, "png"))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    monkeypatch.setattr(output, "build_report", lambda *_, **__: None)
    monkeypatch.setattr(output, "write_report", lambda *_: None)

    def run(stop=None, **raw):
        job = read_job(opt_ml.root, {"DALLE_DEVICE": "cpu"})
        prepare_outputs(job.paths)
        device = torch.device("cpu")
        given = {name: text for name, text in (TINY | raw).items() if text}
        Trainer(job, parse(given), stop or threading.Event(), device=device).run()

    return run


@pytest.fixture
def finished(run, opt_ml):
    """A finished job; a function that returns all of its files and their content."""
    run()

    def state():
        return {
            path.relative_to(opt_ml.root): path.read_bytes()
            for folder in ("model", "checkpoints", "output")
            for path in (opt_ml.root / folder).rglob("*")
            if path.is_file()
        }

    return state


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"max_steps": "4"}, "set dvae_max_steps=2 to prolong the other stages alone"),
        ({"epochs": "5", "max_steps": ""}, "set dvae_max_steps=2"),
        ({"transformer_learning_rate": "0.1"}, "learning_rate was 0.001, this job has 0.1"),
        ({"clip_text_width": "24"}, "clip_config was .*'text_width': 24"),
        ({"seed": "3"}, "seed was 0, this job has 3"),
    ],
)
def test_a_job_that_is_refused_has_changed_nothing(run, finished, raw, says):
    before = finished()
    with pytest.raises(CheckpointError, match=says):
        run(**raw)
    assert finished() == before
    run()
    assert {*finished()} >= {*before}


def test_a_larger_budget_of_the_last_stages_goes_on(run, finished, opt_ml):
    before = artefacts.load(opt_ml.root / "model")
    run(max_steps="4", dvae_max_steps="2")
    manifest = read_manifest(opt_ml.root / "model")
    assert [record.steps for record in manifest.stages] == [2, 4, 4]
    after = artefacts.load(opt_ml.root / "model")
    assert torch.equal(*(model.dvae.decoder[0].weight for model in (before, after)))


def test_a_job_that_is_stopped_keeps_the_finished_model_of_an_earlier_one(
    run, finished, opt_ml, caplog
):
    before = read_manifest(opt_ml.root / "model")
    stop = threading.Event()
    stop.set()
    run(stop, transformer_max_steps="4")
    assert read_manifest(opt_ml.root / "model") == before


def test_a_job_that_would_lose_components_of_an_earlier_model_is_refused(run, finished):
    before = finished()
    with pytest.raises(ArtefactError, match="an earlier model with dvae, transformer, which this"):
        run(stage="clip")
    assert finished() == before


def test_a_job_that_would_put_an_untrained_model_in_place_of_a_trained_one_is_refused(
    run, finished, opt_ml
):
    """The channel brings a published model without a record, as `legacy` does."""
    before = finished()
    channel = opt_ml.add_channel("artefact")
    shutil.copytree(opt_ml.root / "model", channel, dirs_exist_ok=True)
    path = channel / "manifest.json"
    manifest = json.loads(path.read_text())
    kept = [each for each in manifest["stages"] if each["stage"] != "transformer"]
    path.write_text(json.dumps(manifest | {"stages": kept}))
    with pytest.raises(ArtefactError, match="an earlier model with transformer, .* as the channel"):
        run(stage="clip", clip_max_steps="4")
    assert finished() == before
