"""Whole training jobs by the real command: what they leave, how they stop and how they go on."""

import io
import json
import os
import re
import signal
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import artefact
from dalle.platform.environment import Paths
from dalle.platform.metric_lines import METRIC_PATTERN
from tests.forked import PIPE, Forked
from tests.training import two_hosts
from tests.training.two_hosts import SAMPLES, fill
from training.__main__ import main

pytestmark = pytest.mark.slow

TINY = two_hosts.TINY | {"image_size": 16, "dropout": 0.1, "token_noise": 0.1}


@pytest.fixture
def tree(opt_ml):
    """A tree with pairs in train and validation, ready for a tiny job."""
    fill(opt_ml.add_channel("train"))
    fill(opt_ml.add_channel("validation"), SAMPLES[:4])
    opt_ml.set_hyperparameters(**TINY, max_steps=4)
    return opt_ml


def run(tree):
    status = main(["--root", str(tree.root)])
    failure = tree.root / "output" / "failure"
    assert status == 0, failure.read_text()


def weights(tree, name):
    return artefact.load(tree.root / "model").__getattribute__(name).state_dict()


def losses(tree, stage):
    lines = (tree.root / "output/data/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {
        record["step"]: record["loss"]
        for record in records
        if record["stage"] == stage and "loss" in record
    }


def test_a_job_computes_without_denormal_numbers(tree):
    denormal = torch.full((8,), 1e-39)
    assert (denormal * 1.0).count_nonzero() == 8, "this processor has none"
    run(tree)
    assert (denormal * 1.0).count_nonzero() == 0


@pytest.mark.parametrize("shape", ["platform", "local", "empty"])
def test_a_job_leaves_a_servable_artefact_a_report_and_metrics(make_opt_ml, capsys, shape):
    tree = make_opt_ml(shape)
    fill(tree.add_channel("train"))
    if shape == "empty":
        config = tree.root / "input/config"
        config.mkdir()
        texts = {name: str(value) for name, value in TINY.items()} | {"max_steps": "2"}
        (config / "hyperparameters.json").write_text(json.dumps(texts))
    else:
        tree.set_hyperparameters(**TINY, max_steps=2)
    run(tree)
    loaded = artefact.load(tree.root / "model")
    assert loaded.components() == ["dvae", "transformer", "clip", "tokenizer"]
    assert [stage.stage for stage in loaded.manifest.stages] == ["dvae", "transformer", "clip"]
    assert all(stage.is_finished and stage.steps == 2 for stage in loaded.manifest.stages)
    assert len(set(loaded.manifest.captions)) == 4
    assert set(loaded.manifest.captions) <= {sample.caption for sample in SAMPLES}
    assert "data:image" in (tree.root / "output/data/report.html").read_text()
    assert any((tree.root / "output/tensorboard").iterdir())
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line]
    assert lines
    assert all(re.search(METRIC_PATTERN, line) for line in lines), printed


def test_nothing_is_written_outside_the_allowed_directories(tree):
    allowed = Paths(tree.root.absolute()).allowed
    before = {path for path in tree.root.rglob("*") if path.is_file()}
    run(tree)
    written = {path for path in tree.root.rglob("*") if path.is_file()} - before
    assert written
    for path in written:
        assert any(path.is_relative_to(each) for each in allowed), path
    assert not [path for path in tree.root.rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("stage", ["dvae", "transformer", "clip"])
def test_a_resumed_stage_has_the_losses_and_weights_of_an_uninterrupted_one(
    make_opt_ml, tree, stage
):
    names = {"dvae": ["dvae"], "transformer": ["dvae", "transformer"], "clip": ["clip"]}[stage]
    wanted = {"stage": "clip"} if stage == "clip" else {}
    tree.set_hyperparameters(**TINY, **wanted, max_steps=6)
    run(tree)

    # The budget decides the schedule, so the first part is a stop in the middle, not a shorter run.
    halves = make_opt_ml("local")
    fill(halves.add_channel("train"))
    fill(halves.add_channel("validation"), SAMPLES[:4])
    halves.set_hyperparameters(**TINY, **wanted, max_steps=6)
    stop_after(halves, stage, step=3)
    first = max(losses(halves, stage))
    assert first < 6, "the stop came too late to show anything"
    run(halves)
    assert losses(halves, stage) == losses(tree, stage)
    for name in names:
        for key, value in weights(tree, name).items():
            assert torch.equal(value, weights(halves, name)[key]), f"{name} {key}"


def stop_after(tree, stage, step):
    """Run the job in this process and ask it to stop when it reports a step of a stage."""
    import training.__main__ as command
    from training.loop.metrics import Metrics

    report = Metrics.report

    def report_and_stop(self, name, number, seconds, values, **more):
        report(self, name, number, seconds, values, **more)
        if name == stage and number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "report", report_and_stop)
        assert command.main(["--root", str(tree.root)]) == 0


