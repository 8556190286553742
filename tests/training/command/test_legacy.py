"""A model of DALLE-pytorch in a job's channel, and over HTTP: trained on, served, or refused."""

import json

import numpy as np
import pytest
import torch

from dalle import artefact as artefacts
from dalle.models.legacy.transformer import LegacyTransformer
from tests.inference.served import running
from tests.training import two_hosts
from tests.training.job.legacy.imported import greedy_pictures, pixels_of, write_tokenizer
from tests.training.job.legacy.published.files import HERE, old
from tests.training.two_hosts import SAMPLES, fill
from training import legacy
from training.__main__ import main

pytestmark = pytest.mark.slow

NAME = "1.6.6-plain"
STEPS = two_hosts.TINY | {"max_steps": 2, "learning_rate": 1e-8, "muon_learning_rate": 0}


def import_to(out, tokenizer):
    path = HERE / f"{NAME}.pt"
    return legacy.main(["import", str(path), "--tokenizer", str(tokenizer), "--out", str(out)])


def test_an_imported_model_is_served_with_the_greedy_tokens_of_the_old_package(tmp_path):
    assert import_to(tmp_path / "model", write_tokenizer(tmp_path / "tokenizer.json")) == 0
    expected = greedy_pictures(old(NAME), artefacts.load(tmp_path / "model"))
    with running(tmp_path, DALLE_CHUNK_SIZE="2") as served:
        served.ready()
        served.wait_for("the model has the graph of DALLE-pytorch")
        for caption, picture in expected:
            reply = served.ask(caption=caption, num_candidates=1, temperature=0)
            assert np.abs(pixels_of(reply.json()) - picture).max() <= 1
        guided = served.ask(caption="w3", num_candidates=2, guidance_scale=3.0)
        assert len(guided.json()["images"]) == 2
    assert not np.array_equal(expected[0][1], expected[1][1])


def job_with(tree, options=None, **settings):
    """Put a bare model, which tells nothing, and its tokenizer into the channel."""
    fill(tree.add_channel("train"), SAMPLES[:8])
    channel = tree.add_channel("legacy")
    torch.save(old("0.8.3-reversible").weights, channel / "dalle.pt")
    words = sorted({word for sample in SAMPLES[:8] for word in sample.caption.split()})
    filling = [f"<{number}>" for number in range(30)]
    write_tokenizer(channel / "words.json", ["<pad>", *words, *filling][:30])
    if options is not None:
        (channel / "legacy.json").write_text(json.dumps(options))
    tree.set_hyperparameters(**STEPS | settings)
    return tree


OPTIONS = {
    "attn_types": "conv_like,full",
    "heads": 2,
    "dalle_pytorch_version": "0.8.3",
    "hidden_padding": True,
}


def test_a_job_trains_on_from_the_weights_of_the_channel(opt_ml, caplog):
    caplog.set_level("INFO")
    tree = job_with(opt_ml, OPTIONS, stage="transformer", caption_dropout=0.1)
    assert main(["--root", str(tree.root)]) == 0, tree.failure
    assert "dalle.pt: no file tells whether padding was hidden" in caplog.text
    artefact = artefacts.load(tree.root / "model")
    assert artefact.components() == ["dvae", "transformer", "tokenizer"]
    model = artefact.require("transformer")
    assert isinstance(model, LegacyTransformer)
    assert (model.config.reversible, model.config.caption_dropout) == (True, 0.1)
    before = old("0.8.3-reversible").weights["text_emb.weight"]
    change = (model.text_embedding.weight - before).abs()
    assert 0 < change.max() < 1e-6
    (record,) = artefact.manifest.stages
    assert (record.stage, record.steps) == ("transformer", 2)
    assert "trained on" in (tree.root / "model/MODEL_CARD.md").read_text()


def test_the_plan_knows_the_models_of_the_channel(opt_ml, capsys):
    tree = job_with(opt_ml, OPTIONS, stage="transformer")
    assert main(["--root", str(tree.root), "--plan", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    weights = old("0.8.3-reversible").weights
    ours = {name for name in weights if not name.startswith(("vae.", "logits_mask"))}
    axial = sum(weights[f"image_pos_emb.weights_{axis}"].numel() for axis in (0, 1))
    number = sum(weights[name].numel() for name in ours) - axial + 64 * 32
    assert (stage["stage"], stage["num_parameters"]) == ("transformer", number)


def test_the_plan_has_no_size_for_a_model_whose_size_is_fixed(opt_ml, capsys):
    tree = job_with(opt_ml, OPTIONS, stage="transformer")
    assert main(["--root", str(tree.root), "--plan"]) == 0
    assert "transformer, size of the model of DALLE-pytorch: " in capsys.readouterr().out


def test_a_stage_that_the_job_would_refuse_is_not_planned(opt_ml, capsys):
    tree = job_with(opt_ml, OPTIONS, stage="dvae")
    assert main(["--root", str(tree.root), "--plan"]) != 0
    assert "would leave the artefact's transformer without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "settings", "code", "words"),
    [
        (None, {}, 2, "--dalle-pytorch-version"),
        ({"attn_types": "full", "memory": 1}, {}, 2, "legacy.json: memory"),
        (OPTIONS, {"width": 64}, 1, "width can be set of a new transformer only"),
    ],
)
def test_a_model_or_a_setting_that_does_not_fit_ends_the_job(
    options, settings, code, words, opt_ml
):
    tree = job_with(opt_ml, options, stage="transformer", **settings)
    assert main(["--root", str(tree.root)]) == code
    assert words in tree.failure
    assert not list((tree.root / "model").glob("*"))
