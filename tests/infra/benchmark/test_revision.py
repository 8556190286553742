"""A run says which revision it measured, and a page warns when that is not the present one."""

import subprocess
from types import SimpleNamespace

import pytest

from infra.benchmark.revision import checkout_revision, measured_revisions, outdated
from tests.infra.measured_runs import a_run

WHO = ["-c", "user.name=a", "-c", "user.email=a@b"]


@pytest.fixture
def repository(tmp_path):
    """Its path, and a function: a file's path -> the revision of a commit that changes it."""

    def git(*words):
        done = subprocess.run(
            ["git", "-C", tmp_path, *WHO, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def change(path):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{file.read_text() if file.exists() else ''}x")
        git("add", "-A")
        git("commit", "-q", "-m", "x")
        return git("rev-parse", "HEAD")

    git("init", "-q")
    return SimpleNamespace(path=tmp_path, change=change)


def runs(revision):
    return {"one": a_run(versions={"revision": revision}, date="2030-01-01T00:00:00Z")}


def test_a_run_of_the_present_code_is_no_warning_whatever_else_changed(repository):
    measured = repository.change("inference/a.py")
    repository.change("README.md")
    assert outdated(runs(measured), repository.path) == []


def test_a_run_of_code_that_changed_since_is_a_warning_with_the_number_of_changes(repository):
    measured = repository.change("inference/a.py")
    repository.change("container/dalle/b.py")
    repository.change("inference/a.py")
    (warning,) = outdated(runs(measured), repository.path)
    assert warning.startswith(f"Not the present code: one, measured at revision {measured[:12]} on")
    assert "have changed 2 times since. Measure again." in warning


def test_a_run_that_names_no_revision_is_judged_by_its_date(repository):
    repository.change("inference/a.py")
    assert outdated(runs("unknown"), repository.path) == []
    old = {"old": a_run(versions={}, date="2020-01-01T00:00:00Z")}
    (warning,) = outdated(old, repository.path)
    assert "measured at an unnamed revision on 2020-01-01" in warning
    assert measured_revisions(old) == ["old: measured at an unnamed revision on 2020-01-01."]


def test_without_a_history_nothing_is_said(tmp_path):
    assert outdated(runs("abc"), tmp_path) == []
    assert checkout_revision(tmp_path) is None


def test_the_revision_of_a_checkout_says_whether_its_code_differs(repository):
    revision = repository.change("inference/a.py")
    assert checkout_revision(repository.path) == revision
    (repository.path / "notes.txt").write_text("x")
    assert checkout_revision(repository.path) == revision
    (repository.path / "inference" / "a.py").write_text("changed")
    assert checkout_revision(repository.path) == f"{revision}+"
