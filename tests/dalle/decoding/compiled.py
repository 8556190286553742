"""What of the compiled decoding step runs on this machine."""

import pytest

from dalle.decoding.cpu import structures


def _runs(build):
    loaded = structures.load(build)
    return loaded is not None and loaded.dalle_support() != 0


BUILDS_HERE = [build for build in structures.BUILDS if _runs(build)]
runs_here = pytest.mark.skipif(not BUILDS_HERE, reason="no compiled decoding step for this machine")
