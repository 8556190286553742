"""Caption accuracy: its arithmetic in worlds small enough to count by hand, and the command."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingOptions
from dalle.errors import ArtefactError, DataError
from dalle.manifest import Manifest, StageRecord
from dalle.preprocess.images import encode_image
from training.data.pairs import Subset
from training.data.sources.channel import open_channel
from training.evaluate.__main__ import main
from training.evaluate.ground_truth import GroundTruth, read_attributes, read_ground_truth
from training.evaluate.pixels import MOST_PSNR, compare_pixels
from training.evaluate.scores import (
    ALL,
    GREEDY,
    NOVEL,
    NUMBERS_APART,
    SINGLE,
    Compared,
    choose_captions,
    evaluate,
    score,
)
from training.report.samples import generate_candidates, to_pixels

SIZE = 16
COLOURS = ["red", "orange", "green", "blue", "indigo", "violet", "cyan", "black"]
CAPTIONS = [f"big filled {colour} star" for colour in COLOURS]


def shade(value):
    return np.full((SIZE, SIZE, 3), value, dtype=np.uint8)


def write_pairs(folder, pairs):
    """pairs: (pixels, captions separated by a line's end); files are named by their order."""
    folder.mkdir(parents=True)
    for number, (pixels, captions) in enumerate(pairs):
        (folder / f"{number:04}.png").write_bytes(encode_image(pixels, "png"))
        (folder / f"{number:04}.txt").write_text(captions, encoding="utf-8")


@pytest.fixture
def world(tmp_path):
    """Four classes. In training: dark, grey (as "grey" and "gray"); held out: light, black, and
    "ash", whose picture is that of grey."""
    write_pairs(tmp_path / "train", [(shade(50), "dark"), (shade(128), "grey\ngray")])
    held_out = [(shade(200), "light"), (shade(0), "black"), (shade(128), "ash")]
    write_pairs(tmp_path / "validation", held_out)
    attributes = {
        "dark": {"tone": "low", "warmth": "none"},
        "black": {"tone": "low", "warmth": "none"},
        "light": {"tone": "high", "warmth": "none"},
        "gray": {"tone": "middle"},
        "ash": {"tone": "middle"},
    }
    (tmp_path / "attributes.json").write_text(json.dumps(attributes))
    return tmp_path


@pytest.fixture
def truth(world):
    return read_ground_truth(world, SIZE)


def images(*values):
    return torch.stack([torch.full((3, SIZE, SIZE), each, dtype=torch.uint8) for each in values])


def test_equal_pictures_are_one_class_with_all_their_captions(truth):
    assert truth.captions == [{"dark"}, {"grey", "gray", "ash"}, {"light"}, {"black"}]
    assert truth.in_training == [True, True, False, False]
    assert truth.held_out == ["light", "black", "ash"]
    assert truth.own("ash") == truth.own("grey") == {1}
    assert [truth.is_novel(caption) for caption in truth.held_out] == [True, True, False]


def test_a_caption_with_several_pictures_owns_them_all(tmp_path):
    write_pairs(tmp_path / "train", [(shade(10), "a dog"), (shade(20), "a cat")])
    write_pairs(tmp_path / "validation", [(shade(30), "a dog"), (shade(40), "a dog")])
    truth = read_ground_truth(tmp_path, SIZE)
    assert truth.own("a dog") == {0, 2, 3}
    assert truth.held_out == ["a dog"]
    assert not truth.is_novel("a dog")


def test_the_nearest_picture_is_found_and_the_first_of_equals(truth):
    assert truth.nearest(images(0, 20, 60, 127, 129, 255)).tolist() == [3, 3, 0, 1, 1, 2]
    assert truth.nearest(images(25, 164)).tolist() == [0, 1]  # midway


@pytest.mark.slow
def test_nearest_is_exact_where_single_precision_is_not(tmp_path):
    generator = np.random.default_rng(0)
    base = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pictures = [base.copy() for _ in range(32)]
    for number, picture in enumerate(pictures):
        picture[number, 0, 0] += 1  # one level of one channel of one pixel
    write_pairs(tmp_path / "train", [(each, "x") for each in pictures[:16]])
    write_pairs(tmp_path / "validation", [(each, "x") for each in pictures[16:]])
    truth = read_ground_truth(tmp_path, 64)
    everything = truth.images(range(32))
    distances = (everything[:, None].long() - everything[None].long()).square().sum(dim=(2, 3, 4))
    assert distances.unique().tolist() == [0, 2]
    assert truth.nearest(everything).tolist() == list(range(32))


def test_pictures_are_compared_in_chunks_to_the_same_end(truth, monkeypatch):
    queries = images(*range(0, 256, 5))
    whole = truth.nearest(queries)
    monkeypatch.setattr("training.data.batching.nearest.CHUNK_BYTES", 2 * 8 * 3 * SIZE**2)
    assert torch.equal(truth.nearest(queries), whole)


def scored(truth, captions, nearest):
    """The score of images that are the real ones of some classes."""
    own = truth.images([min(truth.own(caption)) for caption in captions])
    pixels = compare_pixels(truth.images(nearest), own)
    return score(truth, captions, Compared(torch.tensor(nearest), pixels))


def test_of_several_real_images_the_nearest_is_compared(tiny_models, tmp_path):
    greedy = SamplingOptions(temperature=0.0)
    (drawn,) = generate_candidates(tiny_models, CAPTIONS[:1], [[0]], seed=0, options=greedy)
    write_pairs(tmp_path / "train", [(shade(1), "x")])
    held_out = [shade(0), to_pixels(drawn.images[0]), shade(255)]
    write_pairs(tmp_path / "validation", [(each, CAPTIONS[0]) for each in held_out])
    result = evaluate(tiny_models, read_ground_truth(tmp_path, SIZE), greedy_only=True)
    assert result.scores[ALL][GREEDY].pixels.error == 0


def test_the_score_counts_right_novel_memorised_and_attributes(truth):
    # light -> light, black -> dark (a training picture of another caption), ash -> grey, its own
    result = scored(truth, ["light", "black", "ash"], [2, 0, 1])
    assert result.right == pytest.approx(2 / 3)
    assert result.memorised == pytest.approx(1 / 3)
    assert result.per_attribute == {"tone": 1.0, "warmth": 1.0}
    # black -> light: no training picture; its tone is wrong, its warmth right
    assert scored(truth, ["black"], [2]).memorised == 0
    assert scored(truth, ["black"], [2]).per_attribute == {"tone": 0.0, "warmth": 1.0}
    # any caption of the nearest class may have the word: "ash" has it, "grey" says nothing
    assert scored(truth, ["ash"], [1]).per_attribute == {"tone": 1.0}


def test_without_attributes_only_whole_captions_are_scored(world):
    (world / "attributes.json").unlink()
    assert scored(read_ground_truth(world, SIZE), ["light"], [2]).per_attribute == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ('{"red": "x"}', "'red' has 'x'; it must be"),
        ('{"red": {"a": 1}}', "'red' has {'a': 1}; it must be"),
    ],
)
def test_wrong_attributes_are_named(tmp_path, text, says):
    (tmp_path / "attributes.json").write_text(text)
    with pytest.raises(DataError, match=r"attributes\.json") as caught:
        read_attributes(tmp_path / "attributes.json")
    assert says in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    write_pairs(tmp_path / "train", [(shade(1), "x")])
    with pytest.raises(DataError, match=r"^validation: .*validation is not a directory"):
        read_ground_truth(tmp_path, SIZE)


