"""The demo: its steps and what is reused, its refusals, and once the real thing in miniature."""

import json
import os
import signal
import threading
from unittest.mock import patch

import numpy as np
import pytest

from dalle.errors import HyperparameterError, UserError
from dalle.preprocess.images import decode_image
from tests import REPOSITORY
from tests.forked import PIPE, Forked
from training import rainbow
from training.demo.__main__ import Demo, main, prepare_directory
from training.demo.commands import CommandFailed, run_train, serving
from training.demo.report import caption_sheet
from training.demo.run import RECIPE_MINUTES, read_recipe, training_seconds
from training.demo.steps import (
    NOT_TRAINING,
    Step,
    digest_of_code,
    duration,
    reporting_code,
    run_steps,
    serving_code,
    training_code,
)
from training.report import page


class Kitchen:
    """Two steps that depend on one another: dough of some flour, bread of the dough."""

    def __init__(self, directory):
        self.directory = directory
        self.flour, self.log, self.said, self.oven_works = "rye", [], [], True

    def knead(self, is_continued):
        self.log.append(("knead", is_continued))
        (self.directory / "dough").write_text(self.flour)

    def bake(self, is_continued):
        self.log.append(("bake", is_continued))
        if not self.oven_works:
            raise UserError("the oven is cold")
        (self.directory / "bread").write_text("bread")

    def run(self):
        self.log, self.said = [], []
        dough, bread = self.directory / "dough", self.directory / "bread"
        steps = [
            Step(
                name="knead",
                title="kneading",
                seconds=60,
                key=self.flour,
                outputs=[dough],
                action=self.knead,
            ),
            Step(
                name="bake",
                title="baking",
                seconds=65,
                key=200,
                inputs=[dough],
                outputs=[bread],
                action=self.bake,
            ),
        ]
        return run_steps(steps, self.directory / "state.json", self.said.append)


@pytest.fixture
def kitchen(tmp_path):
    return Kitchen(tmp_path)


def test_steps_are_announced_with_the_time_left_and_done_once(kitchen):
    assert kitchen.run() == 2
    assert kitchen.said == [
        "kneading; about 2 min 05 s left in all",
        "baking; about 1 min 05 s left in all",
    ]
    assert kitchen.run() == 0
    assert kitchen.said == ["kneading: reused", "baking: reused"]


def test_a_change_redoes_what_depends_on_it(kitchen):
    kitchen.run()
    kitchen.flour = "wheat"
    kitchen.run()
    assert kitchen.log == [("knead", False), ("bake", False)]


def test_a_missing_file_is_made_again_alone(kitchen):
    kitchen.run()
    (kitchen.directory / "bread").unlink()
    kitchen.run()
    assert kitchen.log == [("bake", False)]


def test_a_step_that_failed_is_continued_unless_its_key_changed(kitchen):
    kitchen.oven_works = False
    with pytest.raises(UserError, match="cold"):
        kitchen.run()
    with pytest.raises(UserError, match="cold"):
        kitchen.run()
    assert kitchen.log == [("bake", True)]
    kitchen.oven_works, kitchen.flour = True, "wheat"
    kitchen.run()
    assert kitchen.log == [("knead", False), ("bake", False)]


def test_a_damaged_state_file_costs_a_run_and_nothing_else(kitchen):
    kitchen.run()
    (kitchen.directory / "state.json").write_text('{"knead": {')
    assert kitchen.run() == 2
    assert kitchen.run() == 0


def names(paths):
    return {f"{path.parent.name}/{path.name}" for path in paths}


def test_a_step_depends_on_the_code_that_decides_its_outcome():
    trained_by, shown_by = names(training_code()), names(reporting_code())
    wanted = {"models/transformer.py", "engine/optimizer.py", "batching/sampler.py"}
    assert wanted <= trained_by
    assert (
        trained_by & {"report/page.py", "demo/__main__.py", "training/rainbow.py", "server/app.py"}
        == set()
    )
    assert {"decoding/sampling.py", "engine/model_runner.py"} <= names(serving_code())
    assert {
        "report/page.py",
        "templates/report.html",
        "pages/page.css",
        "evaluate/scores.py",
    } <= shown_by
    assert all((REPOSITORY / "training" / name).exists() for name in NOT_TRAINING)


