"""The transformer: losses, likelihoods, causality, and the key-value cache."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle.models.layers import ChannelDropout, FeedForward
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.types import ATTENTION_KINDS, FEED_FORWARD_KINDS
from tests.dalle.decoding.reference import decode_one

T, N, M = 5, 16, 2  # of conftest's tiny transformer
KINDS = [*[(kind,) for kind in ATTENTION_KINDS], ("axial_row", "full"), ("conv_like", "axial_col")]


def random_pairs(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Text tokens, some padded, and image tokens."""
    generator = torch.Generator().manual_seed(1)
    text_tokens = torch.randint(1, 11, (count, T), generator=generator)
    text_tokens[1:, 3:] = 0
    return text_tokens, torch.randint(7, (count, N, M), generator=generator)


def log_probabilities(model: Dalle, text_tokens, image_tokens) -> torch.Tensor:
    """Log probability of every token in its order, text first: [B, T + N·M]."""
    text = model.text_logits(text_tokens).log_softmax(dim=-1).gather(2, text_tokens[..., None])
    _, hidden = model._hidden(text_tokens, image_tokens[:, :-1])
    image = model._log_probabilities(hidden, image_tokens)
    return torch.cat([text.squeeze(2), image.flatten(1)], dim=1)


@pytest.mark.parametrize("kinds", KINDS)
def test_changing_a_token_changes_nothing_before_it(kinds, make_dalle):
    model = make_dalle(attention_kinds=kinds)
    text_tokens, image_tokens = random_pairs(1)
    before = log_probabilities(model, text_tokens, image_tokens)
    for index in range(T + N * M):
        changed_text, changed_image = text_tokens.clone(), image_tokens.clone()
        if index < T:
            changed_text[0, index] = (changed_text[0, index] + 1) % 11
        else:
            flat = changed_image.view(-1)  # a position's codes, one after another
            flat[index - T] = (flat[index - T] + 1) % 7
        after = log_probabilities(model, changed_text, changed_image)
        torch.testing.assert_close(after[:, :index], before[:, :index], atol=1e-5, rtol=0)
        assert (after[:, index] - before[:, index]).abs() > 1e-4, "it is itself predicted"
        if index < T + N * M - 1:
            assert (after[:, index + 1 :] - before[:, index + 1 :]).abs().max() > 1e-4


@pytest.mark.parametrize("kinds", KINDS)
def test_every_image_token_depends_on_every_word(kinds, make_dalle):
    model = make_dalle(attention_kinds=kinds)
    text_tokens, image_tokens = random_pairs(1)
    before = log_probabilities(model, text_tokens, image_tokens)[:, T:]
    for index in range(T):
        changed = text_tokens.clone()
        changed[0, index] = (changed[0, index] + 1) % 11
        after = log_probabilities(model, changed, image_tokens)[:, T:]
        assert ((after - before).abs() > 1e-6).all()


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_the_losses_are_the_mean_log_probabilities(num_codebooks, make_dalle):
    model = make_dalle(num_codebooks=num_codebooks, text_loss_weight=0.5)
    text_tokens, _ = random_pairs()
    image_tokens = torch.randint(7, (3, N, num_codebooks))
    loss = model.loss(text_tokens, image_tokens)
    likelihood = model.log_likelihood(text_tokens, image_tokens)
    assert likelihood.shape == (3,)
    each = log_probabilities(model, text_tokens, image_tokens)
    torch.testing.assert_close(likelihood, each[:, T:].sum(dim=1))
    torch.testing.assert_close(loss.image, -each[:, T:].mean())
    torch.testing.assert_close(loss.total, loss.image + 0.5 * loss.text)
    # Rows of 5 words, of 3 words and an end, of 3 words and an end.
    counted = torch.cat([each[0, :5], each[1, :4], each[2, :4]])
    torch.testing.assert_close(loss.text, -counted.mean())


