"""A short run of what `make fuzz` does for an hour."""

import shutil

import pytest

from tests.fuzz import files, requests
from tests.inference.served import running

pytestmark = pytest.mark.slow


def test_hostile_files_are_read_or_refused(tiny_artefact):
    counts = files.fuzz(tiny_artefact, num_files=60, seed=1)
    assert sum(counts.values()) == 60
    assert any("refused" in result for result in counts)


@pytest.fixture(scope="module")
def served(tiny_artefact, tmp_path_factory):
    root = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    with running(root, DALLE_MAX_CANDIDATES="4", DALLE_BODY_SECONDS="5") as served:
        yield served.ready()


def test_every_reply_to_what_the_document_allows_or_forbids_is_in_the_document(served):
    pytest.importorskip("schemathesis", reason="needs the package schemathesis")
    from tests.fuzz import schema

    counts = schema.fuzz(served, num_cases=80, seed=1)
    assert counts["schema 200"] > 0
    assert counts["schema 422"] > 0


def test_hostile_requests_are_answered_and_honest_ones_beside_them_too(served):
    counts = requests.fuzz(served, num_requests=400, seed=1).counts
    assert sum(count for status, count in counts.items() if status != "honest") == 400
    assert counts["status 200"] > 0
    assert counts["status 422"] > 0
    assert counts["honest"] > 0
