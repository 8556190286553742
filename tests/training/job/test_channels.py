"""training.job.channels: missing, unexpected and unusable channels, each by name."""

import os
from dataclasses import replace

import pytest

from dalle.errors import ChannelError
from dalle.platform.environment import read_job
from tests.permissions import common_user, directory_for_all
from training.job import channels


def add_filled(tree, name):
    (tree.add_channel(name) / "a.txt").write_text("a red square")


def test_every_known_channel_is_accepted(opt_ml):
    for name in ("train", "validation", "artefact", "clip", "tokenizer_model"):
        add_filled(opt_ml, name)
    channels.check(read_job(opt_ml.root, {}))


@pytest.mark.parametrize("shape", ["platform", "local", "empty"])
def test_the_channel_train_is_required(make_opt_ml, shape):
    tree = make_opt_ml(shape)
    with pytest.raises(ChannelError, match="the channel train is missing; put image-text pairs"):
        channels.check(read_job(tree.root, {}))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("artifact", "did you mean artefact?"),
        ("zzz", "known are train, validation, artefact, clip, tokenizer_model"),
    ],
)
def test_an_unexpected_channel_is_named(opt_ml, name, says):
    add_filled(opt_ml, "train")
    add_filled(opt_ml, name)
    with pytest.raises(ChannelError, match=f"the channel {name} is unexpected") as caught:
        channels.check(read_job(opt_ml.root, {}))
    assert says in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once(opt_ml):
    opt_ml.add_channel("train")
    opt_ml.add_channel("validation").rmdir()
    opt_ml.channels["clip"] = {"TrainingInputMode": "Pipe"}
    opt_ml.write("inputdataconfig", opt_ml.channels)
    with pytest.raises(ChannelError) as caught:
        channels.check(read_job(opt_ml.root, {}))
    root = opt_ml.root
    assert str(caught.value).splitlines() == [
        f"the channel train is empty: {root}/input/data/train",
        f"the channel validation should be the directory {root}/input/data/validation",
        "the channel clip has input mode Pipe; it must be File or FastFile",
    ]


def test_pairs_may_come_through_a_pipe_that_is_not_there_yet_and_in_parts(opt_ml):
    opt_ml.add_channel("train", TrainingInputMode="Pipe", S3DistributionType="ShardedByS3Key")
    # Which objects a host was given is for all hosts to hear of together: see `data.parts`.
    opt_ml.add_channel("validation", S3DistributionType="ShardedByS3Key")
    job = read_job(opt_ml.root, {})
    channels.check(job)
    assert job.channels["train"].pipe(0) == opt_ml.root / "input/data/train_0"


@pytest.mark.parametrize(
    ("name", "distribution", "says"),
    [
        ("train", "Sharded", "Sharded; it must be FullyReplicated or ShardedByS3Key"),
        ("artefact", "ShardedByS3Key", "ShardedByS3Key; it must be FullyReplicated"),
    ],
)
def test_a_distribution_that_cannot_be_is_named(opt_ml, name, distribution, says):
    add_filled(opt_ml, "train")
    opt_ml.add_channel(name, S3DistributionType=distribution)
    with pytest.raises(ChannelError, match=f"{name} has the S3DataDistributionType {says}"):
        channels.check(read_job(opt_ml.root, {}))


@pytest.mark.parametrize(
    ("channel", "locked", "shown"),
    [
        ("train", ".", ""),
        ("artefact", ".", ""),
        ("artefact", "model.tar.gz", "/model.tar.gz"),
        ("clip", "ViT-B-32.pt", "/ViT-B-32.pt"),
    ],
)
def test_what_cannot_be_read_is_named_with_who_must_be_able_to(opt_ml, channel, locked, shown):
    add_filled(opt_ml, "train")
    with directory_for_all() as folder:
        for name in ("model.tar.gz", "ViT-B-32.pt"):
            (folder / name).write_bytes(b"content")
        job = read_job(opt_ml.root, {f"SM_CHANNEL_{channel.upper()}": str(folder)})
        (folder / locked).chmod(0)
        job = replace(job, channels={channel: job.channels[channel]})
        with common_user(), pytest.raises(ChannelError) as caught:
            channels.check(job)
    says = f"the channel {channel} cannot be read: {folder}{shown}: Permission denied; the job runs"
    assert str(caught.value).splitlines()[-1].startswith(says)


def test_a_path_that_the_system_refuses_is_named(opt_ml):
    long = "/" + "x" * 300
    with pytest.raises(ChannelError, match=f"the channel train cannot be read: {long}: File name"):
        channels.check(read_job(opt_ml.root, {"SM_CHANNEL_TRAIN": long}))


def test_a_pipe_among_an_artefacts_files_is_not_waited_for(opt_ml):
    add_filled(opt_ml, "train")
    add_filled(opt_ml, "artefact")
    os.mkfifo(opt_ml.root / "input/data/artefact/pipe")
    channels.check(read_job(opt_ml.root, {}))


def test_a_channel_of_hidden_files_alone_is_empty(opt_ml):
    for name in ("train", "artefact"):
        (opt_ml.add_channel(name) / ".DS_Store").write_bytes(b"x")
    with pytest.raises(ChannelError, match="channel train is empty: .*\n.*artefact is empty"):
        channels.check(read_job(opt_ml.root, {}))
