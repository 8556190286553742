"""dalle.types: every list of shared names is written once."""

import ast

import pytest

from dalle import types as names
from tests import REPOSITORY

FOLDERS = ("container", "training", "inference", "infra")
LISTS = {
    name: frozenset(value)
    for name, value in vars(names).items()
    if name.isupper() and isinstance(value, tuple)
}


def spelt_out(source: str) -> list[str]:
    """Return the lists of dalle.types that a source repeats as a list, tuple, set or Literal."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            words = [each.value for each in node.elts if isinstance(each, ast.Constant)]
            texts = frozenset(word for word in words if isinstance(word, str))
            found += [name for name, listed in LISTS.items() if texts >= listed]
    return found


@pytest.mark.slow
def test_no_other_module_spells_a_list_of_names_out():
    sources = {
        path.relative_to(REPOSITORY).as_posix(): path.read_text("utf-8")
        for folder in FOLDERS
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    }
    at_home = spelt_out(sources.pop("container/dalle/types.py"))
    assert {*at_home, "COMPONENTS"} == LISTS.keys()  # those are the stages and one more
    assert {path: spelt_out(text) for path, text in sources.items() if spelt_out(text)} == {}


@pytest.mark.parametrize(
    "source",
    [
        'Stage = Literal["dvae", "transformer", "clip"]',
        'for name in ("clip", "dvae", "transformer", "tokenizer"): ...',
        'assert finished >= {"dvae", "transformer", "clip"}',
        'def f(kind: Literal["full", "axial_row", "axial_col", "conv_like"] | None): ...',
        'QUANTISERS = ["gumbel", "vq"]',
    ],
)
def test_a_list_that_is_spelt_out_is_found(source):
    assert spelt_out(source) != []


def test_the_folders_of_an_artefact_are_the_stages_and_the_tokenizer():
    assert set(names.COMPONENTS) - set(names.STAGES) == {"tokenizer"}
