"""The benchmark runs, and its last line can be read by a program."""

import json

import pytest
import torch

from dalle.models import sizes
from inference.bench import __main__ as bench
from inference.bench import http as bench_http
from inference.bench import peers as bench_peers
from inference.bench import steps as bench_steps

pytestmark = pytest.mark.slow


def test_the_last_line_is_json_with_every_figure(capsys):
    bench.main(
        [
            "--size",
            "tiny",
            "--candidates",
            "1,3",
            "--rounds",
            "2",
            "--device",
            "cpu",
            "--probe-mb",
            "8",
        ]
        + ["--precision", "fp32,fp16,int8"]
    )
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert [(each["precision"], each["candidates"]) for each in figures["steps"]] == [
        (precision, candidates) for candidates in (1, 3) for precision in ("fp32", "fp16", "int8")
    ]
    for each in figures["steps"]:
        assert each["step_ms"] > 0
        assert each["tokens_per_second"] == pytest.approx(
            1000 * each["candidates"] * 2 / each["step_ms"]
        )
        assert each["images_per_second"] == pytest.approx(each["tokens_per_second"] / (16 * 2))
        assert 0 < each["outside_kernels"] < 1
        assert each["tables_mb"] > 0
    assert set(figures["stages_ms"]) == {"decode", "encode", "rank"}
    assert figures["torch"] == torch.__version__
    assert figures["positions"] == 16
    assert set(figures["request_seconds"]) == {"queue", "sample", "decode", "rank", "encode"}
    assert figures["request_images_per_second"] > 0
    assert "1" in figures["threads_ms"], "one thread was tried"
    assert len(lines) == 1 + 1 + 6 + 3 + 1 + 1


