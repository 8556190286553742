"""Artefacts: saved and loaded bit for bit; an interrupted save is refused."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.errors import ArtefactError, DiskFullError, PlatformError
from dalle.manifest import (
    ChosenSampling,
    Manifest,
    SamplingSettings,
    StageRecord,
    TriedSampling,
    read_manifest,
)
from dalle.model_card import render
from dalle.types import COMPONENTS, STAGES
from tests.dalle.artefact_files import files_under, read, small_disk

CAPTIONS = ["big filled red star", "small halftone cyan circle rotated twice"]


def answers(artefact: Artefact) -> list[torch.Tensor]:
    """Return tensors that every component computes."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text_tokens = artefact.tokenizer.encode(CAPTIONS)
    image_tokens = artefact.dvae.encode(images)
    return [
        text_tokens,
        image_tokens,
        artefact.dvae.decode(image_tokens),
        artefact.transformer.text_logits(text_tokens),
        artefact.transformer.log_likelihood(text_tokens, image_tokens),
        artefact.clip.encode_image(images),
        artefact.clip.encode_text(text_tokens),
    ]


def test_a_loaded_artefact_computes_bit_equal_results(tiny_models, artefact_copy):
    loaded = artefacts.load(artefact_copy)
    assert loaded.components() == [*COMPONENTS]
    for one, other in zip(answers(tiny_models), answers(loaded), strict=True):
        assert torch.equal(one, other)
    for name in STAGES:
        model, original = getattr(loaded, name), getattr(tiny_models, name)
        assert model.config == original.config
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        state = original.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_loaded_artefact_saves_to_the_same_files(artefact_copy, tmp_path):
    manifest = artefacts.save(tmp_path / "again", artefacts.load(artefact_copy))
    assert manifest.files == read(artefact_copy)["files"]


def test_manifest_and_card_are_replaced_beside_the_components(artefact_copy, tiny_models):
    names = files_under(artefact_copy)
    before = {name: (artefact_copy / name).read_bytes() for name in names}
    settings = SamplingSettings(temperature=0.7)
    tried = TriedSampling(settings=settings, own_caption=0.8, nats=1.0, spread=0.1)
    sampling = ChosenSampling(
        settings=settings, num_captions=96, own_caption_of_real=0.9, tried=[tried]
    )
    chosen = replace(tiny_models, manifest=Manifest(sampling=sampling))
    artefacts.save_manifest(artefact_copy, chosen)
    assert artefacts.load(artefact_copy).manifest.sampling == sampling
    assert "| temperature | 0.7 |" in (artefact_copy / "MODEL_CARD.md").read_text()
    assert files_under(artefact_copy) == names
    changed = [name for name in names if (artefact_copy / name).read_bytes() != before[name]]
    assert sorted(changed) == ["MODEL_CARD.md", "manifest.json"]


def test_configs_keep_their_tuples(tiny_models, make_dalle, tmp_path):
    transformer = make_dalle(attention_kinds=("axial_row", "conv_like"), layer_scale=0.1)
    artefacts.save(tmp_path, Artefact(transformer=transformer))
    assert artefacts.load(tmp_path).transformer.config == transformer.config


def test_the_directory_holds_the_components_and_the_manifest_their_hashes(artefact_copy):
    files = read(artefact_copy)["files"]
    weights = {
        f"{name}/{file}" for name in STAGES for file in ("config.json", "weights.safetensors")
    }
    assert set(files) == weights | {"tokenizer/tokenizer.json"}
    assert files_under(artefact_copy) == set(files) | {"manifest.json", "MODEL_CARD.md"}
    for name, digest in files.items():
        assert hashlib.sha256((artefact_copy / name).read_bytes()).hexdigest() == digest


def test_the_manifest_keeps_the_training_history(tiny_models, tmp_path):
    record = StageRecord(
        stage="dvae",
        job_name="rainbow-1",
        finished_at="2026-01-02T03:04:05+00:00",
        steps=100,
        is_finished=True,
        wall_seconds=1.5,
        cpu_seconds=2.5,
        hyperparameters={"learning_rate": 0.001, "size": None},
        metrics={"validation_loss": 0.25},
        dataset_fingerprint="abc",
        dataset_counts={"train": 10},
    )
    manifest = Manifest(licence="MIT – ©", stages=[record])
    saved = artefacts.save(
        tmp_path, replace(tiny_models, manifest=manifest), git_revision="0123abc"
    )
    loaded = artefacts.load(tmp_path).manifest
    assert loaded == saved == read_manifest(tmp_path)
    assert (loaded.licence, loaded.git_revision, loaded.format_version) == ("MIT – ©", "0123abc", 1)
    assert loaded.stages == [record]
    assert manifest.files == {}, "the one that was given is not changed"


@pytest.mark.parametrize("missing", COMPONENTS)
def test_a_component_may_be_missing(missing, tiny_models, tmp_path):
    artefacts.save(tmp_path, replace(tiny_models, **{missing: None}))
    loaded = artefacts.load(tmp_path)
    assert loaded.components() == [name for name in COMPONENTS if name != missing]
    assert getattr(loaded, missing) is None


