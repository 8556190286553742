"""dalle.platform.user: a user id without a name or a home gets both."""

import getpass
import os
import pwd
import stat
import tempfile
from pathlib import Path

import pytest

from dalle.platform.user import name_user


@pytest.fixture
def nameless(monkeypatch, tmp_path):
    """A user without an entry in the passwd file, and an empty temporary directory."""

    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_an_entry_gets_a_name_and_a_home_of_its_own(nameless):
    name_user()
    assert getpass.getuser() == f"user-{os.getuid()}"
    home = Path.home()
    assert home.parent == nameless
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    name_user()
    assert Path.home() == home


def test_a_home_that_another_user_could_write_to_is_not_taken(nameless):
    name_user()
    first = Path.home()
    first.chmod(0o777)
    del os.environ["HOME"]
    name_user()
    assert Path.home() != first
    assert Path.home().parent == nameless


def test_a_name_and_a_home_that_are_there_stay(nameless, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setenv("HOME", str(nameless))
    name_user()
    assert (getpass.getuser(), Path.home()) == ("ada", nameless)
    assert list(nameless.iterdir()) == []


@pytest.mark.parametrize("home", ["/nowhere", "/proc/self", "~"])
def test_a_home_that_cannot_be_written_to_is_replaced(nameless, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    name_user()
    assert Path.home().parent == nameless or os.access(home, os.W_OK)
