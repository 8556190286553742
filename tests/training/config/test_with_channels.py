"""training.config.with_channels: settings that do not fit the models which channels bring."""

import pytest

from dalle.errors import HyperparameterError
from training.config.hyperparameters import parse
from training.config.with_channels import with_channels


@pytest.mark.parametrize(
    ("raw", "channels", "says"),
    [
        ({}, ["train"], None),
        ({"stage": "clip"}, ["clip"], "stage=clip trains a CLIP and the channel clip brings one"),
        ({"clip_fine_tune": "true"}, ["train"], "neither the channel clip nor artefact is there"),
        ({"clip_fine_tune": "true"}, ["artefact"], None),
        ({"clip_fine_tune": "true", "stage": "dvae"}, ["train"], None),
        ({"clip_fine_tune": "true", "embed_size": "8"}, ["clip"], "embed_size is of a new CLIP"),
        ({"fine_tune": "true", "clip_size": "tiny"}, ["clip"], "clip_size is of a new CLIP"),
        ({"fine_tune": "true", "size": "tiny", "clip_epochs": "1"}, ["clip"], None),
        ({"fine_tune": "true", "clip_likelihood_weight": "1"}, ["clip"], None),
    ],
)
def test_fine_tuning_is_checked_with_the_channels(raw, channels, says):
    settings = parse(raw)
    if says is None:
        with_channels(settings, channels)
        return
    with pytest.raises(HyperparameterError, match=says):
        with_channels(settings, channels)


def test_settings_of_the_stage_dvae_are_refused_where_a_channel_brings_its_model():
    raw = {"stage": "dvae", "num_blocks": "3", "dvae_epochs": "2", "width": "64", "epochs": "3"}
    settings = parse(raw)
    with_channels(settings, ["train", "artefact"])
    with pytest.raises(HyperparameterError) as caught:
        with_channels(settings, ["train", "tokenizer_model"])
    first, *lines = str(caught.value).splitlines()
    assert first == "3 hyperparameters are wrong:"
    assert lines[0].startswith("- stage=dvae trains an image tokenizer and the channel tokenizer_")
    assert [line.split()[1] for line in lines[1:]] == ["dvae_epochs", "num_blocks"]
    with_channels(parse({"image_size": "64", "width": "64"}), ["tokenizer_model"])


def test_models_that_are_trained_on_have_no_averages_unless_they_are_set():
    on = parse({"train_on": "transformer,clip"})
    assert (on.transformer.ema_decay, on.clip.ema_decay) == (0.0, 0.0)
    assert parse({"train_on": "clip", "ema_decay": "0.9"}).clip.ema_decay == 0.9
    brought = with_channels(parse({"stage": "transformer"}), {"train", "legacy"})
    assert brought.transformer.ema_decay == 0.0
    assert parse({}).transformer.ema_decay > 0
