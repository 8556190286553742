"""dalle.models.tokenizers: published graphs have the surface and the place of the dVAE."""

import json
from dataclasses import replace

import pytest
import torch

from dalle import artefact as artefacts
from dalle.errors import ArtefactError
from dalle.models.configs import DVAEConfig
from dalle.models.tokenizers.configs import config_content, parse_config
from tests.dalle.artefact_files import replace_file
from tests.dalle.models.tiny_tokenizers import CONFIGS, tiny_tokenizer

EACH = pytest.mark.parametrize("name", CONFIGS)


@EACH
def test_images_become_tokens_in_range_and_images_again(name):
    tokenizer, config = tiny_tokenizer(name), CONFIGS[name]
    size = config.image_size
    tokens = tokenizer.encode(torch.rand(3, 3, size, size))
    assert tokens.shape == (3, config.num_positions, config.num_codebooks)
    assert tokens.dtype == torch.int64
    assert tokens.min() >= 0
    assert tokens.max() < config.codebook_size
    images = tokenizer.decode(tokens)
    assert images.shape == (3, 3, size, size)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.001


@EACH
def test_rows_that_are_missing_are_grey(name):
    tokenizer, config = tiny_tokenizer(name), CONFIGS[name]
    tokens = torch.randint(config.codebook_size, (2, config.num_positions, 1))
    images = tokenizer.decode_rows(tokens[:, : config.grid_size])
    assert (images[:, :, config.stride :] == 128 / 255).all()
    assert (images[:, :, : config.stride] != 128 / 255).any()
    assert torch.equal(tokenizer.decode_rows(tokens), tokenizer.decode(tokens))


@EACH
def test_a_saved_tokenizer_is_loaded_as_the_same_graph(name, tmp_path):
    tokenizer = tiny_tokenizer(name)
    artefacts.save(tmp_path, artefacts.Artefact(dvae=tokenizer))
    loaded = artefacts.load(tmp_path)
    assert loaded.dvae is not None
    assert type(loaded.dvae) is type(tokenizer)
    assert loaded.dvae.config == tokenizer.config
    size = tokenizer.config.image_size
    images = torch.rand(2, 3, size, size)
    tokens = tokenizer.encode(images)
    assert torch.equal(loaded.dvae.encode(images), tokens)
    assert torch.equal(loaded.dvae.decode(tokens), tokenizer.decode(tokens))
    content = json.loads((tmp_path / "dvae" / "config.json").read_text())
    assert content["kind"] == tokenizer.config.kind


def test_a_config_without_a_kind_is_of_the_dvae_that_is_trained_here():
    config = DVAEConfig(image_size=16)
    content = config_content(config)
    assert "kind" not in content, "earlier versions refuse it"
    assert parse_config(content) == parse_config({"kind": "dvae"} | content) == config


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"kind": "vq"}, "kind must be one of dvae, dalle_pytorch, openai, vqgan, got 'vq'"),
        ({"kind": ["vqgan"]}, "kind must be one of"),
        ({"kind": "openai", "width": 4}, "image_size"),
        ([], "is not a JSON object"),
    ],
)
def test_a_config_of_an_unknown_kind_or_without_its_fields_is_named(content, says, artefact_copy):
    replace_file(artefact_copy, "dvae/config.json", json.dumps(content).encode())
    with pytest.raises(ArtefactError, match=says):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("openai", {"image_size": 100}, "image_size must be a multiple of 8, .*, got 100"),
        ("nearest", {"image_size": 18}, "image_size must be a multiple of 4, .*, got 18"),
        ("nearest", {"channel_multipliers": ()}, "channel_multipliers must have one number"),
        ("nearest", {"quantiser": "vq"}, "quantiser must be one of .*, got 'vq'"),
        ("gumbel", {"code_width": 4}, "code_width must be latent_channels = 8 .*, got 4"),
        ("nearest", {"channel_multipliers": (1, 65)}, "channel_multipliers must be from 1 to 64"),
        ("dalle_pytorch", {"codebook_size": 0}, "codebook_size must be from 1 to"),
    ],
)
def test_sizes_that_do_not_fit_are_named(name, fields, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIGS[name], **fields)


def test_a_width_that_does_not_suit_the_norms_is_refused_as_an_artefact(artefact_copy):
    content = json.dumps(config_content(CONFIGS["nearest"]) | {"width": 20}).encode()
    replace_file(artefact_copy, "dvae/config.json", content)
    with pytest.raises(ArtefactError, match="num_channels .20. must be divisible by num_groups"):
        artefacts.load(artefact_copy)


@EACH
def test_tokens_and_pixels_do_not_depend_on_autocast_and_tf32_of_the_caller(name):
    tokenizer, config = tiny_tokenizer(name), CONFIGS[name]
    images = torch.rand(4, 3, config.image_size, config.image_size)
    tokens = tokenizer.encode(images)
    pixels = tokenizer.decode(tokens)
    flags = []
    tokenizer.encoder.register_forward_pre_hook(
        lambda module, inputs: flags.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), tokens)
        assert torch.equal(tokenizer.decode(tokens), pixels)
    assert flags == [False]
    assert torch.backends.cudnn.allow_tf32 == before
