"""A report of costs is measured here and now, and says when its code has changed since."""

import os
from contextlib import contextmanager

import pytest

from infra.benchmark.revision import outdated
from infra.benchmark.run_file import load_run, save_run
from infra.compare import report
from infra.compare.report import REPORTS, main, render, runs_of, types_of_gpu
from tests.infra.measured_runs import CPU, GPU

CHANGED = "Not the present code"


def test_the_reports_of_this_repository_say_when_their_code_has_changed_since():
    silent = []
    for folder in {path.parent for path in REPORTS.glob("*/compare.html")}:
        runs = {path.stem: load_run(path) for path in runs_of(folder)}
        pages = [(folder / f"compare.{kind}").read_text("utf-8") for kind in ("html", "txt")]
        if outdated(runs) and not all(CHANGED in page for page in pages):
            silent.append(folder.name)
    assert silent == [], "`make docs` renders the reports again"


@pytest.fixture
def served(serve_url, monkeypatch):
    """`serve` of tiny models in the place of the one that a report starts; no GPU.

    A list of the cores and the device that it would have been started with.
    """
    started = []

    @contextmanager
    def serving(root, log):
        started.append((len(os.sched_getaffinity(0)), os.environ["DALLE_DEVICE"]))
        yield serve_url

    monkeypatch.setattr(report, "serving", serving)
    monkeypatch.setattr(report, "this_machine", lambda device: CPU.hardware)
    return started


@pytest.mark.slow
def test_a_report_is_measured_on_so_many_cores_and_rendered(served, tmp_path):
    cores = os.sched_getaffinity(0)
    words = ["--root", str(tmp_path), "--reports", str(tmp_path / "reports"), "--cores", "1"]
    assert main(["measure", *words, "--requests", "2", "--clients", "1", "--name", "tiny"]) == 0
    assert served == [(1, "cpu")]
    assert os.sched_getaffinity(0) == cores
    assert "DALLE_DEVICE" not in os.environ
    (folder,) = (tmp_path / "reports").iterdir()
    assert folder.name.endswith("_tiny")
    run = load_run(folder / "1-cores.json")
    assert run.hardware.cpu_limit == 1
    assert run.stands_for == ["ml.c7i.large", "serverless"]
    assert "While callers wait, " in (folder / "compare.txt").read_text("utf-8")
    assert (folder / "compare.html").read_text("utf-8").startswith("<!doctype html>")


def test_more_cores_than_there_are_is_refused(served, tmp_path, capsys):
    assert main(["measure", "--root", str(tmp_path), "--cores", "4096"]) == 1
    assert "--cores must be 1 to the" in capsys.readouterr().err
    assert served == []


def test_a_gpu_without_a_price_is_named_and_left_out(tmp_path):
    save_run(CPU.model_copy(update={"stands_for": ["ml.m5.large"]}), tmp_path / "cpu.json")
    hardware = GPU.hardware.model_copy(update={"gpu": "NVIDIA X9"})
    save_run(GPU.model_copy(update={"hardware": hardware}), tmp_path / "gpu.json")
    render(tmp_path)
    text = (tmp_path / "compare.txt").read_text("utf-8")
    assert text.endswith("Left out: gpu, since no host with NVIDIA X9 has a known price.\n")


@pytest.mark.parametrize(
    ("gpu", "types"),
    [
        ("NVIDIA H100 80GB HBM3", ["ml.p5.4xlarge"]),
        ("NVIDIA L40S", ["ml.g6e.xlarge"]),
        ("NVIDIA L4", ["ml.g6.xlarge"]),
        ("NVIDIA X9", []),
    ],
)
def test_a_gpu_stands_for_the_type_that_has_one_of_it(gpu, types):
    assert types_of_gpu(gpu) == types
