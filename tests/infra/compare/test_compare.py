"""What a comparison says and shows: the article's figures, words, tables, page, charts, command."""

import html.parser
import json
import re

import numpy as np
import pytest

from infra.__main__ import main
from infra.benchmark.run_file import load_run, save_run
from infra.compare.charts import plot_costs, plot_latencies, shown
from infra.compare.page import render_page
from infra.compare.recommendation import about, quietness, recommendation, usd
from infra.compare.tables import article, tables
from infra.cost.prices import load_prices
from infra.cost.training import TrainingAssumptions, job_cost, load_plan
from tests import REPOSITORY
from tests.infra.measured_runs import CPU, GPU, a_run, compare, scenario

# --- the article


def test_the_articles_figures_stand_beside_ours():
    rows = article(compare(("cpu", CPU, ["ml.m5.large", "serverless"]))).rows
    assert rows[0] == [
        "USD a month, smallest CPU instance",
        "50",
        "$40.88",
        "ml.t2.medium: 0.056 USD per hour (undated, B) x 730 hours",
    ]
    ratios = {figure: ours for figure, _, ours, _ in rows[1:]}
    assert ratios["price of ml.g4dn.xlarge / ml.t2.medium"] == "13.2"
    assert rows[-1][2:] == ["not measured", "ml.m5.large 2.00 requests/s"]


def test_the_ratio_of_prices_follows_the_table():
    dear = [
        each.model_copy(update={"usd": 0.5}) if each.item == "ml.m5.large" else each
        for each in load_prices().prices
    ]
    table = load_prices().model_copy(update={"prices": dear})
    rows = article(compare(("cpu", CPU, ["ml.m5.large"]), table=table)).rows
    (ratio,) = (row[2] for row in rows if row[0] == "price of ml.g4dn.xlarge / ml.m5.large")
    assert ratio == "1.5"


def test_the_ratio_of_speeds_is_of_what_was_measured():
    comparison = compare(("cpu", CPU, ["ml.m5.large"]), ("gpu", GPU, ["ml.g5.xlarge"]))
    assert article(comparison).rows[-1] == [
        "speed of a GPU / a CPU",
        "3 or more",
        "20.0",
        "ml.g5.xlarge 40.00 requests/s / ml.m5.large 2.00 requests/s",
    ]


# --- words


def test_a_shared_machine_is_reported():
    shared = a_run(scenario(1, 1.0, 1.0, others_share=0.4), scenario(8, 2.0, 4.0, others_share=0.1))
    quiet = a_run(scenario(1, 1.0, 1.0, others_share=0.02))
    unknown = a_run(load_average=1.5)
    comparison = compare(
        ("shared", shared, ["ml.m5.large"]),
        ("quiet", quiet, ["ml.c5.large"]),
        ("unknown", unknown, ["serverless"]),
    )
    first, second, third = quietness(comparison)
    assert "shared: the machine was shared; others used up to 40%" in first
    assert "at most 2%" in second
    assert "load average of the measuring machine was 1.5" in third


def test_prices_that_are_doubtful_are_named_beside_the_recommendation():
    said = recommendation(compare(("cpu", CPU, ["ml.c6i.large"])))[-1]
    assert "ml.c6i.large (Hosting)" in said
    assert "prices refresh" in said


@pytest.mark.parametrize(
    ("amount", "text"),
    [(40.88, "$40.88"), (0.0042, "$0.0042"), (0.1, "$0.100"), (1240.4, "$1,240"), (0, "$0.00"),
     (0.000031, "$0.000031")],
)  # fmt: skip
def test_dollars_have_two_significant_digits_or_more(amount, text):
    assert usd(amount) == text


@pytest.mark.parametrize(("number", "text"), [(34_127, "34,000"), (7.2, "7"), (999, "1,000")])
def test_about_is_two_digits(number, text):
    assert about(number) in (text, "990")


# --- the report


