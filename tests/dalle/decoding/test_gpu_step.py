"""The Triton kernels: interpreted without a GPU, half a second a step, and compiled with one."""

import copy
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dalle.decoding import select as steps
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.gpu import launch, layers, sampler
from dalle.decoding.gpu import step as gpu_step
from dalle.decoding.gpu.cuda_graph import CudaGraphs
from dalle.decoding.sampling import SamplingOptions, choose
from dalle.decoding.select import describe_step, new_step, why_not_triton
from dalle.decoding.validate import _walk, sample_reference
from tests.dalle.decoding.reference import sample_image_tokens
from tests.dalle.decoding.test_engine import (
    KINDS,
    OTHER_TEXT,
    PRIME,
    REQUESTS,
    TEXT,
    assert_as_sampled,
    run,
)
from tests.dalle.decoding.triton_interpreter import GpuStep

FIELDS = [
    {"norm": "rms", "feed_forward": "gelu", "num_codebooks": 1},
    {"feed_forward": "geglu", "layer_scale": 2.0, "num_codebooks": 3},
    {"qk_norm": False, "target_position": False, "width": 24},
    {"codebook_size": 130, "layer_scale": 0.3, "num_codebooks": 1},
    {"grid_size": 1},
]
SMALL = {"num_layers": 1, "grid_size": 2, "num_codebooks": 1}
FEW = [
    {
        "text_tokens": TEXT,
        "candidates": range(2),
        "seed": 7,
        "options": SamplingOptions(temperature=0.7, top_k=3, top_p=0.9),
        "prime_tokens": PRIME[:1],
    },
    {
        "text_tokens": OTHER_TEXT,
        "candidates": [1],
        "seed": 3,
        "options": SamplingOptions(guidance_scale=3.0),
    },
]
GREEDY = SamplingOptions(temperature=0.0)

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled for it"
)


@pytest.fixture(autouse=True)
def in_small_pieces(monkeypatch):
    """Imitate a GPU on a CPU: run a function once before its capture, and read in several pieces as
    for long sequences and wide layers."""
    if torch.cuda.is_available():
        return
    add = CudaGraphs.add

    def add_after_a_run(self, name, work):
        work()
        add(self, name, work)

    monkeypatch.setattr(CudaGraphs, "add", add_after_a_run)
    monkeypatch.setattr(gpu_step, "_FULL", (8, 4))
    monkeypatch.setattr(gpu_step, "_SPARSE", (4, 1))
    monkeypatch.setattr(layers, "_INNER", 32)


def engine_of(model, num_slots):
    return DecodeEngine(model, num_slots, step=GpuStep(model, num_slots))


def finished_by(engine):
    finished = {}
    while not engine.is_idle:
        finished |= {each.number: each for each in engine.step()}
    return finished


def on_gpu(requests):
    return [
        {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in request.items()
        }
        for request in requests
    ]


@interpreted
@pytest.mark.slow
def test_it_samples_as_the_reference_in_every_kind_of_attention(make_dalle):
    kinds = ("axial_row", "axial_col", "conv_like", "full")
    model = make_dalle(attention_kinds=kinds, num_layers=4, grid_size=3)
    requests = [{**request, "candidates": [1]} for request in FEW]
    assert_as_sampled(model, run(engine_of(model, 3), requests, every=2), requests)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("fields", FIELDS)
def test_so_it_does_for_every_field_of_the_config(fields, make_dalle):
    model = make_dalle(**(SMALL | fields))
    requests = [{**request, "prime_tokens": None} for request in FEW]
    assert_as_sampled(model, run(engine_of(model, 3), requests, every=1), requests)