def test_a_limit_draws_the_same_captions_for_a_seed(truth):
    assert choose_captions(truth, None, 0) == choose_captions(truth, 9, 0) == truth.held_out
    assert choose_captions(truth, 2, 1) == choose_captions(truth, 2, 1)
    assert set(choose_captions(truth, 2, 1)) < set(truth.held_out)


def write_world_of(pictures, tmp_path):
    """Held out: each caption with its picture. In training: others, of other captions."""
    write_pairs(tmp_path / "train", [(shade(each), f"tone {each}") for each in (1, 254)])
    write_pairs(tmp_path / "validation", zip(pictures, CAPTIONS, strict=True))
    return read_ground_truth(tmp_path, SIZE)


def test_a_generator_that_draws_the_real_pictures_scores_one(tiny_models, tmp_path):
    greedy = SamplingOptions(temperature=0.0)
    drawn = generate_candidates(
        tiny_models, CAPTIONS, [[0]] * len(CAPTIONS), seed=0, options=greedy
    )
    truth = write_world_of([to_pixels(each.images[0]) for each in drawn], tmp_path)
    result = evaluate(tiny_models, truth, greedy_only=True)
    assert result.scores[ALL][GREEDY].right == 1.0
    pixels = result.scores[ALL][GREEDY].pixels
    assert (pixels.error, pixels.close, pixels.psnr) == (0, 1, MOST_PSNR)
    assert result.scores[NOVEL][GREEDY].right == 1.0
    assert list(result.scores[ALL]) == [GREEDY]


