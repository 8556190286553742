"""training.scenes: what its pictures and captions hold, what is kept back, and its exact judge."""

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.artefact import Artefact
from dalle.errors import DataError
from dalle.models.clip import Clip, ClipConfig
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.sizes import CLIP_SIZES, DVAE_SIZES, TRANSFORMER_SIZES
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.preprocess.tokenizer import CaptionTokenizer
from training import scenes
from training.scenes import (
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    SYNONYMS,
    Thing,
    evaluate_scenes,
    is_reserved,
    read_scenes,
    recognise,
    render,
    score_scenes,
    things,
    write_folder,
)


def planes(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(scenes, "NUM_TRAINING", 60)
    monkeypatch.setattr(scenes, "NUM_HELD_OUT", 20)


def test_every_thing_is_recognised_at_every_place():
    for place in PLACES:
        for thing in things():
            assert recognise(planes(render({place: thing}))) == [{place: thing}]
    assert recognise(planes(render({}))) == [{}]


def test_what_stands_in_one_quarter_leaves_the_others_as_they_are():
    scene = dict(zip(PLACES, things()[::20], strict=False))
    noisy = render(scene).astype(np.int64) + np.random.default_rng(0).integers(-40, 40, (64, 64, 3))
    assert recognise(planes(noisy.clip(0, 255).astype(np.uint8))) == [scene]


def test_a_caption_says_what_stands_where_in_words_of_its_own(few):
    def known(words, name):
        return any(each in words for each in SYNONYMS.get(name, (name,)))

    training, held_out = scenes.sample_scenes(0)
    captions = [*training, *held_out]
    for caption, scene in [*training.items(), *held_out.items()]:
        clauses = caption.split(" and ")
        assert len(clauses) == len(scene)
        for place, thing in scene.items():
            (clause,) = (each for each in clauses if known(each, place))
            assert all(known(clause, word) for word in (thing.size, thing.colour, thing.shape))
    assert len({word for caption in captions for word in caption.split()}) > 30
    assert any(caption.split()[0] != "a" for caption in captions), "clauses begin either way"


def test_reserved_pairs_are_held_out_and_every_word_is_still_trained_on(few):
    training, held_out = scenes.sample_scenes(0)
    reserved = {(t.colour, t.shape) for t in things() if is_reserved(t)}
    assert len(reserved) == len(COLOURS)
    trained = [thing for scene in training.values() for thing in scene.values()]
    assert not any(is_reserved(thing) for thing in trained)
    assert {thing.colour for thing in trained} == set(COLOURS)
    assert {thing.shape for thing in trained} == set(SHAPES)
    assert {thing.size for thing in trained} == set(RADII)
    with_reserved = [any(is_reserved(t) for t in scene.values()) for scene in held_out.values()]
    assert sum(with_reserved) == len(held_out) / 2


def test_no_held_out_scene_is_a_training_scene_in_other_words(few):
    training, held_out = scenes.sample_scenes(1)
    keys = [frozenset(scene.items()) for scene in [*training.values(), *held_out.values()]]
    assert len(set(keys)) == len(keys) == 80
    assert scenes.sample_scenes(1) == (training, held_out)
    assert scenes.sample_scenes(2) != (training, held_out)


def test_a_written_folder_is_read_back(few, tmp_path):
    assert write_folder(tmp_path, seed=3) == {"train": 60, "validation": 20}
    training, held_out = read_scenes(tmp_path)
    assert (training, held_out) == scenes.sample_scenes(3)
    for folder, content in (("train", training), ("validation", held_out)):
        for text in (tmp_path / folder).glob("*.txt"):
            pixels = np.asarray(Image.open(text.with_suffix(".png")))
            assert (pixels == render(content[text.read_text().strip()])).all()


@pytest.mark.parametrize("content", ["", "{", '{"train": {}}', '{"train": {}, "validation": 3}'])
def test_a_spoilt_description_is_named(tmp_path, content):
    (tmp_path / "scenes.json").write_text(content)
    with pytest.raises(DataError, match="scenes.json"):
        read_scenes(tmp_path)


def test_the_score_counts_pictures_places_and_attributes():
    red, blue = Thing("big", "red", "circle"), Thing("big", "blue", "circle")
    wanted = [{"top left": red}, {"top left": red, "top right": blue}, {"bottom left": blue}]
    found = [{"top left": red}, {"top left": blue, "top right": blue}, {"top left": blue}]
    score = score_scenes(wanted, found, [{"top left": blue}])
    assert score.num_captions == 3
    assert score.right == pytest.approx(1 / 3)
    assert score.memorised == pytest.approx(1 / 3)  # the third is a training scene
    assert score.empty_places == pytest.approx(7 / 8)
    assert score.colour == pytest.approx(2 / 4)
    assert score.shape == score.size == pytest.approx(3 / 4)


def test_an_artefact_is_scored_on_both_halves(few, tmp_path, tiny_models, monkeypatch):
    write_folder(tmp_path)
    scores = evaluate_scenes(artefact_for(tmp_path), tmp_path, num_candidates=2, limit=3)
    assert set(scores) == {scenes.KNOWN, scenes.RESERVED}
    for methods in scores.values():
        assert set(methods) == {"greedy", "best of 2"}
        assert all(score.num_captions == 3 for score in methods.values())


def artefact_for(directory):
    """An untrained artefact that reads the folder's captions and generates 64 pixels."""
    training, held_out = read_scenes(directory)
    tokenizer = CaptionTokenizer.train([*training, *held_out], kind="word", text_length=32)
    torch.manual_seed(0)
    dvae = DiscreteVAE(DVAEConfig(**DVAE_SIZES["tiny"] | {"image_size": 64, "patch_size": 16}))
    transformer = Dalle(
        TransformerConfig(
            text_vocab_size=tokenizer.vocab_size,
            text_length=32,
            grid_size=4,
            codebook_size=dvae.config.codebook_size,
            num_codebooks=dvae.config.num_codebooks,
            **TRANSFORMER_SIZES["tiny"],
        )
    )
    clip = Clip(
        ClipConfig(
            image_size=64,
            text_vocab_size=tokenizer.vocab_size + 1,
            text_length=33,
            **CLIP_SIZES["tiny"] | {"patch_size": 16},
        )
    )
    for model in (dvae, transformer, clip):
        model.eval().requires_grad_(False)
    return Artefact(dvae, transformer, clip, tokenizer)
