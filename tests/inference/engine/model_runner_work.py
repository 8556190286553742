"""What the tests of the model runner ask, and how they read the answer."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from inference.api.rendering import Candidate, GenerateResult
from inference.api.schema import GenerateRequest
from inference.engine.model_runner import ModelRunner
from inference.engine.request import EngineRequest

CPU = torch.device("cpu")


def ask(**fields: object) -> GenerateRequest:
    """All candidates are asked for, so that the pixels of all are kept."""
    given = {"caption": "a red square", "seed": 7, "num_images": fields.get("num_candidates", 4)}
    return GenerateRequest.model_validate(given | fields)


def picture(size: int = 16, format: str = "PNG") -> str:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=format)
    return base64.b64encode(file.getvalue()).decode()


def answer(runner: ModelRunner, request):
    return runner.run(runner.prepare(request))


def events_of(prepared: EngineRequest):
    """The candidates and previews so far, in order."""
    return list(iter(lambda: prepared.next_event(0.0), None))


def by_number(result: GenerateResult) -> dict[int, Candidate]:
    return {candidate.number: candidate for candidate in result.ranked}


class Clock:
    """A clock that advances by a second at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now
