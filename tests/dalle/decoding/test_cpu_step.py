"""The compiled step: as exact as torch's kernels, and replaced by them where it cannot run."""

import ctypes
import os
import platform
import shutil
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dalle.decoding.cpu import step as cpu_step
from dalle.decoding.cpu import structures
from dalle.decoding.cpu.step import CpuStep, why_not
from dalle.decoding.cpu.torch_step import CpuTorchStep
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.gpu.torch_step import GpuTorchStep
from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.select import describe_step, needs_key_ranges, new_step
from dalle.decoding.step import Step
from dalle.decoding.validate import measure_key_ranges, sample_reference
from dalle.types import ATTENTION_KINDS
from tests.dalle.decoding.compiled import BUILDS_HERE, runs_here
from tests.dalle.decoding.test_engine import run

TEXT = torch.tensor([[3, 1, 4, 0, 0]])
OTHER_TEXT = torch.tensor([[2, 7, 1, 8, 2]])
PRECISIONS = ["fp32", "fp16", "int8"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=BUILDS_HERE)
def build(request, monkeypatch):
    """Each of the builds that run on this processor, not the best one alone."""
    monkeypatch.setattr(cpu_step, "library", lambda: structures.load(request.param))


def begun(step, model, captions):
    """Load caption k into slot k; return the states [slots, W] that predict the first position."""
    hidden = []
    for slot, caption in enumerate(captions):
        cache = model.new_cache(1)
        hidden.append(model.prefill(caption, None, cache))
        step.load(torch.tensor([slot]), step.pack(cache))
    return torch.cat(hidden)


def walk(step, slots, codes):
    """Run the step on codes [positions, slots, M]; return the states after each position."""
    slots = np.array(slots)
    return torch.stack(
        [
            step(slots, each, np.full(len(slots), position)).clone()
            for position, each in enumerate(codes)
        ]
    )


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which("g++"),
    reason="no compiler for this machine",
)
def test_setup_has_built_it():
    assert structures.library() is not None


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("fp16", 1e-3), ("int8", 0.1)])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize(
    ("width", "num_heads", "fields"),
    [
        (48, 1, {}),
        (36, 2, {"feed_forward": "gelu", "norm": "rms"}),
        (24, 4, {"feed_forward": "geglu", "layer_scale": 0.5, "num_codebooks": 3}),
        (256, 2, {"qk_norm": False, "num_codebooks": 1, "num_layers": 1}),
    ],
)
def test_it_is_as_exact_as_torchs_kernels(
    width, num_heads, fields, kind, precision, close, make_dalle
):
    model = make_dalle(
        width=width, num_heads=num_heads, attention_kinds=(kind,), grid_size=5, **fields
    )
    for parameter in model.parameters():
        parameter.mul_(0.4)  # or no query sees more than one input
    config = model.config
    codes = torch.randint(config.codebook_size, (20, 2, config.num_codebooks))
    ranges = measure_key_ranges(model, sample_reference(model)) if precision == "int8" else None
    steps: list[Step] = [
        CpuStep(model, 2, precision=precision),
        CpuTorchStep(model, 2, precision=precision, key_ranges=ranges),
        CpuTorchStep(model, 2),
    ]
    states, logits = [], []
    for step in steps:
        begun(step, model, [TEXT, OTHER_TEXT])
        states.append(walk(step, [0, 1], codes))
        logits.append(step.code_logits(states[-1][-1], config.num_codebooks - 1, codes[0]))
    for native, torchs, exact in (states, logits):
        size = exact.abs().max()
        assert (native - exact).abs().max() / size < close
        # Not by chance: the error is of the size that this precision has.
        assert (native - exact).abs().mean() < 2 * (torchs - exact).abs().mean() + 1e-6 * size


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_depends_neither_on_other_rows_nor_on_the_number_of_threads(
    precision, make_dalle, threads
):
    model = make_dalle(attention_kinds=("full", "axial_col"), width=40, num_heads=2)
    captions = [TEXT, OTHER_TEXT] * 10
    codes = torch.randint(7, (6, 20, 2))
    step = CpuStep(model, 20, precision=precision)
    torch.set_num_threads(1)
    begun(step, model, captions)
    together = walk(step, range(20), codes)
    for number, slots in ((1, [3]), (2, [3, 0]), (3, [9, 3, 1, 19, 2, 8, 7]), (2, range(19))):
        torch.set_num_threads(1)  # torch's own kernels may depend on it
        begun(step, model, captions)
        torch.set_num_threads(number)
        again = walk(step, slots, codes[:, list(slots)])
        assert (again == together[:, list(slots)]).all()
        logits = step.code_logits(again[-1], 1, codes[-1, list(slots)])
        for row, slot in enumerate(slots):
            alone = step.code_logits(together[-1, slot][None], 1, codes[-1, slot][None])
            assert (logits[row] == alone[0]).all()


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_rows_of_one_slot_see_each_other_as_in_steps_of_one_row(
    precision, kind, make_dalle, threads
):
    model = make_dalle(attention_kinds=("full", kind), width=40, num_heads=2)
    codes = torch.randint(7, (12, 2, 2))
    step = CpuStep(model, 24, precision=precision)
    begun(step, model, [TEXT, OTHER_TEXT])
    one_by_one = walk(step, [0, 1], codes)
    # Guesses that are wrong leave keys and values behind them, which are written again.
    step(np.repeat([0, 1], 12), torch.randint(7, (24, 2)), np.tile(np.arange(3, 15), 2))
    for number, first in ((1, 5), (2, 1), (2, 11)):
        torch.set_num_threads(1)  # torch's own kernels may depend on it
        begun(step, model, [TEXT, OTHER_TEXT])
        torch.set_num_threads(number)
        for window in (np.arange(first), np.arange(first, 12)):
            slots, positions = np.repeat([1, 0], len(window)), np.tile(window, 2)
            states = step(slots, codes[positions, slots], positions)
            assert (states == one_by_one[positions, slots]).all()


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.0),
        SamplingOptions(temperature=1e-40),
        SamplingOptions(temperature=1.7),
        SamplingOptions(top_k=1),
        SamplingOptions(top_k=5, temperature=0.5),
        SamplingOptions(top_k=1000),
        SamplingOptions(top_p=0.6),
        SamplingOptions(top_p=1e-9),
        SamplingOptions(top_p=0.9, top_k=30, guidance_scale=3.0),
        SamplingOptions(guidance_scale=0.0),
    ],
)
def test_codes_are_sampled_as_by_the_reference(options, make_dalle):
    model = make_dalle(codebook_size=100, num_codebooks=3, width=64, num_heads=2)
    step = CpuStep(model, 80)
    engine = DecodeEngine(model, 80, step=step, window=1)
    engine.submit(TEXT, candidates=range(40), seed=5, options=options)
    engine.step()
    batch = engine._batch
    assert batch is not None
    torch.manual_seed(2)
    hidden = 3 * torch.randn(len(batch.rows), 64)
    noise_keys = torch.randint(-(2**63), 2**63 - 1, (40, 3))
    codes, log_likelihood = step.sample(hidden, noise_keys, batch)
    expected_codes, expected = batch.sample(step.code_logits, hidden, noise_keys)
    assert (codes == expected_codes).all()
    assert len(codes.unique()) > 10
    assert (log_likelihood - expected).abs().max() < 1e-4


