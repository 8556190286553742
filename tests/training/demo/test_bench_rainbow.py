"""The bench: its arithmetic, its refusals, and once all of it in miniature."""

import json
import os

import pytest

from tests.forked import Forked
from tests.training.two_hosts import LONG_TIMEOUTS, train
from training import rainbow
from training.bench.rainbow import RECIPE, SeedRun, main, means, render_table
from training.config.hyperparameters import parse
from training.demo.run import read_recipe_file

pytestmark = pytest.mark.slow


def test_our_recipe_is_counted_in_steps_and_leaves_the_seed_to_the_bench():
    recipe = read_recipe_file(None, RECIPE)
    settings = parse(recipe)
    for stage in (settings.dvae, settings.transformer, settings.clip):
        assert stage.max_steps is not None
    assert "seed" not in recipe


def test_means_are_over_seeds_and_stand_beside_each():
    by_seed = {0: {"greedy": 0.5, "core-seconds": 900.0}, 7: {"greedy": 0.75, "core-seconds": 1100}}
    assert means(by_seed) == {"greedy": 0.625, "core-seconds": 1000.0}
    head, greedy, seconds = render_table(by_seed).splitlines()
    assert head.split() == ["mean", "seed", "0", "seed", "7"]
    assert greedy.split() == ["greedy", "0.6250", "0.5000", "0.7500"]
    assert seconds.split() == ["core-seconds", "1000", "900", "1100"]


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"seed": "3"}', "the recipe sets seed"), ("{", "cannot be read as a recipe")],
)
def test_a_recipe_that_does_not_fit_is_named_before_any_work(tmp_path, capsys, content, says):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(content)
    assert main(["--out", str(tmp_path / "out"), "--recipe", str(recipe)]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_seed_chooses_its_own_training_captions_and_random_numbers(tmp_path, monkeypatch):
    few = rainbow.samples()[:40]
    monkeypatch.setattr(rainbow, "samples", lambda: few)
    trained_on = []
    for seed in (0, 1):
        run = SeedRun(tmp_path / str(seed), {}, seed, 5)
        run.out.mkdir()
        run.write_data(False)
        trained_on.append({path.name for path in (run.data / "train").glob("*.txt")})
    assert len(trained_on[0]) == len(trained_on[1]) == 12
    assert trained_on[0] != trained_on[1]
    first, second = (SeedRun(tmp_path, {}, seed, 5).steps()[1].key for seed in (0, 1))
    assert first != second


def run_train(root, channels):
    """As `training.demo.commands.run_train`, by a fork."""
    variables = {f"SM_CHANNEL_{name.upper()}": str(folder) for name, folder in channels.items()}
    words = ["--root", str(root)]
    process = Forked(train, words, LONG_TIMEOUTS, None, environment=os.environ | variables)
    assert process.wait(timeout=300) == 0


def test_the_whole_bench_in_miniature_and_reused(tmp_path, monkeypatch, capsys):
    few = rainbow.samples()[::40]
    monkeypatch.setattr(rainbow, "samples", lambda: few)
    monkeypatch.setenv("DALLE_DEVICE", "cpu")
    monkeypatch.setattr("training.demo.run.run_train", run_train)
    settings = {"size": "tiny", "max_steps": "2", "batch_size": "8", "tokenizer_kind": "word"}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({**settings, "num_validations": "1", "text_length": "8"}))
    arguments = ["--out", str(tmp_path / "out"), "--recipe", str(recipe)]
    arguments += ["--seeds", "0", "1", "--limit", "4"]

    assert main(arguments) == 0
    *_, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert summary["seeds"] == [0, 1]
    assert len(summary["each"]) == 2
    for numbers in (summary["mean"], *summary["each"]):
        assert numbers["transformer steps"] == 2
        for label in ("greedy", "greedy, of 4", "best of 32, of 4"):
            assert 0 <= numbers[label] <= 1
            assert 0 <= numbers[f"{label}, memorised"] <= 1 - numbers[label]
            assert numbers[label] <= numbers[f"{label}, right colour"]
    greedy = json.loads((tmp_path / "out" / "seed-1" / "greedy.json").read_text("utf-8"))
    assert greedy["scores"]["held-out captions"]["greedy"]["num_captions"] == len(few) - 69

    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(": reused") == 8
    assert json.loads(printed.splitlines()[-1]) == summary
