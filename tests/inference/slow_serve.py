"""`serve` whose decoding steps take 50 ms each at least, so that a test can come in between."""

import time
from unittest.mock import patch

from dalle.decoding.engine import DecodeEngine
from dalle.decoding.step import CandidateTokens
from inference.__main__ import main

STEP_SECONDS = 0.05
step = DecodeEngine.step


def slow_step(engine: DecodeEngine, _: float) -> list[CandidateTokens]:
    """One step a call."""
    if not engine.is_idle:
        time.sleep(STEP_SECONDS)
    return step(engine)


def serve(words: list[str]) -> int:
    """Main function of a fork."""
    with patch.object(DecodeEngine, "step", slow_step):
        return main(words)
