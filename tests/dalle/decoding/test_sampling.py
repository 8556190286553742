"""Sampling: with a cache as without one, and each candidate a function of its own number."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dalle.decoding.sampling import (
    SamplingOptions,
    SamplingStopped,
    choose,
    complete_captions,
    gumbel_noise,
    image_noise_keys,
)
from dalle.models.transformer import Dalle
from dalle.types import ATTENTION_KINDS
from tests.dalle.decoding.reference import sample_image_tokens

T, N, M, V = 5, 16, 2, 7  # of conftest's tiny transformer
TEXT = torch.tensor([[3, 1, 4, 0, 0]])
OTHER_TEXT = torch.tensor([[2, 7, 1, 8, 2]])
KINDS = [
    *[(kind,) for kind in ATTENTION_KINDS],
    ("axial_row", "axial_col", "conv_like"),
    ("full", "conv_like"),
]
GREEDY = SamplingOptions(temperature=0.0)


@pytest.fixture(scope="module")
def model(make_dalle):
    return make_dalle(attention_kinds=("axial_row", "full"))


def sample(model: Dalle, candidates: Sequence[int] = (0, 1, 2), **arguments: object):
    given = {"text_tokens": TEXT, "seed": 7} | arguments
    text_tokens = given.pop("text_tokens")
    return sample_image_tokens(model, text_tokens, candidates=candidates, **given)


def greedy_without_cache(model: Dalle, text_tokens: torch.Tensor, scale: float) -> torch.Tensor:
    """The whole sequence again for every code, both branches, and guidance by its definition."""
    N, M = model.config.num_positions, model.config.num_codebooks
    image_tokens = torch.zeros(1, N, M, dtype=torch.int64)
    for position in range(N):
        for m in range(M):
            with_caption, without = (
                model.code_logits(
                    model._hidden(text, image_tokens[:, :-1])[1][:, position],
                    m,
                    image_tokens[:, position],
                )
                for text in (text_tokens, torch.zeros_like(text_tokens))
            )
            guided = without + scale * (with_caption - without)
            image_tokens[:, position, m] = guided.argmax(dim=-1)
    return image_tokens


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kinds", KINDS)
def test_cached_sampling_equals_uncached_sampling(kinds, guidance_scale, make_dalle):
    model = make_dalle(attention_kinds=kinds, num_layers=3)
    options = SamplingOptions(temperature=0.0, guidance_scale=guidance_scale)
    sampled = sample(model, range(2), options=options)
    expected = greedy_without_cache(model, TEXT, guidance_scale)
    assert (sampled.image_tokens == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_so_it_does_with_another_number_of_codebooks(num_codebooks, make_dalle):
    model = make_dalle(num_codebooks=num_codebooks)
    sampled = sample(model, [0], options=SamplingOptions(temperature=0.0, guidance_scale=3.0))
    assert (sampled.image_tokens == greedy_without_cache(model, TEXT, 3.0)).all()


def test_guidance_changes_the_tokens(model):
    plain, guided = (
        sample(model, options=SamplingOptions(temperature=0.0, guidance_scale=scale))
        for scale in (1.0, 3.0)
    )
    assert (plain.image_tokens != guided.image_tokens).any()


def test_guidance_0_ignores_the_caption(model):
    options = SamplingOptions(guidance_scale=0.0)
    first = sample(model, options=options)
    second = sample(model, text_tokens=OTHER_TEXT, options=options)
    assert (first.image_tokens == second.image_tokens).all()
    assert (first.log_likelihood != second.log_likelihood).any(), "that is of the caption"


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        GREEDY,
        SamplingOptions(temperature=0.5, top_k=3, top_p=0.8),
        SamplingOptions(guidance_scale=3.0),
    ],
)
@pytest.mark.parametrize("kinds", KINDS)
def test_the_log_likelihood_is_the_teacher_forced_one(kinds, options, make_dalle):
    model = make_dalle(attention_kinds=kinds)
    sampled = sample(model, options=options)
    expected = model.log_likelihood(TEXT.expand(3, -1), sampled.image_tokens)
    torch.testing.assert_close(sampled.log_likelihood, expected, atol=1e-3, rtol=1e-5)


def test_tokens_are_of_the_codebook_and_inputs_stay_as_they_were(model):
    text_tokens, prime_tokens = TEXT.clone(), torch.full((3, M), 5)
    image_tokens = sample(model, text_tokens=text_tokens, prime_tokens=prime_tokens).image_tokens
    assert image_tokens.shape == (3, N, M)
    assert image_tokens.dtype == torch.int64
    assert ((image_tokens >= 0) & (image_tokens < V)).all()
    assert (text_tokens == TEXT).all()
    assert (prime_tokens == 5).all()
    assert not model.training
    assert all(not parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("chunks", [[[5]], [[5, 0]], [[9, 8, 5, 7]], [[0, 1, 2], [3, 4, 5]]])
def test_a_candidate_is_the_same_whatever_is_sampled_beside_it(chunks, guidance_scale, model):
    options = SamplingOptions(guidance_scale=guidance_scale)
    whole = sample(model, range(12), options=options)
    for chunk in chunks:
        part = sample(model, chunk, options=options)
        assert (part.image_tokens == whole.image_tokens[chunk]).all()
        torch.testing.assert_close(part.log_likelihood, whole.log_likelihood[chunk])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_so_it_is_beside_other_captions(guidance_scale, model):
    options = SamplingOptions(guidance_scale=guidance_scale)
    alone = sample(model, [4, 2], options=options)
    other = sample(model, [4], text_tokens=OTHER_TEXT, options=options)
    both = torch.cat([TEXT, OTHER_TEXT, TEXT])
    together = sample(model, [4, 4, 2], text_tokens=both, options=options)
    assert (together.image_tokens[[0, 2]] == alone.image_tokens).all()
    assert (together.image_tokens[1] == other.image_tokens[0]).all()
    torch.testing.assert_close(together.log_likelihood[[0, 2]], alone.log_likelihood)


def test_captions_must_be_one_or_one_a_candidate(model):
    with pytest.raises(ValueError, match="text_tokens must have 1 or 3 rows, got 2"):
        sample(model, text_tokens=torch.cat([TEXT, OTHER_TEXT]))


@pytest.mark.slow
def test_candidates_and_seeds_differ(model):
    # Seeds that share their 32-bit words with another's candidates, too.
    seeds = [0, 1, 7, 2**32, 2**32 + 1, 2**53 - 1]
    images = [sample(model, range(4), seed=seed).image_tokens for seed in seeds]
    assert len(torch.cat(images).flatten(1).unique(dim=0)) == 4 * len(seeds)
    again = sample(model, range(4), seed=seeds[-1]).image_tokens
    assert (again == images[-1]).all()


def test_torchs_own_random_numbers_are_neither_read_nor_moved(model):
    torch.manual_seed(1)
    first, state = sample(model), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert (sample(model).image_tokens == first.image_tokens).all()
    torch.manual_seed(1)
    assert (torch.random.get_rng_state() == state).all()


def test_temperature_0_ignores_the_seed_and_the_candidate(model):
    first = sample(model, options=GREEDY, seed=1).image_tokens
    second = sample(model, options=GREEDY, seed=2).image_tokens
    assert (first == second).all()
    assert (first == first[:1]).all()


@pytest.mark.parametrize("options", [SamplingOptions(top_k=1), SamplingOptions(temperature=1e-40)])
def test_the_narrowest_filters_are_greedy(options, model):
    greedy = sample(model, options=GREEDY).image_tokens
    assert (sample(model, options=options).image_tokens == greedy).all()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("primed", [1, 4, 6, N - 1, N])
def test_priming_keeps_the_rows_and_goes_on_as_the_unprimed_run_would(
    primed, guidance_scale, model
):
    options = SamplingOptions(guidance_scale=guidance_scale)
    unprimed = sample(model, [3], options=options).image_tokens
    prime_tokens = unprimed[0, :primed]
    sampled = sample(model, [1, 3], options=options, prime_tokens=prime_tokens)
    assert (sampled.image_tokens[:, :primed] == prime_tokens).all()
    assert (sampled.image_tokens[1] == unprimed[0]).all()


def test_primed_positions_are_not_counted_in_the_likelihood(model):
    sampled = sample(model, [0])
    primed = sample(model, [0], prime_tokens=sampled.image_tokens[0, :4])
    _, hidden = model._hidden(TEXT, sampled.image_tokens[:, :-1])
    each = model._log_probabilities(hidden, sampled.image_tokens)
    torch.testing.assert_close(primed.log_likelihood, each[:, 4:].sum(dim=(1, 2)))
    assert sample(model, prime_tokens=sampled.image_tokens[0]).log_likelihood.tolist() == [0.0] * 3


def keys(count: int) -> torch.Tensor:
    """Keys [count] of the noise of one candidate."""
    return torch.from_numpy(image_noise_keys(0, 0, count))


LOGITS = torch.tensor([0.05, 0.4, 0.05, 0.3, 0.2]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.4, 0.05, 0.3, 0.2]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 5}, [0.05, 0.4, 0.05, 0.3, 0.2]),
        ({"top_k": 99}, [0.05, 0.4, 0.05, 0.3, 0.2]),
        ({"top_p": 0.3}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_p": 1.0}, [0.05, 0.4, 0.05, 0.3, 0.2]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 0.5}, [0.0025, 0.16, 0.0025, 0.09, 0.04]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_filters_keep_the_likeliest_in_their_proportions(options, expected):
    """The chi-square of each share: 28 is exceeded once in ten million times."""
    chosen = choose(LOGITS.expand(100_000, -1), keys(100_000), SamplingOptions(**options))
    counts = torch.bincount(chosen, minlength=5).double()
    shares = torch.tensor(expected, dtype=torch.float64) / sum(expected)
    likely = shares > 0
    assert (counts[~likely] == 0).all()
    expected_counts = len(chosen) * shares[likely]
    assert ((counts[likely] - expected_counts) ** 2 / expected_counts < 28).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_fewest_tokens_that_have_the_mass(top_p):
    torch.manual_seed(0)
    logits = torch.randn(50) * 2
    chosen = choose(logits.expand(20_000, -1), keys(20_000), SamplingOptions(top_p=top_p))
    kept = chosen.unique()
    probabilities = logits.softmax(dim=0)[kept]
    assert probabilities.sum() >= top_p - 1e-4
    assert probabilities.sum() - probabilities.min() < top_p
    assert probabilities.min() >= logits.softmax(dim=0).sort(descending=True).values[len(kept) - 1]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_no_more_of_equal_tokens(top_k):
    chosen = choose(torch.zeros(600, 6), keys(600), SamplingOptions(top_k=top_k))
    assert len(chosen.unique()) == top_k


def test_a_token_of_probability_0_is_never_chosen():
    logits = torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf, 1.0, -torch.inf, -torch.inf])
    chosen = choose(logits.expand(20_000, -1), keys(20_000), SamplingOptions())
    assert chosen.unique().tolist() == [2, 4]


def test_the_noise_is_the_same_by_unsigned_arithmetic():
    """The hash by numpy's own 32 unsigned bits, and the logarithms in float64."""
    size = 3000
    noise_keys = np.append(image_noise_keys(3, 1, 40), [0, -1, 2**63 - 1, -(2**63)])
    halves = noise_keys.view(np.uint32).reshape(-1, 2)  # lower half first, as x86 and ARM store it
    low, high = halves[:, :1], halves[:, 1:]

    def mix(x):
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)

    hashes = mix(mix(np.arange(size, dtype=np.uint32) + low) ^ high)
    uniforms = (hashes.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    uniforms = np.minimum(uniforms, np.float32(1 - 2**-24)).astype(np.float64)
    expected = torch.from_numpy(-np.log(-np.log1p(-uniforms)))
    noise = gumbel_noise(torch.from_numpy(noise_keys), size)
    torch.testing.assert_close(noise.double(), expected, atol=2e-6, rtol=1e-6)
    assert (gumbel_noise(torch.from_numpy(noise_keys), 100) == noise[:, :100]).all()


def test_the_noise_of_different_tokens_positions_and_candidates_is_independent():
    """Correlations of 200,000 pairs each; 0.012 is 5.4 standard deviations."""
    noise = torch.stack(
        [gumbel_noise(torch.from_numpy(image_noise_keys(1, k, 200)), 1000) for k in range(2)]
    )
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.std() - math.pi / 6**0.5) < 0.01
    shifts = [(0, 0, 1), (0, 0, 16), (0, 0, 256), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]
    for shift in shifts:
        moved = noise.roll(shift, dims=(0, 1, 2))
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), moved.flatten()]))[0, 1]) < 0.012