class Checker(html.parser.HTMLParser):
    """Whether every element is closed where it should be, what it fetches, and where it leads."""

    VOID = frozenset({"meta"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []
        self.targets, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag, attributes):
        self._note(attributes)

    def _note(self, attributes):
        for name, value in attributes:
            if name == "href" and value.startswith("#"):
                self.targets.append(value[1:])
            elif name in ("src", "href"):
                self.fetched.append(value)
            elif name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def comparison():
    return compare(("cpu <1>", CPU, ["ml.m5.large", "ml.c7i.large", "serverless", "lambda"]))


@pytest.mark.slow
def test_the_page_is_whole_and_fetches_nothing(comparison):
    page = render_page(comparison, title="What a picture costs", date="2026-11-22")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert checker.targets
    assert all(checker.ids.count(target) == 1 for target in checker.targets)
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    text = " ".join(checker.text)
    for table in tables(comparison):
        assert table.title in text
        for row in table.rows:
            for cell in row:
                assert cell in text, f"{table.title}: {cell}"
    assert "cpu <1>" in text


def test_every_assumption_and_every_price_used_is_printed(comparison):
    shown = {table.title: table for table in tables(comparison)}
    names = [row[0] for row in shown["Assumptions"].rows]
    assert {"hours_per_month", "peak_to_mean", "async_cold_start_seconds"} <= set(names)
    assert names.count("stands for") == 4
    assert "async price" in names
    for each in comparison.prices:
        assert any(
            row[:2] == [each.item, each.component] and row[4:6] == [each.dated, each.confidence]
            for row in shown["Prices in us-east-1"].rows
        )


def test_the_chart_of_costs_has_at_most_five_lines_and_the_cheapest_ways_among_them(comparison):
    names = [each.name for each in shown(comparison)]
    assert len(names) == min(5, len(comparison.options))
    best = {each.option.name for each in comparison.ranges_at_once + comparison.ranges_any}
    assert best <= set(names)


@pytest.mark.slow
def test_the_page_begins_with_one_sentence_then_the_chart_then_the_reasons(comparison):
    page = render_page(comparison, title="T", date="2026-11-30")
    parts = ('class="lead"', "<svg", "<nav", "Reasons</h2>", "how far to trust it", ", B)")
    places = [page.index(part) for part in parts]
    assert places == sorted(places), "letters of confidence are explained before the first of them"
    lead = re.search(r'<p class="lead">(.*?)</p>', page)[1]
    assert lead.count(". ") == 0
    assert lead.endswith(".")


@pytest.mark.slow
def test_the_page_says_which_revision_was_measured_and_warns_of_an_old_one(monkeypatch):
    run = a_run(versions={"revision": "0123456789abcdef"})
    comparison = compare(("cpu", run, ["ml.m5.large"]))
    page = render_page(comparison, title="T", date="2026-11-30")
    assert "cpu: measured at revision 0123456789ab on 2026-11-22." in page
    monkeypatch.setattr("infra.compare.page.outdated", lambda runs: ["Not the present code: x"])
    page = render_page(comparison, title="T", date="2026-11-30")
    assert '<p class="warning" role="note">Not the present code: x</p>' in page


@pytest.mark.slow
def test_the_article_is_named_by_what_it_claims(comparison):
    page = render_page(comparison, title="T", date="2026-11-30")
    assert "A blog article of 2021 says</h2>" in page
    assert "the smallest instance without a GPU costs 50 USD a month" in page


def test_the_lines_of_costs_stay_inside_the_chart_and_cheap_is_low(comparison):
    (axis,) = plot_costs(comparison).axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert {each.name for each in shown(comparison)} <= set(lines)
    top = axis.get_ylim()[1]
    for each in shown(comparison):
        assert np.max(lines[each.name].get_ydata()) <= top
    ends = {name: line.get_ydata()[-1] for name, line in lines.items()}
    assert ends["ml.m5.large, scaled to zero"] < ends["serverless"]


def test_the_break_even_is_marked_where_the_lines_cross(comparison):
    (axis,) = plot_costs(comparison).axes
    (mark,) = (line for line in axis.get_lines() if line.get_marker() == "o")
    x, y = mark.get_xdata()[0], mark.get_ydata()[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    for name in ("serverless", "ml.m5.large, always on"):
        requests, usd_a_month = lines[name].get_data()
        near = min(range(len(requests)), key=lambda i: abs(requests[i] - x))
        assert usd_a_month[near] == pytest.approx(y, rel=0.1), name
    assert f"{about(comparison.crossings[0].requests_per_day)} a day" in axis.texts[0].get_text()


def test_a_distribution_rises_from_nothing_to_all(comparison):
    (axis,) = plot_latencies(comparison.runs, 60).axes
    *shares, limit = axis.get_lines()
    assert len(shares) == 2
    for line in shares:
        seconds, share = (np.asarray(values).tolist() for values in line.get_data())
        assert seconds == sorted(seconds)
        assert (share[0], share[-1]) == (0, 1)
        assert share == sorted(share)
    assert list(limit.get_xdata()) == [60, 60]
    assert "limit 60 s" in axis.texts[0].get_text()


# --- the command


@pytest.fixture
def files(tmp_path):
    save_run(CPU, tmp_path / "cpu.json")
    save_run(GPU, tmp_path / "gpu.json")
    return tmp_path


@pytest.mark.slow
def test_the_command_prints_the_tables_and_writes_page_and_json(files, capsys):
    page, out = files / "deep" / "c.html", files / "deep" / "c.json"
    words = [f"{files}/cpu.json=ml.m5.large,serverless", "--html", str(page), "--out", str(out)]
    assert main(["compare", *words, "--requests-per-day", "50"]) == 0
    result = capsys.readouterr().out
    assert "While callers wait, serverless ($" in result
    for title in ("USD A MONTH", "LATENCY IN SECONDS", "PRICES IN US-EAST-1", "ASSUMPTIONS"):
        assert title in result
    assert "50 a day" in result
    assert page.read_text("utf-8").startswith("<!doctype html>")
    whole = json.loads(out.read_text("utf-8"))
    assert whole["options"][0]["months"][0]["requests_per_day"] == 50
    assert whole["break_even"][0]["cheaper_below"] == "serverless"
    assert whole["not_measured"][0]["instance_type"] == "ml.g4dn.xlarge"


def test_json_alone_goes_to_stdout_when_it_is_asked_for(files, capsys):
    assert main(["compare", f"{files}/cpu.json=ml.m5.large", "--json"]) == 0
    result = capsys.readouterr()
    assert json.loads(result.out)["stands_for"]["ml.m5.large"]
    assert "LATENCY" in result.err


def test_an_assumption_can_be_changed(files, capsys):
    words = ["compare", f"{files}/cpu.json=ml.m5.large", "--json", "--requests-per-day", "1"]
    assert main([*words, "--assume", "hours_per_month=100", "--assume", "volume_gb=0"]) == 0
    always = json.loads(capsys.readouterr().out)["options"][0]
    assert always["months"][0]["usd_compute"] == pytest.approx(11.5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cpu.json=ml.g5.xlarge"], "a run of one never stands for the other"),
        (["cpu.json"], "does not name the instance type it stands for"),
        (["none.json=ml.m5.large"], "none.json cannot be read"),
        (["cpu.json=ml.m5.large", "--assume", "peak"], "--assume must be NAME=NUMBER, got 'peak'"),
        (["cpu.json=ml.m5.large", "--assume", "peak=1"], "there is no assumption 'peak'"),
        (["cpu.json=ml.m5.large", "--requests-per-day", "0"], "must be 1 to 1,000,000, got 0"),
        (["cpu.json=ml.m5.large", "--region", "eu-west-1"], "no price is known for ml.m5.large"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(files, capsys, monkeypatch, words, says):
    monkeypatch.chdir(files)
    assert main(["compare", *words]) == 1
    assert says in capsys.readouterr().err


FOLDERS = sorted((REPOSITORY / "infra" / "reports").iterdir())
PLAN = "plan.json"  # of a page of training
REPORTS = [path for each in FOLDERS for path in sorted(each.glob("*.json")) if path.name != PLAN]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_runs_of_the_reports_in_the_repository_can_still_be_compared(path):
    run = load_run(path)
    assert run.date[:10] in path.parent.name
    comparison = compare((path.stem, run, run.stands_for or ["ml.c5.large"]))
    assert comparison.options


def test_the_plans_of_the_reports_in_the_repository_can_still_be_priced():
    plans = [load_plan(each / PLAN) for each in FOLDERS if (each / PLAN).exists()]
    assert plans
    for plan in plans:
        found = job_cost(
            plan, "ml.g5.xlarge", load_prices(), TrainingAssumptions(), region="us-east-1"
        )
        assert found.on_demand_usd


def test_there_is_a_report():
    assert REPORTS
    for path in REPORTS:
        assert (path.parent / "compare.html").exists()


def test_the_pages_in_the_repository_refer_to_its_style_sheet_and_hold_none():
    pages = [path for folder in FOLDERS for path in folder.glob("*.html")]
    assert len(pages) == len(FOLDERS)
    for page in pages:
        folder, text = page.parent, page.read_text("utf-8")
        (address,) = re.findall(r'<link rel="stylesheet" href="([^"]+)">', text)
        assert (folder / address).resolve() == REPOSITORY / "container/dalle/pages/page.css"
        assert ":root" not in text
