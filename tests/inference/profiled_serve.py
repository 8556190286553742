"""`serve` under a profiler: when each of its processes last called into each module of ours.

Run as a module. At its end a process writes module -> `time.monotonic()` as JSON into the folder
that CALLS_DIR names, in a file named by its number.
"""

import atexit
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from inference.__main__ import main

OURS = ("dalle.", "inference.", "training.", "infra.")
last_call: dict[str, float] = {}


def note(frame: FrameType, event: str, argument: object) -> None:
    module = frame.f_globals.get("__name__", "")
    if event == "call" and module.startswith(OURS):
        last_call[module] = time.monotonic()


def write() -> None:
    path = Path(os.environ["CALLS_DIR"], f"{os.getpid()}.json")
    path.write_text(json.dumps(last_call), "utf-8")


if __name__ == "__main__":
    atexit.register(write)
    threading.setprofile(note)
    sys.setprofile(note)
    sys.exit(main())
