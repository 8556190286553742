"""The page's parts around the pictures, in a real browser: suggestions, dialogs, panels, looks."""

import importlib
import io
import re
from typing import Any

import pytest
from PIL import Image

from tests.inference.playground.conftest import CAPTIONS
from tests.inference.playground.picture import take
from tests.inference.playground.test_page import downloaded, generate, order

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LOOKS = {
    "desktop": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
}


def serious(page: Any) -> list[str]:
    """The serious and critical violations that axe-core finds."""
    axe = importlib.import_module("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    return [
        f"{each['id']}: {node['html']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_no_serious_violation_in_any_state(new_page, look):
    page = new_page(errors="status of 422", reduced_motion="reduce", **LOOKS[look])
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("#temperature", "11")
    page.fill("#caption", "big")
    page.wait_for_selector("#suggestions li")
    assert serious(page) == [], "with suggestions"
    page.click("#generate")
    page.wait_for_selector("#temperature[aria-invalid]")
    assert serious(page) == [], "with an error"
    generate(page, temperature="1")
    page.click(".tile:nth-child(2) .picture")
    assert serious(page) == [], "with a picture open"
    page.click("#picture-classify")
    page.wait_for_selector("#predictions li")
    assert serious(page) == [], "with pictures, history and predictions"
    page.click("#about-open")
    assert serious(page) == [], "with the model card"


@pytest.mark.parametrize("look", LOOKS)
def test_nothing_is_wider_than_the_window(new_page, look):
    page = new_page(**LOOKS[look])
    generate(page)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("ratio", [1, 1.5, 3])
def test_a_pixel_of_a_picture_is_a_whole_number_of_the_screens(new_page, ratio):
    page = new_page(device_scale_factor=ratio, reduced_motion="reduce", **LOOKS["phone"])
    generate(page)
    for number in (1, 2):
        image = page.locator(f".tile:nth-child({number}) img")
        factor = image.evaluate("each => each.getBoundingClientRect().width") * ratio / 16
        assert factor == pytest.approx(round(factor), abs=0.01)
        assert image.evaluate("each => getComputedStyle(each).imageRendering") == "pixelated"


@pytest.mark.parametrize(("motion", "moves"), [("no-preference", True), ("reduce", False)])
def test_pictures_move_to_their_ranks_unless_motion_is_unwelcome(new_page, motion, moves):
    page = new_page(reduced_motion=motion)
    page.evaluate(
        """() => {
          window.moved = 0;
          const animate = Element.prototype.animate;
          Element.prototype.animate = function (...all) {
            moved++;
            return animate.apply(this, all);
          };
        }"""
    )
    generate(page)
    assert (page.evaluate("moved") > 0) == moves


def test_suggestions_come_from_the_captions_and_from_the_model_and_keys_choose_one(new_page):
    page = new_page()
    page.focus("#caption")
    page.keyboard.type("big ")
    page.wait_for_selector("#suggestions li:has-text('big filled red star')")
    page.wait_for_function("() => document.querySelectorAll('#suggestions li').length > 2")
    assert page.get_attribute("#caption", "aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    active = page.get_attribute("#caption", "aria-activedescendant")
    assert page.get_attribute(f"#{active}", "aria-selected") == "true"
    chosen = page.inner_text(f"#{active}")
    page.keyboard.press("Enter")
    assert page.input_value("#caption") == chosen
    assert page.is_hidden("#suggestions")
    assert page.locator(".tile").count() == 0, "the first Enter chooses, the second generates"
    page.keyboard.press("Enter")
    page.wait_for_selector(".tile")


def test_a_picture_opens_large_and_can_be_saved_and_the_focus_returns(new_page):
    page = new_page()
    generate(page, seed=7)
    page.focus(".tile:nth-child(2) .picture")
    page.keyboard.press("Enter")
    assert page.inner_text("#picture-title") == "Rank 2"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#picture-title") == "Rank 1"
    file = downloaded(page, "#picture-save")
    number = order(page)[0]
    assert file.suggested_filename == f"big_filled_red_star.seed7.rank1.candidate{number}.png"
    with Image.open(file.path()) as image:
        assert (image.format, image.size) == ("PNG", (16, 16))
    page.keyboard.press("Escape")
    assert page.is_hidden("#picture")
    assert page.evaluate("document.activeElement.className") == "picture"


def test_a_dropped_picture_is_classified_against_the_captions(new_page):
    page = new_page(errors="status of 4")
    page.click("#classify > summary")
    assert page.input_value("#classes").splitlines() == CAPTIONS
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, format="PNG")
    page.set_input_files(
        "#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    page.wait_for_selector("#predictions li")
    shares = re.findall(r"([\d.]+) %", page.inner_text("#predictions"))
    assert len(shares) == 3
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert sorted(map(float, shares), reverse=True) == [float(each) for each in shares]
    page.fill("#classes", "")
    page.click("#classify-go")
    page.wait_for_selector("#classes[aria-invalid]")
    assert "classes must have 1 to 1,000 items" in page.inner_text("#classes-error")
    page.set_input_files(
        "#classify-file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    )
    page.fill("#classes", "red")
    page.click("#classify-go")
    page.wait_for_selector("#images-error:not(:empty)")


def test_the_session_remembers_its_runs_and_shows_one_again_without_the_server(new_page, served):
    page = new_page()
    generate(page, seed=1)
    first = order(page)
    generate(page, seed=2, caption="small halftone cyan circle")
    assert page.locator("#runs a").count() == 2
    page.route("**/invocations", lambda route: route.abort())
    page.click("#runs li:nth-child(2) a")
    page.wait_for_function("() => document.getElementById('seed').value === '1'")
    assert order(page) == first
    assert page.input_value("#caption") == "big filled red star"
    page.unroute("**/invocations")
    page.go_back()
    page.wait_for_function("() => document.getElementById('seed').value === '2'")
    page.reload()
    page.wait_for_selector("#grid.ranked")
    assert page.locator("#runs a").count() == 2, "the session's storage has them"


def test_the_model_card_is_a_press_away_and_a_file(new_page):
    page = new_page()
    assert "16 × 16 pixels" in page.inner_text("#model")
    page.click("#about-open")
    words = page.inner_text("#card")
    assert "MIT" in words
    assert "Codebook size" in words
    file = downloaded(page, "#about a")
    assert file.suggested_filename == "MODEL_CARD.md"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "about-open"


def test_the_picture_of_the_readme_is_taken_of_this_page(new_page, tmp_path):
    path = tmp_path / "page.png"
    take(new_page(reduced_motion="reduce", **LOOKS["desktop"]), path, tuple(CAPTIONS[:2]))
    with Image.open(path) as image:
        assert image.width == 1280
