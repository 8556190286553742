"""open_clip's files give open_clip's probabilities; what is not built here is refused by name."""

import copy
import json

import numpy as np
import pytest
import torch

from dalle.errors import ForeignFileError
from tests.training.job.pretrained.clip_files import (
    build_openai,
    open_clip,
    probabilities,
    save_state,
)
from training.job.pretrained.clip import load_clip
from training.job.pretrained.open_clip import read_open_clip_config


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
@pytest.mark.parametrize("name", ["gelu", "quick_gelu"])
def test_open_clips_weights_give_open_clips_probabilities(name, file, tmp_path):
    expected = open_clip(name)
    model = load_clip(*expected.put(tmp_path, file))
    assert model.config.activation == name
    squares = np.stack([model.square.read(each, "x") for each in expected.pictures])
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2) / 255
    images = (pixels - model.mean) / model.std
    torch.testing.assert_close(images, expected.images, atol=1e-5, rtol=0)
    got = probabilities(model, expected.captions, expected.pictures)
    torch.testing.assert_close(got, expected.probabilities, atol=1e-5, rtol=0)


def test_a_checkpoint_of_open_clips_training_is_read(tmp_path):
    expected = open_clip("gelu")
    path, config = expected.put(tmp_path)
    state = {f"module.{name}": value for name, value in expected.weights.items()}
    moments = {"state": {0: {"exp_avg": torch.full((2,), torch.nan)}}}  # of no use here
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": moments}, path)
    got = probabilities(load_clip(path, config), expected.captions, expected.pictures)
    torch.testing.assert_close(got, expected.probabilities, atol=1e-5, rtol=0)
    path = path.rename(tmp_path / "epoch_3.pt")
    with pytest.raises(ForeignFileError, match=r"epoch_3\.pt is of open_clip and does not say"):
        load_clip(path)


def test_published_weights_without_their_config_are_not_guessed_at(tmp_path):
    path, _ = open_clip("quick_gelu").put(tmp_path)
    says = r"does not say whether its activation is gelu or quick_gelu; put its open_clip_config"
    with pytest.raises(ForeignFileError, match=says):
        load_clip(path)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ("visual.trunk.cls_token", "its image tower is one of timm's"),
        ("text.transformer.embeddings.word_embeddings.weight", "its text tower is a custom one"),
        ("text_decoder.text_projection", "it is a CoCa"),
        ("text_model.final_layer_norm.weight", "it is in the layout of the package transformers"),
        ("visual.attn_pool.query", "its image tower ends in an attentional pool"),
        ("logit_bias", "it is a SigLIP"),
    ],
)
def test_other_towers_are_refused_by_name(weight, says, tmp_path):
    path, config = open_clip("gelu").put(tmp_path)
    torch.save({weight: torch.zeros(2), "logit_scale": torch.zeros(())}, path)
    with pytest.raises(ForeignFileError, match=f"{says}.* \\(the weight {weight}\\)"):
        load_clip(path, config)


