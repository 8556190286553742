"""The engine samples the same tokens as the reference, whatever else is in its slots."""

import pytest
import torch

from dalle.decoding.cpu.step import CpuStep
from dalle.decoding.cpu.torch_step import CpuTorchStep, FloatTable
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.gpu.torch_step import GpuTorchStep
from dalle.decoding.sampling import SamplingOptions
from dalle.models.layers import visibility
from dalle.types import ATTENTION_KINDS
from tests.dalle.decoding.compiled import runs_here
from tests.dalle.decoding.reference import sample_image_tokens

T, N, M, V = 5, 16, 2, 7  # of conftest's tiny transformer
TEXT = torch.tensor([[3, 1, 4, 0, 0]])
OTHER_TEXT = torch.tensor([[2, 7, 1, 8, 2]])
KINDS = [
    *[(kind,) for kind in ATTENTION_KINDS],
    ("axial_row", "axial_col", "conv_like"),
    ("full", "conv_like"),
]
STEPS = [pytest.param(CpuStep, marks=runs_here), CpuTorchStep, GpuTorchStep]
PRIME = torch.tensor([[5, 1], [0, 6], [2, 2], [3, 4], [1, 0], [6, 6]])
REQUESTS = [
    {"text_tokens": TEXT, "candidates": range(4), "seed": 7},
    {
        "text_tokens": OTHER_TEXT,
        "candidates": range(2),
        "seed": 3,
        "options": SamplingOptions(guidance_scale=3.0),
    },
    {
        "text_tokens": TEXT,
        "candidates": range(2, 5),
        "seed": 9,
        "options": SamplingOptions(temperature=0.7, top_k=3, top_p=0.9),
        "prime_tokens": PRIME,
    },
    {
        "text_tokens": TEXT,
        "candidates": [1, 0],
        "seed": 9,
        "options": SamplingOptions(temperature=0.0, guidance_scale=0.5),
        "prime_tokens": PRIME[:1],
    },
    {"text_tokens": OTHER_TEXT, "candidates": [5], "seed": 1, "options": SamplingOptions(top_k=1)},
]


@pytest.fixture(scope="module")
def model(make_dalle):
    return make_dalle(attention_kinds=("axial_row", "full"))


def run(engine: DecodeEngine, requests=REQUESTS, every: int = 5):
    """Submit a request every few steps; tokens and log-likelihood by request and candidate."""
    found: dict[tuple[int, int], tuple[torch.Tensor, float]] = {}
    submitted: list[object] = []
    steps = 0
    while len(submitted) < len(requests) or not engine.is_idle:
        if steps % every == 0 and len(submitted) < len(requests):
            request = dict(requests[len(submitted)])
            submitted.append(engine.submit(request.pop("text_tokens"), **request))
        for each in engine.step():
            key = submitted.index(each.request), each.number
            assert key not in found
            found[key] = each.image_tokens, each.log_likelihood
        steps += 1
        assert steps < 2000, "a candidate does not end"
    return found


def assert_as_sampled(model, found, requests=REQUESTS):
    assert len(found) == sum(len(request["candidates"]) for request in requests)
    for number, request in enumerate(requests):
        arguments = dict(request)
        sampled = sample_image_tokens(model, arguments.pop("text_tokens"), **arguments)
        for row, candidate in enumerate(request["candidates"]):
            image_tokens, log_likelihood = found[number, candidate]
            assert (image_tokens == sampled.image_tokens[row]).all()
            expected = float(sampled.log_likelihood[row])
            assert log_likelihood == pytest.approx(expected, abs=1e-3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kinds", KINDS)
def test_it_samples_as_the_reference_at_mixed_positions(kinds, step, make_dalle):
    model = make_dalle(attention_kinds=kinds, num_layers=3)
    engine = DecodeEngine(model, 5, step=step(model, 5))
    assert_as_sampled(model, run(engine))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "fields",
    [
        {"num_codebooks": 1},
        {"num_codebooks": 3},
        {"qk_norm": False},
        {"target_position": False},
        {"layer_scale": 0.3},
        {"norm": "rms", "feed_forward": "gelu"},
        {"feed_forward": "geglu", "layer_scale": 2.0},
        {"grid_size": 2},
        {"grid_size": 1},
    ],
)
def test_so_it_does_for_every_field_of_the_config(fields, step, make_dalle):
    model = make_dalle(**fields)
    engine = DecodeEngine(model, 4, step=step(model, 4))
    requests = [{**request, "prime_tokens": None} for request in REQUESTS]
    assert_as_sampled(model, run(engine, requests, every=1), requests)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("num_slots", [2, 3, 40])