def test_an_artefact_is_measured_as_it_is(tiny_artefact, capsys):
    arguments = [
        "--model",
        str(tiny_artefact),
        "--candidates",
        "2",
        "--rounds",
        "1",
        "--full",
        "--probe-mb",
        "8",
    ]
    bench.main([*arguments, "--precision", "fp32", "--threads", "1", "--requests", "0"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["size"], figures["full"]) == (None, True)
    assert figures["threads_ms"] == {}


def test_windows_are_compared_by_whole_requests_of_equal_tokens(tiny_artefact, capsys):
    arguments = ["--model", str(tiny_artefact), "--windows", "1,3,auto", "--candidates", "1,2"]
    bench.main([*arguments, "--precision", "fp32,int8", "--threads", "1", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])["windows"]
    assert [(each["precision"], each["candidates"], each["window"]) for each in figures] == [
        (precision, candidates, window)
        for precision in ("fp32", "int8")
        for candidates in (1, 2)
        for window in (1, 3, None)
    ]
    assert len(lines) == 1 + len(figures) + 1
    for each in figures:
        low, high = each["ratio_quartiles"]
        assert each["request_ms"] > 0
        assert low <= each["ratio"] <= high
        if each["window"] == 1:
            assert (each["ratio"], each["positions_per_step"]) == (1.0, 1.0)
        if each["outside_step"] is not None:
            assert 0 < each["outside_step"] < 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--precision", "int4"], "--precision must be of"),
        (
            ["--precision", "bf16", "--size", "tiny", "--device", "cpu"],
            "'int8') on cpu, got ['bf16']",
        ),
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
        (["--windows", "1,0"], "must be numbers of at least 1, or auto, like 1,8,auto; got '1,0'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, says, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert says in capsys.readouterr().err


def test_the_first_step_of_a_depth_does_not_count():
    timings = bench_steps.Timings()
    for depth, seconds in ((0.1, 9.0), (0.1, 1.0), (0.1, 3.0), (0.1, 2.0), (0.9, 9.0), (0.9, 4.0)):
        timings.note(depth, seconds)
    assert timings.first == {0.1: 9.0, 0.9: 9.0}
    assert timings.step_seconds == pytest.approx((2.0 + 4.0) / 2)


def test_one_step_has_no_spread():
    timings = bench_steps.Timings(first={0.1: 9.0}, later={0.1: [2.0]})
    assert (timings.step_seconds, timings.spread) == (2.0, 0.0)
    timings.later[0.9] = [1.0, 2.0, 3.0]
    assert timings.spread == pytest.approx(1.0)


def test_one_round_beside_dalle_pytorch_is_enough(make_dalle, monkeypatch, capsys):
    """Without DALLE-pytorch, of which the environment is made elsewhere."""

    class Peer:
        transformer = torch.nn.Linear(2, 3)

        def eval(self):
            return self

    def step(*_):
        return lambda: None

    monkeypatch.setattr("dalle.peers.dalle_pytorch", Peer)
    monkeypatch.setattr(bench_peers, "Dalle", lambda _: make_dalle())
    monkeypatch.setattr(bench_peers, "_Shipped", step)
    monkeypatch.setattr(bench_peers, "_Patched", step)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    words = ["--inside", "--batch", "1", "--precision", "fp32", "--rounds", "1"]
    try:
        bench_peers.main(words)
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    contenders = [each["contender"] for each in figures["results"]]
    assert contenders == ["shipped", "patched", "fp32"]
    assert figures["weights"]["theirs"] == 9


def test_things_compared_take_turns():
    order: list[str] = []
    timings = {name: bench_steps.Timings() for name in "ab"}
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    bench_steps.take_turns(steps, timings, 0.5, 3, torch.device("cpu"))
    assert order == list("ababab")


def test_steps_that_are_timed_together_count_each_by_itself(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(
        bench_steps,
        "timed",
        lambda work, _: work() or 3.0,  # seconds a turn
    )
    timings = {name: bench_steps.Timings() for name in "ab"}
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    bench_steps.take_turns(steps, timings, 0.5, 2, torch.device("cpu"), together=3)
    assert "".join(order) == "ab" + "aaabbb", "the first turn warms up"
    assert timings["a"].first == {0.5: 3.0}
    assert timings["a"].later == {0.5: [1.0]}


def test_a_step_reads_each_weight_once_and_what_its_queries_see(make_dalle):
    model = make_dalle(num_codebooks=1)
    matrices = 2 * (3 * 16 * 16 + 16 * 16 + 2 * 4 * 16 * 16) + 7 * 16
    keys_and_values = 2 * (6 + 16 / 2) * 2 * 16  # layers, inputs seen at mid-image, two of a width
    assert bench_steps.step_bytes(model, 3, "fp32") == 4 * (matrices + 3 * keys_and_values)
    assert bench_steps.step_bytes(model, 3, "fp16") == 2 * matrices + 4 * 3 * keys_and_values
    assert bench_steps.step_bytes(model, 3, "int8") == matrices + 3 * keys_and_values
    sparse = make_dalle(num_codebooks=1, attention_kinds=("axial_row",))
    assert bench_steps.step_bytes(sparse, 3, "fp32") < bench_steps.step_bytes(model, 3, "fp32")


def test_steps_without_our_own_kernels_can_be_measured(monkeypatch, capsys):
    monkeypatch.setattr("dalle.decoding.select.CpuStep", None)
    arguments = ["--size", "tiny", "--candidates", "2", "--rounds", "2", "--probe-mb", "8"]
    arguments += ["--device", "cpu", "--threads", "1", "--requests", "0", "--torch-kernels"]
    bench.main(arguments)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["precision"] for each in figures["steps"]] == ["fp32", "int8"]
    assert not figures["own_kernels"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_bf16_reaches_a_share_of_the_memorys_speed(capsys):
    arguments = ["--size", "tiny", "--candidates", "2", "--rounds", "2", "--probe-mb", "8"]
    bench.main([*arguments, "--device", "cuda"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["precision"] for each in figures["steps"]] == ["fp32", "bf16"]
    assert all(0 < each["bandwidth_share"] < 1 for each in figures["steps"])
    assert figures["gpu"]


def test_the_engine_that_is_measured_in_bf16_finishes_whole_images(make_dalle):
    model = bench_steps.in_precision(make_dalle(), "bf16")
    engine = bench_steps.engine_at(model, 3, 0.5, "bf16", None)
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    assert len(finished) == 3
    assert engine.num_bytes == 2 * 2 * 3 * (5 + 16) * 16 * 2  # layers, two of each input, a width


def test_time_outside_kernels_is_what_torch_does_not_compute():
    numbers = torch.ones(300_000)

    def beside_torch():
        sum(range(300_000))

    assert bench_steps.share_outside_kernels(lambda: numbers.sort()) < 0.5
    assert bench_steps.share_outside_kernels(beside_torch) > 0.9


def test_every_size_has_what_the_benchmark_builds():
    assert set(sizes.DVAE_SIZES) == set(sizes.TRANSFORMER_SIZES) == set(sizes.CLIP_SIZES)


def test_the_share_left_through_http_is_a_ratio_of_the_same_requests(tiny_artefact, capsys):
    words = ["--clients", "2", "--requests", "3", "--turns", "2", "--num-candidates", "2"]
    bench_http.main(["--model", str(tiny_artefact), "--num-images", "1", *words])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert len(lines) == len(figures["ratios"]) + 1 == 3
    assert 0 < min(figures["ratios"]) <= figures["ratio"] <= max(figures["ratios"])
    assert figures["pings"] >= 2
    assert figures["ping_p50_ms"] <= figures["ping_p99_ms"] <= figures["ping_max_ms"]