def test_the_likelihoods_of_all_images_add_up_to_one(make_dalle):
    model = make_dalle(grid_size=2, codebook_size=3, num_codebooks=1)
    pictures = torch.cartesian_prod(*[torch.arange(3)] * 4)[..., None]
    text_tokens = random_pairs(1)[0].expand(len(pictures), -1)
    assert model.log_likelihood(text_tokens, pictures).exp().sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("length", [1, 3, T])
def test_text_logits_of_a_part_are_those_of_the_whole(length, make_dalle):
    model = make_dalle(attention_kinds=("axial_row", "full"))
    text_tokens, _ = random_pairs()
    part = model.text_logits(text_tokens[:, :length])
    assert part.shape == (3, length, 11)
    torch.testing.assert_close(part, model.text_logits(text_tokens)[:, :length])


@pytest.mark.parametrize("primed", [0, 1, 6, N - 1])
@pytest.mark.parametrize("kinds", KINDS)
def test_prefill_and_steps_equal_the_whole_sequence(kinds, primed, make_dalle):
    model = make_dalle(attention_kinds=kinds)
    text_tokens, image_tokens = random_pairs()
    _, expected = model._hidden(text_tokens, image_tokens[:, :-1])
    cache = model.new_cache(3)
    hidden = model.prefill(text_tokens, image_tokens[:, :primed] if primed else None, cache)
    for position in range(primed, N):
        torch.testing.assert_close(hidden, expected[:, position], atol=1e-4, rtol=1e-4)
        if position + 1 < N:
            hidden = decode_one(model, image_tokens[:, position], position, cache)
    assert cache.filled == model.config.length


def test_regularisation_acts_in_training_only(make_dalle):
    plain, dropped = (
        make_dalle(**dict.fromkeys(("dropout", "caption_dropout", "token_noise"), share))
        for share in (0.0, 0.9)
    )
    pairs = random_pairs()
    torch.testing.assert_close(dropped.loss(*pairs).total, plain.loss(*pairs).total)
    torch.testing.assert_close(plain.train().loss(*pairs).total, plain.eval().loss(*pairs).total)
    assert (dropped.train().loss(*pairs).total - plain.loss(*pairs).total).abs() > 1e-3


def test_a_dropped_caption_is_one_of_padding_as_guidance_shows_it(make_dalle):
    model = make_dalle(caption_dropout=1.0).train()
    text_tokens, image_tokens = random_pairs()
    expected = -model.log_likelihood(torch.zeros_like(text_tokens), image_tokens).mean() / (N * M)
    torch.testing.assert_close(model.loss(text_tokens, image_tokens).image, expected)


def test_hidden_words_leave_padding_alone(make_dalle):
    model = make_dalle(word_dropout=1.0).train()
    text_tokens, image_tokens = random_pairs()
    seen, _ = model._corrupt(text_tokens, image_tokens)
    assert (seen[text_tokens != 0] == model.hidden_word).all()
    assert (seen[text_tokens == 0] == 0).all()


def test_noise_replaces_whole_positions_by_codes_of_the_codebook(make_dalle):
    model = make_dalle(token_noise=0.5).train()
    text_tokens, image_tokens = random_pairs(50)
    _, seen = model._corrupt(text_tokens, image_tokens)
    assert ((seen >= 0) & (seen < 7)).all()
    kept = (seen == image_tokens).all(dim=-1).float().mean()
    assert 0.4 < kept < 0.65, "a half, and replacements equal to the original"


