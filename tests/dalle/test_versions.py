"""Versions in the first line of a log, of installed and missing packages, without an import."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from dalle import versions


def test_every_package_has_its_version_or_is_not_installed():
    words = versions.versions_line(["numpy", "no-such-thing"]).split()
    python = ".".join(map(str, sys.version_info[:3]))
    assert words[0].startswith(f"python={python}")
    assert words[1].startswith("dalle-sagemaker=")
    assert words[2:] == [f"numpy={version('numpy')}", "no-such-thing=not-installed"]


def test_naming_a_package_does_not_import_it():
    code = (
        "import sys; from dalle.versions import versions_line; versions_line(['numpy']); "
        "print('numpy' in sys.modules)"
    )
    container = Path(versions.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=container, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
