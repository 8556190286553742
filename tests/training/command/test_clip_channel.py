"""The channel `clip`: a published CLIP ranks for the job's model, or is trained on by it."""

import shutil
from dataclasses import replace

import pytest
import torch

from dalle import artefact as artefacts
from tests.training import two_hosts
from tests.training.job.pretrained.clip_files import (
    build_openai,
    open_clip,
    probabilities,
    save_state,
)
from tests.training.two_hosts import SAMPLES, fill
from training.__main__ import main
from training.job.pretrained.clip import load_clip
from training.memory import command, plan

pytestmark = pytest.mark.slow

SETTINGS = two_hosts.TINY | {"max_steps": 2, "image_size": 16, "stage": "clip"}


def run(tree, *options):
    return main(["--root", str(tree.root), *options])


@pytest.fixture
def job(opt_ml):
    """A function: settings -> a job with open_clip's gelu model in its channel `clip`, if any."""

    def make(has_clip=True, **settings):
        fill(opt_ml.add_channel("train"), SAMPLES[:8])
        if has_clip:
            open_clip("gelu").put(opt_ml.add_channel("clip"))
        opt_ml.set_hyperparameters(**SETTINGS | settings)
        return opt_ml

    return make


def test_a_published_clip_is_trained_on_and_classifies_with_its_new_weights(job, caplog):
    tree = job(clip_fine_tune=True, clip_likelihood_weight=0.5)
    assert run(tree) == 0, tree.failure
    model = artefacts.load(tree.root / "model")
    assert model.components() == ["clip"]
    clip = model.require("clip")
    original = load_clip(*open_clip("gelu").put(tree.root))
    assert (clip.config.activation, clip.config.likelihood_weight) == ("gelu", 0.5)
    moved = [
        float((value - original.state_dict()[name]).abs().max())
        for name, value in clip.state_dict().items()
    ]
    assert 0 < max(moved) < 1e-3, "two steps at a learning rate of 1e-5"
    (record,) = model.manifest.stages
    assert (record.stage, record.steps) == ("clip", 2)
    rates = (record.hyperparameters["learning_rate"], record.hyperparameters["muon_learning_rate"])
    assert rates == (1e-5, 0)
    assert [*model.manifest.imported["clip"].files] == [
        "open_clip_pytorch_model.bin",
        "open_clip_config.json",
    ]
    assert "tokenizer; trained on |" in (tree.root / "model/MODEL_CARD.md").read_text()
    assert "random weights" not in caplog.text
    expected = open_clip("gelu")
    change = probabilities(clip, expected.captions, expected.pictures) - expected.probabilities
    assert 1e-6 < float(change.abs().max()) < 0.05


def test_a_finished_fine_tuning_is_not_begun_again_and_another_clip_is_another_run(job, caplog):
    tree = job(clip_fine_tune=True)
    assert run(tree) == 0, tree.failure
    before = (tree.root / "model/clip/weights.safetensors").read_bytes()
    assert run(tree) == 0, tree.failure
    assert (tree.root / "model/clip/weights.safetensors").read_bytes() == before
    shutil.rmtree(tree.root / "input/data/clip")
    save_state(build_openai("vit"), tree.add_channel("clip") / "clip.pt")
    assert run(tree) == 1
    assert "belongs to another run: clip_config was" in tree.failure
    assert "; trained_on_from was" in caplog.text


def test_an_artefacts_clip_is_trained_on_by_the_next_job(job, tiny_models):
    tree = job(has_clip=False, clip_fine_tune=True)
    artefacts.save(tree.add_channel("artefact"), tiny_models)
    for path in (tree.root / "input/data/train").glob("*.txt"):
        path.write_text("big red star")
    assert run(tree) == 0, tree.failure
    model = artefacts.load(tree.root / "model")
    assert model.components() == ["dvae", "transformer", "clip", "tokenizer"]
    assert model.manifest.imported == {}
    kept = tiny_models.clip.state_dict()
    changes = [
        float((value - kept[name]).abs().max())
        for name, value in model.require("clip").state_dict().items()
    ]
    assert 0 < max(changes) < 1e-3


def test_a_caption_that_the_clip_cannot_read_whole_is_named_or_cut(job):
    tree = job(clip_fine_tune=True)
    (tree.root / "input/data/train/3.txt").write_text("star " * 80)
    assert run(tree) == 1
    assert tree.failure.startswith("train/3.png: caption must be at most 75 tokens long, got 80")
    assert "the CLIP that is trained on reads no more; shorten the caption" in tree.failure
    tree.set_hyperparameters(**SETTINGS, clip_fine_tune=True, long_captions="cut")
    assert run(tree) == 0, tree.failure


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "stage=clip trains a CLIP and the channel clip brings one; leave one of them out, or"),
        ({"clip_fine_tune": True, "vision_width": 64}, "vision_width is of a new CLIP"),
        ({"clip_fine_tune": True, "clip_size": "base"}, "clip_size is of a new CLIP"),
    ],
)
def test_settings_that_do_not_fit_the_channel_are_refused_by_name(job, settings, says):
    tree = job(**settings)
    assert run(tree) == 1
    assert says in tree.failure
    assert run(tree, "--plan") == 1


def test_without_a_clip_there_is_nothing_to_train_on(job, tiny_models, capsys):
    tree = job(has_clip=False, clip_fine_tune=True)
    assert run(tree) == 1
    assert "neither the channel clip nor artefact is there to bring one" in tree.failure
    artefacts.save(tree.add_channel("artefact"), replace(tiny_models, clip=None))
    assert run(tree) == 1
    assert "no channel brings one" in tree.failure
    assert run(tree, "--plan") == 1
    assert "no channel brings one" in capsys.readouterr().err
    shutil.rmtree(tree.root / "input/data/artefact")
    (tree.add_channel("artefact") / "model.tar.gz").touch()
    assert run(tree, "--plan") == 1
    assert "which the plan reads of an unpacked artefact only" in capsys.readouterr().err


def test_the_plan_counts_the_published_clip_that_is_trained_on_and_none_that_is_kept(
    job, monkeypatch
):
    planned = {}

    def note(job, settings, options, *models):
        monkeypatch.setattr(
            plan, "_plan_stage", lambda memory, *_: planned.update({memory.name: memory})
        )
        plan.plan(job, settings, plan.Devices(1, 1, "cuda", None), *models)
        return 0

    monkeypatch.setattr(command, "run_plan", note)
    tree = job(clip_fine_tune=True)
    assert run(tree, "--plan") == 0
    number = sum(value.numel() for value in open_clip("gelu").weights.values())
    assert {name: each.num_parameters for name, each in planned.items()} == {"clip": number}
    planned.clear()
    tree.set_hyperparameters(**SETTINGS | {"stage": "all"})
    assert run(tree, "--plan") == 0
    assert [*planned] == ["dvae", "transformer"]


def test_a_clip_with_a_weight_that_is_not_a_number_leaves_no_model(job):
    tree = job(stage="all")
    state = dict(open_clip("gelu").weights)
    state["ln_final.bias"] = torch.full_like(state["ln_final.bias"], float("nan"))
    torch.save(state, tree.root / "input/data/clip/open_clip_pytorch_model.bin")
    assert run(tree) == 2
    assert "the weight ln_final.bias has values that are not finite" in tree.failure
    assert not (tree.root / "model/manifest.json").exists()
