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


def test_hostile_requests_are_answered_and_honest_ones_beside_them_too(tiny_artefact, tmp_path):
    shutil.copytree(tiny_artefact, tmp_path / "model")
    with running(tmp_path, DALLE_MAX_CANDIDATES="4", DALLE_BODY_SECONDS="5") as served:
        counts = requests.fuzz(served.ready(), num_requests=400, seed=1).counts
    assert sum(count for status, count in counts.items() if status != "honest") == 400
    assert counts["status 200"] > 0
    assert counts["status 422"] > 0
    assert counts["honest"] > 0