@runs_here
def test_where_logits_are_equal_no_more_than_k_codes_are_sampled(make_dalle):
    model = make_dalle(codebook_size=50, num_codebooks=1)
    for parameter in model.code_heads.parameters():
        parameter.data.zero_()
    engine = DecodeEngine(model, 40, step=CpuStep(model, 40))
    engine.submit(TEXT, candidates=range(40), seed=5, options=SamplingOptions(top_k=3))
    sampled = []
    while not engine.is_idle:
        sampled += [each.image_tokens for each in engine.step()]
    assert len(torch.cat(sampled).unique()) == 3


@runs_here
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_the_parents_threads(make_dalle, threads):
    torch.set_num_threads(2)
    model = make_dalle()
    step = CpuStep(model, 1)
    begun(step, model, [TEXT])
    walk(step, [0], torch.zeros(1, 1, 2, dtype=torch.int64))
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it where it waits after all
        status = 1
        try:
            walk(step, [0], torch.zeros(1, 1, 2, dtype=torch.int64))
        except RuntimeError as error:
            status = 0 if "forked" in str(error) else 2
            del step
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@runs_here
def test_a_step_of_more_rows_than_it_has_room_for_is_refused(make_dalle):
    step = CpuStep(make_dalle(), 1)
    with pytest.raises(ValueError, match="2 rows, but the step has room for 1"):
        step(np.arange(2), torch.zeros(2, 2, dtype=torch.int64), np.zeros(2, np.int64))


def test_where_it_cannot_run_the_reason_is_given_and_torchs_kernels_decode(make_dalle, monkeypatch):
    wide = make_dalle(width=272, num_heads=2)
    if structures.library() is not None:
        assert why_not(wide, "fp32") in (
            "head width must be at most 128, got 136",
            "the processor has no AVX2",
        )
    model = make_dalle()
    monkeypatch.setattr(cpu_step, "library", lambda: None)
    assert describe_step(model, "int8").startswith(
        "torch's kernels, because the compiled step is not built"
    )
    assert needs_key_ranges(model, "int8")
    assert not needs_key_ranges(model, "fp16")
    assert isinstance(new_step(model, 1), CpuTorchStep)
    with pytest.raises(ValueError, match="no compiled step: the compiled step is not built"):
        CpuStep(model, 1)
    assert isinstance(new_step(model.to(torch.bfloat16), 1), GpuTorchStep)
    assert describe_step(model, "bf16") == (
        "torch's kernels, because Triton kernels are for a GPU, not for cpu"
    )
    assert why_not(model, "fp32") == (
        "the compiled step is for float32 on a CPU, not torch.bfloat16 on cpu"
    )