def test_training_does_not_modify_its_batch(make_dalle):
    fields = dict.fromkeys(("dropout", "caption_dropout", "word_dropout", "token_noise"), 0.5)
    model = make_dalle(**fields).train()
    pairs = random_pairs()
    copies = [each.clone() for each in pairs]
    model.loss(*pairs)
    assert all((a == b).all() for a, b in zip(pairs, copies, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        *[{"feed_forward": kind} for kind in FEED_FORWARD_KINDS],
        {"norm": "layer", "layer_scale": 0.1, "qk_norm": False, "target_position": False},
        {"attention_kinds": ("axial_row", "axial_col", "conv_like", "full"), "num_layers": 4},
    ],
)
def test_every_variant_overfits_two_images(fields):
    torch.manual_seed(0)
    sizes = {"text_vocab_size": 11, "text_length": T, "grid_size": 4, "codebook_size": 7}
    shape = {"num_codebooks": M, "width": 32, "num_layers": 2, "num_heads": 2}
    model = Dalle(TransformerConfig(**(sizes | shape | fields)))
    text_tokens, image_tokens = random_pairs(2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = model.loss(text_tokens, image_tokens).total.item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(text_tokens, image_tokens)
        loss.total.backward()
        optimizer.step()
    assert first == pytest.approx(math.log(7) + math.log(11) / 7, rel=0.1)
    assert loss.total.item() < 0.2 * first
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_swapped_codes_change_later_positions_only(make_dalle):
    """Embeddings of all codebooks are summed, but the order of positions still counts."""
    model = make_dalle()
    text_tokens, image_tokens = random_pairs(1)
    swapped = image_tokens.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    hidden, other = (
        model._hidden(text_tokens, each[:, :-1])[1] for each in (image_tokens, swapped)
    )
    torch.testing.assert_close(hidden[:, 0], other[:, 0])
    assert (hidden[:, 2:] - other[:, 2:]).abs().max() > 1e-4


def test_each_input_has_the_embedding_of_the_position_that_it_predicts(make_dalle):
    model = make_dalle()
    text_tokens, image_tokens = random_pairs(1)
    _, before = model._hidden(text_tokens, image_tokens[:, :-1])
    model.target_row_position[1] += 1  # of positions 4 to 7
    _, after = model._hidden(text_tokens, image_tokens[:, :-1])
    assert (after[:, :4] == before[:, :4]).all()
    assert (after[:, 4:] != before[:, 4:]).any(dim=-1).all()


def test_muon_has_the_blocks_matrices_and_nothing_else(make_dalle):
    model = make_dalle()
    matrices = model.muon_parameters()
    assert len(matrices) == 2 * 4, "qkv, out, expand and contract of each layer"
    assert {id(each) for each in matrices} <= {id(each) for each in model.blocks.parameters()}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 30, "num_heads": 4}, "width must be a multiple of num_heads = 4, got 30"),
        ({"attention_kinds": ()}, r"attention_kinds must be of .* got \(\)"),
        ({"attention_kinds": ("full", "half")}, "attention_kinds must be of .*'half'"),
        ({"feed_forward": "swish"}, "feed_forward must be of .* got 'swish'"),
    ],
)
def test_a_wrong_config_is_named(fields, says):
    sizes = {"text_vocab_size": 11, "text_length": T, "grid_size": 4, "codebook_size": 7}
    with pytest.raises(ValueError, match=says):
        TransformerConfig(**(sizes | fields))


def test_attention_kinds_repeat_from_the_start(make_dalle):
    config = make_dalle(attention_kinds=("full", "axial_row"), num_layers=5).config
    kinds = [config.kind_of_layer(layer) for layer in range(5)]
    assert kinds == ["full", "axial_row", "full", "axial_row", "full"]


def test_dropout_takes_whole_channels_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(200, 3, 50)
    dropped = ChannelDropout(0.25).train()(x)
    assert (dropped == dropped[:, :1]).all()
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert (ChannelDropout(0.25).eval()(x) == x).all()


def test_relu2_is_the_square_of_relu():
    layer = FeedForward(4, 2, "relu2")
    x = torch.randn(1, 3, 4)
    expected = F.linear(F.relu(layer.expand(x)) ** 2, layer.contract.weight, layer.contract.bias)
    torch.testing.assert_close(layer(x), expected)