def started(tree, until):
    """The command in a process of its own, once it has printed `until`."""
    words = ["--root", str(tree.root)]
    process = Forked(two_hosts.train, words, two_hosts.LONG_TIMEOUTS, None, log=PIPE)
    for line in process.output:
        if until in line:
            return process
    raise AssertionError(f"the job ended with {process.wait()} before it printed {until!r}")


def end(process):
    """Its exit status: 20 s are promised where nothing else runs, and the platform waits 120 s."""
    reader = threading.Thread(target=process.output.read)  # a full pipe would stop it
    reader.start()
    try:
        return process.wait(timeout=120)
    finally:
        process.kill()
        reader.join()
        process.output.close()


def test_sigterm_saves_a_checkpoint_and_the_model_and_exits_with_0(tree):
    tree.set_hyperparameters(**TINY, max_steps=1_000_000)
    process = started(tree, until="dvae_step=5;")
    process.terminate()
    assert end(process) == 0
    assert artefact.load(tree.root / "model").components() == ["dvae", "tokenizer"]
    (record,) = artefact.load(tree.root / "model").manifest.stages
    assert not record.is_finished
    assert list((tree.root / "checkpoints/dvae").glob("step-*.pt"))
    assert not (tree.root / "output/failure").exists()


def test_a_killed_job_goes_on_from_its_newest_complete_checkpoint(tree):
    settings = TINY | {"checkpoint_minutes": 1e-6, "stage": "dvae"}
    tree.set_hyperparameters(**settings, max_steps=1_000_000)
    process = started(tree, until="dvae_step=8;")
    process.kill()
    end(process)
    directory = tree.root / "checkpoints/dvae"
    kept = max(int(path.stem.split("-")[1]) for path in directory.glob("step-*.pt"))
    assert kept >= 7
    (directory / "step-999999999.pt.tmp").write_bytes(b"half of a checkpoint")
    tree.set_hyperparameters(**settings, max_steps=kept + 2)
    run(tree)
    assert max(losses(tree, "dvae")) == kept + 2
    (record,) = artefact.load(tree.root / "model").manifest.stages
    assert record.steps == kept + 2


def test_later_jobs_complete_the_artefact_of_earlier_ones(make_opt_ml, tree):
    tree.set_hyperparameters(**TINY, stage="dvae", max_steps=2)
    run(tree)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tree.root / "model", ".")

    later = make_opt_ml("local")
    fill(later.add_channel("train"))
    (later.add_channel("artefact") / "model.tar.gz").write_bytes(packed.getvalue())
    later.set_hyperparameters(**TINY, max_steps=2)
    run(later)
    loaded = artefact.load(later.root / "model")
    assert loaded.components() == ["dvae", "transformer", "clip", "tokenizer"]
    assert [stage.stage for stage in loaded.manifest.stages] == ["dvae", "transformer", "clip"]
    for key, value in weights(tree, "dvae").items():
        assert torch.equal(value, weights(later, "dvae")[key]), key