@pytest.mark.parametrize("every", [1, 7])
def test_neither_slots_nor_arrival_change_anything(num_slots, every, step, model):
    engine = DecodeEngine(model, num_slots, step=step(model, num_slots))
    assert_as_sampled(model, run(engine, every=every))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_long_sequence_is_read_in_blocks(step, make_dalle, monkeypatch):
    """Rows a block apart, and a block's first and last input."""
    monkeypatch.setattr("dalle.decoding.gpu.torch_step._BLOCK", 8)
    kinds = ("full", "axial_row")  # of which the second sees more than a block at first
    model = make_dalle(grid_size=10, text_length=9, num_codebooks=1, attention_kinds=kinds)
    requests = [
        {"text_tokens": torch.zeros(1, 9).long(), "candidates": [number], "seed": 4}
        for number in range(3)
    ]
    found = run(DecodeEngine(model, 3, step=step(model, 3)), requests, every=41)
    assert_as_sampled(model, found, requests)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_step_reads_what_its_queries_see_and_little_else(kind, make_dalle, monkeypatch):
    """Counts the keys and values that one step of two candidates reads."""
    model = make_dalle(attention_kinds=(kind,), text_length=5, grid_size=8, num_codebooks=1)
    config = model.config
    engine = DecodeEngine(model, 2, step=CpuTorchStep(model, 2))
    prime = torch.zeros(40, 1, dtype=torch.int64)  # the next position is the first of a row
    engine.submit(TEXT, candidates=range(2), seed=0, prime_tokens=prime)
    numbers_read = []
    sums, fetch = FloatTable.sums, FloatTable.fetch

    def noted_sums(self, indices, *others):
        numbers_read.append(indices.numel() * self.table.shape[1])
        return sums(self, indices, *others)

    def noted_fetch(self, indices):
        numbers_read.append(indices.numel() * self.table.shape[1])
        return fetch(self, indices)

    monkeypatch.setattr(FloatTable, "sums", noted_sums)
    monkeypatch.setattr(FloatTable, "fetch", noted_fetch)
    engine.step()
    inputs = sum(numbers_read) / (2 * 2 * config.num_layers * config.width)
    visible = visibility(kind, 5, 8, config.conv_kernel_size).sum(dim=1)
    # Of the sparse kinds as many as any query sees; of the full one whole blocks of 16.
    assert inputs == (48 if kind == "full" else int(visible[6:].max()))
    assert visible[6 + 40] <= inputs < visible[6 + 40] + 16


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_whose_every_position_is_primed_is_finished_at_once(guidance_scale, model):
    engine = DecodeEngine(model, 2)
    prime_tokens = torch.full((N, M), 4)
    options = SamplingOptions(guidance_scale=guidance_scale)
    engine.submit(TEXT, candidates=[3, 1], seed=0, options=options, prime_tokens=prime_tokens)
    finished = engine.step()
    assert [each.number for each in finished] == [3, 1]
    assert all((each.image_tokens == 4).all() for each in finished)
    assert [each.log_likelihood for each in finished] == [0.0, 0.0]
    assert engine.is_idle


def test_freed_slots_are_filled_at_once(model):
    engine = DecodeEngine(model, 3, window=1)
    engine.submit(TEXT, candidates=range(7), seed=0)
    busy = []
    while not engine.is_idle:
        engine.step()
        busy.append(engine.busy_slots)
    # Three at a time: the first position of the next ones follows the last position of others, and
    # no step is without work.
    assert len(busy) == 3 * N
    assert busy[:-N].count(0) == 2
    assert set(busy[2 * N : -1]) == {1}


def test_slots_go_to_the_request_that_has_fewest(model):
    engine = DecodeEngine(model, 4, window=1)
    long = engine.submit(TEXT, candidates=range(12), seed=0)
    for _ in range(3):
        engine.step()
    assert long.in_slots == 4
    short = engine.submit(OTHER_TEXT, candidates=range(2), seed=0)
    finished = []
    while short.waiting or short.in_slots:
        finished += engine.step()
    assert len(long.waiting) >= 4, "the long request came first, and still waits for half"
    assert {each.number for each in finished if each.request is short} == {0, 1}


