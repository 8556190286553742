"""train_on: a job trains on from the models of the channel `artefact`, on other pairs."""

from dataclasses import replace

import pytest
import torch

from dalle import artefact as artefacts
from dalle.manifest import (
    ChosenSampling,
    Manifest,
    SamplingSettings,
    StageRecord,
    TriedSampling,
    read_manifest,
)
from dalle.models.dvae import DiscreteVAE
from dalle.preprocess.tokenizer import CaptionTokenizer
from tests.training import two_hosts
from tests.training.command.test_train_job import stop_after
from tests.training.two_hosts import SAMPLES, fill
from training.__main__ import main
from training.job import output
from training.memory import command, plan

pytestmark = pytest.mark.slow

SETTINGS = two_hosts.TINY | {"max_steps": 4, "train_on": "transformer,clip"}
BEFORE = StageRecord(
    stage="transformer",
    job_name="much",
    finished_at="2026-11-30T00:00:00+00:00",
    steps=1600,
    is_finished=True,
    wall_seconds=1.0,
    cpu_seconds=1.0,
    hyperparameters={},
    metrics={},
    dataset_fingerprint="0" * 64,
    dataset_counts={"train": 2765},
)


@pytest.fixture
def job(make_opt_ml, tiny_models):
    """A function: settings -> a job with the tiny models in its channel `artefact`."""

    def make(shape="platform", models=tiny_models, **settings):
        tree = make_opt_ml(shape)
        fill(tree.add_channel("train"), SAMPLES[:8])
        manifest = Manifest(stages=[BEFORE])
        artefacts.save(tree.add_channel("artefact"), replace(models, manifest=manifest))
        tree.set_hyperparameters(**SETTINGS | settings)
        return tree

    return make


def run(tree, *options):
    return main(["--root", str(tree.root), *options])


def test_both_models_move_a_little_and_keep_tokenizer_and_image_tokens(job, tiny_models, caplog):
    tree = job()
    assert run(tree) == 0, tree.failure
    model = artefacts.load(tree.root / "model")
    for name in ("transformer", "clip"):
        before, after = getattr(tiny_models, name), getattr(model, name)
        assert before.config == after.config
        moved = max(
            float((value - before.state_dict()[weight]).abs().max())
            for weight, value in after.state_dict().items()
        )
        assert 0 < moved < 0.1, "four steps at the low rates of a trained model"
    kept = tiny_models.dvae.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.dvae.state_dict().items())
    assert model.require("tokenizer").words == tiny_models.tokenizer.words
    assert "random weights" not in caplog.text


def test_the_manifest_and_the_card_tell_what_a_model_was_trained_on_from(job):
    tree = job(train_on="transformer", stage="transformer")
    assert run(tree) == 0, tree.failure
    manifest = artefacts.load(tree.root / "model").manifest
    newest, before = manifest.lineage("transformer")
    assert (newest.steps, before) == (4, BEFORE)
    assert len(newest.trained_on_from) == 64
    assert newest.hyperparameters["muon_learning_rate"] == 0.01
    card = (tree.root / "model/MODEL_CARD.md").read_text()
    assert "; trained on from job much, 1,600 steps until 2026-11-30" in card


def test_sampling_settings_are_chosen_on_held_out_pairs_and_shown(job, monkeypatch):
    settings = SamplingSettings(temperature=0.7)
    tried = TriedSampling(settings=settings, own_caption=0.8, nats=1.0, spread=0.1)
    chosen = ChosenSampling(
        settings=settings, num_captions=96, own_caption_of_real=0.9, tried=[tried]
    )
    asked = []

    def choose(artefact, captions, images, **options):
        asked.append(({*captions}, len(images), options["guidance"], options["seconds"]))
        return chosen

    monkeypatch.setattr(output, "choose_sampling", choose)
    tree = job(stage="clip", train_on="clip")
    fill(tree.add_channel("validation"), SAMPLES[8:12])
    assert run(tree) == 0, tree.failure
    held_out = {sample.caption for sample in SAMPLES[8:12]}
    assert asked == [(held_out, 4, False, output.SAMPLING_SECONDS[0])]
    assert artefacts.load(tree.root / "model").manifest.sampling == chosen
    report = (tree.root / "output/data/report.html").read_text()
    assert "at temperature 0.7, guidance_scale 1 where a request does not say" in report


