"""training.loop.metrics and dalle.platform.metric_lines: what is printed, written and read back."""

import io
import json
import re

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from dalle.platform.metric_lines import (
    METRIC_DEFINITIONS,
    METRIC_PATTERN,
    metric_definition,
    read_metrics,
    render_metrics,
)
from training.loop.budget import Budget
from training.loop.metrics import Metrics, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def metrics(tmp_path, output):
    with Metrics(tmp_path / "data/metrics.jsonl", tmp_path / "tb", output=output) as metrics:
        yield metrics


def lines_of(tmp_path):
    text = (tmp_path / "data/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def scalars_of(tmp_path):
    (path,) = (tmp_path / "tb").iterdir()
    events = list(EventFileLoader(str(path)).Load())
    return [(v.tag, e.step) for e in events for v in e.summary.value if v.tag]


@pytest.mark.parametrize("value", [0.0, 1, -3, 0.1, 1e-9, 123456789.0, -2.5e-7, 1e300, 1 / 3])
def test_every_number_printed_is_found_by_the_published_expressions(value):
    line = render_metrics({"dvae_loss": value, "dvae_validation_loss": value})
    assert re.fullmatch(rf"({METRIC_PATTERN} ?)+", line)
    assert read_metrics(line)["dvae_loss"] == pytest.approx(value, rel=1e-5)
    for name in ("dvae_loss", "dvae_validation_loss"):
        (definition,) = (d for d in METRIC_DEFINITIONS if d["Name"] == name)
        (found,) = re.findall(definition["Regex"], f"2026-11-22 INFO {line}")
        assert float(found) == pytest.approx(value, rel=1e-5)


def test_the_time_left_is_printed_and_not_kept(metrics, output, tmp_path):
    metrics.report("dvae", 5, 10.0, {"loss": 0.5}, seconds_left=61.4)
    assert output.getvalue() == "dvae_step=5; dvae_loss=0.5; dvae_seconds_left=61;\n"
    assert lines_of(tmp_path) == [{"stage": "dvae", "step": 5, "seconds": 10.0, "loss": 0.5}]


@pytest.mark.parametrize(
    ("budget", "left"),
    [(Budget(20, "step"), 150.0), (Budget(60, "s"), 10.0), (Budget(5, "step"), 0.0)],
)
def test_the_time_left_follows_the_budget(budget, left):
    assert budget.seconds_left(step=5, seconds=50.0) == left


def test_a_definition_does_not_match_a_longer_name():
    assert not re.search(metric_definition("loss")["Regex"], "dvae_loss=1;")
    assert not re.search(metric_definition("dvae_loss")["Regex"], "dvae_loss_total=1;")


def test_the_definitions_keep_within_the_platforms_limits():
    assert len(METRIC_DEFINITIONS) <= 40
    for definition in METRIC_DEFINITIONS:
        assert len(definition["Name"]) <= 255
        assert len(definition["Regex"]) <= 500
        assert re.compile(definition["Regex"]).groups == 1


def test_ordinary_text_holds_no_metrics():
    assert read_metrics("INFO a=b; c=1, d=; e=1.2.3;") == {}


def test_a_report_goes_to_the_log_the_file_and_tensorboard(metrics, output, tmp_path):
    metrics.report("dvae", 50, 1.5, {"loss": 0.25, "usage": float("nan")})
    metrics.close()
    assert output.getvalue() == "dvae_step=50; dvae_loss=0.25;\n"
    assert lines_of(tmp_path) == [
        {"stage": "dvae", "step": 50, "seconds": 1.5, "loss": 0.25, "usage": None}
    ]
    assert ("dvae/loss", 50) in scalars_of(tmp_path)


def test_on_a_terminal_reports_do_not_break_the_bar(tmp_path):
    terminal = Terminal()
    with Metrics(tmp_path / "metrics.jsonl", tmp_path / "tb", output=terminal) as metrics:
        metrics.report("dvae", 50, 1.5, {"loss": 0.25})
    assert terminal.getvalue() == ""


def test_a_resumed_stage_has_each_report_once(metrics, tmp_path):
    metrics.report("dvae", 1, 1.0, {"loss": 3.0})
    metrics.report("clip", 1, 1.0, {"loss": 2.0})
    saved = metrics.records("clip")
    metrics.report("clip", 2, 2.0, {"loss": 1.0})
    metrics.restore("clip", saved)
    metrics.report("clip", 2, 3.0, {"loss": 1.0})
    lines = [(line["stage"], line["step"], line["seconds"]) for line in lines_of(tmp_path)]
    assert lines == [("dvae", 1, 1.0), ("clip", 1, 1.0), ("clip", 2, 3.0)]


def test_progress_shows_a_bar_with_the_time_left_on_a_terminal():
    terminal = Terminal()
    bar = Progress("dvae", total=10, done=0, unit="step", output=terminal)
    bar.show(4, {"loss": 0.5})
    bar.show(12)
    bar.close()
    assert "dvae: 100%" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()


def test_progress_is_silent_elsewhere(output):
    bar = Progress("dvae", total=90.5, done=30.2, unit="s", output=output)
    bar.show(60)
    bar.close()
    assert output.getvalue() == ""
