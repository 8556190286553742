"""Both quantisers: codes, gradients, and codebooks that do not collapse."""

import math

import pytest
import torch

from dalle.models.dvae import DVAEConfig
from dalle.models.layers import embed_codes
from dalle.models.quantiser import GumbelQuantiser, Quantiser, build_quantiser

WIDTH, M, V, E = 6, 2, 16, 4
KINDS = ["gumbel", "vq"]


def build(kind: str, codebook_size: int = V, **weights: float) -> Quantiser:
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "num_codebooks": M, "codebook_size": codebook_size, "code_width": E}
    return build_quantiser(DVAEConfig(quantiser=kind, **sizes, **weights))


def random_features(count: int = 8) -> list[torch.Tensor]:
    """A feature map per codebook, [B, C, 4, 4]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, WIDTH, 4, 4, generator=generator) for _ in range(M)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_of_the_codebook_and_embed_as_its_rows(kind):
    quantiser = build(kind).eval()
    image_tokens = quantiser.tokens(random_features())
    assert image_tokens.shape == (8, 16, M)
    assert image_tokens.dtype == torch.int64
    assert ((image_tokens >= 0) & (image_tokens < V)).all()
    embeddings = embed_codes(quantiser.codebook, image_tokens)
    assert embeddings.shape == (8, M * E, 4, 4)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        codes = image_tokens[5, 4 * row + column]
        expected = torch.cat([quantiser.codebook[m, codes[m]] for m in range(M)])
        assert (embeddings[5, :, row, column] == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_codebook_reads_its_own_feature_map(kind):
    quantiser = build(kind).eval()
    features = random_features()
    tokens = quantiser.tokens(features)
    changed = quantiser.tokens([features[0], features[1].flip(0)])
    assert (changed[..., 0] == tokens[..., 0]).all()
    assert (changed[..., 1] != tokens[..., 1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_gradients_to_the_features_and_to_all_weights(kind):
    quantiser = build(kind, **({"kl_weight": 0.1} if kind == "gumbel" else {})).train()
    features = [each.requires_grad_() for each in random_features()]
    quantised = quantiser(features, 0.5)
    assert quantised.embeddings.shape == (8, M * E, 4, 4)
    (quantised.embeddings.square().mean() + quantised.loss).backward()
    for value in (*features, *(p for p in quantiser.parameters() if p.requires_grad)):
        assert value.grad is not None
        assert value.grad.abs().sum() > 0


def test_vq_chooses_the_nearest_code():
    quantiser = build("vq").eval()
    features = random_features()
    vectors = quantiser._vectors(features)
    for m in range(M):
        distances = torch.cdist(vectors[:, :, m], quantiser.codebook[m][None])
        assert (quantiser.tokens(features)[..., m] == distances.argmin(dim=-1)).all()
    quantised = quantiser(features, 0.5)
    expected = embed_codes(quantiser.codebook, quantiser.tokens(features))
    torch.testing.assert_close(quantised.embeddings, expected)


def test_vq_passes_gradients_straight_through():
    quantiser = build("vq", commitment_weight=0.0).eval()
    features = [each.requires_grad_() for each in random_features()]
    given = torch.randn(8, M * E, 4, 4)
    quantiser(features, 0.5).embeddings.backward(given)
    straight = [each.detach().clone().requires_grad_() for each in features]
    vectors = quantiser._vectors(straight).flatten(2).mT.reshape(8, -1, 4, 4)
    vectors.backward(given)
    for one, other in zip(features, straight, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.slow
def test_vq_codes_move_to_the_mean_of_their_vectors():
    quantiser = build("vq").train()
    features = random_features(16)
    for _ in range(400):
        quantiser(features, 0.99)  # late: nothing is restarted
    vectors, image_tokens = quantiser._vectors(features), quantiser.tokens(features)
    for m in range(M):
        for code in image_tokens[..., m].unique():
            mean = vectors[:, :, m][image_tokens[..., m] == code].mean(dim=0)
            torch.testing.assert_close(quantiser.codebook[m, code], mean, atol=0.05, rtol=0.05)


def test_the_gumbel_temperature_falls_from_1_to_a_sixteenth():
    quantiser = build("gumbel")
    temperatures = [quantiser.gumbel_temperature(step / 20) for step in range(21)]
    assert temperatures[0] == 1
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[15:] == pytest.approx([1 / 16] * 6)


def test_cold_gumbel_weights_are_nearly_one_code():
    quantiser = build("gumbel").train()
    for parameter in quantiser.to_logits.parameters():
        parameter.data *= 1000
    features = random_features()
    expected = embed_codes(quantiser.codebook, quantiser.tokens(features))
    close = (quantiser(features, 1.0).embeddings - expected).abs().amax(dim=1) < 1e-3
    assert close.float().mean() > 0.9


def test_the_kl_term_is_0_for_uniform_codes_and_log_v_for_certain_ones():
    quantiser = build("gumbel", kl_weight=2.0).train()
    for layer in quantiser.to_logits:
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    assert quantiser(random_features(), 0.5).loss.item() == pytest.approx(0, abs=1e-5)
    for layer in quantiser.to_logits:
        layer.bias.data[3] = 1000.0
    certain = quantiser(random_features(), 0.5).loss.item()
    assert certain == pytest.approx(2 * math.log(V), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_usage_is_the_share_of_the_positions(kind):
    quantiser = build(kind).train()
    assert quantiser.perplexity().tolist() == pytest.approx([V] * M)
    features = random_features()
    for _ in range(600):
        quantiser(features, 1.0)
    image_tokens = quantiser.tokens(features)
    for m in range(M):
        shares = torch.bincount(image_tokens[..., m].flatten(), minlength=V) / (8 * 16)
        torch.testing.assert_close(quantiser.usage[m], shares, atol=0.01, rtol=0)
        expected = torch.special.entr(shares).sum().exp()
        assert float(quantiser.perplexity()[m]) == pytest.approx(float(expected), rel=0.1)
        assert (quantiser.dead()[m] == (quantiser.usage[m] < 0.03 / V)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_no_state(kind):
    quantiser = build(kind).eval()
    before = {name: value.clone() for name, value in quantiser.state_dict().items()}
    quantiser(random_features(), 0.1)
    quantiser.tokens(random_features())
    assert all((value == before[name]).all() for name, value in quantiser.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_never_exceeds_the_codebook(kind):
    quantiser = build(kind)
    quantiser.usage.fill_(0.0)
    quantiser.usage[:, : V // 2] = 2 / V
    quantiser.usage[:, V // 2 :] = 1 / V  # as a restart leaves them
    assert (quantiser.perplexity() <= V).all()
    quantiser.usage.fill_(0.0)
    quantiser.usage[:, 3] = 1.0
    assert quantiser.perplexity().tolist() == pytest.approx([1.0] * M)


def kill(quantiser: Quantiser) -> None:
    """Make code 0 of every codebook the nearest of all vectors, so that the others die."""
    if isinstance(quantiser, GumbelQuantiser):
        for layer in quantiser.to_logits:
            layer.bias.data[0] += 20.0
    else:
        quantiser.codebook.data[:, 1:] += 100.0
        quantiser.sums.copy_(quantiser.codebook)
        quantiser.counts.fill_(1.0)
    quantiser.usage.zero_()
    quantiser.usage[:, 0] = 1.0
    quantiser.steps.fill_(quantiser.RESTART_EVERY - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_codes_are_restarted(kind):
    quantiser = build(kind).train()
    features = random_features()
    kill(quantiser)
    assert quantiser.dead().sum() == M * (V - 1)
    assert quantiser.tokens(features).unique().tolist() == [0]
    quantiser(features, 0.1)
    assert not quantiser.dead().any()
    if isinstance(quantiser, GumbelQuantiser):
        probabilities = quantiser._logits(features).softmax(dim=-1).mean(dim=(0, 1))
        assert (probabilities > 0.5 / V).all(), "each has its share of the first one's work"
    else:
        for m in range(M):
            assert len(quantiser.tokens(features)[..., m].unique()) > V // 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_leaves_live_codes_alone(kind):
    quantiser = build(kind).train()
    quantiser(random_features(), 1.0)
    quantiser.usage[:, 5:] = 0.0
    quantiser.steps.fill_(quantiser.RESTART_EVERY)
    before = quantiser.codebook.detach().clone()
    if isinstance(quantiser, GumbelQuantiser):
        quantiser._restart()
    else:
        quantiser._restart(quantiser.dead(), quantiser._vectors(random_features()))
    assert (quantiser.codebook[:, :5] == before[:, :5]).all()
    assert (quantiser.codebook[:, 5:] != before[:, 5:]).any(dim=-1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps_before", "progress"), [(19, 0.7), (3, 0.1)])
def test_no_restart_late_in_training_or_between_its_steps(kind, steps_before, progress):
    quantiser = build(kind).train()
    kill(quantiser)
    quantiser.steps.fill_(steps_before)
    quantiser(random_features(), progress)
    assert quantiser.dead().sum() == M * (V - 1)


def test_vq_starts_on_the_first_batch():
    quantiser = build("vq", 64).train()
    features = random_features()
    quantiser(features, 0.0)
    assert len(quantiser.tokens(features)[..., 0].unique()) > 32