def changed(config, section, **values):
    """open_clip's config with other values in a section."""
    config = copy.deepcopy(config)
    model = config["model_cfg"]
    {"model": model, "preprocess": config["preprocess_cfg"]}.get(
        section, model.get(f"{section}_cfg")
    ).update(values)
    return config


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("model", {"custom_text": True}, "has custom_text=True, which is not built here"),
        ("model", {"multimodal_cfg": {"width": 2}}, "has multimodal_cfg="),
        ("model", {"embed_dim": 25}, "says that embed_size is 25, and the weights have 24"),
        ("model", {"vision_cfg": 3}, "must have a mapping vision_cfg, got 3"),
        ("vision", {"timm_model_name": "vit_b"}, "has vision_cfg.timm_model_name='vit_b'"),
        ("vision", {"ls_init_value": 1e-4}, "has vision_cfg.ls_init_value=0.0001"),
        ("vision", {"no_ln_pre": True}, "has vision_cfg.no_ln_pre=True"),
        ("vision", {"pool_type": "avg"}, "pool_type='avg', which .*; it must be 'tok'"),
        ("vision", {"head_width": 48}, "width=64, which is no multiple of head_width=48"),
        ("vision", {"head_width": "80"}, "a whole number from 1 as vision_cfg.head_width"),
        ("vision", {"layers": [2, 2]}, r"says that vision_layers is \(2, 2\)"),
        ("vision", {"layers": True}, "a whole number from 1 as vision_cfg.layers, got True"),
        ("model", {"quick_gelu": "no"}, "true or false as quick_gelu, got 'no'"),
        ("preprocess", {"std": True}, "three numbers as preprocess_cfg.std, got True"),
        ("vision", {"layers": 12}, "says that vision_layers is 12, and the weights have 2"),
        ("vision", {"image_size": [32, 64]}, r"says that image_size is \(32, 64\)"),
        ("text", {"hf_model_name": "roberta"}, "has text_cfg.hf_model_name='roberta'"),
        ("text", {"hf_tokenizer_name": "bert"}, "has text_cfg.hf_tokenizer_name='bert'"),
        ("text", {"pool_type": "last"}, "it must be 'argmax'"),
        ("text", {"no_causal_mask": True}, "has text_cfg.no_causal_mask=True"),
        ("text", {"heads": 5}, "text_width must be a multiple of text_heads = 5"),
        ("preprocess", {"interpolation": "bilinear"}, "it must be 'bicubic'"),
        ("preprocess", {"resize_mode": "longest"}, "it must be 'shortest' or 'squash'"),
        ("preprocess", {"mean": [0.5, 0.5]}, "three numbers as preprocess_cfg.mean"),
        ("preprocess", {"std": [0, 1, 1]}, "image_std must be from 0.001"),
    ],
)
def test_settings_that_are_not_built_here_are_refused_by_name(section, values, says, tmp_path):
    expected = open_clip("gelu")
    paths = expected.put(tmp_path)
    paths[1].write_text(json.dumps(changed(expected.config, section, **values)))
    with pytest.raises(ForeignFileError, match=says):
        load_clip(*paths)


def test_a_resnet_with_heads_of_another_width_than_openais_is_refused(tmp_path):
    """The weights tell that it is a ResNet, and the width of its heads changes its result."""
    path = tmp_path / "open_clip_model.pt"
    save_state(build_openai("resnet"), path)
    config = open_clip("gelu").config
    for width, says in ((32, r"head_width=32, which is not built here for a ResNet"), (64, None)):
        vision = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64, "head_width": width}
        text = {"width": 64, "heads": 1, "layers": 2}
        settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
        file = tmp_path / "open_clip_config.json"
        file.write_text(json.dumps(config | {"model_cfg": settings}))
        if says is None:
            assert load_clip(path, file).config.vision_heads is None
            continue
        with pytest.raises(ForeignFileError, match=says):
            load_clip(path, file)


def test_settings_of_training_and_of_towers_that_are_not_there_are_left_alone(tmp_path):
    expected = open_clip("gelu")
    path = expected.put(tmp_path)[1]
    plain = read_open_clip_config(path)
    config = changed(expected.config, "vision", patch_dropout=0.5, timm_pool="avg", no_ln_pre=False)
    config = changed(config, "text", hf_pooler_type="mean_pooler", hf_tokenizer_name=None)
    config = changed(config, "preprocess", size=[32, 32], mode="RGB", fill_color=0)
    path.write_text(json.dumps(changed(config, "model", init_logit_scale=2.6, custom_text=False)))
    assert read_open_clip_config(path) == plain


def test_a_config_as_the_package_has_it_is_read_too(tmp_path):
    """open_clip/model_configs/NAME.json has no preprocessing: OpenAI's is the usual."""
    path = open_clip("quick_gelu").put(tmp_path)[1]
    model = json.loads(path.read_text())["model_cfg"]
    path.write_text(json.dumps(model))
    config = read_open_clip_config(path)
    assert config.fields["activation"] == "quick_gelu"
    assert not config.fields["squashes"]
    assert config.sizes["vision_layers"] == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "must have a mapping of settings"),
        ("{", "is not JSON"),
        ("{}", "must have a mapping model_cfg"),
        ('{"model_cfg": {"quick_gelu": NaN}}', "is not JSON: NaN is not a number"),
    ],
)
def test_a_config_of_something_else_is_refused_by_its_name(content, says, tmp_path):
    path = tmp_path / "open_clip_config.json"
    path.write_text(content)
    with pytest.raises(ForeignFileError, match=rf"open_clip_config\.json {says}"):
        read_open_clip_config(path)
    with pytest.raises(ForeignFileError, match=r"open_clip_config\.json cannot be read: No such"):
        read_open_clip_config(tmp_path / "other" / "open_clip_config.json")