@pytest.mark.slow
@interpreted
def test_slots_that_were_freed_are_as_new(make_dalle):
    model = make_dalle(**SMALL)
    engine = engine_of(model, 3)
    guidance = SamplingOptions(guidance_scale=3.0)
    gone = engine.submit(TEXT, candidates=range(2), seed=0, options=guidance)
    engine.submit(OTHER_TEXT, candidates=range(3), seed=5, options=GREEDY)
    engine.step()
    engine.cancel(gone)
    engine.step()
    finished = finished_by(engine)
    assert set(finished) == {0, 1, 2}
    expected = sample_image_tokens(model, OTHER_TEXT, candidates=[1], seed=5, options=GREEDY)
    assert all((each.image_tokens == expected.image_tokens[0]).all() for each in finished.values())
    engine.submit(TEXT, candidates=range(2), seed=1)
    engine.step()
    engine.reset()
    engine.submit(TEXT, candidates=[4], seed=2, prime_tokens=torch.tensor([[3], [1], [5]]))
    (last,) = finished_by(engine).values()
    prime = {"candidates": [4], "seed": 2, "prime_tokens": torch.tensor([[3], [1], [5]])}
    assert (last.image_tokens == sample_image_tokens(model, TEXT, **prime).image_tokens[0]).all()


@pytest.mark.slow
@interpreted
def test_log_p_in_bf16_is_close_to_fp32(make_dalle):
    """Other tokens may be sampled than in fp32, but the log p given for them is theirs."""
    model = make_dalle(**SMALL)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    engine = engine_of(copy.deepcopy(model).bfloat16(), 4)
    engine.submit(TEXT, candidates=range(2), seed=3)
    guidance = SamplingOptions(guidance_scale=2.0)
    engine.submit(TEXT, candidates=range(2, 4), seed=3, options=guidance)
    for finished in finished_by(engine).values():
        exact = float(model.log_likelihood(TEXT, finished.image_tokens[None]))
        assert finished.log_likelihood == pytest.approx(exact, abs=0.1)


@pytest.mark.slow
@interpreted
def test_one_step_can_be_walked_by_hand(make_dalle):
    """As `validate.compare` does."""
    model = make_dalle(**(SMALL | {"num_codebooks": 2}))
    sample = sample_reference(model)
    step = GpuStep(model, len(sample.text_tokens))
    walked = [
        _walk(model, step, sample.text_tokens, sample.image_tokens, window, None)
        for window in sample.windows
    ]
    log_p, likeliest = (torch.cat(each) for each in zip(*walked, strict=True))
    torch.testing.assert_close(log_p, sample.log_p, atol=1e-3, rtol=1e-4)
    assert (likeliest == sample.likeliest).all()


@pytest.mark.slow
@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_logits_that_are_nan_are_an_error(make_dalle):
    model = make_dalle(**SMALL)
    engine = engine_of(model, 2)
    # In the branch without caption alone, whose log p is not used.
    engine.submit(TEXT, candidates=[0], seed=0, options=SamplingOptions(guidance_scale=2.0))
    engine.step()
    engine._state.hidden[1] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        finished_by(engine)


