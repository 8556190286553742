"""Whole training jobs by the real command, on data that come in parts or through a pipe."""

import shutil
import signal
from contextlib import ExitStack
from functools import partial

import pytest
from safetensors.torch import load_file

from dalle import artefact
from dalle.preprocess.images import encode_image
from infra.local.opt_ml import OptMl
from infra.local.pipes import Pipe, objects
from tests.training import two_hosts
from tests.training.pairs import tar_of
from tests.training.two_hosts import (
    LOOPBACK,
    SAMPLES,
    TINY,
    exit_codes,
    forked,
    log_of,
    metrics_of,
    wait_for_step,
    written,
)
from training.__main__ import main
from training.data import open as opening
from training.data.sources.channel import open_channel

pytestmark = pytest.mark.slow

STEPS = 60
CLIP = TINY | {"stage": "clip", "max_steps": STEPS}


def shard(path, samples):
    """A tar shard of these pictures with their captions."""
    return tar_of(
        path,
        [
            member
            for number, sample in enumerate(samples)
            for member in (
                (f"{path.stem}-{number}.png", encode_image(sample.picture(), "png")),
                (f"{path.stem}-{number}.txt", sample.caption.encode()),
            )
        ],
    )


def run(trees):
    with forked(trees) as processes:
        codes = exit_codes(processes, 180)
    assert codes == [0] * len(trees), "\n".join(map(log_of, trees))


def parted_trees(root, **hyperparameters):
    """Two hosts' trees: 10 and 21 pairs to train on, and 2 and 3 held out."""
    trees = []
    for host, (train, held_out) in enumerate(
        ((SAMPLES[:10], SAMPLES[:2]), (SAMPLES[10:], SAMPLES[2:5]))
    ):
        tree = OptMl(root / LOOPBACK[host], "local")
        resources = {"current_host": LOOPBACK[host], "hosts": list(LOOPBACK)}
        tree.write("resourceconfig", resources)
        for name, samples in (("train", train), ("validation", held_out)):
            channel = tree.add_channel(name, S3DistributionType="ShardedByS3Key")
            shard(channel / f"{host}.tar", samples)
        tree.set_hyperparameters(**hyperparameters)
        trees.append(tree)
    return trees


def test_hosts_with_parts_of_unequal_size_train_together_and_go_on_after_a_stop(tmp_path):
    whole = parted_trees(tmp_path / "whole", **CLIP)
    run(whole)
    manifest = artefact.load(whole[0].root / "model").manifest
    (record,) = manifest.stages
    assert record.dataset_counts == {"train": len(SAMPLES), "validation": 5}
    together = tmp_path / "together"
    for tree in whole:
        shutil.copytree(tree.root / "input/data/train", together, dirs_exist_ok=True)
    undivided = open_channel(together, image_size=16)
    assert record.dataset_fingerprint == undivided.fingerprint
    assert "validation_loss" in record.metrics

    trees = parted_trees(tmp_path / "parts", **CLIP)
    with forked(trees) as processes:
        wait_for_step(trees, processes, "clip", 5)
        processes[1].send_signal(signal.SIGTERM)
        assert exit_codes(processes) == [0, 0]
    assert max(step for _, step, _ in metrics_of(trees[0])) < STEPS, "the stop came too late"
    run(trees)
    assert metrics_of(trees[0]) == metrics_of(whole[0])


# The command itself, but no data set is small enough to be decoded ahead.


def train_from_files(words, timeouts, namespace):
    """`train` that takes no data set to be small enough for memory."""
    vars(opening)["is_small"] = lambda *_: False
    return two_hosts.train(words, timeouts, namespace)


def test_each_host_keeps_the_image_tokens_of_its_own_part_alone(tmp_path):
    settings = TINY | {"stage": "all", "epochs": 2, "num_workers": 0}
    trees = parted_trees(tmp_path, **settings)
    with forked(trees, work=train_from_files) as processes:
        codes = exit_codes(processes, 180)
    assert codes == [0, 0], "\n".join(map(log_of, trees))
    tokens = [
        sorted(path for path in written(tree) if path.startswith("checkpoints/image-tokens/"))
        for tree in trees
    ]
    assert [len(each) for each in tokens] == [1, 1]
    assert tokens[0] != tokens[1], "two hosts' files meet in one folder of S3"
    assert written(trees[1]) == set(tokens[1])
    counts = [
        len(load_file(tree.root / names[0])["tokens"])
        for tree, names in zip(trees, tokens, strict=True)
    ]
    assert counts == [10, len(SAMPLES) - 10]


def test_too_many_bad_pairs_of_all_parts_together_fail_every_host_alike(tmp_path):
    trees = parted_trees(tmp_path, **CLIP, max_bad_share=0.05)
    for host, tree in enumerate(trees):
        tar_of(tree.root / f"input/data/train/bad{host}.tar", [("x.txt", b"alone")])
    with forked(trees) as processes:
        assert exit_codes(processes) == [1, 1]
    for tree in trees:
        assert "train: 2 of 33 pairs cannot be used, more than max_bad_share 0.05" in tree.failure


def piped(tree, stack, shards):
    for name, folder in shards.items():
        directory = tree.add_channel(name, TrainingInputMode="Pipe", RecordWrapperType="None")
        stack.enter_context(Pipe(directory, partial(objects, folder)))


def test_a_job_in_pipe_mode_goes_on_after_a_stop_though_its_stream_comes_in_another_order(tmp_path):
    shard(tmp_path / "train/b.tar", SAMPLES[:16])
    shard(tmp_path / "train/c.tar", SAMPLES[16:])
    shard(tmp_path / "validation/a.tar", SAMPLES[:4])
    shards = {name: tmp_path / name for name in ("train", "validation")}
    whole, stopped = (OptMl(tmp_path / name, "platform") for name in ("whole", "stopped"))
    for tree in (whole, stopped):
        tree.set_hyperparameters(**CLIP)
    with ExitStack() as stack:
        piped(whole, stack, shards)
        run([whole])
    counts = artefact.load(whole.root / "model").manifest.stages[-1].dataset_counts
    assert counts == {"train": len(SAMPLES), "validation": 4}

    with ExitStack() as stack:
        piped(stopped, stack, shards)
        with forked([stopped]) as processes:
            wait_for_step([stopped], processes, "clip", 5)
            processes[0].send_signal(signal.SIGTERM)
            assert exit_codes(processes) == [0]
    assert max(step for _, step, _ in metrics_of(stopped)) < STEPS, "the stop came too late"
    (tmp_path / "train/c.tar").rename(tmp_path / "train/a.tar")
    with ExitStack() as stack:
        piped(stopped, stack, shards)
        run([stopped])
    assert metrics_of(stopped) == metrics_of(whole)


def test_a_stream_that_breaks_off_fails_the_job_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_DEVICE", "cpu")
    data = shard(tmp_path / "a.tar", SAMPLES).read_bytes()[:20_000]
    tree = OptMl(tmp_path / "ml", "platform")
    with Pipe(tree.add_channel("train", TrainingInputMode="Pipe"), lambda: [data]):
        assert main(["--root", str(tree.root)]) == 1
    assert tree.failure.startswith("train: train_0 ended at byte 20,000, in the middle of a shard")