@pytest.mark.parametrize("stage", ["transformer", "clip"])
def test_a_stopped_job_goes_on_to_the_weights_of_an_undisturbed_one(job, stage):
    whole, halves = job("platform"), job("local")
    assert run(whole) == 0, whole.failure
    stop_after(halves, stage, step=2)
    stopped = read_manifest(halves.root / "model").newest_records()[stage]
    assert not stopped.is_finished
    assert run(halves) == 0, halves.failure
    expected = getattr(artefacts.load(whole.root / "model"), stage).state_dict()
    found = getattr(artefacts.load(halves.root / "model"), stage).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_other_weights_in_the_channel_are_another_run(job, tiny_models):
    tree = job(train_on="transformer", stage="transformer")
    assert run(tree) == 0, tree.failure
    torch.manual_seed(1)
    other = type(tiny_models.transformer)(tiny_models.transformer.config)
    artefacts.save(tree.root / "input/data/artefact", replace(tiny_models, transformer=other))
    assert run(tree) == 1
    assert "trained_on_from was" in tree.failure


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": 64}, "width can be set of a new transformer only"),
        ({"transformer_size": "base"}, "transformer_size is of a new transformer, and train_on="),
        ({"clip_embed_size": 64}, "clip_embed_size is of a new CLIP, and train_on=clip"),
        ({"image_size": 32}, "image_size is 32, and train_on keeps the image tokenizer of the"),
        ({"clip_fine_tune": False}, "clip_fine_tune is false and train_on names clip"),
        ({"train_on": "dvae"}, "train_on must be a list of transformer, clip, got 'dvae'"),
    ],
)
def test_settings_that_do_not_fit_the_models_are_refused_by_name(job, settings, says):
    tree = job(**settings)
    assert run(tree) == 1
    assert says in tree.failure
    assert not list((tree.root / "model").glob("*"))


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        (
            "big red star " * 3,
            "train/3.png: caption must be at most 8 tokens long, got 9",
        ),
        (
            "a grinning face",
            "1 of 8 captions have words that the model's tokenizer does not know, the first is "
            "train/3.png: 'a grinning face': 'a' (1), 'grinning' (1), 'face' (1). train_on keeps",
        ),
    ],
)
def test_captions_that_do_not_fit_the_tokenizer_are_refused_with_their_file(job, caption, says):
    tree = job()
    (tree.root / "input/data/train/3.txt").write_text(caption)
    assert run(tree) == 1
    assert says in tree.failure
    assert "raise text_length" not in tree.failure


def test_few_unknown_words_are_a_warning(job, caplog):
    tree = job(max_bad_share=0.2, stage="transformer")
    (tree.root / "input/data/train/3.txt").write_text("big red face")
    assert run(tree) == 0, tree.failure
    assert "'face' (1); they are all read as one token" in caplog.text


def test_an_artefact_without_the_model_is_refused(job, tiny_models):
    without = replace(tiny_models, transformer=None, clip=None)
    tree = job(models=without, stage="transformer", train_on="transformer")
    assert run(tree) == 1
    assert "train_on=transformer trains on from a transformer, and no channel" in tree.failure


def test_the_plan_has_the_sizes_of_the_models_that_are_trained_on(job, tiny_models, monkeypatch):
    planned = {}

    def note(job, settings, options, *models):
        monkeypatch.setattr(
            plan, "_plan_stage", lambda memory, *_: planned.update({memory.name: memory.config})
        )
        plan.plan(job, settings, plan.Devices(1, 1, "cuda", None), *models)
        return 0

    monkeypatch.setattr(command, "run_plan", note)
    assert run(job(size="base"), "--plan") == 0
    assert planned == {
        "transformer": tiny_models.transformer.config,
        "clip": tiny_models.clip.config,
    }


def test_a_tokenizer_of_byte_pairs_knows_every_word(job, tiny_models):
    captions = [sample.caption for sample in SAMPLES]
    tokenizer = CaptionTokenizer.train(captions, kind="bpe", vocab_size=300, text_length=32)
    config = replace(
        tiny_models.transformer.config, text_vocab_size=tokenizer.vocab_size, text_length=32
    )
    model = type(tiny_models.transformer)(config)
    models = replace(tiny_models, transformer=model, clip=None, tokenizer=tokenizer)
    tree = job(models=models, stage="transformer", train_on="transformer")
    (tree.root / "input/data/train/3.txt").write_text("a grinning face")
    assert run(tree) == 0, tree.failure
    assert isinstance(artefacts.load(tree.root / "model").dvae, DiscreteVAE)
