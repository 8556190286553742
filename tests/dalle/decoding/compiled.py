"""Marker for tests that need the compiled decoding step on this machine."""

import pytest

from dalle.decoding.cpu import step, structures

_compiled = structures.library()
runs_here = pytest.mark.skipif(
    _compiled is None or _compiled.dalle_support() == 0 or not step.SAMPLES_BY_GUMBEL_MAX,
    reason="no compiled decoding step for this machine",
)
