"""training.channels: missing, unexpected and unusable channels, each by name."""

import pytest

from dalle.contract import read_job
from dalle.errors import ChannelError
from training import channels


def add_filled(tree, name):
    (tree.add_channel(name) / "a.txt").write_text("a red square")


def test_every_known_channel_is_accepted(opt_ml):
    for name in ("train", "validation", "artefact", "clip"):
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
        ("zzz", "known are train, validation, artefact, clip"),
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
