"""The kernels for a GPU: interpreted here, which takes a second a step, and compiled on a GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dalle import steps
from dalle.decoding import DecodeEngine
from dalle.precision import _walk, draw_sample
from dalle.recorded_step import Recordings
from dalle.sampling import SamplingOptions
from dalle.steps import describe_step, new_step, why_not_fused
from tests.fused import FusedStep
from tests.test_decoding import KINDS, OTHER_TEXT, PRIME, REQUESTS, TEXT, assert_as_sampled, run

FIELDS = [
    {"norm": "rms", "feed_forward": "gelu", "num_codebooks": 1},
    {"feed_forward": "geglu", "layer_scale": 2.0, "num_codebooks": 3},
    {"qk_norm": False, "target_position": False, "width": 24},
    {"codebook_size": 130, "layer_scale": 0.3, "num_codebooks": 1},
]
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


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """On a CPU, too, what is recorded is done beforehand, as it is on a GPU."""
    if torch.cuda.is_available():
        return
    add = Recordings.add

    def add_after_a_run(self, name, work):
        work()
        add(self, name, work)

    monkeypatch.setattr(Recordings, "add", add_after_a_run)


def engine_of(model, num_slots):
    return DecodeEngine(model, num_slots, step=FusedStep(model, num_slots))


def on_gpu(requests):
    return [
        {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in request.items()
        }
        for request in requests
    ]


@pytest.mark.slow
def test_it_draws_what_plain_sampling_does_in_every_kind_of_attention(make_dalle):
    kinds = ("axial_row", "axial_col", "conv_like", "full")
    model = make_dalle(attention_kinds=kinds, num_layers=4, grid_size=3)
    assert_as_sampled(model, run(engine_of(model, 4), FEW, every=2), FEW)


@pytest.mark.parametrize("fields", FIELDS)
def test_so_it_does_for_every_field_of_the_config(fields, make_dalle):
    model = make_dalle(num_layers=1, grid_size=2, **fields)
    requests = [{**request, "prime_tokens": None} for request in FEW]
    assert_as_sampled(model, run(engine_of(model, 3), requests, every=1), requests)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["90 bfloat16 relu2 layer", "80 float32 geglu rms"])
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(arguments, tmp_path):
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.compile_fused", *arguments.split()],
        env=environment | {"PYTHONPATH": "container:.", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    compiled = ended.stdout.split()
    assert compiled == ["activate", "attend", "draw_code", "normalise", "sum_of_rows", "take_in"]


def test_one_step_can_be_walked_by_hand(make_dalle):
    """As when its precision is compared."""
    model = make_dalle(num_layers=1, grid_size=2)
    sample = draw_sample(model)
    step = FusedStep(model, len(sample.text_tokens))
    walked = [
        _walk(model, step, sample.text_tokens, sample.image_tokens, window, None)
        for window in sample.windows
    ]
    log_p, likeliest = (torch.cat(each) for each in zip(*walked, strict=True))
    torch.testing.assert_close(log_p, sample.log_p, atol=1e-3, rtol=1e-4)
    assert (likeliest == sample.likeliest).all()


def test_a_gpu_that_it_is_not_for_draws_by_torch_and_the_reason_is_told(monkeypatch):
    model = SimpleNamespace(text_position=torch.empty(1, device="meta"))
    assert why_not_fused(model) == "the fused ones are for a GPU, not for meta"
    device = torch.device("cuda")
    model = SimpleNamespace(text_position=SimpleNamespace(device=device, dtype=torch.bfloat16))
    capability = [7, 5]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    assert why_not_fused(model) == "the GPU is of capability 7.5, below 8.0"
    capability[:] = 9, 0
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    assert describe_step(model, "bf16") == "torch's kernels, as triton is not installed"


@pytest.mark.gpu
def test_a_gpu_of_today_is_drawn_with_by_it(make_dalle):
    model = make_dalle().cuda()
    assert why_not_fused(model) is None
    assert describe_step(model, "fp32") == "fused kernels"
    assert isinstance(new_step(model, 1), FusedStep)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", KINDS)
def test_on_a_gpu_it_draws_what_plain_sampling_does(kinds, make_dalle):
    model = make_dalle(attention_kinds=kinds, num_layers=3).cuda()
    requests = on_gpu(REQUESTS)
    found = run(engine_of(model, 5), requests)
    assert_as_sampled(model, found, requests)
    assert all(tokens.device.type == "cuda" for tokens, _ in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [*FIELDS, {"grid_size": 10, "text_length": 9}])
@pytest.mark.parametrize("num_slots", [3, 40])
def test_so_it_does_there_for_every_field_of_the_config(num_slots, fields, make_dalle):
    model = make_dalle(**fields).cuda()
    requests = [
        {**request, "text_tokens": torch.zeros_like(request["text_tokens"]), "prime_tokens": None}
        for request in REQUESTS
    ]
    if "text_length" in fields:
        requests = [
            {**request, "text_tokens": torch.zeros(1, 9, dtype=torch.int64)} for request in requests
        ]
    requests = on_gpu(requests)
    assert_as_sampled(model, run(engine_of(model, num_slots), requests, every=1), requests)