def test_the_best_of_many_is_the_one_that_clip_prefers(tiny_models, tmp_path):
    first = [row * NUMBERS_APART for row in range(len(CAPTIONS))]
    numbers = [range(each, each + 6) for each in first]
    drawn = list(generate_candidates(tiny_models, CAPTIONS, numbers, seed=3))
    best = [each.scores.argmax() for each in drawn]
    assert any(row > 0 for row in best)
    pictures = [to_pixels(each.images[row]) for each, row in zip(drawn, best, strict=True)]
    truth = write_world_of(pictures, tmp_path)
    methods = evaluate(tiny_models, truth, num_candidates=6, seed=3).scores[ALL]
    assert list(methods) == [GREEDY, SINGLE, "best of 6"]
    assert methods["best of 6"].right == 1.0
    assert methods[SINGLE].right < 1.0


@pytest.mark.slow
def test_a_generator_that_knows_nothing_scores_about_chance(tiny_models, tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (len(CAPTIONS), SIZE, SIZE, 3), dtype=np.uint8)
    truth = write_world_of(noise, tmp_path)
    right = [
        evaluate(tiny_models, truth, num_candidates=1, seed=seed).scores[ALL][SINGLE].right
        for seed in range(5)
    ]
    assert np.mean(right) < 0.4  # chance is 1 in 8 or, with the training pictures, in 10


def test_a_picture_is_the_same_whichever_captions_are_drawn_with_it(tiny_models, monkeypatch):
    numbers = [[7, 8, 9]] * len(CAPTIONS)
    together = list(generate_candidates(tiny_models, CAPTIONS, numbers, seed=5))
    monkeypatch.setattr("training.report.samples.MAX_TOGETHER", 5)
    torn = list(generate_candidates(tiny_models, CAPTIONS, numbers, seed=5))
    (alone,) = generate_candidates(tiny_models, CAPTIONS[3:4], [[9]], seed=5)
    assert [len(each.images) for each in torn] == [3] * len(CAPTIONS)
    for whole, part in zip(together, torn, strict=True):
        assert torch.equal(whole.images, part.images)
        assert torch.allclose(whole.scores, part.scores, atol=1e-5)
    assert torch.equal(together[3].images[2:], alone.images)


def test_without_clip_there_is_no_best_of_many(tiny_models, tmp_path):
    blind = Artefact(tiny_models.dvae, tiny_models.transformer, None, tiny_models.tokenizer)
    truth = write_world_of([shade(20 * each) for each in range(1, 9)], tmp_path)
    assert list(evaluate(blind, truth, num_candidates=4).scores[ALL]) == [GREEDY, SINGLE]


@pytest.mark.parametrize("missing", ["dvae", "transformer", "tokenizer"])
def test_a_missing_component_is_named(tiny_models, truth, missing):
    components = {name: getattr(tiny_models, name) for name in tiny_models.components()}
    with pytest.raises(ArtefactError, match=f"no {missing}"):
        evaluate(Artefact(**components | {missing: None}), truth)


