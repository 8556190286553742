"""One layout and one style sheet for every page that a command writes.

    page_environment("training.report").get_template("report.html").render(title=…, …)

A template extends `page.html` and fills the blocks `meta` and `body`. The page is complete without
a network; with `stylesheet` it refers to a copy of `page.css` instead of holding one. Imports
neither torch nor anything of ours.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SMALL_UP_TO_PIXELS = 128  # a side; the pixels of such a picture are shown as squares


class _Page(NamedTuple):
    """headings: id and text of each; body: with these ids in it."""

    headings: list[tuple[str, Markup]]
    body: Markup


def page_environment(package: str) -> Environment:
    """Return the environment of the templates in a package's folder `templates`."""
    own = PackageLoader(package)
    environment = Environment(
        loader=ChoiceLoader([own, PackageLoader("dalle.pages", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = (resources.files("dalle.pages") / "page.css").read_text("utf-8")
    environment.globals |= {
        "style": Markup(style),  # noqa: S704 - a file of ours
        "stylesheet": "",
        "with_contents": _with_contents,
    }
    return environment


def shown_width(pixels: int, target: int) -> int:
    """Return the width at which a picture is shown, in CSS pixels: about `target`.

    It is a whole multiple of the picture's own width, or a whole part of one that is more than
    twice as wide.
    """
    return pixels * max(1, target // pixels) // max(1, pixels // target)


def _with_contents(body: str) -> _Page:
    """Give every heading of the second level an id, for the line of contents."""
    headings: list[tuple[str, Markup]] = []

    def number(match: re.Match[str]) -> str:
        id = f"s{len(headings) + 1}"
        headings.append((id, Markup(match[1])))  # noqa: S704 - escaped already
        return f'<h2 id="{id}">{match[1]}</h2>'

    numbered = re.sub("<h2>(.*?)</h2>", number, body)
    return _Page(headings, Markup(numbered))  # noqa: S704 - as above
