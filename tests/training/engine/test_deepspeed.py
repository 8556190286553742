"""training.engine.deepspeed_engine: two processes hold in parts what one holds whole."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests import REPOSITORY
from tests.forked import Forked
from tests.training.engine.deepspeed_work import (
    CASES,
    NUM_STEPS,
    RESUMED,
    Run,
    imports_deepspeed,
    work_into,
)

pytestmark = pytest.mark.slow

HALF = NUM_STEPS // 2
FP32 = [name for name in CASES if "bf16" not in name]
BF16 = [name for name in CASES if "bf16" in name]
AVERAGED = [name for name in FP32 if "averaged" in name]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The results of two processes, by rank, on a machine without a compiler."""
    scratch = tmp_path_factory.mktemp("deepspeed")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "PYTHONPATH": f"{REPOSITORY / 'container'}:{REPOSITORY}",
        "PATH": str(Path(sys.executable).parent),
        "HOME": "/nonexistent",
        "TORCH_EXTENSIONS_DIR": str(scratch / "extensions"),
        "TMPDIR": str(scratch),
    }
    assert not any((Path(environment["PATH"]) / tool).exists() for tool in ("g++", "c++", "mpirun"))
    files = [(scratch / f"{rank}.pt", scratch / f"{rank}.txt") for rank in range(2)]
    processes = [
        Forked(work_into, rank, server.port, *names, environment=environment)
        for rank, names in enumerate(files)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert not (scratch / "extensions").exists(), "something was compiled"
    return [
        torch.load(results, weights_only=True) | {"stdout": printed.read_text()}
        for results, printed in files
    ]


@pytest.fixture(scope="module")
def alone():
    """The same by one process of plain torch, with and without an average of the weights."""
    runs = {}
    for name, raw in (("plain", {}), ("averaged", {"ema_decay": "0.9"})):
        run = Run(raw).train(last=HALF)
        validated = run.validated()
        run.train(HALF)
        runs[name] = {
            "losses": run.losses,
            "norms": run.norms,
            "validated": validated,
            "state": run.engine.state(),
            "weights": run.finished(),
        }
    return runs


def of_one(alone, case):
    return alone["averaged" if case in AVERAGED else "plain"]


def largest_difference(ours, theirs):
    return max((ours[name] - value).abs().max().item() for name, value in theirs.items())


@pytest.mark.parametrize("case", FP32)
def test_two_processes_have_the_losses_of_one(seen, alone, case):
    one = of_one(alone, case)
    for rank in seen:
        assert rank[case]["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert rank[case]["norms"] == pytest.approx(one["norms"], rel=1e-3)


@pytest.mark.parametrize("case", BF16)
def test_half_as_many_bits_have_nearly_those_losses(seen, alone, case):
    losses = alone["plain"]["losses"]
    assert seen[0][case]["losses"] == pytest.approx(losses, rel=5e-3)
    assert seen[0][case]["losses"] != pytest.approx(losses, rel=1e-6), "it is not bf16 at all"
    assert losses[-1] < losses[0] - 0.1, "nothing was learned that could be compared"


@pytest.mark.parametrize("case", FP32)
def test_the_model_is_whole_and_right_between_steps_and_at_the_end(seen, alone, case):
    one = of_one(alone, case)
    for rank in seen:
        assert rank[case]["validated"] == pytest.approx(one["validated"], rel=1e-4)
        assert rank[case]["weights"].keys() == one["weights"].keys()
        assert largest_difference(rank[case]["weights"], one["weights"]) < 1e-4


@pytest.mark.parametrize("case", BF16)
def test_what_is_left_of_bf16_are_the_fp32_weights(seen, case):
    first, second = (rank[case]["weights"] for rank in seen)
    assert {value.dtype for value in first.values()} == {torch.float32}
    assert largest_difference(first, second) == 0
    assert any((value != value.bfloat16()).any() for value in first.values())


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_to_the_bit(seen, case):
    for rank in seen:
        assert rank[case]["resumed losses"] == rank[case]["losses"][HALF:]
        assert largest_difference(rank[case]["resumed weights"], rank[case]["weights"]) == 0


def test_a_checkpoint_is_gone_on_from_at_another_zero_stage(seen, alone):
    losses = alone["plain"]["losses"]
    assert seen[0]["from zero 1 to 3"] == pytest.approx(losses[HALF:], rel=1e-4)


@pytest.mark.parametrize("case", AVERAGED)
def test_the_average_is_that_of_one_process_and_not_the_weights(seen, alone, case):
    plain = alone["plain"]["weights"]
    assert largest_difference(seen[0][case]["weights"], plain) > 1e-3
    assert seen[0][case]["losses"] == pytest.approx(alone["plain"]["losses"], rel=1e-4)


def test_parts_and_recomputed_activations_change_no_loss_of_torchs_own_engine(alone):
    raw = {"gradient_accumulation_steps": "4", "activation_checkpointing": "true"}
    run = Run(raw).train()
    assert run.losses == pytest.approx(alone["plain"]["losses"], rel=1e-4)
    assert largest_difference(run.finished(), alone["plain"]["weights"]) < 1e-4


def test_nothing_but_metrics_goes_to_the_standard_output(seen):
    lines = [line for rank in seen for line in rank["stdout"].splitlines()]
    # Gloo itself writes a line for each group it makes.
    assert [line for line in lines if not line.startswith("[Gloo] ")] == []


def test_deepspeed_is_imported_only_where_it_is_used():
    assert Forked(imports_deepspeed).wait(timeout=300) == 0
