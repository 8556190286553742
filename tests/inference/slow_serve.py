"""`serve` whose decoding steps take 50 ms each at least, so that a test can come in between.

Run as a module.
"""

import sys
import time
from unittest.mock import patch

from dalle.decoding.engine import DecodeEngine
from dalle.decoding.step import CandidateTokens
from inference.__main__ import main

STEP_SECONDS = 0.05
step = DecodeEngine.step


def slow_step(engine: DecodeEngine) -> list[CandidateTokens]:
    if not engine.is_idle:
        time.sleep(STEP_SECONDS)
    return step(engine)


if __name__ == "__main__":
    with patch.object(DecodeEngine, "step", slow_step):
        sys.exit(main())
