"""README.md, the pages below it and CHANGELOG.md tell the truth: commands, links, tables, version.

The tables between `<!-- NAME:begin -->` and `<!-- NAME:end -->` are generated; as a program, this
file writes them again (`make docs`):

    python tests/repository/test_readme.py
"""

import re
import tomllib

import pytest
from pydantic import BaseModel

from inference.api import schema
from inference.openai import schema as openai_schema
from inference.settings import VARIABLES
from tests import REPOSITORY
from training.config import hyperparameters

# infra/README.md has a test of its own besides: its commands are run.
PAGES = [
    "README.md",
    "training/README.md",
    "training/REFERENCE.md",
    "training/INTERNALS.md",
    "inference/README.md",
    "inference/REFERENCE.md",
    "inference/INTERNALS.md",
    "container/README.md",
    "infra/README.md",
]
# Which page has which generated tables.
TABLES = {
    "training/REFERENCE.md": ["hyperparameters"],
    "inference/REFERENCE.md": [
        "environment",
        "caption",
        "images",
        "complete",
        "openai-images",
        "openai-edits",
        "openai-chats",
    ],
}


def request_table(request: type[BaseModel], without: type[BaseModel] = BaseModel) -> str:
    """A Markdown table of a request's fields, less those of another, from their descriptions."""
    lines = ["| field | meaning and range |", "|---|---|"]
    for name, field in request.model_fields.items():
        if name in without.model_fields:
            continue
        required = " **Required.**" if field.is_required() else ""
        lines.append(f"| `{name}` | {field.description}{required} |")
    return "\n".join(lines)


def variables_table() -> str:
    """A Markdown table of the environment variables of `serve`."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in VARIABLES.items():
        lines.append(f"| `{name}` | {field.default or ''} | {field.description} |")
    return "\n".join(lines)


def generated_tables() -> dict[str, str]:
    """The Markdown that belongs between each pair of markers, by the marker's name."""
    return {
        "hyperparameters": hyperparameters.render_table(),
        "environment": variables_table(),
        "caption": request_table(schema.GenerateRequest),
        "images": request_table(schema.ClassifyRequest),
        "complete": request_table(schema.CompleteRequest),
        "openai-images": request_table(openai_schema.ImagesRequest),
        "openai-chats": request_table(openai_schema.ChatRequest, without=openai_schema.Fields),
        "openai-edits": request_table(
            openai_schema.EditRequest, without=openai_schema.ImagesRequest
        ),
    }


def with_tables(text: str, tables: dict[str, str]) -> str:
    """`text` with every table put between its markers."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs exactly one {begin} and one {end}")
        head, _, rest = text.partition(begin)
        tail = rest.partition(end)[2]
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


def page(name: str) -> str:
    return (REPOSITORY / name).read_text("utf-8")


def written_again(name: str) -> str:
    """A page with all its generated tables as the code would write them now."""
    tables = generated_tables()
    return with_tables(page(name), {table: tables[table] for table in TABLES[name]})


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def makefile_targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z][\w-]*):[^=]", text, re.MULTILINE))


def make_commands(text: str) -> set[str]:
    code = "\n".join([*code_blocks(text), *re.findall(r"`([^`\n]+)`", text)])
    return set(re.findall(r"(?:^|[`&;] ?)make ([a-z][\w-]*)", code, re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_every_make_command_is_a_target(name):
    assert make_commands(page(name)) - makefile_targets() == set()


def test_the_readme_begins_with_the_commands_that_everybody_needs():
    assert {"setup", "test", "demo"} <= make_commands(page("README.md"))


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


def anchors(text: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{name} links to {target}"


def test_the_changelog_begins_with_the_version_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    versions = re.findall(
        r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert versions[0] == project["version"]


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_the_ones_the_code_would_write(name):
    assert written_again(name) == page(name), f"{name} is out of date: run `make docs`"


def test_every_generated_table_has_its_page():
    assert sorted(sum(TABLES.values(), [])) == sorted(generated_tables())


def test_a_table_is_replaced_and_nothing_else():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    assert with_tables(text, {"x": "new"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="exactly one <!-- y:begin -->"):
        with_tables(text, {"y": "new"})


if __name__ == "__main__":
    for name in TABLES:
        (REPOSITORY / name).write_text(written_again(name), "utf-8")