@pytest.fixture
def rainbow_world(tmp_path):
    write_pairs(tmp_path / "train", [(shade(9 * n), CAPTIONS[n]) for n in range(3)])
    write_pairs(tmp_path / "validation", [(shade(9 * n), CAPTIONS[n]) for n in range(3, 8)])
    attributes = {caption: {"colour": caption.split()[2]} for caption in CAPTIONS}
    (tmp_path / "attributes.json").write_text(json.dumps(attributes))
    return tmp_path


def test_the_command_prints_a_table_and_ends_with_json(tiny_artefact, rainbow_world, capsys):
    file = rainbow_world / "accuracy.json"
    arguments = ["--artefact", str(tiny_artefact), "--data", str(rainbow_world), "--candidates=2"]
    assert main([*arguments, "--limit", "4", "--json", str(file), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "8 distinct pictures, 3 of them in training" in printed[0]
    assert any(
        line.split() == ["greedy", "single", "sample", "best", "of", "2"] for line in printed
    )
    assert any(line.startswith("  colour") for line in printed)
    numbers = json.loads(printed[-1])
    assert json.loads(file.read_text()) == numbers
    assert numbers["scores"][ALL]["best of 2"]["num_captions"] == 4
    assert set(numbers["scores"][ALL][GREEDY]) == {
        "num_captions",
        "right",
        "memorised",
        "pixels",
        "per_attribute",
    }


@pytest.mark.parametrize(
    ("missing", "arguments", "says"),
    [
        ("transformer", [], "the artefact has no transformer, which caption accuracy needs"),
        ("clip", [], "the artefact has no clip, which the best of 32 needs"),
        ("manifest.json", ["--greedy"], "manifest.json is missing"),
    ],
)
def test_the_command_names_what_is_missing(
    tiny_models, tiny_artefact, rainbow_world, capsys, missing, arguments, says
):
    directory = rainbow_world / "artefact"
    if missing == "manifest.json":
        shutil.copytree(tiny_artefact, directory)
        (directory / missing).unlink()
    else:
        components = {name: getattr(tiny_models, name) for name in tiny_models.components()}
        artefacts.save(directory, Artefact(**components | {missing: None}))
    options = ["--artefact", str(directory), "--data", str(rainbow_world), *arguments]
    assert main(options) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("is_same", [True, False])
def test_the_command_warns_of_a_model_that_was_trained_on_other_pairs(
    tiny_models, rainbow_world, caplog, is_same
):
    known = read_ground_truth(rainbow_world, SIZE).fingerprint
    record = StageRecord(
        stage="dvae",
        job_name="earlier-1",
        finished_at="",
        steps=1,
        is_finished=True,
        wall_seconds=1,
        cpu_seconds=1,
        hyperparameters={},
        metrics={},
        dataset_fingerprint=known if is_same else "another",
        dataset_counts={},
    )
    directory = rainbow_world / "artefact"
    artefacts.save(directory, replace(tiny_models, manifest=Manifest(stages=[record])))
    options = ["--artefact", str(directory), "--data", str(rainbow_world), "--greedy"]
    assert main([*options, "--limit", "1", "--device", "cpu"]) == 0
    warned = f"dvae was not trained on {rainbow_world / 'train'}" in caplog.text
    assert warned == (not is_same)


def test_a_sample_is_not_held_to_have_all_bad_pairs_of_its_channel(tmp_path):
    write_pairs(tmp_path / "train", [(shade(number), "x") for number in range(40)])
    for number in range(3):
        (tmp_path / "train" / f"x{number}.txt").write_text("alone")
    train = open_channel(tmp_path / "train", image_size=SIZE, max_bad_share=0.1)
    sample = Subset(train, 10)  # 3 of 43 would-be pairs are bad, but 3 of 13 would be too many
    assert len(GroundTruth(sample, sample)) == 10