def test_a_required_component_that_is_missing_is_named_with_the_stage_to_train(tiny_models):
    partial = replace(tiny_models, tokenizer=None)
    assert partial.require("dvae") is tiny_models.dvae
    says = "no tokenizer, which this test needs; it has dvae, .*: train the stage transformer"
    with pytest.raises(ArtefactError, match=says):
        partial.require("tokenizer", "this test")


def test_saving_over_an_older_artefact_leaves_nothing_of_it(tiny_models, artefact_copy, make_dalle):
    (artefact_copy / "report.html").write_text("somebody else's")
    other = make_dalle()
    artefacts.save(artefact_copy, Artefact(transformer=other, tokenizer=tiny_models.tokenizer))
    loaded = artefacts.load(artefact_copy)
    assert loaded.components() == ["transformer", "tokenizer"]
    assert loaded.transformer.config == other.config
    assert sorted(path.name for path in artefact_copy.iterdir()) == [
        "MODEL_CARD.md",
        "manifest.json",
        "report.html",
        "tokenizer",
        "transformer",
    ]


RENAMES = 2 * (len(COMPONENTS) + 2)
"""Of a save over an older artefact: of both, the components, the manifest and the model card."""


@pytest.mark.parametrize("survivors", range(RENAMES))
def test_a_save_whose_disk_fails_at_a_rename_leaves_the_old_artefact(
    survivors, tiny_models, artefact_copy, make_dalle, monkeypatch
):
    before = files_under(artefact_copy)
    really_replace, done = os.replace, []

    def fail_once(*arguments: object) -> None:
        done.append(arguments)
        if len(done) == survivors + 1:
            raise OSError(5, "Input/output error")
        really_replace(*arguments)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(PlatformError, match="cannot write the artefact .*Input/output"):
        artefacts.save(artefact_copy, replace(tiny_models, transformer=make_dalle()))
    assert artefacts.load(artefact_copy).transformer.config == tiny_models.transformer.config
    assert files_under(artefact_copy) == before


@pytest.mark.parametrize("survivors", range(RENAMES + 1))
def test_a_save_whose_process_is_killed_leaves_the_old_artefact_or_the_new_one(
    survivors, tiny_models, artefact_copy, make_dalle, monkeypatch
):
    """The new one has a component less and a component more than the old one."""
    old = replace(tiny_models, clip=None)
    artefacts.save(artefact_copy, old)
    new = replace(tiny_models, transformer=None)
    really_replace, done = os.replace, []

    class Killed(BaseException):
        pass

    def die(*arguments: object) -> None:
        if len(done) == survivors:
            raise Killed
        done.append(arguments)
        really_replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(artefacts, "restore", lambda directory: None)  # a dead process does nothing
        if survivors < len(old.components()) + len(new.components()) + 4:
            with pytest.raises(Killed):
                artefacts.save(artefact_copy, new)
        else:
            artefacts.save(artefact_copy, new)
    artefacts.restore(artefact_copy)
    is_replaced = survivors >= len(old.components()) + len(new.components()) + 4
    expected = new if is_replaced else old
    assert artefacts.load(artefact_copy).components() == expected.components()
    assert {path.name for path in artefact_copy.iterdir()} == {
        *expected.components(),
        "manifest.json",
        "MODEL_CARD.md",
    }
    card = (artefact_copy / "MODEL_CARD.md").read_text()
    assert card == render(artefacts.load(artefact_copy).card())


def test_a_save_over_an_artefact_without_a_card_that_is_killed_leaves_none(
    tiny_models, artefact_copy, monkeypatch
):
    (artefact_copy / "MODEL_CARD.md").unlink()
    really_replace = os.replace

    class Killed(BaseException):
        pass

    def die_before_the_manifest(source: Path, target: Path) -> None:
        if Path(target) == artefact_copy / "manifest.json":
            raise Killed
        really_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_before_the_manifest)
        patch.setattr(artefacts, "restore", lambda directory: None)
        with pytest.raises(Killed):
            artefacts.save(artefact_copy, tiny_models)
    assert (artefact_copy / "MODEL_CARD.md").exists()
    artefacts.restore(artefact_copy)
    assert not (artefact_copy / "MODEL_CARD.md").exists()
    assert artefacts.load(artefact_copy).components() == [*COMPONENTS]


def test_a_full_disk_leaves_the_old_artefact_and_nothing_else(tiny_models, artefact_copy):
    with small_disk(), pytest.raises(DiskFullError, match="no room to write the artefact"):
        artefacts.save(artefact_copy, tiny_models)
    assert artefacts.load(artefact_copy).components() == [*COMPONENTS]
    assert not (artefact_copy / ".staging").exists()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFullError),
        (OSError(28, "No space left on device"), DiskFullError),
        (SafetensorError("I/O error: Input/output error (os error 5)"), PlatformError),
        (SafetensorError("an invalid tensor"), SafetensorError),
    ],
)
def test_a_save_that_fails_before_its_renames_leaves_the_old_one(
    error, raised, tiny_models, artefact_copy, monkeypatch
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(artefacts, "save_file", fail)
    with pytest.raises(raised):
        artefacts.save(artefact_copy, tiny_models)
    assert artefacts.load(artefact_copy).components() == [*COMPONENTS]
    assert not (artefact_copy / ".staging").exists()
