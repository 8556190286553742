"""`train` and `serve` as a user id without a passwd entry: only --root and /tmp are writable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dalle.preprocess.images import encode_image
from tests import REPOSITORY
from tests.permissions import directory_for_all, not_permitted

UID = 54321
SCRIPT = r"""
set -e
mount --make-rprivate / || exit 77
mount --bind "$REPO" "$REPO" && mount -o remount,ro,bind "$REPO" || exit 77
as_user="setpriv --reuid=$UID_ --regid=$UID_ --clear-groups"
if ! $as_user test -x "$PYTHON"; then  # it may lie in a home where others may not look
  mkdir -p /run/python && mount --bind "$PREFIX" /run/python
  mount -t tmpfs -o mode=755 tmpfs /root && mkdir -p "$PREFIX" && mount --bind /run/python "$PREFIX"
fi
cd /
run="$as_user env -i PATH=/usr/bin:/bin PYTHONPATH=$PATHS OMP_NUM_THREADS=1 $VENV"
$run -m training --root "$ROOT"
timeout -s TERM 250 $run -m inference --root "$ROOT" --port 0 &
server=$!
for second in $(seq 240); do sleep 1; grep -q ": ready$" "$LOG" && break; done
kill -TERM $server; wait $server || true
"""


@pytest.mark.slow
def test_train_and_serve_work_for_a_user_without_a_name_and_a_home():
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        not_permitted("another user id in a mount namespace needs root, unshare and setpriv")
    with directory_for_all() as folder:
        train = folder / "job/input/data/train"
        train.mkdir(parents=True)
        for number in range(4):
            pixels = np.full((16, 16, 3), number, dtype=np.uint8)
            (train / f"{number}.png").write_bytes(encode_image(pixels, "png"))
            (train / f"{number}.txt").write_text(f"picture {number}")
        config = folder / "job/input/config"
        config.mkdir()
        settings = {"size": "tiny", "image_size": "16", "batch_size": "4", "max_steps": "2"}
        (config / "hyperparameters.json").write_text(json.dumps(settings))
        for path in [folder / "job", *(folder / "job").rglob("*")]:
            os.chown(path, UID, UID)
        python = Path(sys.executable).resolve()
        log = folder / "log"
        with log.open("w") as stream:
            done = subprocess.run(
                ["unshare", "-m", "bash", "-c", SCRIPT],
                env={
                    **os.environ,
                    "REPO": str(REPOSITORY),
                    "UID_": str(UID),
                    "PYTHON": str(python),
                    "PREFIX": str(python.parents[1]),
                    "PATHS": f"{REPOSITORY / 'container'}:{REPOSITORY}",
                    "VENV": sys.executable,
                    "ROOT": str(folder / "job"),
                    "LOG": str(log),
                },
                stdout=stream,
                stderr=stream,
                timeout=300,
                check=False,
            )
        text = log.read_text()
    if done.returncode == 77:
        not_permitted(f"a mount namespace is not permitted here: {text}")
    assert done.returncode == 0, text
    assert "report.html" in text
    assert ": ready\n" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_the_tests_run_for_such_a_user_too_and_cannot_write_into_the_checkout():
    """`make test-any-user` on one file; it runs all of them."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        not_permitted("another user id in a mount namespace needs root, unshare and setpriv")
    with directory_for_all() as folder:
        test = folder / "test_who.py"
        test.write_text(
            "import os, pathlib, pwd, pytest\n"
            "def test_who():\n"
            f"    assert os.getuid() == {UID} and 'DALLE_REQUIRE_ROOT' not in os.environ\n"
            "    with pytest.raises(KeyError):\n"
            "        pwd.getpwuid(os.getuid())\n"
            "    with pytest.raises(OSError):\n"
            "        pathlib.Path('tests/new').touch()\n"
        )
        done = subprocess.run(
            [REPOSITORY / "tests/any_user.sh", "-q", str(test)],
            env={**os.environ, "ANY_USER_ID": str(UID)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    if "unshare failed" in done.stderr:
        not_permitted(f"a mount namespace is not permitted here: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
