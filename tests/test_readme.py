"""README.md and CHANGELOG.md tell the truth: their commands, links, tables and version.

The tables between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in README.md are generated; as a
program, this file writes them again (`make docs`):

    python tests/test_readme.py
"""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from inference import schema
from training import hyperparameters

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"


def request_table(request: type[BaseModel]) -> str:
    """A Markdown table of a request's fields, from the schema's own descriptions."""
    lines = ["| field | meaning and range |", "|---|---|"]
    for name, field in request.model_fields.items():
        required = " **Required.**" if field.is_required() else ""
        lines.append(f"| `{name}` | {field.description}{required} |")
    return "\n".join(lines)


def generated_tables() -> dict[str, str]:
    """The Markdown that belongs between each pair of markers, by the marker's name."""
    return {
        "hyperparameters": hyperparameters.render_table(),
        "caption": request_table(schema.GenerateRequest),
        "images": request_table(schema.ClassifyRequest),
        "complete": request_table(schema.CompleteRequest),
    }


def with_tables(text: str, tables: dict[str, str]) -> str:
    """`text` with every table put between its markers."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md needs exactly one {begin} and one {end}")
        head, _, rest = text.partition(begin)
        tail = rest.partition(end)[2]
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


def readme() -> str:
    return README.read_text("utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def makefile_targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z][\w-]*):[^=]", text, re.MULTILINE))


def test_every_make_command_is_a_target():
    code = "\n".join([*code_blocks(readme()), *re.findall(r"`([^`\n]+)`", readme())])
    commands = set(re.findall(r"(?:^|[`&;] ?)make ([a-z][\w-]*)", code, re.MULTILINE))
    assert {"setup", "test", "demo"} <= commands
    assert commands - makefile_targets() == set()


def test_every_target_says_what_it_does():
    text = (REPOSITORY / "Makefile").read_text("utf-8")
    described = set(re.findall(r"^([a-z][\w-]*):[^=\n]*## \S", text, re.MULTILINE))
    assert makefile_targets() == described
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == described


def slug(heading: str) -> str:
    """The anchor that a heading gets on a page."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_every_link_leads_somewhere(document):
    text = (REPOSITORY / document).read_text("utf-8")
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (REPOSITORY / path).exists(), f"{document} links to {target}"
        assert path or anchor in anchors, f"{document} links to {target}"


def test_the_changelog_begins_with_the_version_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    versions = re.findall(
        r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert versions[0] == project["version"]


@pytest.mark.parametrize("name", ["hyperparameters", "caption", "images", "complete"])
def test_the_tables_are_the_ones_the_code_would_write(name):
    tables = {name: generated_tables()[name]}
    assert with_tables(readme(), tables) == readme(), "README.md is out of date: run `make docs`"


def test_a_table_is_replaced_and_nothing_else():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    assert with_tables(text, {"x": "new"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="exactly one <!-- y:begin -->"):
        with_tables(text, {"y": "new"})


if __name__ == "__main__":
    README.write_text(with_tables(readme(), generated_tables()), "utf-8")
