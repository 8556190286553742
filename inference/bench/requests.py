"""Whole requests that come at once, by stage: what `inference.bench` shows beside single steps."""

from __future__ import annotations

import statistics
import time
from typing import Any

from dalle.artefact import Artefact
from dalle.errors import DalleError
from inference.api.rendering import Candidate, GenerateResult, Preview, render_json
from inference.api.schema import GenerateRequest
from inference.bench.http_target import Response
from inference.bench.load import STAGES, open_loop
from inference.bench.workload import Workload
from inference.engine.engine_core import EngineCore, State
from inference.engine.model_runner import ModelRunner
from inference.engine.request import Failed

CAPTION = "a"
_PATIENCE = 3600.0  # seconds for all requests together


class EngineTarget:
    """The engine behind its own queue, without HTTP. Used by many threads at once."""

    def __init__(self, engine_core: EngineCore) -> None:
        self._engine_core = engine_core

    def connect(self) -> EngineTarget:
        return self

    def close(self) -> None:
        """There is no connection to close."""

    def send(self, body: bytes) -> Response:
        """Wait for a request's end, and encode its images as a reply would. Raises DalleError."""
        request = GenerateRequest.model_validate_json(body)
        deadline = time.monotonic() + _PATIENCE
        prepared = self._engine_core.engine().prepare(request, deadline=deadline)
        self._engine_core.submit(prepared)
        while isinstance(event := prepared.next_event(_PATIENCE), Preview | Candidate):
            pass
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, GenerateResult):
            raise DalleError(f"a request was not answered in {_PATIENCE:g} seconds")
        reply = render_json(event, request, queue_seconds=prepared.queue_seconds)
        return Response("200", reply.model_dump_json().encode())


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
    asked = Workload(captions=[CAPTION], num_candidates=num_candidates, num_images=num_candidates)
    try:
        measured = open_loop(
            EngineTarget(engine_core), asked, times=[0.0] * requests, max_in_flight=requests
        )
    finally:
        engine_core.drain(_PATIENCE)
    medians = {
        stage: statistics.median(each.stages[stage] for each in measured.records)
        for stage in STAGES
    }
    told = ", ".join(f"{stage} {median:.3f}" for stage, median in medians.items())
    per_second = requests * num_candidates / measured.window_seconds
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