@pytest.mark.slow
def test_every_key_but_the_datas_has_the_code(tmp_path):
    digests = {
        "data": "",
        "train": digest_of_code(training_code()),
        "serve": digest_of_code(serving_code()),
        "evaluate": digest_of_code(reporting_code()),
        "report": digest_of_code(reporting_code()),
    }
    assert len(set(digests.values())) == 4
    for step in Demo(tmp_path, {}).steps():
        assert digests[step.name] in json.dumps(step.key), step.name


@pytest.mark.parametrize(
    ("text", "is_the_same"),
    [
        ('"""Another docstring."""\n# why\ndef f( x ):\n    return x + 1', True),
        ("def f(x):\n    return x + 2", False),
        ("def g(x):\n    return x + 1", False),
        ('def f(x):\n    """x and one."""\n    return x + 1', True),
        ('def f(x):\n    return x + 1\nNAME = "text"', False),
    ],
)
def test_words_about_code_are_no_part_of_it(tmp_path, text, is_the_same):
    file = tmp_path / "code.py"
    file.write_text("def f(x):\n    return x + 1\n")
    before = digest_of_code([file])
    file.write_text(text)
    assert (digest_of_code([file]) == before) == is_the_same


def test_durations_are_for_people():
    assert [duration(each) for each in (0.2, 41.4, 59.7, 485)] == [
        "0 s",
        "41 s",
        "1 min 00 s",
        "8 min 05 s",
    ]


def test_our_recipe_is_one_that_train_accepts_and_fits_its_minutes():
    recipe = read_recipe(None, RECIPE_MINUTES)
    assert 60 < training_seconds(recipe) < 60 * RECIPE_MINUTES


def test_minutes_scale_the_training_budgets_and_nothing_else():
    usual, short = read_recipe(None, RECIPE_MINUTES), read_recipe(None, 5)
    assert training_seconds(short) < training_seconds(usual) / 2
    changed = {name for name in usual if usual[name] != short[name]}
    assert changed == {name for name in usual if name.endswith("max_steps")}


def test_a_wrong_recipe_is_named_before_any_work(tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"learning_rat": 1}')
    with pytest.raises(HyperparameterError, match="learning_rat is unknown"):
        read_recipe(recipe, RECIPE_MINUTES)
    recipe.write_text("{")
    with pytest.raises(UserError, match=r"recipe\.json cannot be read as a recipe"):
        read_recipe(recipe, RECIPE_MINUTES)
    assert main(["--out", str(tmp_path / "out"), "--recipe", str(recipe)]) == 1
    assert "cannot be read as a recipe" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--minutes", "1"], ["--limit", "0"]])
def test_numbers_out_of_range_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert f"{arguments[0]} must be at least" in capsys.readouterr().err


def test_somebody_elses_directory_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds files that no demo made"):
        prepare_directory(tmp_path, again=True)
    assert (tmp_path / "data").is_dir()


def test_again_removes_what_a_demo_made_and_nothing_else(tmp_path):
    prepare_directory(tmp_path, again=False)
    (tmp_path / "ml" / "model").mkdir(parents=True)
    (tmp_path / "report.html").touch()
    (tmp_path / "notes.txt").touch()
    prepare_directory(tmp_path, again=False)
    assert (tmp_path / "ml").exists()
    prepare_directory(tmp_path, again=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "state.json"]


def test_what_is_asked_for_was_held_out_and_is_always_the_same(tmp_path):
    captions = Demo(tmp_path, {}).captions
    everything = rainbow.samples()
    in_training = rainbow.split(len(everything), seed=0)
    known = {each.caption for each, trained in zip(everything, in_training, strict=True) if trained}
    assert len(set(captions)) == 8
    assert not known & set(captions)
    assert captions == Demo(tmp_path / "other", {}).captions


def test_as_many_pictures_are_asked_for_of_each_caption_as_the_contact_sheet_has_rows(tmp_path):
    for request in Demo(tmp_path, {}).requests():
        assert (request["num_images"], request["distinct"]) == (4, False)


def test_every_caption_of_the_rainbow_has_all_attributes(tmp_path, monkeypatch):
    few = rainbow.samples()[:20]
    monkeypatch.setattr(rainbow, "samples", lambda: few)
    counts = rainbow.write_folder(tmp_path)
    assert counts == {"train": 6, "validation": 14}
    attributes = json.loads((tmp_path / "attributes.json").read_text("utf-8"))
    assert attributes == {each.caption: each.attributes for each in few}


