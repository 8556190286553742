"""The two commands as a user runs them: `train` to its end, `serve` while requests are sent to it.

Knows nothing of models.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dalle.errors import DalleError, UserError
from dalle.platform.environment import Paths
from dalle.types import STAGES

END_SECONDS = 30.0  # both commands end within 25 s of SIGTERM
READY_SECONDS = 180.0  # torch's first import on a slow disk is most of it
REQUEST_SECONDS = 120.0
POLL_SECONDS = 0.2
LOG_LINES = 20  # of a log in an error message
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without a proxy: requests stay on this machine."""


class CommandFailed(DalleError):  # noqa: N818 - reads as what happened
    """`train` or `serve` failed, or `serve` refused a request."""

    code = "command_failed"


def run_train(root: Path, channels: Mapping[str, Path]) -> None:
    """Run `train --root root` with its output on this terminal.

    Raises CommandFailed with the text of the failure file, UserError for a training that was
    stopped before its budget was spent.
    """
    environment = os.environ | {
        f"SM_CHANNEL_{name.upper()}": str(directory.absolute())
        for name, directory in channels.items()
    }
    command = [sys.executable, "-m", "training", "--root", str(root)]
    process = subprocess.Popen(command, env=environment)  # noqa: S603 - the command of this project
    with _terminated(process):
        status = process.wait()
    paths = Paths(root)
    if status != 0:
        cause = "it left no failure file"
        if paths.failure.is_file():
            cause = paths.failure.read_text("utf-8", errors="replace")
        raise CommandFailed(f"train ended with {status}: {cause}")
    if not is_trained(root):
        raise UserError("train was stopped; run the same command again to go on where it was")


def is_trained(root: Path) -> bool:
    """Return whether the artefact below a root has all three models, each trained to its end."""
    try:
        manifest = json.loads((Paths(root).model / "manifest.json").read_text("utf-8"))
    except FileNotFoundError:
        return False
    finished = {each["stage"] for each in manifest["stages"] if each["is_finished"]}
    return finished >= {*STAGES}


@contextmanager
def serving(root: Path, log: Path) -> Iterator[str]:
    """Run `serve --root root` on a free port of this machine; yield its address once it is ready.

    Its output goes to `log`. SIGTERM stops it, as on the platform.
    Raises CommandFailed with the log's end when it does not become ready, or does not end with 0.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "inference", "--root", str(root)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - the command of this project
            command, stdout=output, stderr=subprocess.STDOUT
        )
    with _terminated(process):
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log)
        yield url
        process.terminate()
        try:
            status = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise _failed(f"did not end within {END_SECONDS:.0f} s of SIGTERM", log) from None
    if status != 0:
        raise _failed(f"ended with {status} after SIGTERM", log)


def invoke(url: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """POST a request to /invocations; return the reply.

    Raises CommandFailed with the server's message when it refuses.
    """
    message = urllib.request.Request(  # noqa: S310 - http, to this machine
        f"{url}/invocations",
        data=json.dumps(request).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with _OPENER.open(message, timeout=REQUEST_SECONDS) as response:
            reply: dict[str, Any] = json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode("utf-8", errors="replace")
        raise CommandFailed(f"serve answered {error.code} to {dict(request)}: {text}") from None
    except OSError as error:
        raise CommandFailed(f"serve did not answer {dict(request)}: {error}") from error
    return reply


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _failed(f"ended with {process.returncode} before it was ready", log)
        try:
            with _OPENER.open(f"{url}/ping", timeout=10):
                return
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503:
                    text = error.read().decode("utf-8", errors="replace")
                    raise CommandFailed(f"serve answers {error.code} to /ping: {text}") from None
        except OSError:
            pass  # it does not listen yet
        time.sleep(POLL_SECONDS)
    raise _failed(f"was not ready after {READY_SECONDS:.0f} s", log)


@contextmanager
def _terminated(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the process on leaving: SIGTERM first, then SIGKILL."""
    try:
        yield
    finally:
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        finally:  # a second Ctrl-C while waiting ends up here too
            process.kill()
            process.wait()


def _failed(what: str, log: Path) -> CommandFailed:
    lines = log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return CommandFailed(f"serve {what}; {log} ends:\n" + "\n".join(f"  {line}" for line in lines))
