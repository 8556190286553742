"""Whole requests that come at once, by stage: what `inference.bench` shows beside single steps."""

from __future__ import annotations

import statistics
import time
from typing import Any

from dalle.artefact import Artefact
from dalle.errors import DalleError
from inference.api.rendering import Candidate, GenerateResult, Preview, render_json, stage_timings
from inference.api.replies import Timings
from inference.api.schema import GenerateRequest
from inference.engine.engine_core import EngineCore, State
from inference.engine.model_runner import ModelRunner
from inference.engine.request import EngineRequest, Failed

CAPTION = "a"
STAGES = ("queue", "sample", "decode", "rank", "encode")
_PATIENCE = 3600.0  # seconds for all requests together


def measure_requests(artefact: Artefact, requests: int, num_candidates: int) -> dict[str, Any]:
    """Seconds by stage of requests that arrive together, through the server's own queue but without
    HTTP, in fp32; the self-test before them warms up. Prints the medians and returns them."""
    device = artefact.require("transformer").text_position.device
    engine_core = EngineCore(
        lambda: ModelRunner(artefact, device, chunk_size=requests * num_candidates)
    )
    engine_core.start()
    if engine_core.wait_until_loaded(_PATIENCE) is not State.READY:
        raise RuntimeError(f"the engine cannot be loaded: {engine_core.cause}")
    try:
        began = time.monotonic()
        asked = [
            GenerateRequest(
                caption=CAPTION, seed=seed, num_candidates=num_candidates, num_images=num_candidates
            )
            for seed in range(requests)
        ]
        engine = engine_core.engine()
        deadline = began + _PATIENCE
        submitted = [engine.prepare(each, arrival=began, deadline=deadline) for each in asked]
        for prepared in submitted:
            engine_core.submit(prepared)
        timings = [
            _timings(prepared, request) for prepared, request in zip(submitted, asked, strict=True)
        ]
        seconds = time.monotonic() - began
    finally:
        engine_core.drain(_PATIENCE)
    medians = {
        stage: statistics.median(getattr(each, f"{stage}_seconds") for each in timings)
        for stage in STAGES
    }
    told = ", ".join(f"{stage} {median:.3f}" for stage, median in medians.items())
    per_second = requests * num_candidates / seconds
    print(
        f"{requests} requests at once, seconds by stage: {told}; {per_second:.3f} images/s",
        flush=True,
    )
    return {
        "requests": requests,
        "request_candidates": num_candidates,
        "request_seconds": {stage: round(median, 4) for stage, median in medians.items()},
        "request_images_per_second": round(per_second, 3),
    }


def _timings(prepared: EngineRequest, request: GenerateRequest) -> Timings:
    """Wait for a request's end, and encode its images as a reply would."""
    while isinstance(event := prepared.next_event(_PATIENCE), Preview | Candidate):
        pass
    if isinstance(event, Failed):
        raise event.error
    if not isinstance(event, GenerateResult):
        raise DalleError(f"a request was not answered in {_PATIENCE:g} seconds")
    began = time.monotonic()
    render_json(event, request, queue_seconds=prepared.queue_seconds)
    return stage_timings(event, prepared.queue_seconds, time.monotonic() - began)