def test_the_contact_sheet_has_a_column_for_each_caption():
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    long = "bigger filled halftone saddlebrown rhombus rotated counterclockwise"
    sheet = caption_sheet(["red", long], [[picture] * 5, [picture] * 3])
    assert sheet.shape[1] == 60 + 12 + 2 * (128 + 12)
    assert sheet.shape[0] > 5 * (128 + 12) + 4 * 16
    black = (sheet == 0).all(axis=2)
    assert black.sum() >= 8 * 128 * 128


@pytest.mark.slow
def test_a_failed_train_is_told_with_its_cause(tmp_path):
    with pytest.raises(CommandFailed, match="train ended with 1: the channel train is missing"):
        run_train(tmp_path, {})


@pytest.mark.slow
def test_a_failed_serve_is_told_with_the_end_of_its_log(tmp_path):
    with (
        pytest.raises(CommandFailed, match=r"(?s)serve ended with 2 .*model is not a directory"),
        serving(tmp_path, tmp_path / "serve.log"),
    ):
        pass


def demo(words):
    """Main function of a fork: the demo on one in sixteen of the captions, and without charts in
    its report, which take 4 seconds; that of `train` has them."""
    few = rainbow.samples()[::16]
    without_charts = patch.multiple(page, plot_curves=lambda _: "", plot_usage=lambda _: "")
    with patch.object(rainbow, "samples", lambda: few), without_charts:
        return main(words)


def start(out, recipe):
    """The demo in its own process, one thread, output to a pipe; it starts the real commands."""
    path = f"{REPOSITORY / 'container'}{os.pathsep}{REPOSITORY}"
    variables = {"PYTHONPATH": path, "DALLE_DEVICE": "cpu", "DALLE_THREADS": "1"}
    words = ["--out", str(out), "--recipe", str(recipe), "--limit", "40"]
    return Forked(demo, words, log=PIPE, environment=os.environ | variables)


def end(process):
    """What it prints until the pipe's end, and its exit status. The pipe's end is reached only when
    `train`, which has it too, is gone."""
    late = threading.Timer(300, process.kill)
    late.start()
    with process.output:
        printed = process.output.read()
    late.cancel()
    return printed, process.wait(timeout=300)


@pytest.mark.slow
def test_the_whole_way_in_miniature_interrupted_finished_and_reused(tmp_path, monkeypatch):
    recipe, out = tmp_path / "recipe.json", tmp_path / "demo"
    settings = {"size": "tiny", "max_steps": "2", "batch_size": "8", "tokenizer_kind": "word"}
    recipe.write_text(json.dumps(settings | {"num_validations": "1", "log_every": "1"}))

    interrupted = start(out, recipe)
    next(line for line in interrupted.output if "training dvae" in line)
    interrupted.send_signal(signal.SIGTERM)
    printed, status = end(interrupted)
    assert status == 130, printed
    assert "the same command goes on" in printed

    printed, status = end(start(out, recipe))
    assert status == 0, printed
    assert "writing the images: 9,216 captions, 30 % of them to train on: reused" in printed
    assert f"--root {out / 'ml'}" in printed
    report = (out / "report.html").read_text("utf-8")
    for heading in (
        "Generated images",
        "Caption accuracy",
        "Reconstructions",
        "Codebook usage",
        "CLIP retrieval",
        "Training",
        "Data",
    ):
        assert f">{heading}</h2>" in report
    replies = json.loads((out / "generated" / "replies.json").read_text("utf-8"))
    few = rainbow.samples()[::16]
    monkeypatch.setattr(rainbow, "samples", lambda: few)
    assert [reply["caption"] for reply in replies] == Demo(out, {}).captions
    assert [image["rank"] for image in replies[0]["images"]] == [1, 2, 3, 4]
    file = out / "generated" / replies[0]["images"][0]["file"]
    assert decode_image(file.read_bytes(), what=file.name).size == (16, 16)
    decode_image((out / "contact_sheet.png").read_bytes(), what="contact sheet")
    scores = json.loads((out / "accuracy.json").read_text("utf-8"))["scores"]
    assert next(iter(scores.values()))["greedy"]["num_captions"] == 40

    printed, status = end(start(out, recipe))
    assert status == 0, printed
    assert printed.count(": reused") == 5