@pytest.mark.parametrize("step", STEPS)
def test_a_cancelled_request_frees_its_slots_and_leaves_the_others_alone(step, model):
    engine = DecodeEngine(model, 4, step=step(model, 4))
    gone = engine.submit(
        TEXT, candidates=range(6), seed=0, options=SamplingOptions(guidance_scale=2)
    )
    kept = engine.submit(TEXT, candidates=range(3), seed=5)
    for _ in range(4):
        engine.step()
    assert gone.in_slots
    engine.cancel(gone)
    assert gone.in_slots == 0
    assert engine.busy_slots == kept.in_slots
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    assert all(each.request is kept for each in finished)
    expected = sample_image_tokens(model, TEXT, candidates=range(3), seed=5).image_tokens
    by_number = sorted(finished, key=lambda each: each.number)
    assert (torch.stack([each.image_tokens for each in by_number]) == expected).all()
    engine.cancel(kept)  # finished already: nothing to give up
    assert engine.busy_slots == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_an_engine_that_was_reset_begins_anew(step, model):
    engine = DecodeEngine(model, 5, step=step(model, 5))
    engine.submit(TEXT, candidates=range(9), seed=1)
    for _ in range(3):
        engine.step()
    engine.reset()
    assert engine.is_idle
    assert engine.busy_slots == 0
    assert_as_sampled(model, run(engine))


def test_tokens_so_far_are_the_beginning_of_the_finished_image(model):
    engine = DecodeEngine(model, 2, window=1)
    request = engine.submit(TEXT, candidates=[4], seed=0)
    for done in range(1, N):
        engine.step()
        ((number, tokens),) = engine.tokens_so_far(request)
        assert (number, tokens.shape) == (4, (done, M))
    (finished,) = engine.step()
    assert (finished.image_tokens[: N - 1] == tokens).all()
    assert engine.tokens_so_far(request) == []


def test_guidance_needs_two_slots(model):
    engine = DecodeEngine(model, 1)
    with pytest.raises(ValueError, match="num_slots must be at least 2 for guidance, got 1"):
        engine.submit(TEXT, candidates=[0], seed=0, options=SamplingOptions(guidance_scale=2.0))
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        DecodeEngine(model, 0)


def test_a_request_for_nothing_is_refused(model):
    engine = DecodeEngine(model, 1)
    with pytest.raises(ValueError, match="candidates must be at least one, got none"):
        engine.submit(TEXT, candidates=[], seed=0)
    assert engine.is_idle


def test_a_model_in_training_mode_is_refused(make_dalle):
    model = make_dalle().train()
    with pytest.raises(ValueError, match="evaluation mode"):
        DecodeEngine(model, 1)


def test_neither_weights_nor_arguments_change(make_dalle):
    model = make_dalle()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    text_tokens, prime_tokens = TEXT.clone(), PRIME.clone()
    requests = [
        {"text_tokens": text_tokens, "candidates": [0], "seed": 1, "prime_tokens": prime_tokens}
    ]
    found = run(DecodeEngine(model, 2), requests)
    assert (text_tokens == TEXT).all()
    assert (prime_tokens == PRIME).all()
    assert (found[0, 0][0][:6] == PRIME).all()
    assert all((before[name] == each).all() for name, each in model.state_dict().items())


@pytest.mark.slow
def test_torchs_own_random_numbers_are_neither_read_nor_moved(model):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = run(DecodeEngine(model, 3))
    assert (torch.random.get_rng_state() == state).all()
    torch.manual_seed(2)
    second = run(DecodeEngine(model, 3))
    assert all((first[key][0] == second[key][0]).all() for key in first)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", KINDS)
def test_a_step_in_cuda_graphs_samples_as_the_reference(kinds, make_dalle, monkeypatch):
    monkeypatch.setattr("dalle.decoding.gpu.torch_step._BLOCK", 8)  # several graphs
    model = make_dalle(attention_kinds=kinds, num_layers=3).cuda()
    requests = [
        {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in request.items()
        }
        for request in REQUESTS
    ]
    found = run(DecodeEngine(model, 5, step=GpuTorchStep(model, 5)), requests)
    assert_as_sampled(model, found, requests)
    assert all(tokens.device.type == "cuda" for tokens, _ in found.values())