@pytest.mark.slow
@interpreted
def test_a_code_is_chosen_as_by_the_reference():
    V = 100
    ways = [
        SamplingOptions(temperature, top_k, top_p)
        for temperature, top_k, top_p in itertools.product(
            (0.0, 0.02, 1.0, 3.0), (None, 1, 7, V), (None, 0.01, 0.5, 0.999)
        )
    ]
    S = len(ways)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(S, V, generator=generator) * 4
    logits[::3, :5] = logits[::3].amax(dim=1, keepdim=True)  # equal ones
    noise_keys = torch.randint(-(2**63), 2**63 - 1, (S, 1, 1), generator=generator)
    plan = torch.zeros(S, len(sampler.PLAN_COLUMNS), dtype=torch.float64)
    plan[:, sampler.BLANK] = sampler.NO_GUIDANCE
    for slot, way in enumerate(ways):
        plan[slot, sampler.TEMPERATURE] = way.temperature
        plan[slot, sampler.TOP_K] = way.top_k or V
        plan[slot, sampler.TOP_P] = way.top_p or 1.0
    bias = torch.randn(V, generator=generator)
    bias[:5] = 0.0
    positions, codes = torch.zeros(S, dtype=torch.int64), torch.zeros(S, 1, dtype=torch.int64)
    image_tokens, log_p = torch.zeros(S, 1, 1, dtype=torch.int64), torch.zeros(S)
    sampler.sample_code[S,](
        logits, bias, plan, positions, noise_keys, codes, image_tokens, log_p, 0, M=1, N=1, V=V,
        BLOCK_V=128,
    )  # fmt: skip
    logits = logits + bias
    expected = torch.cat(
        [choose(logits[slot : slot + 1], noise_keys[slot, 0], way) for slot, way in enumerate(ways)]
    )
    expected = expected[:, None]
    # The reference does not specify which of equal logits are left out.
    assert (logits.gather(1, codes) == logits.gather(1, expected)).all()
    unequal = torch.arange(S) % 3 != 0
    assert codes[unequal].tolist() == expected[unequal].tolist()
    assert (image_tokens[:, 0] == codes).all()
    torch.testing.assert_close(log_p, logits.log_softmax(-1).gather(1, codes)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["90 bfloat16 relu2 layer", "80 float32 geglu rms"])
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(arguments, tmp_path):
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.dalle.decoding.compile_kernels", *arguments.split()],
        env=environment | {"PYTHONPATH": "container:.", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    compiled = ended.stdout.split()
    assert compiled == [
        "activate",
        "attend",
        "normalise",
        "sample_code",
        "store_hidden",
        "sum_of_rows",
    ]


def test_a_kernel_that_needs_another_launch_is_refused():
    ptx = ".visible .entry f(\n\t.param .u64 .ptr f_param_0,\n\t.param .u32 f_param_1\n)"
    metadata = {"name": "f", "global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1}
    made = SimpleNamespace(asm={"ptx": ptx}, metadata=SimpleNamespace(**metadata))
    launch._check_launch(made, 0)
    with pytest.raises(RuntimeError, match="f takes 2 arguments instead of 3"):
        launch._check_launch(made, 1)
    made.metadata.global_scratch_size = 8
    with pytest.raises(RuntimeError, match="8 bytes of scratch"):
        launch._check_launch(made, 0)


def test_an_older_gpu_uses_torchs_kernels_and_the_reason_is_given(monkeypatch):
    model = SimpleNamespace(text_position=torch.empty(1, device="meta"))
    assert why_not_triton(model) == "Triton kernels are for a GPU, not for meta"
    device = torch.device("cuda")
    model = SimpleNamespace(text_position=SimpleNamespace(device=device, dtype=torch.bfloat16))
    capability = [7, 5]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    assert why_not_triton(model) == "the GPU is of capability 7.5, below 8.0"
    capability[:] = 9, 0
    assert why_not_triton(model) is None
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    assert describe_step(model, "bf16") == "torch's kernels, because triton is not installed"

    def without_bindings(name):
        if name == "cuda.bindings":
            raise ModuleNotFoundError("No module named 'cuda'")
        return name

    monkeypatch.setattr(steps, "find_spec", without_bindings)
    assert why_not_triton(model) == "cuda.bindings is not installed"


@pytest.mark.gpu
def test_a_newer_gpu_uses_triton_kernels(make_dalle):
    model = make_dalle().cuda()
    assert why_not_triton(model) is None
    assert describe_step(model, "fp32") == "Triton kernels"
    assert isinstance(new_step(model, 1), GpuStep)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", KINDS)
def test_on_a_gpu_it_samples_as_the_reference(kinds, make_dalle):
    model = make_dalle(attention_kinds=kinds, num_layers=3).cuda()
    requests = on_gpu(REQUESTS)
    found = run(engine_of(model, 5), requests)
    assert_as_sampled(model, found, requests)
    assert all(tokens.device.type == "cuda" for tokens, _ in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("num_slots", [3, 40])
def test_so_it_does_there_for_every_field_of_the_config(num_slots, fields, make_dalle):
    model = make_dalle(**fields).cuda()
    requests = on_gpu([{**request, "prime_tokens": None} for request in REQUESTS])
    assert_as_sampled(model, run(engine_of(model, num_slots), requests, every=1), requests)


@pytest.mark.gpu
def test_so_it_does_there_for_sequences_that_are_read_in_pieces(make_dalle):
    sizes = {"grid_size": 14, "text_length": 9, "width": 512, "num_heads": 8, "codebook_size": 8192}
    model = make_dalle(**sizes, num_codebooks=1, attention_kinds=("full", "axial_col"))
    for parameter in model.parameters():
        parameter.mul_(0.1)
    model = model.cuda()
    requests = [
        {"text_tokens": torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]]), "candidates": [number]}
        for number in range(3)
    ]
    requests = on_gpu([{**request, "seed": 4} for request in requests])
    assert_as_sampled(model, run(engine_of(model, 3), requests, every=41), requests)