def test_of_equal_scores_the_first_token_is_chosen():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    assert choose(logits, keys(1), GREEDY).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44, 1e-300])
def test_a_temperature_close_to_0_is_nearly_greedy(temperature):
    torch.manual_seed(0)
    logits = 30 * torch.randn(100, 9)
    chosen = choose(logits, keys(100), SamplingOptions(temperature=temperature))
    assert (chosen == logits.argmax(dim=1)).all()


def test_tokens_come_as_often_as_they_are_probable():
    """Chi-square of 20,000 tokens; 5 degrees of freedom exceed 40 once in six million times."""
    probabilities = torch.tensor([0.02, 0.28, 0.1, 0.35, 0.05, 0.2], dtype=torch.float64)
    chosen = choose(probabilities.log().expand(20_000, -1), keys(20_000), SamplingOptions())
    expected = 20_000 * probabilities
    counts = torch.bincount(chosen, minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 40


def test_images_come_as_often_as_they_are_probable(make_dalle):
    """The same for whole images: 2,000 candidates of 1 position against their likelihoods."""
    model = make_dalle(grid_size=1, codebook_size=3)
    sampled = sample(model, range(2000)).image_tokens.flatten(1)
    images = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    text_tokens = TEXT.expand(9, -1)
    expected = 2000 * model.log_likelihood(text_tokens, images[:, None]).exp()
    assert expected.sum() == pytest.approx(2000, rel=1e-4)
    counts = torch.bincount(3 * sampled[:, 0] + sampled[:, 1], minlength=9)
    likely = expected > 5
    assert likely.sum() > 2
    assert ((counts - expected) ** 2 / expected)[likely].sum() < 60


def complete(model: Dalle, prefix: Sequence[int], **arguments: object):
    given = {"num_completions": 6, "seed": 7} | arguments
    return complete_captions(model, torch.tensor(prefix, dtype=torch.int64), **given)


@pytest.mark.parametrize("prefix", [[], [3], [3, 1, 4, 1], [3, 1, 4, 1, 5]])
def test_a_completed_caption_keeps_its_beginning_and_ends_at_padding(prefix, make_dalle):
    model = make_dalle(text_vocab_size=3 if not prefix else 11)
    text_tokens, _ = complete(model, prefix, num_completions=40)
    assert text_tokens.shape == (40, T)
    assert (text_tokens[:, : len(prefix)] == torch.tensor(prefix, dtype=torch.int64)).all()
    assert ((text_tokens >= 0) & (text_tokens < model.config.text_vocab_size)).all()
    ended = (text_tokens == 0).cummax(dim=1).values
    assert (text_tokens[ended] == 0).all()
    if len(prefix) < T:
        assert ended.any()


def test_a_completions_likelihood_is_that_of_what_was_added_and_of_its_end(model):
    text_tokens, likelihood = complete(model, [3, 1], num_completions=30)
    log_p = model.text_logits(text_tokens).log_softmax(dim=-1)
    expected = []
    for row, tokens in enumerate(text_tokens.tolist()):
        end = tokens.index(0) + 1 if 0 in tokens else T
        expected.append(sum(float(log_p[row, i, tokens[i]]) for i in range(2, end)))
    torch.testing.assert_close(likelihood, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_caption_that_is_full_is_left_as_it_is(model):
    text_tokens, likelihood = complete(model, [3, 1, 4, 1, 5])
    assert (text_tokens == torch.tensor([3, 1, 4, 1, 5])).all()
    assert (likelihood == 0).all()


def test_a_completion_depends_on_its_seed_and_number_only(model):
    text_tokens, likelihood = complete(model, [3], num_completions=6)
    fewer, their_likelihood = complete(model, [3], num_completions=2)
    assert (fewer == text_tokens[:2]).all()
    torch.testing.assert_close(their_likelihood, likelihood[:2])
    assert len(text_tokens.unique(dim=0)) > 1
    assert (complete(model, [3], seed=8)[0] != text_tokens).any()


def test_on_step_can_stop_a_completion(model):
    steps: list[int] = []

    def stop_at_3(done: int) -> bool:
        steps.append(done)
        return done < 3

    with pytest.raises(SamplingStopped):
        complete(model, [3], num_completions=40, on_step=stop_at_3)
    assert steps == [2, 3]


def test_a_greedy_completion_ignores_the_seed(model):
    first, _ = complete(model, [3], options=GREEDY, seed=1)
    second, _ = complete(model, [3], options=GREEDY, seed=2)
    assert (first == second).all()
    assert len(first.unique(dim=0)) == 1


def test_a_model_in_training_mode_is_refused(make_dalle):
    model = make_dalle(dropout=0.1).train()
    tokens = torch.tensor([[1, 2, 3, 0, 0]])
    with pytest.raises(ValueError, match="must be in evaluation mode to sample"):
        complete_captions(model, tokens[0, :2], num_completions=1, seed=0)
