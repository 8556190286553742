"""`pip` of the image: found where the SageMaker SDK looks, and refusing in words."""

import subprocess
import sys

import no_pip
from dalle.platform.environment import Paths
from tests import REPOSITORY

FILE = REPOSITORY / "container" / "no_pip.py"


def test_an_installation_is_refused_in_the_log_and_as_the_jobs_reason(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Paths.__init__, "__defaults__", (tmp_path, None))
    monkeypatch.setattr(sys, "argv", ["pip", "install", "-r", "requirements.txt"])
    assert no_pip.main() == 1
    said = "this image installs no packages (`pip install -r requirements.txt`)"
    assert said in capsys.readouterr().err
    assert said in (tmp_path / "output" / "failure").read_text()


def test_what_installs_nothing_is_refused_alike():
    done = subprocess.run(
        [sys.executable, FILE, "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "this image installs no packages" in done.stderr
