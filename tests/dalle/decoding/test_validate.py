"""Lower precision: close to the model, independent of the load, and refused where it is not."""

import pytest
import torch

from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.torch_decoder import matrix
from dalle.decoding.validate import (
    Accuracy,
    AccuracyBounds,
    build_engine,
    compare,
    measure_key_ranges,
    sample_reference,
)
from dalle.errors import ArtefactError, DeviceError
from dalle.types import ATTENTION_KINDS
from tests.dalle.decoding.reference import sample_image_tokens

TEXT = torch.tensor([[3, 1, 4, 0, 0]])


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models.transformer


@pytest.fixture(scope="module")
def text_tokens(tiny_models):
    return tiny_models.tokenizer.encode(["a red star"])


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_matrix_is_close_to_its_layer(precision, close, has_bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 40, bias=has_bias).requires_grad_(False)
    x = torch.randn(9, 64)
    x[3] *= 1000
    x[4] = 0
    expected = linear(x)
    found = matrix(linear, precision)(x)
    assert found.dtype == torch.float32
    size = expected.abs().amax(dim=1, keepdim=True) + 1e-9
    assert ((found - expected) / size).abs().max() < close
    if precision != "fp32":
        assert (found != expected).any()


def test_bytes_give_a_row_the_same_whatever_stands_beside_it():
    torch.manual_seed(0)
    multiply = matrix(torch.nn.Linear(64, 40).requires_grad_(False), "int8")
    x = torch.randn(33, 64)
    x[7] *= 1e4
    together = multiply(x)
    for row in range(33):
        assert (multiply(x[row : row + 1]) == together[row]).all()


def test_a_layer_that_no_kernel_takes_is_refused_by_name():
    linear = torch.nn.Linear(8, 8, device="meta")
    with pytest.raises(DeviceError, match="int8 weights need an x86 processor .* use fp32"):
        matrix(linear, "int8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "agreement"), [("fp32", 1.0), ("bf16", 0.9), ("fp16", 0.99), ("int8", 0.9)]
)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_every_precision_has_nearly_the_probabilities_of_the_model(
    kind, precision, agreement, make_dalle
):
    model = make_dalle(attention_kinds=(kind,), width=64, num_heads=2, grid_size=12)
    for parameter in model.parameters():
        parameter.mul_(0.4)
    reference = sample_reference(model)
    key_ranges = measure_key_ranges(model, reference) if precision == "int8" else None
    accuracy = compare(model, reference, precision, key_ranges)
    assert accuracy.greedy_agreement >= agreement
    assert accuracy.likelihood_change < 0.05
    assert (accuracy.likelihood_change > 1e-5) == (precision != "fp32")


def test_bf16_is_for_a_gpu(model):
    with pytest.raises(DeviceError, match="device cpu must be fp32, fp16 or int8, got bf16"):
        build_engine(model, 1, "bf16")


@pytest.mark.gpu
def test_on_a_gpu_bf16_is_built_and_compared(make_dalle):
    model = make_dalle(width=64, grid_size=12).cuda()
    engine = build_engine(model, 3, "bf16", bounds=AccuracyBounds(greedy_agreement=0.5))
    engine.submit(TEXT.cuda(), candidates=range(4), seed=0)
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    assert len(finished) == 4
    with pytest.raises(DeviceError, match="must be fp32 or bf16, got int8"):
        build_engine(model, 3, "int8")


def test_the_reference_is_what_the_model_samples(model, text_tokens):
    reference = sample_reference(model, text_tokens.expand(2, -1), seed=3)
    expected = sample_image_tokens(model, text_tokens, candidates=range(2), seed=3)
    assert (reference.image_tokens == expected.image_tokens).all()
    total = reference.log_p.sum(dim=(0, 2))
    torch.testing.assert_close(total, expected.log_likelihood, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_is_built_in_the_precision_asked_for(precision, model, text_tokens):
    bounds = AccuracyBounds(greedy_agreement=0.5)  # the tiny model is untrained: all tokens alike
    engine = build_engine(model, 4, precision, captions=text_tokens, bounds=bounds)
    engine.submit(text_tokens, candidates=range(3), seed=1)
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    assert len(finished) == 3
    expected = sample_image_tokens(model, text_tokens, candidates=range(3), seed=1)
    for each in finished:
        likelihood = float(expected.log_likelihood[each.number])
        if precision == "fp32":
            assert (each.image_tokens == expected.image_tokens[each.number]).all()
        assert each.log_likelihood == pytest.approx(likelihood, rel=0.1)


def test_an_accuracy_that_is_no_number_is_refused(model, monkeypatch):
    nothing = Accuracy(greedy_agreement=1.0, likelihood_change=float("nan"))
    monkeypatch.setattr("dalle.decoding.validate.compare", lambda *_: nothing)
    with pytest.raises(ArtefactError, match="log p differs by nan nats"):
        build_engine(model, 1, "fp16")


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        (AccuracyBounds(greedy_agreement=1.01), "at least 101.0% is right"),
        (AccuracyBounds(greedy_agreement=0.0, likelihood_change=1e-9), "at most 0.000"),
    ],
)
def test_an_engine_beyond_the_bounds_is_refused(bounds, says, model):
    with pytest.raises(ArtefactError, match="decoding in int8 would change this model") as raised:
        build_engine(model, 4, "int8", bounds=bounds)
    assert says in str(raised.value)
    assert str(raised.value).endswith("use fp32")


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_in_bytes_too_a_candidate_does_not_depend_on_the_load(guidance_scale, model, text_tokens):
    """To the last bit: sums of bytes are exact, and rows are scaled one by one."""
    options = SamplingOptions(guidance_scale=guidance_scale)
    bounds = AccuracyBounds(greedy_agreement=0.0)

    def sample(num_slots: int, candidates, late: int) -> dict[int, tuple[list[int], float]]:
        engine = build_engine(model, num_slots, "int8", bounds=bounds)
        for number in range(late):
            engine.submit(text_tokens.flip(1), candidates=range(number, late), seed=2)
            engine.step()
        own = engine.submit(text_tokens, candidates=candidates, seed=5, options=options)
        found = {}
        while not engine.is_idle:
            for each in engine.step():
                if each.request is own:
                    found[each.number] = (
                        each.image_tokens.flatten().tolist(),
                        each.log_likelihood,
                    )
        return found

    whole = sample(16, range(6), 0)
    assert sample(2, [4], 0)[4][0] == whole[4][0]
    beside_others = sample(7, [3, 4, 0], 3)
    assert all(beside_others[number][0] == whole[number][0] for number in beside_others)


def test_a_longer_image_is_compared_at_both_of_its_ends(make_dalle):
    model = make_dalle(grid_size=12)
    reference = sample_reference(model)
    assert [(each.start, each.stop) for each in reference.windows] == [(0, 48), (96, 144)]
    assert reference.log_p.shape == (96, 4, 2)
    engine = DecodeEngine(model, 1)
    assert engine.is_idle
