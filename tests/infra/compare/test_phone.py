"""The pages of costs on a phone: nothing is wider than the screen, and nothing scrolls sideways."""

import pytest

from infra.__main__ import main
from infra.compare.page import render_page
from tests.inference.playground.conftest import chromium
from tests.infra.cost.test_training import a_plan
from tests.infra.measured_runs import CPU, GPU, compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]
WIDTH = 390  # of a phone, in CSS pixels
WIDER = """() => [...document.querySelectorAll('body *')].filter(each => {
  const scrolls = ['auto', 'scroll'].includes(getComputedStyle(each).overflowX)
  return each.getBoundingClientRect().right > innerWidth + 1
    || (scrolls && each.scrollWidth > each.clientWidth + 1)
}).map(each => each.outerHTML.slice(0, 80))"""


def test_the_pages_of_costs_fit_the_screen_of_a_phone(tmp_path):
    comparison = compare(
        ("cpu", CPU, ["ml.m5.large", "serverless", "lambda"]), ("gpu", GPU, ["ml.g5.xlarge"])
    )
    (tmp_path / "serving.html").write_text(render_page(comparison, title="T", date="2026-11-30"))
    (tmp_path / "plan.json").write_text(a_plan().model_dump_json())
    words = [str(tmp_path / "plan.json"), "--html", str(tmp_path / "training.html")]
    assert main(["cost", *words]) == 0
    with chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 844})
        for name in ("serving", "training"):
            page.goto(f"file://{tmp_path}/{name}.html")
            assert page.evaluate(WIDER) == [], name
            assert page.evaluate("document.documentElement.scrollWidth") == WIDTH
            assert page.locator("td[data-label]").first.is_visible()
            lead, chart = page.locator(".lead"), page.locator("svg.chart").first
            assert lead.bounding_box()["y"] < chart.bounding_box()["y"] < 844
