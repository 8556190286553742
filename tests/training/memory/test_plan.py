"""`train --plan`: what it says of a job, and that it touches nothing."""

import json

import pytest

from training.__main__ import main
from training.memory.command import parse_bytes

pytestmark = pytest.mark.slow

TINY = {"size": "tiny", "image_size": 16}


@pytest.fixture
def plan(opt_ml, capsys):
    """Runs the command on hyperparameters alone; returns its exit code and what it printed."""

    def plan(*arguments, **raw):
        opt_ml.set_hyperparameters(**raw)
        code = main(["--root", str(opt_ml.root), "--plan", *arguments])
        return code, capsys.readouterr()

    return plan


def test_a_job_without_data_or_gpu_is_planned_and_nothing_is_written(plan, opt_ml):
    before = sorted(opt_ml.root.rglob("*"))
    code, said = plan("--device-memory", "24g", "--hosts", "2", "--devices-per-host", "4", **TINY)
    assert code == 0
    for words in ("2 host(s) with 4 cuda device(s), 24.00 GiB each", "dvae, size tiny", "ZeRO 3"):
        assert words in said.out
    assert said.out.count("it fits as it is") == 3
    assert {path.name for path in {*opt_ml.root.rglob("*")} - {*before}} <= {"hyperparameters.json"}


def test_one_line_of_json_holds_the_same(plan):
    code, said = plan("--json", "--device-memory", "24g", stage="clip", batch_size="auto", **TINY)
    (line,) = said.out.splitlines()
    (clip,) = json.loads(line)["stages"]
    assert code == 0
    assert (clip["stage"], clip["batch_size"]) == ("clip", "auto")
    job = clip["job"]
    assert job["part_size"] == job["largest_part_size"] > 64
    parts = {name: size for name, size in job["memory"].items() if name not in ("device", "host")}
    assert job["memory"]["device"] == sum(parts.values())


def test_the_arithmetic_of_a_step_is_that_of_the_weights_for_every_token(plan):
    raw = {"stage": "transformer", "size": "small", "image_size": 64, "batch_size": 16}
    devices = ("--json", "--device-memory", "24g")
    _, said = plan(*devices, **raw)
    (found,) = json.loads(said.out)["stages"]
    assert found["budget"] == {"epochs": 20}
    tokens = 16 * (64 + (64 // 8) ** 2)  # of captions and pictures
    # Two for a product and its sum, forward and twice backward: 6 a weight and token, and more for
    # attention and for the image tokenizer, which encodes every picture.
    assert 0.5 < found["step_flops"] / (6 * found["num_parameters"] * tokens) < 2
    _, said = plan(*devices, "--devices-per-host", "2", **raw, max_steps=7)
    (shared,) = json.loads(said.out)["stages"]
    assert shared["step_flops"] == pytest.approx(found["step_flops"], rel=0.01)
    assert shared["budget"] == {"max_steps": 7}


def test_a_job_that_does_not_fit_is_told_what_to_set(plan):
    devices = ("--json", "--device-memory", "6g", "--devices-per-host", "8")
    wide = {"stage": "transformer", "transformer_width": 4096, **TINY}
    code, said = plan(*devices, **wide)
    (transformer,) = json.loads(said.out)["stages"]
    assert (code, transformer["job"]["fits"]) == (1, False)
    assert transformer["advice"].startswith("engine=deepspeed zero_stage=2")
    chosen = dict(pair.split("=") for pair in transformer["advice"].split())
    code, said = plan(*devices, **wide, **chosen)
    assert (code, json.loads(said.out)["stages"][0]["job"]["fits"]) == (0, True)


def test_what_cannot_fit_at_all_is_said_to(plan):
    code, said = plan("--device-memory", "1g", stage="dvae", **TINY)
    assert code == 1
    assert "nothing here fits: take larger or more devices, or a smaller size" in said.out


def test_a_wrong_hyperparameter_is_named_without_a_plan(plan, opt_ml):
    code, said = plan(batch_siz="3")
    assert code == 1
    assert "did you mean batch_size?" in said.err
    assert not opt_ml.root.joinpath("output/failure").exists()


def test_options_of_the_plan_are_refused_without_it(opt_ml, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--root", str(opt_ml.root), "--device-memory", "24g", "--json"])
    assert ended.value.code == 2
    assert "--device-memory, --json: only with --plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("24g", 24 << 30), ("1.5G", 3 << 29), ("512MiB", 512 << 20), ("7", 7)]
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0g", "-1g", "24 bananas", "g"])
def test_a_size_that_is_none_is_refused(opt_ml, capsys, text):
    with pytest.raises(SystemExit):
        main(["--root", str(opt_ml.root), "--plan", f"--device-memory={text}"])
    assert "must be a size such as 24g" in capsys.readouterr().err