def test_a_processor_without_avx2_uses_torchs_kernels(make_dalle, monkeypatch):
    class Library:
        def dalle_support(self):
            return 0

    monkeypatch.setattr(cpu_step, "library", Library)
    assert describe_step(make_dalle(), "fp32") == (
        "torch's kernels, because the processor has no AVX2"
    )


@runs_here
@pytest.mark.parametrize("which", [slice(None), slice(2, 3)])
def test_logits_that_are_nan_are_an_error(which, make_dalle):
    model = make_dalle()
    engine = DecodeEngine(model, 1, step=CpuStep(model, 1))
    engine.submit(TEXT, candidates=[0], seed=0)
    model.code_heads[0].to_logits.bias[which] = torch.nan  # in memory shared with the step
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        run(engine, [])


@runs_here
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [CpuStep, CpuTorchStep])
def test_so_are_those_of_the_row_without_caption(step, value, make_dalle):
    model = make_dalle()
    engine = DecodeEngine(model, 4, step=step(model, 4))
    engine.submit(TEXT, candidates=[0], seed=0, options=SamplingOptions(guidance_scale=2.0))
    engine.submit(TEXT, candidates=[1], seed=0)
    engine._admit()
    engine._state.hidden[1] = value  # of the first candidate's row without caption
    engine.step()
    state = engine._state
    has_decoder = engine._decoder is not None
    log_p = state.log_p[:, 0] if has_decoder else state.log_likelihood
    assert log_p[0].isnan()
    assert log_p[2].isfinite()


class Loaded:
    """Library of another platform or of another version."""

    def __init__(self, support, layout):
        self.dalle_support = lambda: support
        if layout is not None:
            self.dalle_layout = layout


def same_layout(sizes):
    """Write the sizes of this version."""
    names = ("CModel", "CLayer", "CHead", "CSampling", "CCandidate", "CState", "CLeader")
    ours = [getattr(structures, name) for name in names]
    sizes_of = [*map(ctypes.sizeof, ours), structures.LANES, structures.MOST_HEAD_WIDTH]
    numbers = [structures.INTERFACE, *sizes_of]
    sizes[: len(numbers)] = numbers


@pytest.mark.parametrize(
    "layout",
    [None, lambda sizes: None, same_layout],
    ids=["no layout", "another layout", "no dalle_sample"],
)
def test_code_of_another_version_is_not_used(layout, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin="it.so"))
    monkeypatch.setattr("ctypes.CDLL", lambda path: Loaded(1, layout))
    assert structures.library.__wrapped__() is None
    assert "it.so is of another version" in caplog.text


def test_on_another_platform_the_library_reports_no_support(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin="it.so"))
    monkeypatch.setattr("ctypes.CDLL", lambda path: Loaded(0, None))
    assert structures.library.__wrapped__().dalle_support() == 0


def test_the_best_build_that_runs_on_this_processor_is_used(monkeypatch):
    names: dict[str, Any] = {"_native_avx512": Loaded(0, None), "_native_avx2": Loaded(1, None)}
    monkeypatch.setattr(structures, "load", names.get)
    assert structures.library.__wrapped__() is names["_native_avx2"]
    names["_native_avx512"] = Loaded(2, None)
    assert structures.library.__wrapped__() is names["_native_avx512"]
    del names["_native_avx2"], names["_native_avx512"]
    assert structures.library.__wrapped__() is None


def test_code_that_cannot_be_loaded_is_not_used(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "it.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=broken))
    assert structures.library.__wrapped__() is None
    assert "it.so cannot be loaded" in caplog.text


@runs_here
def test_without_vnni_bytes_have_seven_bits(make_dalle, monkeypatch):
    """On a processor with VNNI both kernels can run."""
    model = make_dalle(width=64, num_heads=2)
    codes = torch.randint(7, (6, 1, 2))
    exact = CpuTorchStep(model, 1)
    begun(exact, model, [TEXT])
    expected = walk(exact, [0], codes)
    library = structures.library()

    class SevenBits:
        dalle_support = staticmethod(lambda: 1)

        def __getattr__(self, name):
            return getattr(library, name)

    monkeypatch.setattr(cpu_step, "library", SevenBits)
    step = CpuStep(model, 1, precision="int8")
    begun(step, model, [TEXT])
    found = walk(step, [0], codes)
    assert (found - expected).abs().max() / expected.abs().max() < 0.1
