"""How torch's CPU threads wait for one another. Standard library only.

A kernel ends when its last thread does, and the others spin until then. Where another process
takes a core for a moment, that turns a step of milliseconds into one of half a second: two
threads, one of two cores busy, 256 rows of a decoding step: 706 ms spinning, 21 ms sleeping.
"""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let waiting threads sleep, unless the environment says otherwise.

    Has an effect before torch is imported and none after: call it first thing in a command.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
