"""dalle.models.legacy: what its transformer does beside the logits, which the importer's tests hold
to the old package's."""

from dataclasses import replace

import pytest
import torch

from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import SamplingOptions, complete_captions
from dalle.decoding.select import describe_step, needs_key_ranges, new_step
from dalle.errors import DeviceError
from dalle.models.legacy.build import parse_transformer_config, transformer_content
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.models.legacy.transformer import LegacyTransformer
from dalle.models.transformer import Dalle, TransformerConfig

CONFIG = LegacyTransformerConfig(
    text_vocab_size=11,
    text_length=5,
    grid_size=4,
    codebook_size=7,
    width=16,
    num_layers=3,
    num_heads=2,
    head_width=6,
    attention_kinds=("full", "conv_up_left", "sparse"),
    sandwich_norm=True,
    token_shift=True,
    rotary_width=4,
    padding_by_position=True,
)
EARLY = replace(
    CONFIG,
    attention_kinds=("axial_row", "conv_centred", "axial_col"),
    padding_by_position=False,
    token_shift=False,
    hides_padding=True,
    reversible=True,
    norm="rms",
)
CAPTIONS = torch.tensor([[3, 4, 0, 0, 0], [1, 2, 5, 9, 10]])


def build(config=CONFIG):
    torch.manual_seed(0)
    model = LegacyTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [CONFIG, EARLY], ids=["late", "early"])
def test_the_engines_log_likelihood_is_the_models(config):
    model = build(config)
    engine = DecodeEngine(model, num_slots=4)
    requests = [engine.submit(each[None], candidates=[0, 1], seed=3) for each in CAPTIONS]
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    assert len(finished) == 4
    for each in finished:
        caption = CAPTIONS[requests.index(each.request)][None]
        expected = model.log_likelihood(caption, each.image_tokens[None])
        torch.testing.assert_close(torch.tensor([each.log_likelihood]), expected, rtol=0, atol=1e-3)


def test_guidance_samples_from_the_caption_and_from_padding_alone():
    model = build(EARLY)
    engine = DecodeEngine(model, num_slots=2)
    options = SamplingOptions(temperature=0, guidance_scale=2.5)
    engine.submit(CAPTIONS[1:], candidates=[0], seed=0, options=options)
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    tokens = finished[0].image_tokens[None]
    logits = []
    for caption in (CAPTIONS[1:], torch.zeros_like(CAPTIONS[1:])):
        _, hidden = model._hidden(caption, tokens[:, :-1])
        logits.append(model.code_logits(hidden, 0, tokens))
    guided = logits[1] + 2.5 * (logits[0] - logits[1])
    assert torch.equal(guided.argmax(dim=-1), tokens[..., 0])


def test_a_captions_end_is_the_padding_of_its_own_position():
    model = build()
    logits = model.text_logits(CAPTIONS[1:])
    hidden = model._whole(model._embed_text(CAPTIONS[1:])[:, :-1], CAPTIONS[1:])
    raw = model.to_text_logits(model.normalised(hidden))
    assert logits.shape == (1, 5, 11)
    assert torch.equal(logits[0, :, 0], torch.stack([raw[0, n, 11 + n] for n in range(5)]))
    assert torch.equal(logits[..., 1:], raw[..., 1:11])
    tokens, _ = complete_captions(model, torch.tensor([3]), num_completions=3, seed=0)
    assert tokens.shape == (3, 5)
    assert int(tokens.max()) < 11


@pytest.mark.parametrize("config", [CONFIG, EARLY], ids=["late", "early"])
def test_training_reaches_every_weight_and_recomputing_changes_nothing(config):
    model = build(config).requires_grad_(True).train()
    image = torch.randint(7, (2, 16, 1))
    gradients = []
    for recomputes in (False, True):
        model.checkpoints_activations = recomputes
        model.zero_grad()
        model.loss(CAPTIONS, image).total.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_config_comes_back_from_its_file_and_no_other_kind_does():
    content = transformer_content(CONFIG)
    assert content["kind"] == "dalle_pytorch"
    assert parse_transformer_config(content) == CONFIG
    with pytest.raises(ValueError, match="kind must be dalle_pytorch or absent, got 'mamba'"):
        parse_transformer_config({"kind": "mamba"})
    for change, words in (
        ({"rotary_width": 8}, "rotary_width must be even and at most head_width = 6"),
        ({"width": 18}, "width must be a multiple of 4 with token_shift"),
        ({"attention_kinds": ("mlp",)}, "attention_kinds"),
        ({"head_width": 0}, "head_width must be from 1"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_transformer_config(content | change)


def test_the_config_of_todays_transformer_has_no_kind():
    config = TransformerConfig(text_vocab_size=9, text_length=4, grid_size=2, codebook_size=5)
    content = transformer_content(config)
    assert "kind" not in content
    assert parse_transformer_config(content) == config


def test_no_other_step_decodes_it_and_the_reason_is_said():
    model = build()
    assert "the graph of DALLE-pytorch" in describe_step(model, "fp32")
    assert not needs_key_ranges(model, "int8")
    with pytest.raises(DeviceError, match="precision must be fp32, got int8"):
        new_step(model, 2, "int8")
    assert isinstance(model, Dalle)
