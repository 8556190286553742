"""The layout that every written page shares."""

import pytest
from jinja2 import DictLoader
from markupsafe import Markup

from dalle.pages.environment import page_environment, shown_width
from tests import REPOSITORY


def rendered(body: str, **values: object) -> str:
    environment = page_environment("training.report")
    page = {"x.html": '{% extends "page.html" %}{% block body %}{{ content }}{% endblock %}'}
    environment.loader.loaders.insert(0, DictLoader(page))
    return environment.get_template("x.html").render(title="T", content=Markup(body), **values)


def test_a_page_of_several_sections_has_a_line_of_contents_that_leads_to_each():
    page = rendered("<h2>A &amp; b</h2><p>1</p><h2>C</h2><h2>A &amp; b</h2>")
    for number, heading in enumerate(("A &amp; b", "C", "A &amp; b"), 1):
        assert f'<a href="#s{number}">{heading}</a>' in page
        assert f'<h2 id="s{number}">{heading}</h2>' in page


def test_a_page_of_two_sections_needs_no_contents():
    assert "<nav" not in rendered("<h2>A</h2><h2>B</h2>")


def test_a_page_holds_the_style_sheet_or_refers_to_a_copy():
    assert ":root {" in rendered("x")
    page = rendered("x", stylesheet="../page.css")
    assert '<link rel="stylesheet" href="../page.css">' in page
    assert "<style" not in page


def test_a_page_ends_with_one_line_break():
    assert rendered("x").endswith("</html>\n")


def test_text_is_escaped():
    environment = page_environment("training.report")
    assert environment.from_string("{{ x }}").render(x="<b>") == "&lt;b&gt;"


@pytest.mark.parametrize(
    ("pixels", "width"),
    [(8, 160), (16, 160), (32, 160), (64, 128), (100, 100), (160, 160), (256, 256), (512, 170)],
)
def test_a_picture_is_shown_about_as_large_as_wanted_by_a_whole_factor(pixels, width):
    assert shown_width(pixels, 160) == width


def test_there_is_one_style_sheet_besides_the_playgrounds():
    folders = ("container", "training", "inference", "infra")
    found = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.css")]
    assert [str(path.relative_to(REPOSITORY)) for path in found] == [
        "container/dalle/pages/page.css",
        "inference/playground/style.css",
    ]