def test_an_openai_clip_in_its_channel_is_kept_instead_of_a_new_one(tree):
    from clip.model import CLIP

    torch.manual_seed(0)
    model = CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    torch.save(model.state_dict(), tree.add_channel("clip") / "ViT-tiny.pt")
    run(tree)
    loaded = artefact.load(tree.root / "model")
    assert loaded.clip is not None
    assert loaded.clip.config.tokenizer == "openai"
    assert [stage.stage for stage in loaded.manifest.stages] == ["dvae", "transformer"]
    imported = loaded.manifest.imported["clip"]
    assert "captions by OpenAI's byte-pair encoding, not by the artefact's" in imported.what
    assert [*imported.files] == ["ViT-tiny.pt"]
    card = (tree.root / "model/MODEL_CARD.md").read_text()
    assert "| published CLIP, ViT/16, quick_gelu: " in card
    assert "byte-pair encoding, not by the artefact's tokenizer; not trained here |" in card


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda channel: [path.unlink() for path in channel.iterdir()], "train is empty"),
        (lambda channel: [path.unlink() for path in channel.glob("*.txt")], "without caption"),
        (lambda channel: [path.unlink() for path in channel.glob("*.png")], "without image"),
        (
            lambda channel: [
                path.write_bytes(path.read_bytes()[:60]) for path in channel.glob("*.png")
            ],
            "damaged",
        ),
        (
            lambda channel: [path.write_bytes(b"na\xefve") for path in channel.glob("*.txt")],
            "not UTF-8",
        ),
        (
            lambda channel: [
                path.write_text("a red square " * 9) for path in channel.glob("*.txt")
            ],
            "at most 8 tokens long, got 27",
        ),
    ],
)
def test_an_unusable_channel_fails_by_name_and_leaves_no_model(tree, spoil, says):
    spoil(tree.root / "input/data/train")
    assert main(["--root", str(tree.root)]) == 1
    assert says in tree.failure
    assert not [path for path in (tree.root / "model").rglob("*") if path.is_file()]


def test_a_few_bad_pairs_are_counted_in_the_report_and_do_not_fail_the_job(tree):
    channel = tree.root / "input/data/train"
    (channel / "alone.txt").write_text("a caption without its image")
    giant = channel / "giant.png"
    Image.fromarray(np.zeros((10_000, 10_000), dtype=np.uint8)).save(giant)
    (channel / "giant.txt").write_text("a hundred megapixels")
    tree.set_hyperparameters(**TINY, max_steps=2, max_bad_share=0.2)
    run(tree)
    report = (tree.root / "output/data/report.html").read_text()
    assert "caption without image" in report
    assert "giant.png" in report


def test_models_that_cannot_be_built_are_all_named_before_anything_is_trained(tree):
    tree.set_hyperparameters(
        **TINY,
        transformer_width=40,
        num_heads=3,
        clip_patch_size=5,
        clip_precision="fp16",
        dvae_precision="fp16",
    )
    assert main(["--root", str(tree.root)]) == 1
    assert "transformer: width must be a multiple of num_heads = 3, got 40" in tree.failure
    assert "dvae: precision=fp16 needs a GPU" in tree.failure
    assert "clip: precision=fp16 needs a GPU" in tree.failure
    assert not (tree.root / "output/data/metrics.jsonl").exists()

    tree.set_hyperparameters(**TINY, clip_patch_size=5)
    assert main(["--root", str(tree.root)]) == 1
    assert tree.failure.startswith("clip: patch_size must divide the image size 16, got 5")


def test_a_clip_to_train_and_a_clip_to_take_over_are_refused_together(tree):
    from clip.model import CLIP

    torch.manual_seed(0)
    model = CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    torch.save(model.state_dict(), tree.add_channel("clip") / "ViT-tiny.pt")
    tree.set_hyperparameters(**TINY, stage="clip")
    assert main(["--root", str(tree.root)]) == 1
    assert "the channel clip brings one; leave one of them out" in tree.failure
